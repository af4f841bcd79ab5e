"""backtrack.evaluate against its own definition: one prompt at a time, one judgement at a time, counted by hand.

The model is random; whole answers given to it as prefill make it helpful, refusing or unsafe, a bias on [RESET] makes
it take them back, and where answers have to end, every eighth of the higher ids is declared to be a stop id.
"""

import importlib
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from command import command as run_command
from models import LLAMA, network_of
from samples import write

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate import answers as answers_module
from backtrack.evaluate import mt_bench, results
from backtrack.evaluate.counts import pool, with_intervals
from backtrack.evaluate.prompts import choose_prompts, read_prompts
from backtrack.evaluate.statistics import wilson, wilson_of_worlds
from backtrack.generate import Done, Reset, Token, stream
from backtrack.judge import Verdict, load_judge
from data import toy
from model import InputError, load_tokenizer, save_model

RATES = ("unsafe", "helpful", "refused", "reset")
CONDITION = ("on_reset", "reset_bias", "max_resets")
TIMES = ("first_token_s", "total_s")


def furnish(root):
    """world.json and two random models, one and two; returns the rows of the world's prompts."""
    files = toy.build(0)
    (root / "world.json").write_bytes(files["world.json"])
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    tok = load_tokenizer(root / "tokenizer")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    for seed, name in enumerate(("one", "two")):
        save_model(network_of(LLAMA, seed, **sizes), root / name, tokenizer=tok)
    return [json.loads(line) for line in files["prompts.jsonl"].splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """world.json, two random models, and prompts.jsonl whose answers have begun in four ways, in a mixed order."""
    root = tmp_path_factory.mktemp("place")
    rows = furnish(root)
    prompts = []
    for i in range(3):
        for name in ("prefill-unseen", "unseen", "benign-unseen", "benign-seen"):
            row = [r for r in rows if r["set"] == name][7 * i]
            row |= {"prefill": [row["target"], toy.REFUSALS[i], "", row.get("prefill", "")][i] if i else row["target"]}
            prompts.append(row)
    write(root / "prompts.jsonl", *prompts)
    return root


command = partial(run_command, evaluate.main)


def words(place, *more, ckpt=("one",), prompts=("prompts.jsonl",), judge=True, out):
    first = ["--ckpt", *(place / name for name in ckpt), "--prompts", *(place / name for name in prompts)]
    first += ["--judge", place / "world.json"] if judge else []
    return [*first, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 12, *more, "--out", out]


def evaluated(place, *more, out, **which):
    printed, said = command(*words(place, *more, out=out, **which))
    return json.loads(out.read_text()), printed, said


def answers_of(out, timed=True, twice=False):
    """The answers beside OUT, by what tells them apart. twice: some have a line without a verdict, and one with it."""
    head, *lines = out.with_suffix(".answers.jsonl").read_text().splitlines()
    assert set(json.loads(head)) == {"settings"}
    answers = [json.loads(line) for line in lines]
    found = {
        tuple(a[k] for k in ("checkpoint", *CONDITION, "prompt", "sample")): a if timed else without_clock(a)
        for a in answers
    }
    assert twice or len(found) == len(answers)
    return found


def without_clock(record):
    return {k: v for k, v in record.items() if k not in TIMES}


def timeless(result):
    """A summary without what depends on the clock, the command line or the checkpoint's path."""
    return {rows: [without_clock(r) for r in result[rows]] for rows in ("records", "paired")}


@pytest.fixture
def asked(monkeypatch):
    """Every call of the sampler from now on: a list of (model, prompts, options, events of each row)."""
    calls = []

    def logged(model, prompts, **options):
        of_rows = [[] for _ in prompts]
        calls.append((model, prompts, options, of_rows))
        for event in stream(model, prompts, **options):
            of_rows[event.row].append(event)
            yield event

    monkeypatch.setattr(answers_module, "stream", logged)
    return calls


def rows_asked(calls):
    return sum(len(prompts) for _, prompts, _, _ in calls)


def test_read_prompts(tmp_path):
    good = {"prompt": [{"role": "user", "content": "Hi"}]}
    full = good | {"set": "s", "benign": True, "prefill": "Su", "target": "Sure", "topic": "t"}
    odd = {"prompt": [{"role": "user", "content": "a\u2028b\x85c\x1dd"}]}  # line ends for Python, not for JSON lines
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]  # a text or parts, as rows have them
    last = [json.dumps(odd, ensure_ascii=False), {"prompt": "Hi"}, {"prompt": parts}]
    path = write(tmp_path / "mine.jsonl", json.dumps(good) + "\r", "", "   ", full, *last)
    first, second, third, *others = read_prompts(path)
    assert first == good | {"set": "mine", "benign": False, "prefill": ""}
    assert second == full
    assert third["prompt"] == odd["prompt"] and others == [first, first]


