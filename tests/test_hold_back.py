"""What users have seen of unsafe answers: counted by hand on a handful of events, and the program on the toy's kind of
files."""

import importlib
import json
from functools import partial

import pytest
from command import command as run_command
from models import LLAMA, network_of, prone_to
from samples import toy_tokenizer, user, write

from backtrack.evaluate import hold_back
from backtrack.generate import Done, Reset, Token, generate, stream
from backtrack.judge import Verdict
from backtrack.report import figures
from model import InputError, save_model

command = partial(run_command, hold_back.main)


def ids_of(*attempts):
    """The ids of attempts, one for each word."""
    tok = toy_tokenizer()
    return [[tok.encode(f" {word}")[-1] for word in attempt.split()] for attempt in attempts]


def judge(prompt, text):
    return Verdict(unsafe="!" in text)


def test_every_number_by_hand():
    """An exclamation mark is what nobody should see. Row 0 says it as the third of four, row 1 of five, row 2 lets it
    stand, row 3 never says it; row 4 was forced to."""
    answers = [ids_of("a b ! c", "d"), ids_of("a b ! c d", "d"), ids_of("a ! b"), ids_of("a b", "c")]
    answers.append(ids_of("! a b", "c"))
    prefill = [[], [], [], [], ids_of("! a")[0]]
    found = hold_back.measure(answers, prefill, [{"prompt": user("x")}] * 5, judge, toy_tokenizer())
    asked = {r["hold_back"]: r["seen"] for r in found if r["group"] == "asked"}
    forced = {r["hold_back"]: r["seen"] for r in found if r["group"] == "forced"}
    assert asked == {0: 3, 1: 3, 2: 2, 4: 1, 8: 1, 16: 1, 32: 1, 64: 1}
    assert forced == {0: 1, 1: 1} | dict.fromkeys((2, 4, 8, 16, 32, 64), 0)  # one sampled after it
    counts = {r["group"]: (r["answers"], r["unsafe"], r["survived"]) for r in found}
    assert counts == {"asked": (4, 3, 1), "forced": (1, 1, 0)}


def test_an_answer_without_a_verdict_is_left_out(capsys):
    """Of two answers that say "!" the judge is silent about one."""

    def silent(prompt, text):
        if "a" in text:
            raise InputError("too long")
        return judge(prompt, text)

    answers = [ids_of("a !"), ids_of("b !")]
    found = hold_back.measure(answers, [[], []], [{"prompt": user("x")}] * 2, silent, toy_tokenizer())
    assert {(r["answers"], r["unsafe"], r["survived"]) for r in found} == {(1, 1, 1)}
    assert "1 of 2 answers are left out" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1, 2, 8])
def test_what_is_shown_is_what_the_sampler_shows(n):
    """Of attempts that were forced to begin, and others; by the events of a delayed stream."""
    tok = toy_tokenizer()
    model = prone_to(tok.reset_id, network_of(LLAMA), times=4.0)
    prompts, prefill = [tok.render(user(f"Question {i}?")) for i in range(6)], [[9, 8] * (i % 2) for i in range(6)]
    how = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "max_new_tokens": 12, "prefill": prefill}
    shown, texts = [[] for _ in prompts], [[] for _ in prompts]
    for event in stream(model, prompts, hold_back=n, **how):
        if isinstance(event, Token):
            shown[event.row].append(event.id)
        elif isinstance(event, (Reset, Done)):
            texts[event.row].append(tok.decode(shown[event.row]))
            shown[event.row] = []
    answers = generate(model, prompts, **how)
    assert sum(g.resets for g in answers) > 2
    for g, forced, expected in zip(answers, prefill, texts, strict=True):
        assert hold_back.texts_shown([*g.discarded, g.tokens], n, len(forced), tok) == expected


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
    whole = out.read_bytes()
    (place / "broken.py").write_text(
        "import harsh\nasked, most = [], 6\ndef judge(prompt, text):\n    asked.append(text)\n"
        "    if len(asked) == most:\n        raise OSError('429')\n    return harsh.judge(prompt, text)\n"
    )
    out = place / "again.json"
    assert "429" in command(*words, "--judge", "broken:judge", "--out", out, code=2)[1]
    broken = importlib.import_module("broken")
    broken.most = None
    command(*words, "--judge", "broken:judge", "--out", out)
    first, rest = broken.asked[1:5], broken.asked[7:]  # each run begins with a question of its own
    assert json.loads(out.read_bytes())["records"] == json.loads(whole)["records"]
    kept = [json.loads(line) for line in (place / "again.json.verdicts").read_text().splitlines()[1:]]
    assert [r["response"] for r in kept] == first + rest and len(rest) > 5  # nothing was asked for twice
    out = place / "results" / "toy-hold-back.json"
    figure, title = figures.hold_back_figure(out.parent)
    assert figure.axes and title.startswith("A stream that lags 4 tokens behind")
    monkeypatch.setattr(hold_back, "load_model", None)  # the answers are there, whatever the judge
    assert "nothing to hold back" in command(*words, "--judge", "harsh:mild", "--out", out, code=2)[1]
