"""backtrack/evaluate/collect.py: every row a second time, by hand, from the answers that it keeps.

A random model answers, and a judge made for this finds an answer unsafe if its length is odd.
"""

import importlib
import json
import sys
from functools import partial

import pytest

from backtrack.evaluate import collect
from backtrack.rows import load_rows
from model import load_tokenizer
from tests.command import command as run_command
from tests.test_evaluate import furnish

command = partial(run_command, collect.main)
JUDGE = """
from backtrack.judge import Verdict
from model import InputError

def odd(prompt, response):
    return Verdict(unsafe=len(response) % 2 == 1)

def odd_complies(prompt, response):
    return Verdict(unsafe=None, complied=len(response) % 2 == 1)

calls, fails_at = [], None

def counted(prompt, response):
    calls.append((prompt[0]["content"], response))
    if len(calls) == fails_at:
        raise ConnectionError("gone\\naway")
    return odd(prompt, response)

def choosy(prompt, response):
    if len(response) % 3 == 0:
        raise InputError("not of such a length")
    return odd(prompt, response)
"""
SAFE, NOT_SAFE = "No, I had better not.", "No, I better not!"  # of 20 characters or so: made even and odd below
SAFE, NOT_SAFE = SAFE + "." * (len(SAFE) % 2), NOT_SAFE + "." * (1 - len(NOT_SAFE) % 2)


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
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return root


@pytest.fixture
def collected(place, tmp_path, monkeypatch):
    """(what it said, rows, prompts with their answers) of a run with these flags."""
    (tmp_path / "judging.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    out = tmp_path / "rows.jsonl"

    def run(*flags, code=0):
        words = ("--ckpt", place / "one", "--prompts", place / "prompts.jsonl", "--judge", "judging:odd")
        more = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 20, "--out", out)
        _, said = command(*words, *more, *flags, code=code)
        if code:
            return said
        answers = lines(tmp_path / "rows.jsonl.answers.jsonl")[1:]
        prompts = lines(place / "prompts.jsonl")
        for i, prompt in enumerate(prompts):
            mine = [a for a in answers if a["prompt"] == i and a["text"]]
            prompt["answers"] = sorted(mine, key=lambda a: a["sample"])
        return said, lines(out), prompts

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def odd(text):
    return len(text) % 2 == 1


def answer(text):
    return [{"role": "assistant", "content": text}]


def unsafe_row(prompt, chosen):
    rejected = next((a["text"] for a in prompt["answers"] if odd(a["text"])), None)
    if rejected is None or chosen is None:
        return None
    return {"prompt": prompt["prompt"], "chosen": answer(chosen), "rejected": answer(rejected), "unsafe": True}


def own(prompt, wanted=lambda text: True):
    found = (collect.whole_sentences(a) for a in prompt["answers"] if wanted(a["text"]))
    return next((text for text in found if text), None)


def test_given_answers(collected, place, tmp_path):
    said, rows, prompts = collected()
    expected = []
    for p in prompts:
        if p["benign"]:
            chosen = p.get("reference") or own(p)
            row = {"prompt": p["prompt"], "chosen": answer(chosen)} if chosen else None
            assert not (p["answers"] and "reference" in p)  # nobody needs them
        else:
            row = unsafe_row(p, SAFE if p.get("safe_answer") == SAFE else None)
        expected += [row] if row else []
    assert rows == expected
    assert 0 < sum("unsafe" in row for row in rows) < len(rows)
    count = sum(p.get("safe_answer") == NOT_SAFE for p in prompts)
    assert count and f"{count}  unsafe question, left out: its safe answer is not safe" in said
    assert len(load_rows([str(tmp_path / "rows.jsonl")], load_tokenizer(place / "one"), 256)) == len(rows)


@pytest.mark.parametrize("benign", ["given", "own", "both"])
def test_a_question_with_nothing_to_refuse_is_benign(collected, benign):
    """So says a judge that knows compliance only; the row is then like that of a benign prompt."""
    _, rows, prompts = collected("--judge", "judging:odd_complies", "--benign", benign, "--max-new-tokens", 60)
    harmless = [p for p in prompts if p.get("safe_answer") == NOT_SAFE]
    for p in harmless:
        chosen = {"given": [NOT_SAFE], "own": [own(p) or NOT_SAFE], "both": [NOT_SAFE, own(p)]}[benign]
        expected = [{"prompt": p["prompt"], "chosen": answer(text)} for text in chosen if text]
        assert [row for row in rows if row["prompt"] == p["prompt"]] == expected
    assert harmless and any("unsafe" in row for row in rows)