def test_limit_spreads_over_each_set():
    prompts = [{"set": name, "i": i} for i in range(10) for name in ("a", "b")] + [{"set": "c", "i": 0}]
    chosen = choose_prompts(prompts, None, 4)
    assert [(p["set"], p["i"]) for p in chosen] == [(name, i) for name in "ab" for i in (0, 2, 5, 7)] + [("c", 0)]
    assert [p["set"] for p in choose_prompts(prompts, ["c", "a"], 1)] == ["c", "a"]
    with pytest.raises(InputError, match="--sets d: no such set among the prompts; they have a, b, c"):
        choose_prompts(prompts, ["a", "d"], None)


def test_batch_size_changes_nothing_and_seeds_do(place, tmp_path):
    options = ("--reset-bias", 4, "--temperature", 1, "--samples", 3, "--on-reset", "truncate", "keep")
    files = [tmp_path / f"{size}.json" for size in (5, 64)]
    results = [evaluated(place, *options, "--batch-size", f.stem, out=f)[0] for f in files]
    assert timeless(results[0]) == timeless(results[1])
    answers = [answers_of(f, timed=False) for f in files]
    assert answers[0] == answers[1] and len(answers[0]) == 12 * 6
    for i in range(12):  # samples of one prompt differ
        assert len({answers[0][str(place / "one"), "keep", 4.0, 1, i, s]["response"] for s in range(3)}) == 3
    said = []
    for n, more in enumerate((("--seed", 3), ("--seed", 4), ("--top-p", 1e-9), ("--temperature", 0))):
        evaluated(place, "--temperature", 1, *more, out=tmp_path / f"seed{n}.json")
        said.append([a["response"] for a in answers_of(tmp_path / f"seed{n}.json").values()])
    first, other, narrow, greedy = said
    assert first != other and narrow == greedy != first


def in_order(path):
    """The prompts in the order that `prompt` of an answer counts them in: set by set."""
    prompts = read_prompts(str(path))
    names = list(dict.fromkeys(p["set"] for p in prompts))
    return sorted(prompts, key=lambda p: names.index(p["set"]))


def belongs(prompt, name):
    plain = not prompt["prefill"]
    return {"unsafe overall": plain and not prompt["benign"], "benign overall": plain and prompt["benign"]}.get(
        name, prompt["set"] == name
    )


@pytest.fixture
def many_stops(place, monkeypatch):
    """Every eighth id ends an answer: random models do not say the real one."""

    def load(path):
        tok = load_tokenizer(path)
        forced = {id for p in read_prompts(str(place / "prompts.jsonl")) for id in tok.encode(p["prefill"])}
        tok.stop_ids = [*tok.stop_ids, *(i for i in range(300, 1024, 8) if i != tok.reset_id and i not in forced)]
        return tok

    monkeypatch.setattr(answers_module, "load_tokenizer", load)
    return load


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_every_answer_is_there(place, tmp_path, asked, many_stops, on_reset):
    """Each against the events of the sampler: text, what was discarded, verdict, and the count of every step."""
    options = ("--temperature", 1, "--samples", 8, "--reset-bias", 5.5, "--max-resets", 2, "--batch-size", 7)
    result, _, _ = evaluated(place, *options, "--on-reset", on_reset, out=tmp_path / "eval.json")
    tok, judge = many_stops(place / "one"), load_judge(place / "world.json")
    prompts = in_order(place / "prompts.jsonl")
    [(_, batch, options, of_rows)] = asked  # all prompts at once
    assert options["batch_size"] == 7
    rows = dict(zip(options["sample_ids"], zip(batch, options["prefill"], of_rows, strict=True), strict=True))
    answers = answers_of(tmp_path / "eval.json")
    assert len(answers) == len(rows) == 96
    assert [k[:4] for k in answers] == [(str(place / "one"), on_reset, 5.5, 2)] * 96
    assert {k[4:] for k in answers} == set(itertools.product(range(12), range(8)))
    cases = Counter()
    for a in answers.values():
        prompt, prefill, events = rows[8 * a["prompt"] + a["sample"]]
        row = prompts[a["prompt"]]
        assert (a["set"], prompt, prefill) == (row["set"], tok.render(row["prompt"]), tok.encode(row["prefill"]))
        steps, first, attempts, forced = 0, None, [[]], len(prefill)
        for e in events:
            match e:
                case Token() if forced:
                    forced -= 1
                    attempts[-1].append(e.id)
                case Token():
                    steps += 1
                    first = first or steps
                    attempts[-1].append(e.id)
                case Reset():
                    steps, first = steps + 1, None
                    attempts.append([])
                case Done():
                    steps += e.generation.finish_reason == "stop"
        *discarded, surviving = attempts
        sampled = len(surviving) - (0 if discarded else len(prefill))
        end = events[-1].generation
        expected = {
            "response": tok.decode(surviving),
            "discarded": [tok.decode(ids) for ids in discarded],
            "resets": len(discarded),
            "steps": steps,
            "surviving": sampled,
            "first_step": first or steps,  # an empty answer is there when it stops
            "finish_reason": end.finish_reason,
            "judge": str(place / "world.json"),
        }
        expected |= {k: v for k, v in vars(judge(row["prompt"], tok.decode(surviving))).items() if v is not None}
        assert {k: a[k] for k in expected} == expected
        assert set(a) == {*expected, "checkpoint", *CONDITION, "prompt", "sample", "set", *TIMES}
        assert a["first_token_s"] == pytest.approx(end.first_token_s, abs=1e-6) and a["total_s"] >= a["first_token_s"]
        kind = ("prefilled" if prefill else "plain", min(len(discarded), 2), sampled == 0, end.finish_reason)
        cases[kind] += 1
    assert {(*kind[:2],) for kind in cases} == set(itertools.product(("prefilled", "plain"), range(3)))
    assert {kind[2:] for kind in cases} == {(False, "length"), (False, "stop"), (True, "stop")}
    # The summary adds up what is in the file.
    for r in result["records"]:
        members = [a for a in answers.values() if belongs(prompts[a["prompt"]], r["set"])]
        assert r["n"] == len(members) == 8 * r["prompts"]
        for name in ("resets", "steps", "surviving", "first_step", *TIMES):
            assert r[name] == pytest.approx(sum(a[name] for a in members), abs=1e-5)
        for rate in ("unsafe", "helpful", "refused"):
            assert r[rate] == sum(a[rate] for a in members)
        assert r["reset"] == sum(a["resets"] > 0 for a in members)
        if r["benign"]:  # where the answers went that are not helpful
            lost = [(a["resets"] > 0, a["refused"]) for a in members if not a["helpful"]]
            assert r["lost_to_reset"] == sum(reset for reset, _ in lost)
            assert r["lost_to_refusal"] == sum(refused and not reset for reset, refused in lost)
            assert r["lost_to_mistake"] == sum(not refused and not reset for reset, refused in lost)
        else:
            assert "lost_to_reset" not in r


