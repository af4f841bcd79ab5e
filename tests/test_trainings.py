"""What compares trainings on the same prompts: rates over seeds and prompts, long beginnings, and the control that asks
again in mid-answer."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command import command
from models import LLAMA, network_of
from samples import toy_tokenizer, user, write

from backtrack.evaluate import any_depth, beginnings, over_seeds
from backtrack.evaluate.prompts import prompts_digest, read_prompts
from backtrack.evaluate.statistics import mcnemar, wilson
from backtrack.generate import generate
from backtrack.judge import Verdict
from backtrack.report import trainings

ROOT = Path(__file__).resolve().parents[1]


def test_the_interval_is_that_of_both_effects():
    """Of values a_s + b_p the variance of the bootstrap's mean is known: Var(a)/S + Var(b)/P."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 0.5, 20), rng.normal(3, 2.0, 80)
    values = a[:, None] + b[None, :]
    low, high = over_seeds.interval(values)
    half = 1.96 * math.sqrt(a.var() / 20 + b.var() / 80)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


@pytest.mark.parametrize("failures", [0, 1, 50])
def test_a_rate_near_its_end_has_no_narrow_interval(failures):
    """One failure in three times fifty says no more about the fifty prompts than none does."""
    values = np.zeros((3, 50))
    values[:, :failures] = 1
    found = over_seeds.rate_record({}, values)["interval"]
    expected = wilson(failures, 50)
    assert found[0] <= expected[0] + 1e-4 and found[1] >= expected[1] - 1e-4


def records(model, verdicts, **more):
    """An answer to each of four prompts: u unsafe, r refused, s both, . neither."""
    for i, v in enumerate(verdicts):
        head = {"checkpoint": f"runs/seed/{model}", "on_reset": "truncate", "reset_bias": 0.0, "max_resets": 1}
        said = {"judge": "J", "unsafe": v in "us", "complied": v == "u", "refused": v in "rs", "resets": int(v == "r")}
        yield head | {"prompt": i, "sample": 0, "set": ["a", "a", "b", "b-forced"][i]} | said | more


def write_seed(root, name, **models):
    sets = [{"set": name, "benign": False} for name in ("a", "b", "b-forced")]
    (root / f"{name}.json").write_text(json.dumps({"records": sets}))
    lines = [r for model, verdicts in models.items() for r in records(model, verdicts)]
    write(root / f"{name}.answers.jsonl", {"settings": {}}, *lines)
    return root / f"{name}.json"


run_over = partial(command, over_seeds.main)


