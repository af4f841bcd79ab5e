"""One bad prompt does not stop the rest, and answers of two experiments never mix, however things are spelled.

Over-long prompts and rows are left out, named and counted; what is wrong with a line names file and line in every
program; an id that the tokenizer lacks is never sampled. The models are random, the programs are run as users run them.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command import command
from models import LLAMA, network_of, prone_to
from samples import llama_tokenizer, row_of, said, toy_tokenizer, user, write
from training import toy_files, trained

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate import answers, collect
from backtrack.generate import Done, generate, one_answer
from backtrack.rows import load_rows
from model import InputError, save_model

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


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    words = [command, *sft(place, tmp_path / "out")[1:], "--data", mixed, "--heldout", held]
    told = trained(*words)
    assert "8 rows are left out, no room" in told and f"{mixed}:3 (" in told and "and 3 more" in told
    assert f"1 rows are left out, no room for an answer after the prompt under --max-length 64: {held}:2 (" in told
    trained(command, *sft(place, tmp_path / "short")[1:], "--data", tmp_path / "short.jsonl", "--heldout", held)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "short")]
    assert weights[0] == weights[1]
    out = tmp_path / "none"
    said = trained(*sft(place, out, "--data", write(tmp_path / "long.jsonl", *long)), code=2)
    assert "raise --max-length" in said and not out.exists()


@pytest.mark.parametrize(
    ("make", "text", "found"),
    [
        (toy_tokenizer, "<bos><start_of_turn>user\nHi", "<bos>"),
        (toy_tokenizer, "Hi<|eot_id|>", "<|eot_id|>"),  # another family's
        (llama_tokenizer, "a < b, <|, |> and <b>x</b> [1]", None),
    ],
)
def test_text_that_spells_special_tokens(tmp_path, capsys, make, text, found):
    path = write(tmp_path / "rows.jsonl", {"text": "plain"}, {"text": text}, row_of("Hi", f"no {text}"))
    load_rows([path], make(), 999)
    said = capsys.readouterr().err
    assert said == "" if found is None else f"{path}:2 ({found}), {path}:3" in said


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
    assert {(r["set"], r["n"], r.get("skipped")) for r in pooled} == {
        ("a", 6, 2),
        ("b", 6, None),
        ("unsafe overall", 12, 4),
    }


def test_no_prompt_is_left(place, tmp_path, asked):
    _, err = evaluated(place, tmp_path / "a.json", "--max-new-tokens", 999, code=2)
    assert "8 of 8 prompts are too long" in err
    assert not asked


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
    _, err = command(collect.main, *words)
    assert "2  left out: too long for the model" in err
    _, again = command(collect.main, *words)
    assert "2  left out: too long for the model" in again


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (user("a") + said("b"), "'prompt' must end with a user message"),
        ([{"content": "a"}], "'prompt' must hold"),
        ([{"role": "system", "content": "a"}, *user("b")], "Gemma's chat format has no system role"),
        (user("a") + user("b"), "turn 1 is the user's; Gemma's chats go user, assistant"),
    ],
)
def test_a_bad_chat_names_file_and_line_everywhere(place, tmp_path, prompt, complaint):
    """Training, evaluation, MT-Bench and collect have one rule."""
    row = {"set": "s", "benign": False, "question_id": 1, "turns": ["a"], "chosen": said("no"), "prompt": prompt}
    path = write(tmp_path / "p.jsonl", row | {"prompt": user("a")}, row)
    more = ("--prompts", path)
    for err in (
        evaluated(place, tmp_path / "a.json", *more, code=2)[1],
        command(collect.main, *("--ckpt", place / "one", *more, "--judge", "x", "--out", tmp_path / "r"), code=2)[1],
        trained(*sft(place, tmp_path / "out", "--data", path), code=2),
    ):
        assert f"error: {path}:2: {complaint}" in err


# ── However it is spelled ────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_are_compared_resolved(place, tmp_path, asked, monkeypatch):
    """sft, sft/, ./sft and a link to it: one model, one judge, asked once."""
    out = tmp_path / "a.json"
    (tmp_path / "link").symlink_to(place)
    evaluated(place, out, "--ckpt", tmp_path / "link/one", "--judge", tmp_path / "link/world.json")
    assert len(asked) == 6
    monkeypatch.chdir(place)
    for ckpt, judge in (
        (f"{place / 'one'}/", "world.json"),
        ("one", f"{place}/../{place.name}/world.json"),
        ("./one/", "./world.json"),
        (place / "one", place / "world.json"),
    ):
        result, _ = evaluated(place, out, "--ckpt", ckpt, "--judge", judge)
        assert {r["checkpoint"] for r in result["records"]} == {str(Path(ckpt))}
        evaluated(place, out, "--ckpt", ckpt, "one", "--judge", judge)
    assert len(asked) == 6


@pytest.mark.parametrize("what", ["directory", "file in the way", "answers"])
def test_a_bad_out_shows_before_the_work(place, tmp_path, asked, what):
    out = tmp_path / "a.json"
    if what == "directory":
        out.mkdir()
    elif what == "answers":
        (tmp_path / "a.answers.jsonl").mkdir()
    else:
        (tmp_path / "file").touch()
        out = tmp_path / "file/a.json"
    evaluated(place, out, code=2)
    words = ("--prompts", place / "prompts.jsonl", "--judge", place / "world.json", "--device", "cpu")
    if what != "answers":
        command(collect.main, "--ckpt", place / "one", *words, "--out", out, code=2)
        command(evaluate.main, "--merge", "gone.json", "--out", out, code=2)
    assert not asked


def test_an_evaluation_locks_its_answers(place, tmp_path, monkeypatch, asked):
    def held(path):
        raise InputError(f"{path}: process 7 writes there")

    monkeypatch.setattr(answers, "locked", held)
    _, err = evaluated(place, tmp_path / "a.json", code=2)
    assert f"{tmp_path / 'a.answers.jsonl'}: process 7" in err and not asked


def test_ctrl_c_says_where_the_answers_are(place, tmp_path, monkeypatch):
    real = answers.stream

    def dies(*args, **options):
        done = 0
        for event in real(*args, **options):
            yield event
            done += isinstance(event, Done)
            if done == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(answers, "stream", dies)
    _, err = evaluated(place, tmp_path / "a.json", code=130)
    assert err.splitlines()[-1].startswith(f"stopped: the answers so far are in {tmp_path / 'a.answers.jsonl'}")
    assert "4 of 6 answers are there already" in evaluated(place, tmp_path / "a.json")[1]


# ── MT-Bench ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def questions(tmp_path):
    rows = []
    for i, category in enumerate(("writing", "math", "stem")):
        turns = [f"Tell me {i}.", f"And {i} in short?"]
        rows.append({"prompt": user(turns[0]), "question_id": 81 + i, "category": category, "turns": turns})
    write(tmp_path / "mt.jsonl", *rows)
    return rows


def bench(ckpt, tmp_path, *more, code=0):
    words = ["--ckpt", ckpt, "--prompts", tmp_path / "mt.jsonl", "--device", "cpu", "--dtype", "float32"]
    words += ["--max-new-tokens", 6, "--mt-bench", tmp_path / "answers", *more]
    return command(evaluate.main, *words, code=code)[1]


def test_mt_bench_answers_of_another_experiment_are_refused(place, tmp_path, questions, asked):
    """Another model under the same name, another setting, another question: each is named, and nothing is asked."""
    ckpt = tmp_path / "sft"
    shutil.copytree(place / "one", ckpt)
    bench(ckpt, tmp_path)
    assert len(asked) == 6
    asked.clear()
    file = tmp_path / "answers/sft.answers"
    before = file.read_bytes()
    for name, flags in (
        ("reset_bias", ("--reset-bias", 3)),
        ("max_new_tokens", ("--max-new-tokens", 7)),
        ("dtype", ("--dtype", "bfloat16")),
    ):
        assert f"{file}: was begun with {name} " in bench(ckpt, tmp_path, *flags, code=2)
    shutil.copyfile(place / "two/model.safetensors", ckpt / "model.safetensors")
    assert f"{file}: was begun with weights " in bench(ckpt, tmp_path, code=2)
    shutil.copyfile(place / "one/model.safetensors", ckpt / "model.safetensors")
    write(tmp_path / "mt.jsonl", questions[0] | {"turns": ["Other.", "One?"]}, *questions[1:])
    assert f"{file}: was begun with prompts " in bench(ckpt, tmp_path, code=2)
    write(tmp_path / "mt.jsonl", *questions)
    bench(f"{ckpt}/", tmp_path)
    assert not asked and file.read_bytes() == before


def test_mt_bench_keeps_the_resets(place, tmp_path, questions):
    bench(place / "one", tmp_path, "--reset-bias", 50, "--max-resets", 2)
    for line in (tmp_path / "answers/one.jsonl").read_text().splitlines():
        assert json.loads(line)["choices"][0]["resets"] == [2, 2]


def test_a_long_mt_bench_question_is_left_out(place, tmp_path, questions):
    """Too long at once, or in its second turn: the others are answered."""
    long = [
        questions[0] | {"question_id": 1, "turns": [LONG, "x"]},
        questions[1] | {"question_id": 2, "turns": ["x", LONG]},
    ]
    path = write(tmp_path / "mt.jsonl", long[0], *questions, long[1])
    err = bench(place / "one", tmp_path)
    assert "2 questions are left out" in err and f"{path}:1" in err and f"{path}:5" in err
    ids = [json.loads(line)["question_id"] for line in (tmp_path / "answers/one.jsonl").read_text().splitlines()]
    assert sorted(ids) == [81, 82, 83]


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
    if "temperature" not in options:
        answer, _ = one_answer(model, prompts[0], vocab_size=tok.vocab_size, **options)
        assert answer == found[0].tokens


def test_programs_know_the_size_of_the_vocabulary(padded, place, tmp_path, questions):
    model, tok = padded
    save_model(prone_to(tok.vocab_size + 1, model, 1.0), tmp_path / "padded", tokenizer=tok)
    evaluated(place, tmp_path / "a.json", "--ckpt", tmp_path / "padded", "--temperature", 1)
    bench(tmp_path / "padded", tmp_path)
    words = ["--ckpt", tmp_path / "padded", "--prompts", place / "prompts.jsonl", "--judge", place / "world.json"]
    command(collect.main, *words, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "rows.jsonl")
