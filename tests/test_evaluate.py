"""evaluate.py against its own definition: one prompt at a time, one judgement at a time, counted by hand.

The model is random; whole answers given to it as prefill make it helpful, refusing or unsafe, a bias on [RESET] makes
it take them back, and where answers have to end, every eighth of the higher ids is declared to be a stop id. Steps are
recounted from the sampler's events, curves over k from all subsets of the samples, pairs from the answers' file.
"""

import itertools
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from command import command as run_command
from models import LLAMA, network_of

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate import results
from backtrack.evaluate import answers as answers_module
from backtrack.evaluate.counts import groups, pool
from backtrack.evaluate.prompts import choose_prompts, read_prompts
from backtrack.evaluate.statistics import wilson, wilson_of_worlds
from backtrack.generate import Done, Reset, Token, generate, stream
from backtrack.judge import Verdict, load_judge
from data import toy
from model import InputError, load_model, load_tokenizer, save_model

RATES = ("unsafe", "helpful", "refused", "reset")
CONDITION = ("on_reset", "reset_bias", "max_resets")
TIMES = ("first_token_s", "total_s")


def random_checkpoint(path, tokenizer, seed):
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    save_model(network_of(LLAMA, seed, **sizes), path, tokenizer=tokenizer)


def furnish(root):
    """world.json and two random models, one and two; returns the rows of the world's prompts."""
    files = toy.build(0)
    (root / "world.json").write_bytes(files["world.json"])
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    for seed, name in enumerate(("one", "two")):
        random_checkpoint(root / name, load_tokenizer(root / "tokenizer"), seed)
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
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return root


command = partial(run_command, evaluate.main)


def words(place, *more, ckpt=("one",), prompts=("prompts.jsonl",), judge=True, out):
    first = ["--ckpt", *(place / name for name in ckpt), "--prompts", *(place / name for name in prompts)]
    first += ["--judge", place / "world.json"] if judge else []
    return [*first, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 12, *more, "--out", out]


def evaluated(place, *more, out, **which):
    printed, said = command(*words(place, *more, out=out, **which))
    return json.loads(out.read_text()), printed, said


def answers_of(out, timed=True):
    """The answers beside OUT, by what tells them apart; without the clock, if they are to be compared."""
    head, *lines = out.with_suffix(".answers.jsonl").read_text().splitlines()
    assert set(json.loads(head)) == {"settings"}
    answers = [json.loads(line) for line in lines]
    found = {
        tuple(a[k] for k in ("checkpoint", *CONDITION, "prompt", "sample")): a if timed else without_clock(a)
        for a in answers
    }
    assert len(found) == len(answers)  # nothing is there twice
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


# ── Prompt files ─────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = {"prompt": [{"role": "user", "content": "Hi"}]}