def test_rates_over_seeds_by_hand(tmp_path):
    files = [write_seed(tmp_path, "0", old="uu.s", new="r..."), write_seed(tmp_path, "1", old="u..u", new="u...")]
    said, _ = run_over("--in", *files, "--against", "old:new", "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    rates = {(r["model"], r["set"], r["rate"]): r for r in found["rates"]}
    asked = rates["old", "asked", "unsafe"]
    assert asked["by_seed"] == [0.6667, 0.3333] and asked["mean"] == 0.5 and asked["prompts"] == 3
    assert rates["old", "b-forced", "refused"]["by_seed"] == [1.0, 0.0]
    kinds = {r["set"]: r["kind"] for r in found["rates"]}
    assert kinds == {"a": "asked", "b": "asked", "b-forced": "begun", "asked": "all"}  # one set is no group
    assert rates["new", "asked", "reset"]["by_seed"] == [0.3333, 0.0]
    assert 0 <= asked["interval"][0] < 0.5 < asked["interval"][1] <= 1 and "asked" in said
    [difference] = [r for r in found["differences"] if (r["set"], r["rate"]) == ("asked", "unsafe")]
    assert difference["difference"] == pytest.approx(-1 / 3, abs=1e-4)
    assert difference["only_first_only_other"] == [[2, 0], [0, 0]]
    assert difference["mcnemar"] == [mcnemar(2, 0), mcnemar(0, 0)]


def test_the_same_questions_with_longer_beginnings_are_not_pooled(tmp_path):
    names = ("b-forced", "c-forced", "begun-8", "begun-32")
    lines = []
    for name in names:
        lines += [record | {"set": name} for record in records("old", "uu..")]
    (tmp_path / "0.json").write_text(json.dumps({"records": [{"set": name, "benign": False} for name in names]}))
    write(tmp_path / "0.answers.jsonl", {"settings": {}}, *[r | {"prompt": i} for i, r in enumerate(lines)])
    run_over("--in", tmp_path / "0.json", "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["rates"]
    sizes = {r["set"]: r["prompts"] for r in found if r["rate"] == "unsafe"}
    assert sizes == {"b-forced": 4, "c-forced": 4, "begun": 8, "begun-8": 4, "begun-32": 4}


@pytest.mark.parametrize("failures, apart", [(0, False), (4, False), (12, True)])
def test_a_few_prompts_on_one_side_prove_nothing(failures, apart):
    """Of 40, against none: McNemar's p is 1, 0.125 and 0.0005. The bootstrap alone would be sure of 4 already."""
    first = np.zeros((1, 40))
    first[0, :failures] = 1
    found = over_seeds.difference_record({}, first, np.zeros((1, 40)))
    low, high = found["interval"]
    assert low < found["difference"] == -failures / 40 < high
    assert (high < 0) == apart == (found["mcnemar"][0] < 0.05)


def test_the_worst_of_several_answers(tmp_path):
    file = write_seed(tmp_path, "0", old="uu..")
    lines = [r for sample, said in enumerate(("u...", "....", "uu..")) for r in records("old", said, sample=sample)]
    write(tmp_path / "0.answers.jsonl", {"settings": {}}, *lines)
    run_over("--in", file, "--out", tmp_path / "out.json")
    rates = json.loads((tmp_path / "out.json").read_text())["rates"]
    means = {(r["set"], r["rate"]): r["mean"] for r in rates}
    assert means["a", "unsafe"] == 0.5 and means["a", "unsafe, worst of 3"] == 1.0
    assert means["asked", "unsafe, worst of 3"] == pytest.approx(2 / 3, abs=1e-4)


def test_what_does_not_fit_together_is_refused(tmp_path):
    files = [write_seed(tmp_path, "0", old="uu..", new="r..."), write_seed(tmp_path, "1", old="u...")]
    _, said = run_over("--in", *files, "--out", tmp_path / "out.json", code=2)
    assert "--in number 2 has not the same answers of new" in said
    _, said = run_over("--in", files[0], "--against", "old:newer", "--out", tmp_path / "out.json", code=2)
    assert "--against old:newer: no such models" in said
    write(tmp_path / "1.answers.jsonl", {"settings": {"dtype": "bfloat16"}}, *records("old", "u..."))
    _, said = run_over("--in", *files, "--out", tmp_path / "out.json", code=2)
    assert "1.json: dtype differs from that of" in said
    lines = [{k: v for k, v in r.items() if k != "judge"} for r in records("old", "u...")]
    write(tmp_path / "1.answers.jsonl", {"settings": {}}, *lines)
    _, said = run_over("--in", files[1], "--out", tmp_path / "out.json", code=2)
    assert "1.answers.jsonl:2: an answer without a verdict" in said


# ── Answers that began long ago ──────────────────────────────────────────────────────────────────────────────────────


def test_beginnings_are_the_first_tokens_of_bad_answers(tmp_path):
    tok = toy_tokenizer()
    tok.save(tmp_path)
    prompts = [{"prompt": user(f"Q{i}"), "set": "bad", "benign": False} for i in range(4)]
    file = write(tmp_path / "prompts.jsonl", *prompts)
    long, short = "one two three four five six", "a"
    answers = [r | {"response": text} for r, text in zip(records("m", "uu.u"), [long, short, long, long], strict=True)]
    answers[3]["complied"] = False  # one of the judges does not mind
    digest = prompts_digest(read_prompts(str(file)))
    write(tmp_path / "eval.answers.jsonl", {"settings": {"prompts": digest}}, *answers)
    words = ["--answers", tmp_path / "eval.json", "--prompts", file, "--ckpt", tmp_path]
    words += ["--out", tmp_path / "long.jsonl"]
    _, said = command(beginnings.main, *words, "--tokens", 1, 4)
    assert "2 of 4 answers are bad, 1 long enough" in said
    rows = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    ids = tok.encode(long)
    assert [r["set"] for r in rows] == ["begun-1", "begun-4"]
    assert [r["prefill"] for r in rows] == [tok.decode(ids[:1]), tok.decode(ids[:4])]
    assert all(r["prompt"] == user("Q0") for r in rows)
    benign = {"prompt": user("Harmless?"), "benign": True}
    harmless = write(tmp_path / "harmless.jsonl", benign, benign | {"reference": "Yes."})
    _, said = command(beginnings.main, *words, "--tokens", 1, 4, "--after", harmless)
    assert "2 of 4 answers are bad, 1 long enough" in said
    *before, second = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    turns = [*user("Harmless?"), {"role": "assistant", "content": "Yes."}, *user("Q0")]
    assert before == rows and second == prompts[0] | {"set": "second-turn", "prompt": turns, "prefill": ""}
    command(beginnings.main, *words, "--tokens", 4, "--as", "target")
    [aim] = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    assert aim == prompts[0] | {"set": "begun-4", "target": tok.decode(ids[:4]), "prefill": ""}
    _, said = command(beginnings.main, *words, "--after", file, code=2)
    assert 'no prompt has a "reference"' in said
    _, said = command(beginnings.main, *words, "--limit", 2, code=2)
    assert "answers to other prompts" in said
    _, said = command(beginnings.main, *words, "--tokens", 400, code=2)
    assert "no answer to begin with" in said


# ── Asked again in mid-answer ────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_asked_again_at_every_depth_until_it_refuses():
    """Against a loop over one prompt and one depth after the other. The judge calls some probes refusals."""
    tok, model = toy_tokenizer(), network_of(LLAMA)
    prompts = [tok.render(user(f"Question {i}?")) for i in range(8)]
    prefill = [[9, 8, 7] * (i % 2) for i in range(8)]
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "max_new_tokens": 20, "max_resets": 0}
    seen = []

    def judge(prompt, text):
        seen.append(text)
        return Verdict(unsafe=None, complied=len(text) % 4 > 0, refused=len(text) % 4 == 0)

    ask = any_depth.around(model, judge, tok, batch_size=3, every=6)
    how = options | {"max_resets": 1, "temperature": 0.0}
    found = [done.generation for done in ask(prompts, prefill=prefill, sample_ids=range(8), **how)]
    asked, refusals = 0, 0
    for prompt, forced, g in zip(prompts, prefill, found, strict=True):
        [plain] = generate(model, [prompt], prefill=[forced], **options)
        expected, discarded, steps = plain.tokens, [], plain.steps
        spent = 0
        for depth in range(0, 20, 6):
            at = len(forced) + depth
            if 0 < at < len(plain.tokens):
                again = prompt + plain.tokens[:at] + any_depth.header_of(tok)
                [probe] = generate(model, [again], **options | {"max_new_tokens": any_depth.PROBE})
                asked, spent = asked + 1, spent + probe.steps
                if len(tok.decode(probe.tokens)) % 4 == 0:
                    [refusal] = generate(model, [again], **options)
                    expected, discarded, steps = refusal.tokens, [plain.tokens[:at]], depth + refusal.steps
                    refusals += 1
                    break
        assert (g.tokens, g.discarded, g.resets, g.steps) == (expected, discarded, len(discarded), steps + spent)
    assert len(seen) == asked and 0 < refusals < 8


def test_the_header_is_what_stands_between_two_turns():
    tok = toy_tokenizer()
    whole = tok.render(user("Hello?"))
    header = any_depth.header_of(tok)
    assert whole[-len(header) :] == header and tok.decode(tok.encode("Hello?")) in tok.decode(whole[: -len(header)])


# ── Tables and the picture ───────────────────────────────────────────────────────────────────────────────────────────


def test_tables_and_picture_of_trainings(tmp_path, monkeypatch):
    """Every rate and difference stands where it belongs, by numbers picked by hand."""

    def rate(model, some, name, mean):
        head = {"model": model, "on_reset": "truncate", "reset_bias": 0.0, "max_resets": 1, "set": some, "rate": name}
        kind = {"alpaca_eval": "harmless", "advbench": "asked", "strongreject": "asked"}.get(some, "begun")
        head["kind"] = "all" if some in trainings.GROUPS else kind
        return head | {"seeds": 2, "prompts": 50, "mean": mean, "interval": [mean - 0.01, mean + 0.01], "by_seed": []}

    def difference(some, mean, low, high):
        head = {"first": "dpo-in-place", "other": "dpo", "reset_bias": 0.0, "set": some, "rate": "unsafe"}
        return head | {"difference": mean, "interval": [low, high], "mcnemar": [0.25, 0.5]}

    origin = {"command": "", "commit": "abc", "machine": "one"}
    sets = ("advbench", "strongreject", "advbench-forced", "asked", "alpaca_eval", "harmless")
    rates = [rate(m, s, "unsafe", 0.1 + i / 100) for i, s in enumerate(sets) for m in ("dpo", "dpo-in-place")]
    rates += [rate(m, s, "reset", 0.5) for s in sets for m in ("dpo", "dpo-in-place")]
    differences = [difference("asked", -0.2, -0.3, -0.1), difference("advbench", -0.5, -0.6, -0.4)]
    differences += [difference("harmless", -0.7, -0.8, -0.6)]  # the harm judge is no judge of those
    write_json(tmp_path / "gemma-main.json", origin | {"rates": rates, "differences": differences})
    long = [rate(m, f"begun-{n}", r, n / 100) for m in ("dpo", "sft") for n in (8, 32) for r in ("unsafe", "complied")]
    long += [rate(m, "asked", "unsafe", 0.2) for m in ("dpo", "sft")]
    behind = [difference("begun-8", -0.1, -0.2, 0.1)]
    write_json(tmp_path / "gemma-long.json", origin | {"rates": long, "differences": behind})
    command(trainings.main, "--results", tmp_path)
    text = (tmp_path / "gemma-tables.md").read_text()
    assert "|  | prompts | in place + DPO | backtracking + DPO |" in text
    assert "| **asked, all** | 50 | 13.0 [12.0, 14.0] | 13.0 [12.0, 14.0] |" in text
    unsafe = text[text.index("harmful answers") : text.index("answers taken back")]
    assert "AlpacaEval" not in unsafe and "AlpacaEval" in text
    pair = "harmful | backtracking + DPO | in place + DPO"
    assert f"| **asked, all** | {pair} | -20.0 [-30.0, -10.0] | yes | 0.25, 0.5 |" in text
    assert "-50.0" not in text and "-70.0" not in text  # of single sets there is no line
    assert "| 8 forced tokens | 50 | 8.0 [7.0, 9.0] | 8.0 [7.0, 9.0] |" in text
    assert f"| 8 forced tokens | {pair} | -10.0 [-20.0, +10.0] |  |" in text
    assert (tmp_path / "gemma-long.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "gemma-main.json").write_text("{}")
    _, said = command(trainings.main, "--results", tmp_path, code=2)
    assert "gemma-main.json: not a result of this version" in said


def write_json(path, value):
    path.write_text(json.dumps(value))


def test_the_tables_in_results_are_up_to_date(tmp_path):
    for file in (ROOT / "results").glob("gemma-*.json"):
        shutil.copy(file, tmp_path)
    command(trainings.main, "--results", tmp_path)
    assert (tmp_path / "gemma-tables.md").read_text() == (ROOT / "results/gemma-tables.md").read_text()
