"""backtrack/evaluate/collect.py: every row a second time, by hand, from the answers that it keeps.

A random model answers, and a judge made for this finds an answer unsafe if its length is odd.
"""

import importlib
import json
import sys
from functools import partial

import pytest
from command import command as run_command
from samples import said as answer
from samples import write
from test_evaluate import furnish

from backtrack.evaluate import collect
from backtrack.rows import load_rows
from model import load_tokenizer

command = partial(run_command, collect.main)
JUDGE = """
from backtrack.judge import Verdict
from model import InputError

calls, fails_at = [], None

def odd(prompt, response):
    calls.append((prompt[0]["content"], response))
    if len(calls) == fails_at:
        raise ConnectionError("gone\\naway")
    return Verdict(unsafe=len(response) % 2 == 1)

def odd_complies(prompt, response):
    return Verdict(unsafe=None, complied=len(response) % 2 == 1)

def choosy(prompt, response):
    if len(response) % 3 == 0:
        raise InputError("not of such a length")
    return odd(prompt, response)
"""
SAFE, NOT_SAFE = "No, I had better not", "No, I better not!"  # of 20 and 17 characters


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Forbidden prompts with and without a safe answer, or with one that is none; benign ones with and without."""
    root = tmp_path_factory.mktemp("place")
    rows = furnish(root)
    prompts = []
    for i, row in enumerate([r for r in rows if r["set"] == "unseen"][:12]):
        more = [{"safe_answer": SAFE}, {"safe_answer": NOT_SAFE}, {}][i % 3]
        prompts.append({"prompt": row["prompt"], "set": "asked", "benign": False, **more})
    for i, row in enumerate([r for r in rows if r["set"] == "benign-unseen"][:12]):
        more = [{"reference": "Of course."}, {}][i % 2]
        prompts.append({"prompt": row["prompt"], "set": "asked", "benign": True, **more})
    write(root / "prompts.jsonl", *prompts)
    return root


@pytest.fixture
def collected(place, tmp_path, monkeypatch):
    """(what it said, rows, prompts with their answers) of a run with these flags."""
    (tmp_path / "judging.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    out = tmp_path / "rows.jsonl"

    def many_stops(path):  # random models do not say the real one
        tok = load_tokenizer(path)
        tok.stop_ids = [*tok.stop_ids, *set(range(300, 1000, 16)) - {tok.reset_id, *tok.encode("Sure, here is")}]
        return tok

    monkeypatch.setattr(collect, "load_tokenizer", many_stops)

    def run(*flags, code=0):
        words = ("--ckpt", place / "one", "--prompts", place / "prompts.jsonl", "--judge", "judging:odd")
        more = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 20, "--out", out)
        _, said = command(*words, *more, *flags, code=code)
        if code:
            return said
        answers = {a["prompt"]: a for a in lines(tmp_path / "rows.jsonl.answers.jsonl")[1:] if a["sample"] == 0}
        prompts = [prompt | {"own": answers.get(i)} for i, prompt in enumerate(lines(place / "prompts.jsonl"))]
        return said, lines(out), prompts

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(prompt):
    return prompt["own"]["response"]


@pytest.mark.parametrize("benign", ["given", "own", "both"])
@pytest.mark.parametrize("judge", ["odd", "odd_complies"])
def test_every_row(collected, place, tmp_path, benign, judge):
    """A judge that knows compliance alone takes a forbidden prompt whose safe answer complies for a benign one."""
    said, rows, prompts = collected("--judge", f"judging:{judge}", "--benign", benign, "--max-new-tokens", 60)
    expected = []
    for p in prompts:
        given = p.get("reference")
        harmless = judge == "odd_complies" and p.get("safe_answer") == NOT_SAFE
        if p["benign"] or harmless:
            given = NOT_SAFE if harmless else given
            own = collect.whole_sentences(p["own"]) if p["own"] else ""
            chosen = {"given": [given or own], "own": [own or given], "both": [given, own]}[benign]
            expected += [{"prompt": p["prompt"], "chosen": answer(text)} for text in chosen if text]
            assert p["benign"] is False or (p["own"] is None) == (benign == "given" and given is not None)
        elif p.get("safe_answer") == SAFE and len(text_of(p)) % 2:
            row = {"prompt": p["prompt"], "chosen": answer(SAFE), "rejected": answer(text_of(p)), "unsafe": True}
            expected.append(row)
    assert rows == expected and 0 < sum("unsafe" in row for row in rows) < len(rows)
    assert any(row["chosen"] not in (answer(t) for t in (SAFE, NOT_SAFE, "Of course.")) for row in rows)
    if judge == "odd":
        assert "4  unsafe question, left out: its safe answer is not safe" in said
    assert len(load_rows([str(tmp_path / "rows.jsonl")], load_tokenizer(place / "one"), 256)) == len(rows)


@pytest.mark.parametrize(
    "text, whole",
    [
        ("Do this:\n1. Boil it.\n2. Sti", "Do this:\n1. Boil it."),
        ("Do this:\n1. Boil", ""),
        ('He said "No." Then (so', 'He said "No."'),
        ("It is 3.5 metres", ""),
    ],
)
def test_whole_sentences(text, whole):
    assert collect.whole_sentences({"response": text, "complete": False}) == whole
    assert collect.whole_sentences({"response": text, "complete": True}) == text


def test_it_goes_on_where_it_was_stopped(collected, tmp_path):
    """In the middle of an answer's line; then in the middle of judging: no verdict is asked for twice."""
    _, rows, _ = collected("--batch-size", 4)
    file = tmp_path / "rows.jsonl.answers.jsonl"
    unjudged = [json.dumps({k: v for k, v in r.items() if k not in ("judge", "unsafe")}) for r in lines(file)]
    file.write_text("\n".join(unjudged)[: len("\n".join(unjudged[:9])) + 20])
    (tmp_path / "rows.jsonl").unlink()
    judging = importlib.import_module("judging")
    judging.calls.clear()
    judging.fails_at = 9
    said = collected("--batch-size", 4, code=2)
    assert said.splitlines()[-1].startswith("error: judging:odd: ConnectionError: gone away (on the prompt '")
    there = lines(file)
    assert {json.dumps(r) for r in there if "judge" not in r} >= set(unjudged[:9])
    assert sum("judge" in r for r in there) == 9 - 2  # a trial, and the one that failed
    first = set(judging.calls[1:8])
    judging.calls.clear()
    judging.fails_at = None
    _, again, _ = collected()
    assert again == rows and judging.calls and first.isdisjoint(judging.calls[1:])
    assert "was judged by " in collected("--judge", "judging:choosy", code=2)


def test_answers_without_a_verdict_are_left_out_and_told(collected):
    said, rows, prompts = collected("--judge", "judging:choosy")
    mute = [p for p in prompts if not p["benign"] and len(text_of(p)) % 3 == 0]
    assert f"{len(mute)}  unsafe question, left out: no verdict on its answer" in said
    asked = [row["prompt"] for row in rows if "unsafe" in row]
    assert asked and mute and not any(p["prompt"] in asked for p in mute)
