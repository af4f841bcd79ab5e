"""What users have seen of unsafe answers: counted by hand on a handful of events, and the program on the toy's kind of
files."""

import json
from functools import partial

import pytest
import torch
from command import command as run_command
from models import LLAMA, network_of, prone_to
from samples import toy_tokenizer, user, write

from backtrack.evaluate import hold_back
from backtrack.generate import Done, Generation, Reset, Token
from backtrack.judge import Verdict
from backtrack.report import figures
from model import InputError, save_model

command = partial(run_command, hold_back.main)


def attempt(row, words, survives):
    """Its events, a token for each of the words, and a last one."""
    tok = toy_tokenizer()
    ids = [tok.encode(f" {word}")[-1] for word in words]
    end = Done(row, Generation(ids, [], 0, "stop", 0, 0.0, 0.0)) if survives else Reset(row, ids)
    return [*(Token(row, id) for id in ids), end]


def judge(prompt, text):
    return Verdict(unsafe="!" in text)


def test_every_number_by_hand():
    """An exclamation mark is what nobody should see. Row 0 says it as the third of four, row 1 of five, row 2 lets it
    stand, row 3 never says it; row 4 was forced to."""
    tok = toy_tokenizer()
    events = attempt(0, ["a", "b", "!", "c"], False) + attempt(0, ["d"], True)
    events += attempt(1, ["a", "b", "!", "c", "d"], False) + attempt(1, ["d"], True)
    events += attempt(2, ["a", "!", "b"], True) + attempt(3, ["a", "b"], False) + attempt(3, ["c"], True)
    events += attempt(4, ["a", "!", "b"], False) + attempt(4, ["c"], True)
    prefill = [[], [], [], [], [1, 2]]
    found = hold_back.measure(events, prefill, [{"prompt": user("x")}] * 5, judge, tok)
    asked = {r["hold_back"]: r["seen"] for r in found if r["group"] == "asked"}
    forced = {r["hold_back"]: r["seen"] for r in found if r["group"] == "forced"}
    assert asked == {0: 3, 1: 3, 2: 2, 4: 1, 8: 1, 16: 1, 32: 1, 64: 1}
    assert forced == {0: 1, 1: 1} | dict.fromkeys((2, 4, 8, 16, 32, 64), 0)  # one sampled after it
    counts = {r["group"]: (r["answers"], r["unsafe"], r["survived"]) for r in found}
    assert counts == {"asked": (4, 3, 1), "forced": (1, 1, 0)}


def test_an_answer_without_a_verdict_is_left_out(capsys):
    """Of two answers that say "!" the judge is silent about one."""
    tok = toy_tokenizer()
    events = attempt(0, ["a", "!"], True) + attempt(1, ["b", "!"], True)

    def silent(prompt, text):
        if "a" in text:
            raise InputError("too long")
        return judge(prompt, text)

    found = hold_back.measure(events, [[], []], [{"prompt": user("x")}] * 2, silent, tok)
    assert {(r["answers"], r["unsafe"], r["survived"]) for r in found} == {(1, 1, 1)}
    assert "1 of 2 answers are left out" in capsys.readouterr().err


@pytest.fixture
def place(tmp_path):
    tok = toy_tokenizer()
    model = prone_to(tok.reset_id, network_of(LLAMA), times=4.0)
    save_model(model, tmp_path / "model", tokenizer=tok)
    rows = [
        {"prompt": user(f"Question {i}?"), "set": "a", "benign": i == 0, "prefill": "It" * (i % 2)} for i in range(8)
    ]
    write(tmp_path / "prompts.jsonl", *rows)
    (tmp_path / "harsh.py").write_text(
        "from backtrack.judge import Verdict\ndef judge(prompt, text):\n    return Verdict(unsafe=len(text) > 9)\n"
        "def mild(prompt, text):\n    return Verdict(unsafe=False)\n"
    )
    return tmp_path


@torch.no_grad()
def test_the_program_and_its_picture(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    words = ["--ckpt", place / "model", "--prompts", place / "prompts.jsonl", "--max-new-tokens", 20]
    out = place / "results" / "toy-hold-back.json"
    printed, _ = command(*words, "--judge", "harsh:judge", "--batch-size", 3, "--out", out)
    records = json.loads(out.read_bytes())["records"]
    assert {r["answers"] for r in records if r["group"] == "forced"} == {4}  # the benign one is left out
    assert {r["answers"] for r in records if r["group"] == "asked"} == {3}
    for group in ("asked", "forced"):
        seen = [r["seen"] for r in records if r["group"] == group]
        assert seen == sorted(seen, reverse=True) and seen[-1] >= records[0]["survived"]
        assert group in printed
    before = out.read_bytes()
    command(*words, "--judge", "harsh:judge", "--out", out)  # batches make no difference
    assert json.loads(out.read_bytes())["records"] == json.loads(before)["records"]
    figure, title = figures.hold_back_figure(out.parent)
    assert figure.axes and title.startswith("A stream that lags 4 tokens behind")
    _, said = command(*words, "--judge", "harsh:mild", "--out", out, code=2)
    assert "nothing to hold back" in said