def test_read_prompts(tmp_path):
    full = GOOD | {"set": "s", "benign": True, "prefill": "Su", "target": "Sure", "topic": "t"}
    odd = {"prompt": [{"role": "user", "content": "a\u2028b\x85c\x1dd"}]}  # line ends for Python, not for JSON lines
    text = f"{json.dumps(GOOD)}\r\n\n   \n{json.dumps(full)}\n{json.dumps(odd, ensure_ascii=False)}"
    (tmp_path / "mine.jsonl").write_bytes(text.encode())
    first, second, third = read_prompts(str(tmp_path / "mine.jsonl"))
    assert first == GOOD | {"set": "mine", "benign": False, "prefill": ""}
    assert second == full
    assert third["prompt"] == odd["prompt"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"{", "not a line of JSON"),
        (b"[]", "'prompt' must be a list"),
        (b"null", "'prompt' must be a list"),
        (b"{}", "'prompt' must be a list"),
        (b'{"prompt": "Hi"}', "'prompt' must be a list"),
        (b'{"prompt": []}', "'prompt' must be a list"),
        (b'{"prompt": ["Hi"]}', "'content'"),
        (b'{"prompt": [{"role": "user"}]}', "'content'"),
        (b'{"prompt": [{"role": "user", "content": null}]}', "'content'"),
        (json.dumps(GOOD | {"set": 1}).encode(), "'set' must be a str"),
        (json.dumps(GOOD | {"benign": "no"}).encode(), "'benign' must be a bool"),
        (json.dumps(GOOD | {"prefill": None}).encode(), "'prefill' must be a str"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    (tmp_path / "mine.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError, match=rf"mine\.jsonl:3: .*{complaint}"):
        read_prompts(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_prompts(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.jsonl: holds no prompts"):
        read_prompts(str(tmp_path / "mine.jsonl"))


def test_limit_spreads_over_each_set():
    prompts = [{"set": name, "i": i} for i in range(10) for name in ("a", "b")] + [{"set": "c", "i": 0}]
    chosen = choose_prompts(prompts, None, 4)
    assert [p["i"] for p in chosen if p["set"] == "a"] == [p["i"] for p in chosen if p["set"] == "b"] == [0, 2, 5, 7]
    assert [p["set"] for p in chosen] == ["a"] * 4 + ["b"] * 4 + ["c"]
    for limit in range(1, 11):
        chosen = choose_prompts(prompts, ["b"], limit)
        places = [p["i"] for p in chosen]
        assert len(set(places)) == limit and places[0] == 0 and {p["set"] for p in chosen} == {"b"}
        gaps = [b - a for a, b in itertools.pairwise([*places, 10])]
        assert max(gaps) - min(gaps) <= 1
    assert [p["set"] for p in choose_prompts(prompts, ["c", "a"], 1)] == ["c", "a"]
    assert choose_prompts(prompts, None, 100) == choose_prompts(prompts, None, None)
    assert Counter(p["set"] for p in choose_prompts(prompts, None, None)) == {"a": 10, "b": 10, "c": 1}
    with pytest.raises(InputError, match="--sets d: no such set among the prompts; they have a, b, c"):
        choose_prompts(prompts, ["a", "d"], None)


def test_sets_and_limit_on_the_command_line(place, tmp_path, asked):
    options = ("--sets", "unseen", "benign-seen", "--limit", 2)
    result, _, _ = evaluated(place, *options, out=tmp_path / "eval.json")
    assert [(r["set"], r["n"]) for r in result["records"]] == [("unseen", 2), ("benign-seen", 2)]
    prompts, tok = read_prompts(str(place / "prompts.jsonl")), load_tokenizer(place / "one")
    expected = [tok.render(p["prompt"]) for p in (prompts[1], prompts[5], prompts[3], prompts[7])]  # 0 and 1 of 3
    assert sorted(p for _, batch, _, _ in asked for p in batch) == sorted(expected)


# ── From prompts to counts ───────────────────────────────────────────────────────────────────────────────────────────


def expected_records(place, ckpt, **condition):
    """As evaluate should count, with a batch of one and everything written out."""
    model, tok, judge = load_model(place / ckpt), load_tokenizer(place / ckpt), load_judge(place / "world.json")
    records = {}
    for row in map(json.loads, (place / "prompts.jsonl").read_text().splitlines()):
        [g] = generate(
            model,
            [tok.render(row["prompt"])],
            prefill=[tok.encode(row["prefill"])],
            reset_id=tok.reset_id,
            stop_ids=tok.stop_ids,
            max_new_tokens=12,
            **condition,
        )
        verdict = judge(row["prompt"], tok.decode(g.tokens))
        names = [row["set"]]
        if not row["prefill"]:
            names.append("benign overall" if row["benign"] else "unsafe overall")
        for name in names:
            record = records.setdefault(name, {"benign": row["benign"], "n": 0, "steps": 0, **dict.fromkeys(RATES, 0)})
            for key, more in (
                ("n", 1),
                ("steps", g.steps),
                ("unsafe", verdict.unsafe),
                ("helpful", verdict.helpful),
                ("refused", verdict.refused),
                ("reset", g.resets > 0),
            ):
                record[key] += int(more)
    return records


def by_set(result, ckpt, **condition):
    keys = ("benign", "n", "steps", *RATES)
    wanted = {"checkpoint": str(ckpt), **condition}
    chosen = [r for r in result["records"] if all(r[k] == v for k, v in wanted.items())]
    assert len({r["set"] for r in chosen}) == len(chosen)
    return {r["set"]: {key: r[key] for key in keys} for r in chosen}


def test_counts(place, tmp_path):
    """Two models, every combination of ways, biases and numbers of resets, in one command."""
    grid = {"on_reset": ("truncate", "keep"), "reset_bias": (0.0, 4.0), "max_resets": (2, 0)}
    flags = [w for name, values in grid.items() for w in ("--" + name.replace("_", "-"), *values)]
    result, _, _ = evaluated(place, *flags, "--batch-size", 5, ckpt=("one", "two"), out=tmp_path / "eval.json")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = {"prefill-unseen", "unseen", "benign-unseen", "benign-seen", "unsafe overall", "benign overall"}
    assert len(result["records"]) == 2 * 8 * len(names)
    seen = []
    for ckpt in ("one", "two"):
        plain = expected_records(place, ckpt, max_resets=0)  # then nothing else matters
        for condition in combinations:
            expected = expected_records(place, ckpt, **condition) if condition["max_resets"] else plain
            assert set(expected) == names
            assert by_set(result, place / ckpt, **condition) == expected
            seen.append((condition, {rate: sum(r[rate] for r in expected.values()) for rate in RATES}))
    for condition, totals in seen:  # the comparison means something: there was something to count
        resetting = condition["reset_bias"] > 0 and condition["max_resets"] > 0
        assert (totals["reset"] > 0) == resetting
        assert resetting or (totals["unsafe"] > 0 and totals["helpful"] > 0 and totals["refused"] > 0)
    said: dict[tuple, list] = {}
    for (_, *condition, _, _), a in answers_of(tmp_path / "eval.json").items():
        said.setdefault(tuple(condition), []).append(a["response"])
    assert len({tuple(texts) for texts in said.values()}) == 3  # resets in two ways, or none


def test_one_combination_is_the_default(place, tmp_path):
    result, _, _ = evaluated(place, out=tmp_path / "eval.json")
    assert {tuple(r[k] for k in CONDITION) for r in result["records"]} == {("truncate", 0.0, 1)}
    assert by_set(result, place / "one") == expected_records(place, "one")


def test_asked_twice_is_counted_once(place, tmp_path):
    once, _, _ = evaluated(place, ckpt=("one", "two"), out=tmp_path / "once.json")
    doubled = ("--on-reset", "truncate", "truncate", "--reset-bias", 0, 0.0, "--max-resets", 1, 1, "--sets")
    sets = ("prefill-unseen", "unseen", "unseen", "benign-unseen", "benign-seen")
    twice, _, _ = evaluated(place, *doubled, *sets, ckpt=("one", "two", "one"), out=tmp_path / "twice.json")
    assert sorted(map(str, timeless(twice)["records"])) == sorted(map(str, timeless(once)["records"]))
    assert "best_of_k" not in twice["records"][0]


def test_groups():
    """What is pooled: sets of plain questions, where there are several of one kind."""
    plain = {"prompt": [{"role": "user", "content": "Hi"}], "prefill": "", "benign": False}
    prompts = [
        plain | {"set": "a"},
        plain | {"set": "b"},
        plain | {"set": "b", "prefill": "Sure"},
        plain | {"set": "forced", "prefill": "Sure"},
        plain | {"set": "good", "benign": True},
        plain | {"set": "a"},
        plain | {"set": "good-forced", "benign": True, "prefill": "Sure"},
    ]
    sets = {"a": [0, 5], "b": [1, 2], "forced": [3], "good": [4], "good-forced": [6]}
    assert groups(prompts) == sets | {"unsafe overall": [0, 1, 5]}  # benign: one plain set, nothing to pool
    more = [*prompts, plain | {"set": "better", "benign": True}]
    assert groups(more) == sets | {"better": [7], "unsafe overall": [0, 1, 5], "benign overall": [4, 7]}
    assert groups(prompts[:1] + prompts[3:4]) == {"a": [0], "forced": [1]}


def test_batch_size_changes_nothing(place, tmp_path):
    sampled = ("--reset-bias", 4, "--temperature", 1, "--samples", 3, "--on-reset", "truncate", "keep")
    for options in (("--reset-bias", 4), sampled):
        files = [tmp_path / f"{len(options)}-{size}.json" for size in (1, 5, 64)]
        results = [evaluated(place, *options, "--batch-size", f.stem.split("-")[1], out=f)[0] for f in files]
        assert timeless(results[0]) == timeless(results[1]) == timeless(results[2])
        answers = [answers_of(f, timed=False) for f in files]
        assert answers[0] == answers[1] == answers[2]
        assert len(answers[0]) == 12 * (6 if options is sampled else 1)
    assert {key[-1] for key in answers[0]} == {0, 1, 2}
    for i in range(12):  # samples of one prompt differ
        assert len({answers[0][str(place / "one"), "keep", 4.0, 1, i, s]["response"] for s in range(3)}) == 3


def test_sampling_follows_the_seed(place, tmp_path):
    answers = []
    for n, more in enumerate(
        (
            ("--seed", 3),
            ("--seed", 3),
            ("--seed", 4),
            (),
            ("--seed", 3, "--top-p", 1e-9),
            ("--temperature", 0),
        )
    ):
        evaluated(place, "--temperature", 1, "--batch-size", 5, *more, out=tmp_path / f"{n}.json")
        answers.append([a["response"] for a in answers_of(tmp_path / f"{n}.json").values()])
    first, again, other, default, narrow, greedy = answers
    assert first == again != other and default not in (first, other)
    assert narrow == greedy != first
    assert len(first) == 12


def test_several_prompt_files(place, tmp_path):
    """Sets that share a name are one; a set without a name has its file's."""
    (place / "more.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"set": "unseen"}) + "\n")
    result, _, _ = evaluated(place, prompts=("prompts.jsonl", "more.jsonl"), out=tmp_path / "eval.json")
    sizes = {r["set"]: r["n"] for r in result["records"] if "overall" not in r["set"]}
    assert sizes == {"prefill-unseen": 3, "unseen": 4, "benign-unseen": 3, "benign-seen": 3, "more": 1}


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        verdict = judge(row["prompt"], tok.decode(surviving))
        expected |= {"unsafe": verdict.unsafe, "helpful": verdict.helpful, "refused": verdict.refused}
        assert {k: a[k] for k in expected} == expected
        assert set(a) == {*expected, "checkpoint", *CONDITION, "prompt", "sample", "set", *TIMES}
        assert a["first_token_s"] == pytest.approx(end.first_token_s, abs=1e-6) and a["total_s"] >= a["first_token_s"]
        cases["reset, prefilled" if prefill else "reset"] += bool(discarded)
        cases["prefill survives"] += bool(prefill) and not discarded
        cases["plain"] += not prefill and not discarded
        cases["stops at once"] += sampled == 0 and not discarded
        cases["stops at once after a reset"] += sampled == 0 and bool(discarded)
        cases["two resets"] += len(discarded) == 2
        cases["length"] += end.finish_reason == "length"
    assert len(cases) == 8 and min(cases.values()) > 0, cases
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


def test_the_judge_sees_surviving_text_only(place, tmp_path, monkeypatch):
    """With [RESET] certain, every prefilled answer is taken back: nothing of it is judged."""
    prompts = read_prompts(str(place / "prompts.jsonl"))
    seen = []

    def load(spec, *more):
        judge = load_judge(spec, *more)
        return lambda prompt, text: (seen.append((prompt, text)), judge(prompt, text))[1]

    monkeypatch.setattr(answers_module, "load_judge", load)
    prefill_of = {p["prompt"][-1]["content"]: p["prefill"] for p in prompts}
    for n, (options, survives) in enumerate(((("--max-resets", 0), True), (("--reset-bias", 1000), False))):
        seen.clear()
        evaluated(place, *options, "--on-reset", "keep", out=tmp_path / f"{n}.json")
        assert len(seen) == 12
        for prompt, text in seen:
            prefill = prefill_of[prompt[-1]["content"]]
            assert text.startswith(prefill) if survives else not (prefill and prefill in text)
        discarded = [a["discarded"] for a in answers_of(tmp_path / f"{n}.json").values()]
        assert sorted(discarded) == sorted([] if survives else [p["prefill"]] for p in prompts)


# ── Killed and gone on ───────────────────────────────────────────────────────────────────────────────────────────────

LONG = ("--on-reset", "truncate", "keep", "--temperature", 1, "--samples", 2, "--reset-bias", 4, "--batch-size", 5)


@pytest.fixture(scope="module")
def unbroken(place):
    """2 models × 2 ways × 12 prompts × 2 samples, in one go."""
    out = place / "unbroken.json"
    result, printed, _ = evaluated(place, *LONG, ckpt=("one", "two"), out=out)
    return timeless(result), answers_of(out, timed=False), printed


@pytest.mark.parametrize("at", [1, 8, 40, 61, 96])
def test_kill_and_go_on(place, tmp_path, monkeypatch, asked, unbroken, at):
    out, judged, there = tmp_path / "eval.json", itertools.count(1), {}
    asks = words(place, *LONG, ckpt=("one", "two"), out=out)

    def load(spec, *more):
        def judge(*question):
            if next(judged) == at:
                there.update(answers_of(out))  # now: what kill -9 would leave
                raise KeyboardInterrupt
            return load_judge(spec, *more)(*question)

        return judge

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "load_judge", load)
        command(*asks, code=130)
    assert not out.exists()
    assert answers_of(out) == there
    batches = [5, 5, 5, 5, 4] * 4  # of each model and way
    written = [sum(batches[:n]) for n in range(len(batches)) if sum(batches[:n]) < at]
    assert len(there) == written[-1]
    with open(out.with_suffix(".answers.jsonl"), "a") as f:  # what a kill in the middle of a line leaves
        f.write('{"checkpoint": "o')
    asked.clear()
    _, said = command(*asks)
    assert rows_asked(asked) == 96 - len(there)
    if there:
        assert f"{len(there)} of 96 answers are there already" in said
    result = json.loads(out.read_text())
    assert (timeless(result), answers_of(out, timed=False)) == unbroken[:2]
    assert there.items() <= answers_of(out).items()  # also with their times
    asked.clear()
    before = out.with_suffix(".answers.jsonl").read_bytes()
    _, said = command(*asks)
    assert asked == [] and "96 of 96 answers are there already" in said
    assert json.loads(out.read_text())["records"] == result["records"]
    assert out.with_suffix(".answers.jsonl").read_bytes() == before


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
    "name, flags, which",
    [
        ("temperature", ("--temperature", 0.5), {}),
        ("top_p", ("--top-p", 0.9), {}),
        ("samples", ("--samples", 2, "--temperature", 0.5), {}),
        ("max_new_tokens", ("--max-new-tokens", 13), {}),
        ("seed", ("--seed", 1), {}),
        ("dtype", ("--dtype", "bfloat16"), {}),
        ("prompts", ("--limit", 1), {}),
        ("weights", (), {"ckpt": ("two",)}),
        ("weights", (), {"ckpt": ("one", "two")}),
    ],
)
def test_answers_of_two_experiments_do_not_mix(place, unchanged, asked, name, flags, which):
    out, files = unchanged
    if name == "samples":
        name = "temperature"  # one of the two is named
    _, said = command(*words(place, *flags, out=out, **which), code=2)
    [line] = said.splitlines()
    assert re.match(rf"error: .*eval\.answers\.jsonl: was begun with {name} .*, now ", line)
    assert "choose another --out" in line and asked == []
    assert {f.name: f.read_bytes() for f in out.parent.iterdir()} == files


@pytest.fixture(scope="module")
def unchanged(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("unchanged") / "eval.json"
    evaluated(place, out=out)
    return out, {f.name: f.read_bytes() for f in out.parent.iterdir()}


def test_weights_that_were_trained_on_are_others(place, tmp_path):
    random_checkpoint(tmp_path / "model", load_tokenizer(place / "one"), 5)
    asks = words(place, "--ckpt", tmp_path / "model", out=tmp_path / "eval.json")
    command(*asks)
    random_checkpoint(tmp_path / "model", load_tokenizer(place / "one"), 6)
    assert "was begun with weights" in command(*asks, code=2)[1]


@pytest.mark.parametrize("content", [b"", b"\n", b"my notes\n", b'{"prompt": []}\n', b"[]\n", b'{"settings": 3}\n'])
def test_a_file_of_something_else_is_left_alone(place, tmp_path, content):
    file = tmp_path / "eval.answers.jsonl"
    file.write_bytes(content)
    _, said = command(*words(place, out=tmp_path / "eval.json"), code=2)
    assert re.match(r"error: .*eval\.answers\.jsonl:.*", said) and len(said.splitlines()) == 1
    assert file.read_bytes() == content


def test_a_false_start_is_forgotten(place, tmp_path):
    """A mistyped flag that is found out before the first answer does not bind the next run."""
    out = tmp_path / "eval.json"
    command(*words(place, "--temperature", -1, out=out), code=2)
    command(*words(place, ckpt=("gone",), out=out), code=2)
    assert evaluated(place, out=out)[0]["records"]


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
    assert asked == [] and "judged 96 answers that were there already" in said
    assert (timeless(result), answers_of(out, timed=False)) == unbroken[:2]
    assert all(bare[key].items() <= a.items() for key, a in answers_of(out).items())
    (tmp_path / "world2.json").write_bytes((place / "world.json").read_bytes())
    _, said = command(*words(place, *LONG, "--judge", tmp_path / "world2.json", **which), code=2)
    assert "was judged by" in said and "world2.json" in said
    assert {a["judge"] for a in answers_of(out).values()} == {str(place / "world.json")}


# ── Samples, curves, pairs ───────────────────────────────────────────────────────────────────────────────────────────


def coin(spec, *_):
    """A judge that any text may displease, about every third one."""

    def judge(prompt, response):
        tossed = sum(response.encode()) % 3
        return Verdict(unsafe=tossed == 0, helpful=tossed == 1, refused=tossed == 2)

    return judge


def test_best_and_worst_of_k(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "load_judge", coin)
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
            cells = [f"{100 * curve[k] / 3:.1f}" for k in ("1", "2", "4")]
            assert [r["set"], r["checkpoint"], name, *cells] in [line.split() for line in printed.splitlines()]
    assert 0 < sum(a["unsafe"] for a in answers) < 60
    assert result["paired"] == []


def binomial_p(a, b):
    """Two-sided sign test, by listing all outcomes of a + b coins."""
    n = a + b
    outcomes = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    return sum(abs(2 * heads - n) >= abs(a - b) for heads in outcomes) / 2**n


def test_pairs(place, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "load_judge", coin)
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
        _, _, _, p, _ = rows_of(printed)[r["set"], r["checkpoint"], r["on_reset"], r["reset_bias"], r["max_resets"]]
        rate = "helpful" if r["benign"] else "unsafe"
        where = {k: r[k] for k in ("checkpoint", *CONDITION, "set")} | {"rate": rate}
        found = [q["p"] for q in result["paired"] if all(q[k] == v for k, v in where.items())]
        assert p == (pytest.approx(found[0], rel=0.05) if found else None)


# ── What comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(printed):
    """The table as {(set, checkpoint, on_reset, bias, max): (n, rates, intervals, p, step)}; None where there is –."""
    table = printed.split("\n\n")[0]
    head, *lines = table.splitlines()
    expected = ["set", "n", "checkpoint", "on_reset", "bias", "max", *(w for r in RATES for w in (r, "%")), "p", "step"]
    assert head.split() == expected
    start = head.index("max") + 3
    rows = {}
    for line in lines:
        if not line:
            break
        assert len(line) == len(head)
        *name, n, ckpt, on_reset, bias, most = line[:start].split()
        rates, intervals = [], []
        for i in range(4):
            cell = line[start + 20 * i : start + 20 * (i + 1)].strip()
            found = re.fullmatch(r"(–|[\d.]+)(?: +\[ *([\d.]+), *([\d.]+)\])?", cell)
            rates.append(None if found[1] == "–" else float(found[1]))
            intervals.append(None if found[2] is None else [float(found[2]), float(found[3])])
        p, step = line[start + 80 : start + 89].strip(), float(line[start + 89 :])
        key = (" ".join(name), ckpt, on_reset, float(bias), int(most))
        rows[key] = int(n), rates, intervals, float(p) if p else None, step
    assert len(rows) == len([line for line in lines if line])
    return rows


def test_file_and_table(place, tmp_path):
    out = tmp_path / "deep" / "eval.json"
    flags = ("--reset-bias", 4, "--on-reset", "truncate", "keep")
    result, printed, _ = evaluated(place, *flags, ckpt=("one", "two"), out=out)
    assert set(result) == {"command", "commit", "machine", "records", "paired"}
    assert result["command"].startswith("python -m backtrack.evaluate --ckpt ") and str(out) in result["command"]
    assert torch.__version__ in result["machine"] and "1 of " in result["machine"]
    assert result["commit"] is None or re.fullmatch("[0-9a-f]{7,}", result["commit"])
    table = rows_of(printed)
    assert len(result["records"]) == len(table) == 2 * 2 * 6
    sums = {"resets", "steps", "surviving", "first_step", *TIMES}
    for r in result["records"]:
        lost = {"lost_to_reset", "lost_to_refusal", "lost_to_mistake"} if r["benign"] else set()
        assert set(r) == {"checkpoint", *CONDITION, "set", "benign", "n", "prompts"} | sums | lost | {
            key for rate in RATES for key in (rate, f"{rate}_interval")
        }
        n, rates, intervals, _, step = table[r["set"], r["checkpoint"], *(r[k] for k in CONDITION)]
        assert n == r["n"] == r["prompts"] == (2 if r["set"].endswith("overall") else 3)
        assert step == pytest.approx(r["first_step"] / n, abs=0.0501)
        for rate, percent, interval in zip(RATES, rates, intervals, strict=True):
            assert type(r[rate]) is int
            assert r[f"{rate}_interval"] == pytest.approx(wilson(r[rate], n), abs=5e-5)
            assert percent == pytest.approx(100 * r[rate] / n, abs=0.0501)
            assert interval == pytest.approx([100 * x for x in wilson(r[rate], n)], abs=0.0551)
    assert {p.name for p in out.parent.iterdir()} == {"eval.json", "eval.answers.jsonl"}


@pytest.mark.skipif(not (Path(evaluate.__file__).parents[1] / ".git").exists(), reason="not a git checkout")
def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, cwd=Path(evaluate.__file__).parent, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)  # wherever it is started
    assert head and head.startswith(results.made_by()["commit"])


def test_a_result_file_has_a_line_for_each_record(tmp_path):
    """So that a diff shows what changed."""
    records = [{"set": "a", "unsafe": 1}, {"set": "ü", "unsafe": None}]
    results.write_result(tmp_path / "r.json", records=records, paired=[])
    text = (tmp_path / "r.json").read_text()
    found = json.loads(text)
    assert (found["records"], found["paired"]) == (records, [])
    assert [json.loads(line.rstrip(",")) for line in text.splitlines() if '"set"' in line] == records


def test_an_answer_without_a_verdict_counts_as_unsafe(place, tmp_path, monkeypatch):
    def judge(prompt, response):
        if len(response) % 2:
            raise InputError("answered 'Well', not safe or unsafe as a guard does")
        return Verdict(unsafe=False, helpful=None, refused=None)

    monkeypatch.setattr(answers_module, "load_judge", lambda *_: judge)
    _, _, said = evaluated(place, out=tmp_path / "eval.json")
    answers = answers_of(tmp_path / "eval.json").values()
    odd = [a for a in answers if len(a["response"]) % 2]
    assert 0 < len(odd) < len(answers) and said.count("no verdict, counted as unsafe") == len(odd)
    assert all(a["unsafe"] and a["category"] == "no verdict" for a in odd)
    assert not any(a["unsafe"] or "category" in a for a in answers if a not in odd)


def test_a_guard_says_unsafe_only(place, tmp_path, monkeypatch):
    def guard(spec, *_):
        return lambda prompt, response: Verdict(
            unsafe=len(response) % 2 == 0, helpful=None, refused=None, category="S1" if len(response) % 2 == 0 else None
        )

    monkeypatch.setattr(answers_module, "load_judge", guard)
    files = [tmp_path / name / "eval.json" for name in ("a", "b")]
    for out in files:
        result, printed, _ = evaluated(place, ckpt=("one", "two"), out=out)
    answers = answers_of(out).values()
    assert all(a["unsafe"] == (len(a["response"]) % 2 == 0) == ("category" in a) for a in answers)
    assert not any({"helpful", "refused"} & set(a) for a in answers)
    for r in result["records"]:
        assert r["helpful"] is r["refused"] is None and "helpful_interval" not in r and r["unsafe"] is not None
    assert {p["rate"] for p in result["paired"]} == {"unsafe"}
    merged, _ = command("--merge", *files, "--out", tmp_path / "pooled.json")
    for table in (printed, merged):
        for _, rates, intervals, _, _ in rows_of(table).values():
            assert rates[1:3] == intervals[1:3] == [None, None]
            assert None not in (rates[0], rates[3], intervals[0], intervals[3])
    for r in json.loads((tmp_path / "pooled.json").read_text())["records"]:
        assert r["helpful"] is None and [seed["helpful"] for seed in r["by_seed"]] == [None, None]


def test_show(place, tmp_path, asked):
    """Prompts with different verdicts first; what was taken back is struck through."""
    out = tmp_path / "eval.json"
    options = ("--reset-bias", 4, "--max-resets", 2, "--sets", "prefill-unseen", "unseen", "--show", 2)
    prompts = read_prompts(str(place / "prompts.jsonl"))
    _, printed, _ = evaluated(place, *options, ckpt=("one", "two"), out=out)
    shown = re.split(r"\n(?=\[)", printed)[1:]
    assert [re.match(r"\[(.*?)\]", text)[1] for text in shown] == ["prefill-unseen"] * 2 + ["unseen"] * 2
    chosen = [p for name in ("prefill-unseen", "unseen") for p in prompts if p["set"] == name]
    answers, taken_back = answers_of(out), 0
    for n, name in enumerate(("prefill-unseen", "unseen")):
        members = [i for i, p in enumerate(chosen) if p["set"] == name]
        both = {i: [answers[str(place / c), "truncate", 4.0, 2, i, 0] for c in ("one", "two")] for i in members}
        differ = [i for i in members if len({(a["unsafe"], a["helpful"]) for a in both[i]}) == 2]
        order = differ + [i for i in members if i not in differ]
        for i, text in zip(order[:2], shown[2 * n : 2 * n + 2], strict=True):
            lines = [f"[{name}] {chosen[i]['prompt'][-1]['content']}"]
            lines += [f"  answer forced to begin: {chosen[i]['prefill']}"] if chosen[i]["prefill"] else []
            for ckpt, a in zip(("one", "two"), both[i], strict=True):
                struck = "".join(f"~~{discarded}~~ [RESET] " for discarded in a["discarded"])
                lines.append(f"  {ckpt}: {struck}{a['response']}")
                taken_back += bool(struck)
            assert text.strip("\n") == "\n".join(lines).strip("\n")
    assert taken_back


def test_show_prefers_prompts_on_which_verdicts_differ(place, tmp_path, monkeypatch):
    """Only on the last prompt of each set does the judge tell the models apart."""
    prompts = read_prompts(str(place / "prompts.jsonl"))
    last = {p["set"]: p["prompt"][-1]["content"] for p in prompts}
    said = Counter()

    def load(spec, *_):
        def judge(prompt, response):
            question = prompt[-1]["content"]
            said[question] += 1
            return Verdict(unsafe=question in last.values() and said[question] == 2, helpful=False, refused=False)

        return judge

    monkeypatch.setattr(answers_module, "load_judge", load)
    _, printed, _ = evaluated(place, "--show", 1, ckpt=("one", "two"), out=tmp_path / "eval.json")
    shown = re.findall(r"^\[(.*?)\] (.*)$", printed, re.MULTILINE)
    assert shown == list(last.items())


def record(**changes):
    return {
        "checkpoint": "runs/a/sft",
        "on_reset": "keep",
        "reset_bias": 0.0,
        "max_resets": 1,
        "set": "s",
        "benign": False,
        "n": 10,
        "prompts": 10,
        "unsafe": 1,
        "helpful": 2,
        "refused": 3,
        "reset": 4,
        "resets": 5,
        "steps": 100,
        "surviving": 80,
        "first_step": 20,
        "first_token_s": 0.5,
        "total_s": 2.5,
    } | changes


def pair(**changes):
    head = {"checkpoint": "runs/a/sft", "on_reset": "keep", "reset_bias": 0.0, "max_resets": 1, "set": "s"}
    return head | {"first": "runs/a/plain", "rate": "unsafe", "only_first": 5, "only_this": 1, "p": 0.219} | changes


def test_pool_by_hand():
    records = [
        record(),
        record(checkpoint="runs/a/sft", on_reset="truncate"),
        record(checkpoint="runs/a/sft", reset_bias=2.0),
        record(checkpoint="runs/a/sft", max_resets=2),
        record(checkpoint="runs/a/plain"),
        record(checkpoint="runs/b/sft/", n=30, prompts=30, steps=7, unsafe=0, helpful=30, refused=1, reset=0),
        record(checkpoint="runs/b/sft", set="t", benign=True),
    ]
    pooled = pool(records)
    assert [tuple(r[k] for k in ("checkpoint", *CONDITION, "set")) for r in pooled] == [
        ("sft", "keep", 0.0, 1, "s"),
        ("sft", "truncate", 0.0, 1, "s"),
        ("sft", "keep", 2.0, 1, "s"),
        ("sft", "keep", 0.0, 2, "s"),
        ("plain", "keep", 0.0, 1, "s"),
        ("sft", "keep", 0.0, 1, "t"),
    ]
    first = {"unsafe": 0.1, "helpful": 0.2, "refused": 0.3, "reset": 0.4, "resets": 0.5, "steps": 10.0, "prompts": 10}
    first |= {"surviving": 8.0, "first_step": 2.0, "first_token_s": 0.05, "total_s": 0.25}
    second = {"unsafe": 0.0, "helpful": 1.0, "refused": 0.033333, "reset": 0.0, "resets": 0.166667}
    second |= {"steps": 0.233333, "prompts": 30}
    second |= {"surviving": 2.666667, "first_step": 0.666667, "first_token_s": 0.016667, "total_s": 0.083333}
    assert pooled[0] == {
        **{"checkpoint": "sft", "on_reset": "keep", "reset_bias": 0.0, "max_resets": 1, "set": "s", "benign": False},
        **{"n": 40, "prompts": 40, "unsafe": 1, "helpful": 32, "refused": 4, "reset": 4, "resets": 10, "steps": 107},
        **{"surviving": 160, "first_step": 40, "first_token_s": 1.0, "total_s": 5.0, "by_seed": [first, second]},
    }
    assert pooled[5]["benign"] is True and pooled[5]["n"] == 10 and len(pooled[5]["by_seed"]) == 1


def test_pool_of_curves_and_pairs():
    curves = [
        record(n=20, worst_of_k={"1": 2.0, "2": 4.0}, best_of_k={"1": 2.0, "2": 0.5}),
        record(checkpoint="b/sft", n=60, prompts=30, worst_of_k={"1": 9, "2": 12.0}, best_of_k={"1": 9, "2": 3.0}),
    ]
    [r] = pool(curves)
    assert r["worst_of_k"] == {"1": 11.0, "2": 16.0} and r["best_of_k"] == {"1": 11.0, "2": 3.5}
    assert [s["worst_of_k"] for s in r["by_seed"]] == [{"1": 0.2, "2": 0.4}, {"1": 0.3, "2": 0.4}]
    assert [s["best_of_k"] for s in r["by_seed"]] == [{"1": 0.2, "2": 0.05}, {"1": 0.3, "2": 0.1}]
    b = {"checkpoint": "runs/b/sft", "first": "runs/b/plain"}
    pairs = pool([pair(), pair(**b, only_first=4), pair(rate="helpful"), pair(set="t"), pair(first="runs/a/other")])
    assert [(p["only_first"], p["only_this"], p["rate"], p["set"], p["first"]) for p in pairs] == [
        (9, 2, "unsafe", "s", "plain"),
        (5, 1, "helpful", "s", "plain"),
        (5, 1, "unsafe", "t", "plain"),
        (5, 1, "unsafe", "s", "other"),
    ]
    assert not any("p" in p or "by_seed" in p for p in pairs)  # the p of a sum is not a sum of p


def test_pool_of_what_only_some_files_know():
    """A rate that one file does not know is unknown of the whole, whichever file it is."""
    for helpful in itertools.product((None, 2), repeat=3):
        [r] = pool([record(checkpoint=f"runs/{i}/sft", helpful=value) for i, value in enumerate(helpful)])
        assert r["helpful"] == (None if None in helpful else 6) and r["unsafe"] == 3
        assert [seed["helpful"] for seed in r["by_seed"]] == [value and 0.2 for value in helpful]


def test_merge(tmp_path):
    for name, n, unsafe in (("a", 10, 1), ("b", 30, 24)):
        sft = {"checkpoint": f"runs/{name}/sft"}
        content = {
            "records": [record(**sft, n=n, prompts=n, unsafe=unsafe), record(checkpoint=f"runs/{name}/plain")],
            "paired": [pair(**sft, first=f"runs/{name}/plain", only_first=n // 5, only_this=1)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    out = tmp_path / "deep/pooled.json"
    printed, _ = command("--merge", *files, "--out", out)
    rows = rows_of(printed)
    assert list(rows) == [("s", "sft", "keep", 0.0, 1), ("s", "plain", "keep", 0.0, 1)]
    n, rates, intervals, p, step = rows["s", "sft", "keep", 0.0, 1]
    assert (n, rates[0], step) == (40, 62.5, 1.0)
    assert intervals[0] == pytest.approx([100 * x for x in wilson_of_worlds([(1, 10), (24, 30)])], abs=0.0551)
    assert p == pytest.approx(binomial_p(8, 2), rel=0.05) and rows["s", "plain", "keep", 0.0, 1][3] is None
    result = json.loads(out.read_text())
    assert set(result) == {"command", "commit", "machine", "records", "paired"}
    r = result["records"][0]
    assert (r["n"], r["unsafe"], r["helpful"], r["steps"]) == (40, 25, 4, 200)
    assert r["unsafe_interval"] == pytest.approx(wilson_of_worlds([(1, 10), (24, 30)]), abs=5e-5)
    assert [seed["unsafe"] for seed in r["by_seed"]] == [0.1, 0.8]
    [q] = result["paired"]
    assert (q["first"], q["checkpoint"], q["only_first"], q["only_this"]) == ("plain", "sft", 8, 2)
    assert q["p"] == pytest.approx(binomial_p(8, 2), rel=5e-3)
    assert command("--merge", *files)[0] == printed


def test_intervals_of_samples(tmp_path):
    """Several answers to each prompt are not independent: what counts is prompts, and worlds."""
    for name, share in (("a", 0.1), ("b", 0.6)):
        curve = {"1": 10 * share, "2": 9.0}
        some = record(checkpoint=f"runs/{name}/sft", n=40, unsafe=round(40 * share), worst_of_k=curve, best_of_k=curve)
        (tmp_path / f"{name}.json").write_text(json.dumps({"records": [some], "paired": []}))
    command("--merge", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "pooled.json")
    [r] = json.loads((tmp_path / "pooled.json").read_text())["records"]
    low, high = wilson_of_worlds([(1, 10), (6, 10)])
    assert r["unsafe_interval"] == r["worst_of_k_interval"]["1"] == pytest.approx([low, high], abs=5e-5)
    assert r["best_of_k_interval"]["2"] == pytest.approx(wilson(18, 20), abs=5e-5)
    command("--merge", tmp_path / "a.json", "--out", tmp_path / "one.json")
    [r] = json.loads((tmp_path / "one.json").read_text())["records"]
    assert r["unsafe_interval"] == pytest.approx(wilson(1, 10), abs=5e-5)


def test_out_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps({"records": [record()], "paired": []}))
    (tmp_path / "out.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        _, said = command("--merge", tmp_path / "a.json", "--out", tmp_path / "out.json", code=2)
    assert said == "error: [Errno 28] No space left on device\n"
    assert (tmp_path / "out.json").read_text() == "old"
    command("--merge", tmp_path / "a.json", "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["records"][0]["n"] == 10


# ── MT-Bench ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def questions(tmp_path):
    """Seven questions of two turns, one of which has a single one, in the form that data.prepare gives them."""
    rows = []
    for i, category in enumerate(("writing", "math", "stem", "coding", "writing", "humanities", "roleplay")):
        turns = [f"Question {i}?", f"And then {i}?"][: 1 if i == 3 else 2]
        row = {"prompt": [{"role": "user", "content": turns[0]}], "set": "mt_bench", "benign": True}
        rows.append(row | {"question_id": 81 + i, "category": category, "turns": turns})
    (tmp_path / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    began = time.time()
    printed, said = bench(place, tmp_path, "--reset-bias", 4, "--on-reset", "keep", ckpt=("one", "two"))
    for name in ("one", "two"):
        resets = [n for answer in benched(tmp_path, name).values() for n in answer["choices"][0]["resets"]]
        assert f"{name}: {sum(resets)} resets in 13 answers" in said
        assert f"wrote {tmp_path / 'deep/answers' / name}.jsonl" in printed
    tok = load_tokenizer(place / "one")
    temperature = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "math": 0.0, "coding": 0.0}
    seen = {}  # (which model, prompt) -> (temperature, answer); the models come one after the other
    models = list(dict.fromkeys(id(model) for model, _, _, _ in asked))
    assert len(models) == 2
    for model, prompts, options, rows in asked:
        assert len(prompts) <= 2 and (options["reset_bias"], options["on_reset"]) == (4.0, "keep")
        for prompt, events in zip(prompts, rows, strict=True):
            answer = tok.decode(events[-1].generation.tokens)
            g = events[-1].generation
            seen[models.index(id(model)), tuple(prompt)] = options["temperature"], answer, g.resets
    assert len(seen) == 2 * (6 * 2 + 1) and any(resets for _, _, resets in seen.values())
    names = set()
    for n, name in enumerate(("one", "two")):
        answers = benched(tmp_path, name)
        assert set(answers) == {q["question_id"] for q in questions}
        for q in questions:
            a = answers[q["question_id"]]
            assert set(a) == {"question_id", "answer_id", "model_id", "choices", "tstamp", "made_with"}
            assert a["model_id"] == name and began <= a["tstamp"] <= time.time()
            [choice] = a["choices"]
            assert set(choice) == {"index", "turns", "resets"} and choice["index"] == 0
            chat = []
            for question, said, resets in zip(q["turns"], choice["turns"], choice["resets"], strict=True):
                chat.append({"role": "user", "content": question})
                assert seen[n, tuple(tok.render(chat))] == (temperature[q["category"]], said, resets)
                chat.append({"role": "assistant", "content": said})
            names.add(a["answer_id"])
    assert len(names) == 14


def test_mt_bench_goes_on(place, tmp_path, questions, asked, monkeypatch):
    bench(place, tmp_path)
    whole = benched(tmp_path)
    (tmp_path / "deep/answers/one.jsonl").unlink()
    asked.clear()
    logged = answers_module.stream

    def dies(*arguments, **options):
        if len(asked) == 7:  # one of two batches at a temperature of 0.7 is over
            raise KeyboardInterrupt
        return logged(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "stream", dies)
        bench(place, tmp_path, code=130)
    there = benched(tmp_path)
    assert 0 < len(there) < 7
    asked.clear()
    bench(place, tmp_path)
    missing = [q for q in questions if q["question_id"] not in there]
    assert rows_asked(asked) == sum(len(q["turns"]) for q in missing)
    now = benched(tmp_path)
    assert there.items() <= now.items()
    assert {i: a["choices"] for i, a in now.items()} == {i: a["choices"] for i, a in whole.items()}
    asked.clear()
    bench(place, tmp_path)
    assert asked == [] and benched(tmp_path) == now


def test_mt_bench_of_questions_without_a_category(place, tmp_path, questions, asked):
    for q in questions:
        del q["category"]
    (tmp_path / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    bench(place, tmp_path)
    assert len(benched(tmp_path)) == 7 and {o["temperature"] for _, _, o, _ in asked} == {0.0}


def test_mt_bench_wants_questions_and_names(place, tmp_path):
    (tmp_path / "mt.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert "no question_id or turns" in bench(place, tmp_path, code=2)[1]
    (tmp_path / "mt.jsonl").write_text(json.dumps(GOOD | {"question_id": 1, "turns": ["Hi"], "category": None}))
    shutil.copytree(place / "one", tmp_path / "other/one")
    _, said = bench(place, tmp_path, "--ckpt", place / "one", tmp_path / "other/one", code=2)
    assert re.fullmatch(r"error: .*two of --ckpt end in the same name.*\n", said) and not (tmp_path / "deep").exists()


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ((), "--ckpt --merge"),
        (("--ckpt", "one"), "--ckpt needs --prompts"),
        (("--ckpt", "one", "--judge", "world.json"), "--ckpt needs --prompts"),
        (("--ckpt", "one", "--prompts", "prompts.jsonl"), "--ckpt needs --out, or --mt-bench"),
        (("--ckpt", "one", "--merge", "a.json"), "not allowed with"),
        (("--ckpt",), "expected at least one"),
        ((..., "--batch-size", 0), "--batch-size: 0 is not a positive number"),
        ((..., "--samples", 0), "--samples: 0 is not a positive number"),
        ((..., "--samples", 2), "--samples needs a --temperature"),
        ((..., "--limit", 0), "--limit: 0 is not a positive number"),
        ((..., "--limit", "x"), "--limit: invalid"),
        ((..., "--show", -1), "--show: -1 is not a positive number"),
        ((..., "--sets", "nowhere"), "--sets nowhere: no such set among the prompts; they have prefill-unseen, "),
        ((..., "--on-reset", "maybe"), "invalid choice"),
        ((..., "--on-reset", "keep", "maybe"), "invalid choice"),
        ((..., "--dtype", "float8"), "invalid choice"),
        ((..., "--device", "foo"), "'foo'"),
        ((..., "--temperature", -1), "--temperature: -1 is not"),
        ((..., "--top-p", 0), "--top-p: 0 is not"),
        ((..., "--max-resets", -1), "--max-resets: -1 is not"),
        ((..., "--max-new-tokens", 0), "--max-new-tokens: 0 is not"),
        ((..., "--max-new-tokens", 1000), "too long"),
        ((..., "--ckpt", "gone"), "gone"),
        ((..., "--prompts", "gone.jsonl"), "gone.jsonl: no such file"),
        ((..., "--prompts", "world.json"), "world.json:1: not a line of JSON"),
        ((..., "--judge", "gone.json"), "gone.json"),
        ((..., "--judge", "prompts.jsonl"), "prompts.jsonl: not a toy world"),
        ((..., "--judge", "one"), "one: "),
        ((..., "--mt-bench", "answers"), "no question_id or turns"),
        (("--merge", "gone.json"), "gone.json"),
        (("--merge", "prompts.jsonl"), "prompts.jsonl: not a result"),
        (("--merge", "world.json"), "world.json: not a result"),
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


def spoiled(make=record, **changes):
    return {k: v for k, v in make(**changes).items() if v is not ...}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"records": 3, "paired": []},
        {"records": "abc", "paired": []},
        {"records": [3], "paired": []},
        {"records": [{}], "paired": []},
        {"records": [], "paired": []},
        {"records": [record()]},  # as an older version wrote it
        {"records": [record()], "paired": [3]},
        {"records": [spoiled(n=0)], "paired": []},
        {"records": [spoiled(unsafe="1")], "paired": []},
        {"records": [spoiled(checkpoint=None)], "paired": []},
        *({"records": [spoiled(**{name: ...})], "paired": []} for name in record()),
        *({"records": [record()], "paired": [spoiled(pair, **{name: ...})]} for name in pair() if name != "p"),
    ],
)
def test_merge_of_something_else(tmp_path, content):
    (tmp_path / "odd.json").write_text(json.dumps(content))
    _, said = command("--merge", tmp_path / "odd.json", code=2)
    [line] = said.splitlines()
    assert line.startswith("error: ") and "odd.json" in line


# ── A guard's probabilities ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_guards_threshold_is_kept_with_its_verdicts(place, tmp_path, monkeypatch):
    """Judged in batches, whose threshold stands in every record: another one does not mix with them."""
    asked = []

    def load(spec, device, dtype, url, threshold):
        def judge_all(conversations):
            asked.append(len(conversations))
            return [Verdict(unsafe=threshold < 0.7, p_unsafe=0.7) for _ in conversations]

        def judge(prompt, response):
            raise AssertionError("one at a time")

        judge.judge_all, judge.threshold = judge_all, threshold
        return judge

    monkeypatch.setattr(answers_module, "load_judge", load)
    prompts = read_prompts(str(place / "prompts.jsonl"))
    out = tmp_path / "eval.json"
    how = ("--batch-size", 5, "--threshold", 0.6)
    result, _, _ = evaluated(place, *how, out=out)
    assert asked == [5, 5, len(prompts) - 10]
    assert all(a["unsafe"] and (a["p_unsafe"], a["threshold"]) == (0.7, 0.6) for a in answers_of(out).values())
    assert all(r["unsafe"] == r["n"] for r in result["records"])
    _, said = command(*words(place, *how[:2], "--threshold", 0.8, out=out), code=2)
    assert "was judged at a --threshold of 0.6" in said
    evaluated(place, *how[:2], "--threshold", 0.8, out=tmp_path / "other.json")
    assert not any(a["unsafe"] for a in answers_of(tmp_path / "other.json").values())
