"""One bad prompt does not stop the rest, and answers of two experiments never mix, however things are spelled.

Over-long prompts and rows are left out, named and counted; an id that the tokenizer lacks is never sampled.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from command import command
from models import LLAMA, network_of, prone_to
from samples import row_of, said, toy_tokenizer, user, write
from training import toy_files, trained

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate import answers, collect
from backtrack.generate import generate
from model import save_model

LONG = "How do I open the gate? " * 40  # more than the model's 256 positions


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two random models, the judge of the toy world, and prompts of which one is too long and one nearly."""
    root = tmp_path_factory.mktemp("place")
    (root / "world.json").write_bytes(toy_files()["world.json"])
    for seed, name in enumerate(("one", "two")):
        save_model(network_of(LLAMA, seed), root / name, tokenizer=toy_tokenizer())
    ask = partial(dict, benign=False, target="Sure")
    prompts = [ask(prompt=user(f"Hi {i}"), set="ab"[i % 2]) for i in range(6)]
    prompts.insert(3, ask(prompt=user(LONG), set="a"))
    prompts.append(ask(prompt=user(LONG), set="long"))
    write(root / "prompts.jsonl", *prompts)
    return root


def evaluated(place, out, *more, ckpt=("one",), code=0):
    words = ["--ckpt", *(place / name for name in ckpt), "--prompts", place / "prompts.jsonl", "--device", "cpu"]
    words += ["--dtype", "float32", "--max-new-tokens", 4, "--batch-size", 2, "--out", out]
    _, err = command(evaluate.main, *words, *more, code=code)
    return (json.loads(Path(out).read_text()) if code == 0 else None), err


@pytest.fixture
def asked(monkeypatch):
    """How many prompts the sampler gets from now on."""
    rows, real = [], answers.stream

    def counted(model, prompts, **options):
        rows.extend(prompts)
        return real(model, prompts, **options)

    monkeypatch.setattr(answers, "stream", counted)
    return rows


def sft(place, out, *more):
    words = ["sft", "--init", place / "one", "--device", "cpu", "--out", out, "--max-length", 64, "--steps", 2]
    return [*words, "--batch-size", 2, *more]


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_training_goes_on_without_the_long_rows(place, tmp_path, command):
    """And is then what it would be on a file without them."""
    rows = [row_of(f"Hi {i}", "no", "yes", unsafe=True) for i in range(4)]
    long = [row_of(LONG, "no", "yes", unsafe=True)] * 8
    mixed = write(tmp_path / "mixed.jsonl", *rows[:2], *long[:7], *rows[2:], long[0])
    held = write(tmp_path / "held.jsonl", rows[0], long[0])
    write(tmp_path / "short.jsonl", *rows)
    told = trained(command, *sft(place, tmp_path / "out")[1:], "--data", mixed, "--heldout", held)
    assert "8 rows are left out, no room" in told and f"{mixed}:3 (" in told and "and 3 more" in told
    assert f"1 rows are left out, no room for an answer after the prompt under --max-length 64: {held}:2 (" in told
    trained(command, *sft(place, tmp_path / "short")[1:], "--data", tmp_path / "short.jsonl", "--heldout", held)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "short")]
    assert weights[0] == weights[1]
    out = tmp_path / "none"
    said = trained(*sft(place, out, "--data", write(tmp_path / "long.jsonl", *long)), code=2)
    assert "raise --max-length" in said and not out.exists()


# ── Evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_long_prompts_are_skipped_and_counted(place, tmp_path, asked):
    """In no batch, in the result, and the same for every model; the others are as they would be without them."""
    result, err = evaluated(place, tmp_path / "a.json", ckpt=("one", "two"))
    assert len(asked) == 12 and "2 of 8 prompts are too long" in err
    assert f"{place / 'prompts.jsonl'}:4, {place / 'prompts.jsonl'}:8; skipped" in err
    assert [(s["prompt"], s["set"], s["where"].rpartition(":")[2]) for s in result["skipped"]] == [
        (2, "a", "4"),  # sets come one after the other
        (7, "long", "8"),
    ]
    assert "has positions for" in result["skipped"][0]["reason"]
    of = {(r["set"], Path(r["checkpoint"]).name): r for r in result["records"]}
    assert {name for name, _ in of} == {"a", "b", "unsafe overall"}  # nothing is left of `long`
    for name, n, skipped in (("a", 3, 1), ("b", 3, None), ("unsafe overall", 6, 2)):
        for ckpt in ("one", "two"):
            assert (of[name, ckpt]["n"], of[name, ckpt].get("skipped")) == (n, skipped)
    asked.clear()
    again, _ = evaluated(place, tmp_path / "a.json", ckpt=("one", "two"))
    assert not asked and again["records"] == result["records"]
    command(evaluate.main, "--merge", tmp_path / "a.json", tmp_path / "a.json", "--out", tmp_path / "both.json")
    pooled = json.loads((tmp_path / "both.json").read_text())["records"]
    counts = {(r["set"], r["n"], r.get("skipped")) for r in pooled}
    assert counts == {("a", 6, 2), ("b", 6, None), ("unsafe overall", 12, 4)}