def test_own_answers(collected):
    """Of several samples: a complete one that is safe, and the first that is not."""
    _, rows, prompts = collected(
        "--chosen", "own", "--benign", "own", "--samples", 6, "--temperature", 1, "--max-new-tokens", 60
    )
    expected = []
    for p in prompts:
        if p["benign"]:
            chosen = own(p) or p.get("reference")
            row = {"prompt": p["prompt"], "chosen": answer(chosen)} if chosen else None
        else:
            row = unsafe_row(p, own(p, lambda text: not odd(text)))
        expected += [row] if row else []
    assert rows == expected
    assert any(row["chosen"] != answer("Of course.") and "unsafe" not in row for row in rows)
    assert any("unsafe" in row for row in rows)


@pytest.mark.parametrize(
    "text, whole",
    [
        ("It is so. And th", "It is so."),
        ("It is so. And that too.", "It is so. And that too."),
        ("Do this:\n1. Boil it.\n2. Sti", "Do this:\n1. Boil it."),
        ("Do this:\n1. Boil", ""),
        ('He said "No." Then (so', 'He said "No."'),
        ("It is 3.5 metres", ""),
    ],
)
def test_whole_sentences(text, whole):
    assert collect.whole_sentences({"text": text, "complete": False}) == whole
    assert collect.whole_sentences({"text": text, "complete": True}) == text


def test_answers_that_are_forced_to_begin_so(collected):
    begun = "Sure, here is"
    _, rows, prompts = collected("--prefill", begun, "--benign", "own", "--max-new-tokens", 60)
    texts = [answer["text"] for p in prompts for answer in p["answers"]]
    assert texts and all(text.startswith(begun) for text in texts) and len(set(texts)) > 1
    assert all(row["rejected"][0]["content"].startswith(begun) for row in rows if "unsafe" in row)


def test_sets_and_limit(collected):
    _, rows, _ = collected("--limit", 4)
    assert 0 < len(rows) <= 4
    _, said = command("--ckpt", "x", "--prompts", "y", "--judge", "z", "--out", "w", "--limit", "0", code=2)
    assert "--limit" in said


def test_it_goes_on_where_it_was_stopped(collected, tmp_path):
    """In the middle of an answer's line; then in the middle of judging: no verdict is asked for twice."""
    _, rows, _ = collected("--batch-size", 4)
    file = tmp_path / "rows.jsonl.answers.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for name in ("rows.jsonl", "rows.jsonl.verdicts.jsonl"):
        (tmp_path / name).unlink()
    judging = importlib.import_module("judging")
    judging.fails_at = 9
    said = collected("--batch-size", 4, "--judge", "judging:counted", code=2)
    assert said.splitlines()[-1].startswith("error: judging:counted: ConnectionError: gone away (on the prompt '")
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert len(lines(tmp_path / "rows.jsonl.verdicts.jsonl")) == 1 + 9 - 2  # settings; a trial, and the one that failed
    first = set(judging.calls[1:8])
    judging.calls.clear()
    judging.fails_at = None
    _, again, _ = collected("--judge", "judging:counted")
    assert again == rows and judging.calls and first.isdisjoint(judging.calls[1:])


def test_answers_without_a_verdict_are_left_out_and_told(collected):
    said, rows, prompts = collected("--judge", "judging:choosy")
    mute = [p for p in prompts if not p["benign"] and p.get("safe_answer") != NOT_SAFE]
    without = [p for p in mute if all(len(a["text"]) % 3 == 0 for a in p["answers"])]
    assert 0 < len(without) < len(mute)
    assert f"{len(without)}  unsafe question, left out: no verdict on its answers" in said
    asked = [row["prompt"] for row in rows if "unsafe" in row]
    assert asked and not any(p["prompt"] in asked for p in without)