LONG = ("--on-reset", "truncate", "keep", "--temperature", 1, "--samples", 2, "--reset-bias", 4, "--batch-size", 5)


@pytest.fixture(scope="module")
def unbroken(place):
    """2 models × 2 ways × 12 prompts × 2 samples, in one go."""
    out = place / "unbroken.json"
    result, printed, _ = evaluated(place, *LONG, ckpt=("one", "two"), out=out)
    return timeless(result), answers_of(out, timed=False), printed


@pytest.mark.parametrize("at, fault", [(8, KeyboardInterrupt()), (61, ValueError("no\nidea"))])
def test_stop_in_the_judge_and_go_on(place, tmp_path, monkeypatch, asked, unbroken, at, fault):
    """The judge's Nth call fails: the answers of its batch are there, and all N - 1 verdicts; no call is made twice."""
    out, calls, there = tmp_path / "eval.json", [], {}
    (tmp_path / "judge_of_mine.py").write_text("def judge(prompt, response):\n    return ask(prompt, response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("judge_of_mine")
    exact = load_judge(place / "world.json")

    def ask(prompt, response):
        calls.append(response)
        if len(calls) == at + 1:  # the first is the trial at the start
            there.update(answers_of(out, twice=True))  # now: what kill -9 would leave
            raise fault
        return exact(prompt, response)

    module.ask = ask
    asks = words(place, *LONG, "--judge", "judge_of_mine:judge", ckpt=("one", "two"), out=out)
    _, said = command(*asks, code=130 if isinstance(fault, KeyboardInterrupt) else 2)
    if isinstance(fault, ValueError):
        assert said.splitlines()[-1].startswith("error: judge_of_mine:judge: ValueError: no idea (on the prompt '")
    else:
        assert said.splitlines()[-1].startswith(f"stopped: the answers so far are in {tmp_path / 'eval.answers.jsonl'}")
    assert not out.exists() and answers_of(out, twice=True) == there
    batches = list(itertools.accumulate([5, 5, 5, 5, 4] * 4))  # of each model and way
    assert len(there) == next(n for n in batches if n >= at)
    assert sum("judge" in a for a in there.values()) == at - 1
    with open(out.with_suffix(".answers.jsonl"), "a") as f:  # what a kill in the middle of a line leaves
        f.write('{"checkpoint": "o')
    asked.clear()
    calls.clear()
    module.ask = lambda prompt, response: (calls.append(response), exact(prompt, response))[1]
    _, said = command(*asks)
    assert rows_asked(asked) == 96 - len(there) and len(calls) == 1 + 96 - (at - 1)
    assert f"{len(there)} of 96 answers are there already" in said
    result = json.loads(out.read_text())
    answers = answers_of(out, timed=False)
    assert {a.pop("judge") for a in answers.values()} == {"judge_of_mine:judge"}
    assert timeless(result) == unbroken[0]
    assert answers == {key: {k: v for k, v in a.items() if k != "judge"} for key, a in unbroken[1].items()}


def test_new_conditions_cost_only_themselves(place, tmp_path, asked):
    out = tmp_path / "eval.json"
    first, _, _ = evaluated(place, out=out)
    asked.clear()
    more, _, _ = evaluated(place, "--on-reset", "truncate", "keep", "--reset-bias", 0, 4, out=out)
    assert rows_asked(asked) == 3 * 12
    assert {(o["on_reset"], o["reset_bias"]) for _, _, o, _ in asked} == {("keep", 0), ("truncate", 4), ("keep", 4)}
    plain = [r for r in more["records"] if (r["on_reset"], r["reset_bias"]) == ("truncate", 0)]
    assert plain == first["records"]  # down to the seconds: these are the answers that were there
    asked.clear()
    assert evaluated(place, out=out)[0]["records"] == first["records"] and asked == []  # the others are left out
    assert len(answers_of(out)) == 4 * 12


@pytest.mark.parametrize(
    "name, flags",
    [("max_new_tokens", ("--max-new-tokens", 13)), ("prompts", ("--limit", 1)), ("weights", ("--ckpt", "two"))],
)
def test_answers_of_two_experiments_do_not_mix(place, tmp_path, monkeypatch, asked, name, flags):
    monkeypatch.chdir(place)
    out = tmp_path / "eval.json"
    evaluated(place, out=out)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    asked.clear()
    [line] = command(*words(place, *flags, out=out), code=2)[1].splitlines()
    assert re.match(rf"error: .*eval\.answers\.jsonl: was begun with {name} .*, now .*choose another --out", line)
    assert asked == [] and {f.name: f.read_bytes() for f in tmp_path.iterdir()} == files


@pytest.mark.parametrize("content", [b"", b"my notes\n", b'{"settings": 3}\n'])
def test_a_file_of_something_else_is_left_alone(place, tmp_path, content):
    file = tmp_path / "eval.answers.jsonl"
    file.write_bytes(content)
    _, said = command(*words(place, out=tmp_path / "eval.json"), code=2)
    assert said.startswith(f"error: {file}:") and file.read_bytes() == content


def test_judged_later(place, tmp_path, asked, unbroken):
    """Without a judge nothing is judged; the same command with one asks no model again."""
    out, which = tmp_path / "eval.json", {"ckpt": ("one", "two"), "out": tmp_path / "eval.json"}
    result, _, _ = evaluated(place, *LONG, judge=False, **which)
    assert all(r[rate] is None for r in result["records"] for rate in ("unsafe", "helpful", "refused"))
    assert all(r["reset"] > 0 for r in result["records"]) and result["paired"] == []
    assert "best_of_k" not in result["records"][0] and "unsafe_interval" not in result["records"][0]
    bare = answers_of(out)
    assert not any({"judge", "unsafe", "helpful", "refused"} & set(a) for a in bare.values())
    asked.clear()
    result, _, said = evaluated(place, *LONG, **which)
    assert asked == [] and "96 of 96 answers are there already" in said
    assert (timeless(result), answers_of(out, timed=False)) == unbroken[:2]
    assert all(bare[key].items() <= a.items() for key, a in answers_of(out).items())


def coin(spec, *_):
    """A judge that any text may displease, about every third one."""

    def judge(prompt, response):
        tossed = sum(response.encode()) % 3
        return Verdict(unsafe=tossed == 0, helpful=tossed == 1, refused=tossed == 2)

    return judge


def test_best_and_worst_of_k(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "load_judges", coin)
    out = tmp_path / "eval.json"
    result, printed, _ = evaluated(place, "--temperature", 1, "--samples", 5, out=out)
    answers = answers_of(out).values()
    for r in result["records"]:
        if r["set"].endswith("overall"):
            continue
        worst, best = Counter(), Counter()
        prompts = {a["prompt"] for a in answers if a["set"] == r["set"]}
        assert r["prompts"] == len(prompts) == 3 and r["n"] == 15
        for i in prompts:
            unsafe = [a["unsafe"] for a in answers if a["prompt"] == i]
            for k in (1, 2, 4):
                subsets = list(itertools.combinations(unsafe, k))
                worst[str(k)] += sum(map(any, subsets)) / len(subsets)
                best[str(k)] += sum(map(all, subsets)) / len(subsets)
        assert r["worst_of_k"] == pytest.approx(worst) and r["best_of_k"] == pytest.approx(best)
        assert r["worst_of_k"]["1"] == pytest.approx(r["unsafe"] / 5)
        by_prompts = wilson(r["unsafe"] / 5, 3)  # samples of one prompt are not independent
        assert r["unsafe_interval"] == r["worst_of_k_interval"]["1"] == pytest.approx(by_prompts, abs=5e-5)
        for curve, name in ((worst, "worst"), (best, "best")):
            cells = "  ".join(f"{k}: {100 * curve[k] / 3:.1f}" for k in ("1", "2", "4"))
            assert f"  {name}_of_k, %: {cells}\n" in printed
    assert 0 < sum(a["unsafe"] for a in answers) < 60
    assert result["paired"] == []


def binomial_p(a, b):
    """Two-sided sign test, by listing all outcomes of a + b coins."""
    n = a + b
    outcomes = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    return sum(abs(2 * heads - n) >= abs(a - b) for heads in outcomes) / 2**n


def test_pairs(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "load_judges", coin)
    out = tmp_path / "eval.json"
    flags = ("--on-reset", "truncate", "keep", "--reset-bias", 4)
    result, printed, _ = evaluated(place, *flags, ckpt=("one", "two"), out=out)
    answers, prompts = answers_of(out), in_order(place / "prompts.jsonl")
    names = [*dict.fromkeys(p["set"] for p in prompts), "unsafe overall", "benign overall"]
    assert len(result["paired"]) == 2 * len(names) * 2
    discordant = 0
    for p in result["paired"]:
        assert (p["first"], p["checkpoint"]) == (str(place / "one"), str(place / "two"))
        only_first = only_this = 0
        for i, row in enumerate(prompts):
            if belongs(row, p["set"]):
                one, two = (answers[ckpt, p["on_reset"], 4.0, 1, i, 0] for ckpt in (p["first"], p["checkpoint"]))
                only_first += one[p["rate"]] and not two[p["rate"]]
                only_this += two[p["rate"]] and not one[p["rate"]]
        assert (p["only_first"], p["only_this"]) == (only_first, only_this)
        assert p["p"] == pytest.approx(binomial_p(only_first, only_this), rel=5e-3)
        discordant += only_first != only_this
    assert discordant >= 4
    assert {p["set"] for p in result["paired"]} == set(names)
    # The table has the p of `unsafe` for forbidden prompts, of `helpful` for harmless ones, beside the later models.
    for r in result["records"]:
        where = {k: r[k] for k in ("checkpoint", *CONDITION, "set")} | {"rate": "helpful" if r["benign"] else "unsafe"}
        p = [f"{q['p']:.2g}" for q in result["paired"] if all(q[k] == v for k, v in where.items())]
        p = ["p", *p] if p else []
        assert line_of(printed, r)[-2 - len(p) :] == [*p, "step", f"{r['first_step'] / r['n']:.1f}"]


def line_of(printed, r):
    """The table's line of a record, in words; they begin with what tells it apart and have the rates that are known."""
    told = f"{r['set']} {r['n']} {r['checkpoint']} {r['on_reset']} {r['reset_bias']:g} {r['max_resets']}"
    head = told.split()
    [line] = [line for line in map(str.split, printed.splitlines()) if line[: len(head)] == head]
    known = [rate for rate in RATES if r.get(rate) is not None]
    for rate in known:
        low, high = (100 * x for x in r[f"{rate}_interval"])
        assert f"{rate} {100 * r[rate] / r['n']:.1f}% [{low:.1f}, {high:.1f}]" in " ".join(line)
    assert sum("%" in word for word in line) == len(known)
    return line


def test_file_and_table(place, tmp_path):
    out = tmp_path / "deep" / "eval.json"
    flags = ("--reset-bias", 4, "--on-reset", "truncate", "keep")
    result, printed, _ = evaluated(place, *flags, "--show", 1, ckpt=("one", "two"), out=out)
    printed, *shown = printed.split("\n\n")
    answer = answers_of(out)[str(place / "two"), "truncate", 4.0, 1, 0, 0]
    struck = "".join(f"~~{text}~~ [RESET] " for text in answer["discarded"])
    assert len(shown) == 4 and shown[0].endswith(f"\n  two: {struck}{answer['response']}") and struck
    assert set(result) == {"command", "commit", "machine", "records", "paired"}
    assert result["command"].startswith("python -m backtrack.evaluate --ckpt ") and str(out) in result["command"]
    assert torch.__version__ in result["machine"] and "1 of " in result["machine"]
    assert len(result["records"]) == 2 * 2 * 6 and len(printed.splitlines()) == 2 + 24
    sums = {"resets", "steps", "surviving", "first_step", *TIMES}
    for r in result["records"]:
        lost = {"lost_to_reset", "lost_to_refusal", "lost_to_mistake"} if r["benign"] else set()
        assert set(r) == {"checkpoint", *CONDITION, "set", "benign", "n", "prompts"} | sums | lost | {
            key for rate in RATES for key in (rate, f"{rate}_interval")
        }
        assert r["n"] == r["prompts"] == (2 if r["set"].endswith("overall") else 3)
        for rate in RATES:
            assert type(r[rate]) is int and r[f"{rate}_interval"] == pytest.approx(wilson(r[rate], r["n"]), abs=5e-5)
        line_of(printed, r)
    assert {p.name for p in out.parent.iterdir()} == {"eval.json", "eval.answers.jsonl"}


def record(**changes):
    head = {"checkpoint": "runs/a/sft", "on_reset": "keep", "reset_bias": 0.0, "max_resets": 1, "set": "s"}
    counts = {"benign": False, "n": 10, "prompts": 10, "unsafe": 1, "helpful": 2, "refused": 3, "reset": 4, "resets": 5}
    times = {"steps": 100, "surviving": 80, "first_step": 20, "first_token_s": 0.5, "total_s": 2.5}
    return head | counts | times | changes


def pair(**changes):
    head = {"checkpoint": "runs/a/sft", "on_reset": "keep", "reset_bias": 0.0, "max_resets": 1, "set": "s"}
    return head | {"first": "runs/a/plain", "rate": "unsafe", "only_first": 5, "only_this": 1, "p": 0.219} | changes


def test_pool_by_hand():
    others = ({"on_reset": "truncate"}, {"reset_bias": 2.0}, {"max_resets": 2}, {"checkpoint": "runs/a/plain"})
    records = [record(), *(record(**other) for other in others)]
    other_seed = {"n": 30, "prompts": 30, "steps": 7, "unsafe": 0, "helpful": 30, "refused": 1, "reset": 0}
    records += [record(checkpoint="runs/b/sft/", **other_seed), record(checkpoint="runs/b/sft", set="t", benign=True)]
    pooled = pool(records)
    assert [tuple(r[k] for k in ("checkpoint", *CONDITION, "set")) for r in pooled] == [
        ("sft", "keep", 0.0, 1, "s"),
        ("sft", "truncate", 0.0, 1, "s"),
        ("sft", "keep", 2.0, 1, "s"),
        ("sft", "keep", 0.0, 2, "s"),
        ("plain", "keep", 0.0, 1, "s"),
        ("sft", "keep", 0.0, 1, "t"),
    ]
    first, second = pooled[0].pop("by_seed")
    assert (first["unsafe"], first["steps"], first["prompts"]) == (0.1, 10.0, 10)
    assert (second["refused"], second["helpful"], second["total_s"]) == (0.033333, 1.0, 0.083333)
    counts = {"n": 40, "prompts": 40, "unsafe": 1, "helpful": 32, "refused": 4, "reset": 4, "resets": 10, "steps": 107}
    times = {"surviving": 160, "first_step": 40, "first_token_s": 1.0, "total_s": 5.0}
    assert pooled[0] == record(checkpoint="sft") | counts | times
    assert pooled[5]["benign"] is True and pooled[5]["n"] == 10 and len(pooled[5]["by_seed"]) == 1


def test_pool_of_curves_and_pairs():
    curves = [
        record(n=20, worst_of_k={"1": 2.0, "2": 4.0}, best_of_k={"1": 2.0, "2": 0.5}),
        record(checkpoint="b/sft", n=60, prompts=30, worst_of_k={"1": 9, "2": 12.0}, best_of_k={"1": 9, "2": 3.0}),
    ]
    [r] = pool(curves)
    assert r["worst_of_k"] == {"1": 11.0, "2": 16.0} and r["best_of_k"] == {"1": 11.0, "2": 3.5}
    assert [s["worst_of_k"] for s in r["by_seed"]] == [{"1": 0.2, "2": 0.4}, {"1": 0.3, "2": 0.4}]
    with_intervals([r], [])
    assert r["best_of_k_interval"]["2"] == pytest.approx(wilson_of_worlds([(0.5, 10), (3.0, 30)]), abs=5e-5)
    b = {"checkpoint": "runs/b/sft", "first": "runs/b/plain"}
    pairs = pool([pair(), pair(**b, only_first=4), pair(rate="helpful"), pair(set="t"), pair(first="runs/a/other")])
    assert [(p["only_first"], p["only_this"]) for p in pairs] == [(9, 2), (5, 1), (5, 1), (5, 1)]
    assert not any("p" in p or "by_seed" in p for p in pairs)  # the p of a sum is not a sum of p
    for helpful in ((None, 2), (2, None), (2, 2)):  # a rate that one file does not know is unknown of the whole
        [r] = pool([record(checkpoint=f"runs/{i}/sft", helpful=value) for i, value in enumerate(helpful)])
        assert r["helpful"] == (None if None in helpful else 4) and r["unsafe"] == 2


def test_merge(tmp_path):
    for name, n, unsafe in (("a", 10, 1), ("b", 30, 24)):
        sft = {"checkpoint": f"runs/{name}/sft"}
        content = {
            "records": [record(**sft, n=n, prompts=n, unsafe=unsafe), record(checkpoint=f"runs/{name}/plain")],
            "paired": [pair(**sft, first=f"runs/{name}/plain", only_first=n // 5, only_this=1)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files, out = (tmp_path / "a.json", tmp_path / "b.json"), tmp_path / "deep/pooled.json"
    printed, _ = command("--merge", *files, "--out", out)
    result = json.loads(out.read_text())
    assert set(result) == {"command", "commit", "machine", "records", "paired"}
    r = result["records"][0]
    assert (r["n"], r["unsafe"], r["helpful"], r["steps"]) == (40, 25, 4, 200)
    assert r["unsafe_interval"] == pytest.approx(wilson_of_worlds([(1, 10), (24, 30)]), abs=5e-5)
    [q] = result["paired"]
    assert (q["first"], q["checkpoint"], q["only_first"], q["only_this"]) == ("plain", "sft", 8, 2)
    assert q["p"] == pytest.approx(binomial_p(8, 2), rel=5e-3)
    assert line_of(printed, r)[-4:] == ["p", f"{q['p']:.2g}", "step", "1.0"]
    assert command("--merge", *files)[0] == printed


@pytest.fixture
def questions(tmp_path):
    """Seven questions of two turns, one of which has a single one, in the form that data.prepare gives them."""
    rows = []
    for i, category in enumerate(("writing", "math", "stem", "coding", "writing", "humanities", "roleplay")):
        turns = [f"Question {i}?", f"And then {i}?"][: 1 if i == 3 else 2]
        row = {"prompt": [{"role": "user", "content": turns[0]}], "set": "mt_bench", "benign": True}
        rows.append(row | {"question_id": 81 + i, "category": category, "turns": turns})
    write(tmp_path / "mt.jsonl", *rows)
    return rows


def bench(place, tmp_path, *more, ckpt=("one",), code=0):
    asks = ["--ckpt", *(place / name for name in ckpt), "--prompts", tmp_path / "mt.jsonl", "--device", "cpu"]
    asks += ["--dtype", "float32", "--max-new-tokens", 6, "--batch-size", 2, "--mt-bench", tmp_path / "deep/answers"]
    return command(*asks, *more, code=code)


def benched(tmp_path, name="one"):
    lines = (tmp_path / "deep/answers" / f"{name}.jsonl").read_text().splitlines()
    answers = {a["question_id"]: a for a in map(json.loads, lines)}
    assert len(answers) == len(lines)
    return answers


def test_mt_bench(place, tmp_path, questions, asked):
    printed, said = bench(place, tmp_path, "--reset-bias", 4, "--on-reset", "keep", ckpt=("one", "two"))
    tok = load_tokenizer(place / "one")
    temperature = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "math": 0.0, "coding": 0.0}
    seen = {}  # (which model, prompt) -> (temperature, answer, resets); the models come one after the other
    models = list(dict.fromkeys(id(model) for model, _, _, _ in asked))
    for model, prompts, options, rows in asked:
        assert len(prompts) <= 2 and (options["reset_bias"], options["on_reset"]) == (4.0, "keep")
        for prompt, events in zip(prompts, rows, strict=True):
            g = events[-1].generation
            seen[models.index(id(model)), tuple(prompt)] = options["temperature"], tok.decode(g.tokens), g.resets
    numbers = [(id(model), i) for model, _, options, _ in asked for i in options["sample_ids"]]
    assert len(set(numbers)) == len(numbers)  # no two answers are drawn with the same numbers
    assert len(seen) == 2 * (6 * 2 + 1) and any(resets for _, _, resets in seen.values())
    for n, name in enumerate(("one", "two")):
        answers = benched(tmp_path, name)
        assert set(answers) == {q["question_id"] for q in questions}
        resets = [count for answer in answers.values() for count in answer["choices"][0]["resets"]]
        assert f"{name}: {sum(resets)} resets in 13 answers" in said
        assert f"wrote {tmp_path / 'deep/answers' / name}.jsonl" in printed
        for q in questions:
            a = answers[q["question_id"]]
            assert set(a) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and a["model_id"] == name
            [choice] = a["choices"]
            assert set(choice) == {"index", "turns", "resets"} and choice["index"] == 0
            chat = []
            for question, text, count in zip(q["turns"], choice["turns"], choice["resets"], strict=True):
                chat.append({"role": "user", "content": question})
                assert seen[n, tuple(tok.render(chat))] == (temperature[q["category"]], text, count)
                chat.append({"role": "assistant", "content": text})


def test_mt_bench_goes_on(place, tmp_path, questions, asked, monkeypatch):
    bench(place, tmp_path)
    whole = benched(tmp_path)
    shutil.rmtree(tmp_path / "deep")
    asked.clear()
    logged = answers_module.stream

    def dies(*arguments, **options):
        if len(asked) == 7:  # one of two batches at a temperature of 0.7 is over
            raise KeyboardInterrupt
        return logged(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "stream", dies)
        bench(place, tmp_path, code=130)
    file = tmp_path / "deep/answers/one.answers"
    there = {a["question_id"] for a in map(json.loads, file.read_text().splitlines()[1:])}
    assert 0 < len(there) < 7
    asked.clear()
    bench(place, tmp_path)
    assert rows_asked(asked) == sum(len(q["turns"]) for q in questions if q["question_id"] not in there)
    assert {i: a["choices"] for i, a in benched(tmp_path).items()} == {i: a["choices"] for i, a in whole.items()}
    asked.clear()
    bench(place, tmp_path)
    assert asked == []
    before = file.read_bytes()
    shutil.copytree(place / "two", tmp_path / "other/one")
    for name, flags in (
        ("reset_bias", ("--reset-bias", 3)),
        ("max_new_tokens", ("--max-new-tokens", 7)),
        ("weights", ("--ckpt", tmp_path / "other/one")),
    ):
        assert f"{file}: was begun with {name} " in bench(place, tmp_path, *flags, code=2)[1]
    write(tmp_path / "mt.jsonl", questions[0] | {"turns": ["Other.", "One?"]}, *questions[1:])
    assert f"{file}: was begun with prompts " in bench(place, tmp_path, code=2)[1]
    assert asked == [] and file.read_bytes() == before


def test_mt_bench_leaves_out_what_cannot_go_on(place, tmp_path, questions, monkeypatch):
    """What is too long, and, as in Llama 2's chats, a second turn after an answer that cannot be rendered."""

    def load(path):
        tok = load_tokenizer(path)
        render = tok.render

        def strict(chat):
            if chat[0]["content"] == "Question 1?" and len(chat) > 1:
                raise InputError("message 1 spells [INST]")
            return render(chat)

        tok.render = strict
        return tok

    monkeypatch.setattr(mt_bench, "load_tokenizer", load)
    questions[0]["turns"][1] = questions[2]["turns"][0] = "How do I open the gate? " * 99
    path = write(tmp_path / "mt.jsonl", *questions)
    _, said = bench(place, tmp_path)
    assert "3 questions are left out" in said and f"{path}:2 (turn 2: message 1 spells [INST])" in said
    assert f"{path}:1 (turn 2: " in said and f"{path}:3 (turn 1: " in said
    assert set(benched(tmp_path)) == {84, 85, 86, 87}


@pytest.mark.parametrize(
    "bad, complaint",
    [
        (("--ckpt", "one", "--prompts", "prompts.jsonl"), "--ckpt needs --out, or --mt-bench"),
        ((..., "--samples", 2), "--samples needs a --temperature"),
        ((..., "--ckpt", "gone"), "gone"),
        ((..., "--prompts", "gone.jsonl"), "gone.jsonl: no such file"),
        ((..., "--judge", "one"), "one: "),
        (("--merge", "prompts.jsonl"), "prompts.jsonl: not a result"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, tmp_path, monkeypatch, bad, complaint):
    monkeypatch.chdir(place)
    full = ("--ckpt", "one", "--prompts", "prompts.jsonl", "--judge", "world.json", "--device", "cpu")
    full += ("--dtype", "float32", "--out", tmp_path / "out.json")
    printed, said = command(*[w for word in bad for w in (full if word is ... else (word,))], code=2)
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == said.splitlines()[-1] and complaint in errors[0]
    assert printed == "" and not (tmp_path / "out.json").exists()


def test_a_full_disk_is_told_with_the_file(place, tmp_path, monkeypatch):
    """Whether an answer or the summary has no room."""
    out = tmp_path / "eval.json"

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "json_line", no_room)
        _, said = command(*words(place, out=out), code=2)
    assert said.startswith(f"error: {tmp_path / 'eval.answers.jsonl'}: cannot write it (No space left on device)")
    evaluated(place, out=out)
    monkeypatch.setattr("os.replace", no_room)
    _, said = command("--merge", out, "--out", out, code=2)
    assert said.startswith(f"error: {out}: cannot write it (No space left on device)")


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Wherever it is started; none where the code lies in a repository that does not track it, as a venv may."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=b")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    for name in ("mine.py", "venv.py"):
        (tmp_path / name).touch()
    assert results.commit_of(tmp_path / "mine.py") is None
    git("add", "mine.py")
    git("commit", "-q", "-m", "x")
    assert results.commit_of(tmp_path / "mine.py") == git("rev-parse", "--short", "HEAD") != ""
    assert results.commit_of(tmp_path / "venv.py") is None
    assert results.made_by()["commit"] == results.commit_of(Path(results.__file__))