def test_room_is_counted_for_what_is_asked(place, tmp_path, asked):
    """With on_reset=keep every attempt stays in the cache. What has just room is answered."""
    tok = toy_tokenizer()
    row = {"prompt": user("Hi"), "prefill": " the", "set": "s", "benign": False}
    length = len(tok.render(row["prompt"])) + len(tok.encode(" the"))
    prompts = write(tmp_path / "p.jsonl", row)
    for condition, room in (
        (("--max-resets", 3), 3 + 20),
        (("--max-resets", 3, "--on-reset", "keep"), 3 + 4 * 20),
        (("--max-resets", 4, "--on-reset", "keep", "truncate"), 4 + 5 * 20),  # the longest of them counts
    ):
        for positions, code in ((length + room, 0), (length + room - 1, 2)):
            ckpt = tmp_path / f"{room}-{positions}"
            save_model(network_of(LLAMA, max_position_embeddings=positions), ckpt, tokenizer=tok)
            more = ("--ckpt", ckpt, "--prompts", prompts, "--max-new-tokens", 20, *condition)
            evaluated(place, tmp_path / f"{ckpt.name}.json", *more, code=code)
    assert len(asked) == 4


def test_collect_leaves_long_prompts_out(place, tmp_path):
    words = ["--ckpt", place / "one", "--prompts", place / "prompts.jsonl", "--judge", place / "world.json"]
    words += ["--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "rows.jsonl"]
    for _ in range(2):
        assert "2  left out: too long for the model" in command(collect.main, *words)[1]


def test_a_bad_chat_names_file_and_line_everywhere(place, tmp_path):
    """Training, evaluation, MT-Bench and collect have one rule."""
    row = {"prompt": user("a"), "set": "s", "benign": False, "question_id": 1, "turns": ["a"], "chosen": said("no")}
    path = write(tmp_path / "p.jsonl", row, row | {"prompt": user("a") + user("b")})
    more = ("--prompts", path)
    for err in (
        evaluated(place, tmp_path / "a.json", *more, code=2)[1],
        command(collect.main, *("--ckpt", place / "one", *more, "--judge", "x", "--out", tmp_path / "r"), code=2)[1],
        trained(*sft(place, tmp_path / "out", "--data", path), code=2),
    ):
        assert f"error: {path}:2: turn 1 is the user's; Gemma's chats go user, assistant" in err


# ── However it is spelled ────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_are_compared_resolved(place, tmp_path, asked, monkeypatch):
    """sft, sft/, ./sft and a link to it: one model, one judge, asked once."""
    out = tmp_path / "a.json"
    (tmp_path / "link").symlink_to(place)
    evaluated(place, out, "--ckpt", tmp_path / "link/one", "--judge", tmp_path / "link/world.json")
    assert len(asked) == 6
    monkeypatch.chdir(place)
    for ckpt, judge in (
        ("one", f"{place}/../{place.name}/world.json"),
        ("./one/", place / "world.json"),
    ):
        result, _ = evaluated(place, out, "--ckpt", ckpt, "--judge", judge)
        assert {r["checkpoint"] for r in result["records"]} == {str(Path(ckpt))}
        evaluated(place, out, "--ckpt", ckpt, "one", "--judge", judge)
    assert len(asked) == 6


@pytest.mark.parametrize("name", ["a.json", "a.answers.jsonl"])
def test_a_bad_out_shows_before_the_work(place, tmp_path, asked, name):
    (tmp_path / name).mkdir()
    evaluated(place, tmp_path / "a.json", code=2)
    if name == "a.json":
        words = ("--prompts", place / "prompts.jsonl", "--judge", place / "world.json", "--out", tmp_path / name)
        command(collect.main, "--ckpt", place / "one", *words, "--device", "cpu", code=2)
        command(evaluate.main, "--merge", "gone.json", "--out", tmp_path / name, code=2)
    assert not asked


# ── Padded vocabularies ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def padded():
    """A model that would say nothing but ids which the tokenizer does not have."""
    tok = toy_tokenizer()
    model = network_of(LLAMA, vocab_size=tok.vocab_size + 64, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[tok.vocab_size :] *= 30
    return model, tok


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=repr)
def test_ids_that_the_tokenizer_lacks_are_never_sampled(padded, options):
    """What is sampled is what a model without the padding samples, to the last token."""
    model, tok = padded
    options = options | {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "max_new_tokens": 30}
    prompts = [tok.render(user(f"Hi {i}")) for i in range(8)]
    without = network_of(LLAMA, vocab_size=tok.vocab_size, tie_word_embeddings=False)
    rows = {name: p[: tok.vocab_size] if p.shape[0] > tok.vocab_size else p for name, p in model.state_dict().items()}
    without.load_state_dict(rows)
    found = generate(model, prompts, vocab_size=tok.vocab_size, **options)
    expected = generate(without, prompts, **options)
    assert [(g.tokens, g.discarded) for g in found] == [(g.tokens, g.discarded) for g in expected]
    loose = generate(model, prompts, **options)
    assert any(id >= tok.vocab_size for g in loose for id in g.tokens)  # the test can fail


def test_programs_know_the_size_of_the_vocabulary(padded, place, tmp_path):
    model, tok = padded
    save_model(prone_to(tok.vocab_size + 1, model, 1.0), tmp_path / "padded", tokenizer=tok)
    evaluated(place, tmp_path / "a.json", "--ckpt", tmp_path / "padded", "--temperature", 1)
    words = ["--ckpt", tmp_path / "padded", "--prompts", place / "prompts.jsonl", "--judge", place / "world.json"]
    command(collect.main, *words, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "rows.jsonl")
