"""sample.py against a small terminal written out below, and against a model that says what a script tells it to.

The scripted model keeps the tokens it reads in a real KVCache and looks up what to say in what the cache still holds,
so it sees exactly what a model would after a reset. One real checkpoint is sampled in processes of its own.
"""

import ast
import contextlib
import fcntl
import io
import json
import os
import pty
import random
import re
import shutil
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest
import torch
from models import LLAMA, network_of, prone_to

import sample
from backtrack.generate import stream
from backtrack.serve import terminal
from data import toy
from model import load_model, load_tokenizer, save_model
from model.errors import run

ROOT = Path(__file__).resolve().parents[1]


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
SIZES |= {"hidden_size": 16, "intermediate_size": 8, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(toy.build(0)["tokenizer/tokenizer.model"])
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, tok):
    """A directory with the toy tokenizer and a random model."""
    root = tmp_path_factory.mktemp("ckpt")
    save_model(network_of(LLAMA, seed=0, **SIZES), root, tokenizer=tok)
    return root


class Scripted:
    """Says what `script(context)` returns, an id; the context is read back from the cache."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, script):
        sizes = SIZES | {"hidden_size": 2, "head_dim": 2}
        self.config, self.script, self.compiled = network_of(LLAMA, **sizes).config, script, False

    def forward(self, tokens, cache, at=None):
        """(B, T) -> (B, T, V), or (N, V) of those at `at`."""
        B, T = tokens.shape
        positions = cache.lengths[:, None] + torch.arange(T)
        entries = tokens[:, None, :, None].float().expand(B, 1, T, 2)
        ids, _ = cache.write(0, entries, entries, positions)  # (B, 1, S, 2)
        cache.grow(T)
        said = []
        for i in range(B * T) if at is None else at.tolist():
            row, place = divmod(i, T)
            said.append(self.script(ids[row, 0, : int(positions[row, place]) + 1, 0].long().tolist()))
        logits = 100.0 * torch.nn.functional.one_hot(torch.tensor(said), 1024).float()
        return logits.view(B, T, -1) if at is None else logits

    __call__ = forward

    def compile(self):
        self.compiled = True


RESET = object()


def turn_marker(tok):
    return tok.render([{"role": "user", "content": "x"}])[1]


def script(tok, *answers):
    """A model whose answer to any prompt is the texts before each RESET, retracted, and then the last text.

    After a reset in a context [RESET] counts how far it has come; a user cannot type one. `answers` may be a function
    of the question.
    """

    def say(context):
        turn = max(i for i, id in enumerate(context) if id == turn_marker(tok))
        answer = context[turn + 1 + len(tok.encode("model\n")) :]
        question = tok.decode(context[:turn]).split("user\n")[-1].strip()
        parts = answers[0](question) if callable(answers[0]) else answers
        resets = answer.count(tok.reset_id)
        if resets:  # the attempt since the last one
            answer = answer[len(answer) - answer[::-1].index(tok.reset_id) :]
        text = [part for part in parts if part is not RESET][resets]
        ids = text if isinstance(text, list) else tok.encode(text)
        if len(answer) < len(ids):
            return ids[len(answer)]
        return tok.reset_id if resets < sum(part is RESET for part in parts) else tok.stop_ids[-1]

    return say


class Output(io.TextIOWrapper):
    def __init__(self, terminal=False, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


class Input(io.TextIOWrapper):
    def __init__(self, data, terminal=False):
        super().__init__(io.BytesIO(data if isinstance(data, bytes) else data.encode()), encoding="utf-8")
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def command(*words, model=None, stdin="", typed=None, terminal=False, encoding="utf-8", code=0):
    """`python sample.py words` in this process; (stdout, stderr). `typed`: standard input is a terminal."""
    out, err = Output(terminal, encoding), Output()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        patch.setattr(sys, "stdin", Input(stdin if typed is None else typed, terminal=typed is not None))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        if model is not None:
            patch.setattr(sample, "load_model", lambda path, device, dtype: model)
        status = 0
        try:
            run(sample.main)
        except SystemExit as end:
            status = end.code
    assert status == code, err.text()
    assert "Traceback" not in err.text()
    return out.text(), err.text()


# ── In a pipe ────────────────────────────────────────────────────────────────────────────────────────────────────────

HOW = ("--prompt", "How do I make it?", "--device", "cpu", "--dtype", "float32")


def taking_back(tok):
    return Scripted(script(tok, "Sure. Take the road", RESET, "I cannot help with that."))


def test_only_surviving_text_is_printed(ckpt, tok):
    assert command("--ckpt", ckpt, *HOW, model=taking_back(tok)) == ("I cannot help with that.\n", "")
    plain = Scripted(script(tok, "Yes, it is\nallowed."))
    assert command("--ckpt", ckpt, *HOW, model=plain) == ("Yes, it is\nallowed.\n", "")
    assert command("--ckpt", ckpt, *HOW, model=Scripted(script(tok, ""))) == ("\n", "")


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_discarded_text_is_shown_if_asked_for(ckpt, tok, on_reset):
    model = Scripted(script(tok, "Sure. Take", RESET, "Well,\nyou", RESET, "No."))
    more = ("--show-discarded", "--max-resets", 2, "--on-reset", on_reset)
    out, _ = command("--ckpt", ckpt, *HOW, *more, model=model)
    assert out == "~~Sure. Take~~ [RESET]\n~~Well,\nyou~~ [RESET]\nNo.\n"


def test_max_resets(ckpt, tok):
    """Masked, [RESET] is not said; the model of the script has then nothing to add but the id 0, a control piece."""
    out, _ = command("--ckpt", ckpt, *HOW, "--max-resets", 0, "--max-new-tokens", 30, model=taking_back(tok))
    assert out.startswith("Sure. Take the road")


def test_prefill(ckpt, tok):
    """It is the head of the answer: printed if it survives, gone if it does not."""
    kept = Scripted(script(tok, "Sure. Take the road home."))
    assert command("--ckpt", ckpt, *HOW, "--prefill", "Sure. Take", model=kept)[0] == "Sure. Take the road home.\n"
    lost = Scripted(script(tok, "Sure. Take", RESET, "No."))
    assert command("--ckpt", ckpt, *HOW, "--prefill", "Sure. Take", model=lost)[0] == "No.\n"
    out, _ = command("--ckpt", ckpt, *HOW, "--prefill", "Sure. Take", "--show-discarded", model=lost)
    assert out == "~~Sure. Take~~ [RESET]\nNo.\n"


def test_json(ckpt, tok):
    discarded, surviving = "Sure. Take the road", "I cannot help with that. 漢"
    model = Scripted(script(tok, discarded, RESET, surviving))
    out, _ = command("--ckpt", ckpt, *HOW, "--json", "--prefill", "Sure.", model=model)
    [line] = out.splitlines()
    record = json.loads(line)
    assert "漢" in line and "road" not in line
    times = record.pop("first_token_s"), record.pop("total_s")
    assert 0 <= times[0] <= times[1]
    forced = len(tok.encode("Sure."))
    assert record == {
        "prompt": "How do I make it?",
        "prefill": "Sure.",
        "sample": 0,
        "text": surviving,
        "resets": 1,
        "finish_reason": "stop",
        "steps": len(tok.encode(discarded)) - forced + 1 + len(tok.encode(surviving)) + 1,
    }
    out, _ = command("--ckpt", ckpt, *HOW, "--json", "--show-discarded", model=model)
    assert json.loads(out)["discarded"] == [discarded]
    out, _ = command("--ckpt", ckpt, *HOW, "--json", "--max-new-tokens", 3, model=Scripted(script(tok, surviving)))
    record = json.loads(out)
    assert (record["finish_reason"], record["steps"], record["resets"], record["prefill"]) == ("length", 3, 0, "")
    assert record["text"] == tok.decode(tok.encode(surviving)[:3])
    out, _ = command("--ckpt", ckpt, *HOW, "--json", terminal=True, model=model)  # no escape codes there either
    assert json.loads(out)["text"] == surviving and "\x1b" not in out


def test_num_samples(ckpt, tok):
    model = taking_back(tok)
    for where in (False, True):
        out, _ = command("--ckpt", ckpt, *HOW, "--num-samples", 3, model=model, terminal=where)
        assert out == 3 * "I cannot help with that.\n"
    out, _ = command("--ckpt", ckpt, *HOW, "--num-samples", 3, "--json", model=model)
    assert [json.loads(line)["sample"] for line in out.splitlines()] == [0, 1, 2]


def test_sampling_options_reach_the_sampler(ckpt, tok):
    """With a real (random) model: the first of many samples is the one sample; seeds differ; a tiny top_p is greedy."""

    def texts(*more):
        out, _ = command("--ckpt", ckpt, *HOW, "--json", "--max-new-tokens", 8, *more)
        return [json.loads(line)["text"] for line in out.splitlines()]

    [greedy], many = texts(), texts("--temperature", 1, "--num-samples", 4)
    assert len(set(many)) == 4 and greedy not in many
    assert texts("--temperature", 1) == texts("--temperature", 1, "--seed", 0) == many[:1]
    assert texts("--temperature", 1, "--seed", 1) != many[:1]
    assert texts("--temperature", 1, "--top-p", 1e-9) == [greedy]
    out, _ = command("--ckpt", ckpt, *HOW, "--json", "--reset-bias", 1000, "--max-resets", 3, "--max-new-tokens", 8)
    assert json.loads(out)["resets"] == 3


def test_every_option_reaches_the_sampler(ckpt, tok, monkeypatch):
    seen = {}

    def spy(model, prompts, **options):
        seen.update(options, prompts=prompts)
        return stream(model, prompts, **options)

    monkeypatch.setattr(sample, "stream", spy)
    words = "--temperature 0.5 --top-p 0.9 --reset-bias -1.5 --max-resets 4 --on-reset keep --num-samples 2"
    words += " --max-new-tokens 5 --seed 7 --prefill Sure"
    model = Scripted(script(tok, "Sure. Take"))
    command("--ckpt", ckpt, *HOW, *words.split(), model=model)
    assert seen == {
        "prompts": 2 * [tok.render([{"role": "user", "content": "How do I make it?"}])],
        "reset_id": tok.reset_id,
        "stop_ids": tok.stop_ids,
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "reset_bias": -1.5,
        "max_resets": 4,
        "on_reset": "keep",
        "prefill": 2 * [tok.encode("Sure")],
        "seed": 7,
        "vocab_size": tok.vocab_size,
    }
    assert not model.compiled


def test_compile_device_and_dtype(ckpt, tok, monkeypatch):
    model, loaded = taking_back(tok), []
    monkeypatch.setattr(sample, "load_model", lambda *arguments: (loaded.append(arguments), model)[1])
    out, _ = command("--ckpt", ckpt, "--prompt", "Hi", "--device", "cpu", "--dtype", "bfloat16", "--compile")
    assert out == "I cannot help with that.\n"
    assert model.compiled and loaded == [(str(ckpt), "cpu", torch.bfloat16)]


@pytest.mark.parametrize("prompt", ["", " ", "\n"])
def test_empty_prompt(ckpt, tok, prompt):
    """An empty message is a message."""
    echo = Scripted(script(tok, lambda question: [f"you said {question!r}"]))
    assert command("--ckpt", ckpt, "--prompt", prompt, model=echo)[0] == "you said ''\n"


def test_what_looks_like_reset_is_text(ckpt, tok):
    """In the prompt, in the prefill and in the answer."""
    answer = "Sure <reset> [RESET] <end_of_turn> go"
    model = Scripted(script(tok, lambda question: [answer] if question == "a <reset> b" else ["wrong"]))
    for prefill in ("", "Sure <reset> ["):
        out, _ = command("--ckpt", ckpt, "--prompt", "a <reset> b", "--prefill", prefill, model=model)
        assert out == answer + "\n"


def test_what_the_output_cannot_hold(ckpt, tok):
    model = Scripted(script(tok, "the 漢 road"))
    assert command("--ckpt", ckpt, *HOW, encoding="ascii", model=model)[0] == "the ? road\n"
    lone = b"\xff".decode("utf-8", "surrogateescape")  # how Python passes on a byte of the command line
    out, _ = command("--ckpt", ckpt, "--prompt", lone, "--json", model=model)
    assert json.loads(out)["text"] == "the 漢 road"


# ── A line, an answer ────────────────────────────────────────────────────────────────────────────────────────────────


def echoing(tok):
    return Scripted(script(tok, lambda question: ["Sure. Take", RESET, f"about {question}"]))


def test_a_line_an_answer(ckpt, tok):
    """Lines are separate prompts: no answer sees the line before."""
    model, contexts = echoing(tok), []
    inner = model.script
    model.script = lambda context: (contexts.append(context), inner(context))[1]
    out, err = command("--ckpt", ckpt, "--device", "cpu", stdin="the first\n\n  \nthe second\r\nthe third", model=model)
    assert out == "about the first\nabout the second\nabout the third\n" and err == ""
    assert contexts
    for context in contexts:
        assert context.count(tok.bos_id) == 1 and context.count(turn_marker(tok)) == 2
    assert command("--ckpt", ckpt, stdin="", model=model) == ("", "")


def test_lines_that_are_not_utf8(ckpt, tok):
    out, _ = command("--ckpt", ckpt, stdin=b"a\xffb\n", model=echoing(tok))
    assert out == "about a\ufffdb\n"


def test_a_line_that_is_too_long_ends_it(ckpt, tok):
    out, err = command("--ckpt", ckpt, stdin="one\n" + "x " * 5000 + "\nthree\n", model=echoing(tok), code=2)
    [line] = err.splitlines()
    assert out == "about one\n" and line.startswith("error: ") and "too long" in line


# ── Chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prompts_of(monkeypatch):
    seen = []

    def spy(model, prompts, **options):
        seen.append(prompts[0])
        return stream(model, prompts, **options)

    monkeypatch.setattr(sample, "stream", spy)
    return seen


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_history_is_what_survived(ckpt, tok, monkeypatch, on_reset):
    seen = prompts_of(monkeypatch)
    more = ("--on-reset", on_reset, "--prefill", "Sure")
    out, err = command("--ckpt", ckpt, *more, typed="one\ntwo\n\nthree\n", model=echoing(tok))
    assert out == "about one\nabout two\nabout three\n"  # not even a "> " in a pipe
    assert "Ctrl-D" in err
    one = [message("user", "one")]
    two = [*one, message("assistant", "about one"), message("user", "two")]
    three = [message("user", "three")]  # an empty line starts over
    assert seen == [tok.render(m) for m in (one, two, three)]
    assert all(tok.reset_id not in prompt for prompt in seen)


def test_history_of_several_samples_is_the_first(ckpt, tok, monkeypatch):
    seen = prompts_of(monkeypatch)
    command("--ckpt", ckpt, "--num-samples", 2, typed="one\ntwo\n", model=echoing(tok))
    assert tok.decode(seen[1]) == tok.decode(
        tok.render([message("user", "one"), message("assistant", "about one"), message("user", "two")])
    )


def test_chat_on_a_terminal(ckpt, tok):
    """Both ends are one: there is a prompt, and Ctrl-D (the end of the input) ends it."""
    out, err = command("--ckpt", ckpt, typed="one\n", terminal=True, model=echoing(tok))
    assert out.startswith("> ") and out.endswith("about one\n> ")
    assert err.count("Ctrl-D") == 1


def test_a_chat_that_grew_too_long_starts_over(ckpt, tok, monkeypatch):
    seen = prompts_of(monkeypatch)
    long = "x " * 5000
    out, err = command("--ckpt", ckpt, typed=f"one\n{long}\ntwo\n", model=echoing(tok))
    assert out == "about one\nabout two\n"
    assert [line for line in err.splitlines() if "too long" in line and line.endswith("; starting over")]
    assert len(seen) == 3 and seen[2] == tok.render([message("user", "two")])


# ── Step by step ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undecided(tmp_path_factory, tok):
    """A random model that now and then says [RESET], and now and then stops."""
    model = network_of(LLAMA, seed=2, tie_word_embeddings=False, **SIZES)
    prone_to(tok.reset_id, prone_to(tok.stop_ids[-1], model, 4.0), 6.0)
    root = tmp_path_factory.mktemp("undecided")
    save_model(model, root, tokenizer=tok)
    return root


def recount(ckpt, tok, text, prefill="", on_reset="truncate", max_resets=1, bias=0.0, max_new_tokens=12):
    """What a trace has to say, from full forward passes: a tuple for each line."""
    model, prompt = load_model(ckpt), tok.render([{"role": "user", "content": text}])
    attempt = tok.encode(prefill)  # since the last reset
    context, resets, sampled = prompt + attempt, 0, 0
    lines = [("forced", tok.decode([id])) for id in attempt]
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1]
        seen = len(context), logits.double().softmax(dim=-1)[tok.reset_id].item()
        logits[tok.reset_id] += bias if resets < max_resets else -torch.inf
        token = int(logits.argmax())
        if token == tok.reset_id:
            lines.append(("reset", *seen, len(attempt)))
            if on_reset == "truncate":
                lines.append(("back", len(prompt) + resets, len(attempt)))
                context = prompt + [tok.reset_id] * resets
            context, attempt, resets, sampled = context + [tok.reset_id], [], resets + 1, 0
        elif token in tok.stop_ids:
            return [*lines, ("stop", *seen)]
        else:
            lines.append(("token", *seen, tok.decode([token])))
            context, attempt, sampled = [*context, token], [*attempt, token], sampled + 1
            if sampled == max_new_tokens:
                return lines


def traced(out):
    """The same, read from what was printed; and what was printed behind it."""
    head, rest = out.split("\n", 1)
    assert head == " cache  p([RESET])  token"
    trace, answer = rest.split("\n\n", 1)
    lines = []
    for line in trace.split("\n"):
        if match := re.fullmatch(r" {20}('.*'|\".*\")   \(forced\)", line):
            lines.append(("forced", ast.literal_eval(match[1])))
        elif match := re.fullmatch(r"([ \d]{6})  ← the cache is cut back: (\d+) entries forgotten", line):
            lines.append(("back", int(match[1]), int(match[2])))
        else:
            match = re.fullmatch(r"([ \d]{6})  {5}([01]\.\d{4})  (.*)", line)
            seen = int(match[1]), float(match[2])
            if match[3] == "(stop)":
                lines.append(("stop", *seen))
            elif reset := re.fullmatch(r"\[RESET\]  (\d+) tokens taken back", match[3]):
                lines.append(("reset", *seen, int(reset[1])))
            else:
                lines.append(("token", *seen, ast.literal_eval(match[3])))
    return lines, answer


def same_lines(lines, expected):
    """Up to what four digits leave of a probability."""
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        if line[0] in ("forced", "back"):
            assert line == other
        else:
            assert line[:2] + line[3:] == other[:2] + other[3:]
            assert line[2] == pytest.approx(other[2], abs=0.00006)


@pytest.mark.parametrize("prefill", ["", "Sure, take"])
@pytest.mark.parametrize("on_reset, max_resets", [("truncate", 1), ("truncate", 3), ("keep", 3), ("truncate", 0)])
def test_trace_of_a_real_run(undecided, tok, on_reset, max_resets, prefill):
    """Every number against full forward passes; the answer behind it is that of a run without a trace."""
    kinds, resets, bias = set(), set(), 4.0
    for text in ("Hi", "How do I make it?", "sheep", "The gate is open.", "x y z"):
        words = ["--ckpt", undecided, "--device", "cpu", "--dtype", "float32", "--prompt", text, "--prefill", prefill]
        words += ["--on-reset", on_reset, "--max-resets", max_resets, "--reset-bias", bias, "--max-new-tokens", 12]
        out, err = command(*words, "--trace")
        lines, answer = traced(out)
        expected = recount(undecided, tok, text, prefill, on_reset, max_resets, bias)
        same_lines(lines, expected)
        assert (answer, err) == command(*words)
        assert command(*words, "--trace", terminal=True) == (out, err)  # no streaming beside it
        kinds |= {line[0] for line in expected}
        resets.add(sum(line[0] == "reset" for line in expected))
    assert {"token", "stop"} <= kinds and ("forced" in kinds) == bool(prefill)
    assert ("back" in kinds) == (max_resets > 0 and on_reset == "truncate")
    assert max(resets) == max_resets


def test_the_traced_probability_is_before_the_bias(undecided, tok):
    words = ["--ckpt", undecided, "--device", "cpu", "--dtype", "float32", "--prompt", "Hi", "--max-new-tokens", 6]
    out, _ = command(*words, "--trace", "--reset-bias", 1000)
    lines, _ = traced(out)
    expected = recount(undecided, tok, "Hi", bias=1000.0, max_new_tokens=6)
    same_lines(lines, expected)
    assert lines[0][0] == "reset" and lines[0][2] < 0.9


def test_trace_line_by_line(ckpt, tok):
    """As it looks. After a reset nothing of what was taken back is counted."""
    model = Scripted(script(tok, "Su it", RESET, "No"))
    n = len(tok.render([{"role": "user", "content": "How do I make it?"}]))
    assert n < 100
    forced, *said = tok.encode("Su it")
    no = tok.encode("No")
    expected = [" cache  p([RESET])  token", f"{'':20}{tok.decode([forced])!r}   (forced)"]
    expected += [f"    {n + 1 + i}      0.0000  {tok.decode([id])!r}" for i, id in enumerate(said)]
    end = n + 1 + len(said)
    expected += [f"    {end}      1.0000  [RESET]  {1 + len(said)} tokens taken back"]
    expected += [f"    {n}  ← the cache is cut back: {end - n} entries forgotten"]
    expected += [f"    {n + 1 + i}      0.0000  {tok.decode([id])!r}" for i, id in enumerate(no)]
    expected += [f"    {n + 1 + len(no)}      0.0000  (stop)", "", "No", ""]
    prefill = ("--prefill", tok.decode([forced]))
    out, _ = command("--ckpt", ckpt, *HOW, *prefill, "--trace", model=model)
    assert out.split("\n") == expected
    out, _ = command("--ckpt", ckpt, *HOW, *prefill, "--trace", "--show-discarded", model=model)
    assert out.split("\n") == [*expected[:-2], "~~Su it~~ [RESET]", *expected[-2:]]
    out, _ = command("--ckpt", ckpt, *HOW, *prefill, "--trace", "--json", model=model)
    assert out.split("\n")[:-2] == expected[:-2] and json.loads(out.split("\n")[-2])["text"] == "No"


def test_trace_of_a_sample(undecided):
    words = ["--ckpt", undecided, "--device", "cpu", "--dtype", "float32", "--prompt", "Hi", "--max-new-tokens", 20]
    words += ["--temperature", 1, "--seed", 3]
    assert traced(command(*words, "--trace")[0])[1] == command(*words)[0]


# ── On a terminal ────────────────────────────────────────────────────────────────────────────────────────────────────


class Screen:
    """As much of a terminal as sample.py uses, and one that wraps as they do: late, when the next character comes."""

    def __init__(self, columns=20, lines=24):
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column, self.struck = [[]], 0, 0, set()
        self.strike = False

    def down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def feed(self, text):
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\s\S]", text):
            if match := re.fullmatch(r"\x1b\[([0-9;]*)(.)", part):
                number, kind = match.groups()
                if kind == "A":
                    self.row = max(self.row - int(number or 1), max(0, len(self.rows) - self.lines))
                elif kind == "J" and number in ("", "0"):
                    del self.rows[self.row + 1 :], self.rows[self.row][self.column :]
                elif kind == "m":
                    self.strike = "9" in number.split(";")
                else:
                    raise AssertionError(f"unknown {part!r}")
            elif part == "\n":
                self.down()
                self.column = 0
            elif part == "\r":
                self.column = 0
            else:
                assert unicodedata.category(part) != "Cc", f"a control character: {part!r}"
                if self.column == self.columns:
                    self.down()
                    self.column = 0
                row = self.rows[self.row]
                row += [" "] * (self.column - len(row))
                row[self.column : self.column + 1] = [part]
                self.column += 1
                if self.strike:
                    self.struck.add(part)

    def text(self):
        return "\n".join("".join(row).rstrip() for row in self.rows).strip("\n")


def wrapped(text, columns=20):
    """What a terminal shows of a plain text."""
    screen = Screen(columns, lines=10_000)
    screen.feed(text)
    return screen.text()


def on_screen(monkeypatch, ckpt, *words, model, columns=20, lines=24, already=""):
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda *_: os.terminal_size((columns, lines)))
    out, _ = command("--ckpt", ckpt, *words, model=model, terminal=True)
    screen = Screen(columns, lines)
    screen.feed(already + out)
    return screen, out


DISCARDED = {
    "short": "Sure.",
    "one column less": "a" * 19,
    "exactly one row": "a" * 20,
    "one column more": "a" * 21,
    "wraps": "Sure. Take the long road and do not stir it before the night is over, my friend.",
    "two rows exactly": "b" * 40,
    "lines": "Sure.\nTake\n\nthe road.",
    "ends with a newline": "Sure.\n",
    "only newlines": "\n\n\n",
    "wrapping lines": "Sure. Take the long road and\ndo not stir it before the night\n" + "c" * 20 + "\nis over.",
    "tabs": "a\tb\tc\td",
    "escapes": "a\x1b[5Ab\x1b[2Jc\rd\x08e\x9bf",
    "nothing": "",
}


@pytest.mark.parametrize("discarded", DISCARDED.values(), ids=DISCARDED)
def test_retracted_text_is_erased(monkeypatch, ckpt, tok, discarded):
    """What was on the screen before stays, what was retracted goes, what survives is as if it stood there alone."""
    surviving = "I cannot help with that, nor with\nanything of that kind."
    model = Scripted(script(tok, discarded, RESET, surviving))
    before = "$ python sample.py with arguments\n"
    screen, out = on_screen(monkeypatch, ckpt, *HOW, model=model, already=before)
    assert screen.text() == wrapped(f"{before}[RESET]\n{surviving}\n")
    assert not screen.struck
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out)
    assert discarded.split("\n")[0][:1] in shown  # it was there


@pytest.mark.parametrize("seed", range(4))
def test_random_texts_are_erased(monkeypatch, ckpt, tok, seed):
    rng = random.Random(seed)
    for _ in range(10):
        first, second, last = (
            "".join(rng.choices("ab cé\n", weights=(8, 8, 3, 1, 2, 1), k=rng.randint(0, 120))) for _ in range(3)
        )
        columns = rng.randint(2, 30)
        model = Scripted(script(tok, first, RESET, second, RESET, "Z" + last))
        screen, _ = on_screen(
            monkeypatch, ckpt, *HOW, "--max-resets", 2, model=model, columns=columns, lines=500, already="top\n"
        )
        assert screen.text() == wrapped(f"top\n[RESET]\n[RESET]\nZ{last}", columns)


def test_held_back_it_is_never_on_the_screen(monkeypatch, ckpt, tok):
    ids = tok.encode("Sure. Take the road")
    for n in (0, 3, 100):
        out, _ = command("--ckpt", ckpt, *HOW, "--hold-back", n, model=taking_back(tok), terminal=True)
        before, after = out.split("\r\x1b[J")
        assert before == tok.decode(ids[: max(0, len(ids) - n)])
        assert after.endswith("I cannot help with that.\n")


def test_with_show_discarded_it_is_struck_through(monkeypatch, ckpt, tok):
    model = Scripted(script(tok, "Qu\x1b[7mq", RESET, "No."))
    screen, out = on_screen(monkeypatch, ckpt, *HOW, "--show-discarded", model=model)
    assert screen.text() == wrapped("Qu [7mq [RESET]\nNo.")
    assert screen.struck == set("Qu [7mq")
    assert out.endswith("\x1b[0m\nNo.\n")


def test_wide_characters_take_two_columns(monkeypatch, ckpt, tok):
    """Five of them fill a row of ten columns, four one of nine; an accent that stands on a letter takes none."""
    for columns, up in ((10, "\x1b[2A"), (9, "\x1b[2A"), (7, "\x1b[3A"), (24, "\r\x1b[J")):
        model = Scripted(script(tok, "漢" * 12, RESET, "No."))
        _, out = on_screen(monkeypatch, ckpt, *HOW, model=model, columns=columns)
        assert up in out, columns
    assert terminal.height("e\u0301" * 10, 10) == 1 and terminal.height("", 10) == 1


def test_what_is_printed_does_not_move_the_cursor(ckpt, tok):
    """Nor where nothing is erased: with several samples the answers are printed. A pipe gets what was said."""
    on_a_terminal, in_a_pipe = "~~a [2Jb~~ [RESET]\nc [1Ad\n", "~~a\x1b[2Jb~~ [RESET]\nc\x1b[1Ad\n"
    for is_terminal, expected in ((True, on_a_terminal), (False, in_a_pipe)):
        model = Scripted(script(tok, "a\x1b[2Jb", RESET, "c\x1b[1Ad"))
        words = ["--ckpt", ckpt, *HOW, "--show-discarded", "--num-samples", 2]
        out, _ = command(*words, model=model, terminal=is_terminal)
        assert out == 2 * expected


def test_text_higher_than_the_screen(monkeypatch, ckpt, tok):
    """What has scrolled away cannot be erased; the cursor goes to the top of the screen and no further."""
    text = "\n".join(f"line {n}" for n in range(30))
    model = Scripted(script(tok, text, RESET, "No."))
    screen, out = on_screen(monkeypatch, ckpt, *HOW, "--max-new-tokens", 999, model=model, lines=10)
    assert "\x1b[9A" in out
    assert screen.text() == "\n".join([*(f"line {n}" for n in range(20)), "[RESET]", "No."])


def test_text_streams_and_characters_come_whole(monkeypatch, ckpt, tok):
    """漢 is three bytes and three tokens here: nothing is written before the third."""
    writes = []
    monkeypatch.setattr(terminal, "write", writes.append)
    answer = "it is 漢 now"
    ids = tok.encode(answer)
    assert len(tok.encode("漢")) == 3
    command("--ckpt", ckpt, *HOW, terminal=True, model=Scripted(script(tok, answer)))
    assert "".join(writes) == answer and len([w for w in writes if w]) > 3
    assert len(writes) == len(ids) and not any("\ufffd" in w for w in writes)


def test_on_a_real_pseudo_terminal(ckpt, tok, monkeypatch):
    """The size is asked of the terminal, and Python's own stdout is one."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # keep "\n" what it is
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    long = "Sure. Take the long road and do not stir it before the night is over, my friend. " * 2
    model = Scripted(script(tok, long, RESET, "No, never."))
    monkeypatch.setattr(sample, "load_model", lambda path, device, dtype: model)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(ckpt), *HOW])
    with os.fdopen(theirs, "w", encoding="utf-8") as tty, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", tty)
        patch.setattr(sys, "__stdout__", tty)  # where shutil looks for the size
        run(sample.main)
    received = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed and all of it was read
        while data := os.read(ours, 4096):
            received += data
    received = received.decode()
    os.close(ours)
    screen = Screen(30)
    screen.feed(received)
    assert screen.text() == "[RESET]\nNo, never."
    assert "night" in received and f"\x1b[{-(-len(long) // 30) - 1}A" in received


# ── Processes of their own ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipe(ckpt, tok):
    """The real thing on a real checkpoint: two lines in, two out, the same as in this process."""
    words = ["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "6", "--reset-bias", "1000", "--json"]
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", *words], input=b"one\na\xffb\n", capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["prompt"] for r in records] == ["one", "a\ufffdb"] and [r["resets"] for r in records] == [1, 1]
    here, _ = command(*words, stdin=b"one\na\xffb\n")
    assert [json.loads(line)["text"] for line in here.splitlines()] == [r["text"] for r in records]
    assert done.stderr == b""


def test_compile_without_a_compiler(ckpt, tmp_path):
    words = ["--ckpt", str(ckpt), "--prompt", "Hi", "--device", "cpu", "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", *words, "--compile"],
        env={**os.environ, "CXX": str(tmp_path / "gone"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: torch.compile failed")
    assert "leave out --compile" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_it_says_the_same(ckpt):
    words = ["--ckpt", ckpt, "--prompt", "Hi", "--device", "cpu", "--max-new-tokens", "30", "--num-samples", "4"]
    words += ["--reset-bias", "9", "--max-resets", "2", "--temperature", "1", "--json"]
    plain, compiled = (
        subprocess.run([sys.executable, ROOT / "sample.py", *words, *more], capture_output=True, text=True, check=True)
        for more in ([], ["--compile"])
    )
    timeless = dict(first_token_s=0, total_s=0)
    plain, compiled = ([json.loads(line) | timeless for line in done.stdout.splitlines()] for done in (plain, compiled))
    assert plain == compiled and sum(answer["resets"] for answer in plain) > 0


def test_a_chat_on_a_pseudo_terminal(ckpt):
    """Somebody types a message, reads the answer, and types Ctrl-D."""
    ours, theirs = pty.openpty()
    words = ["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "3", "--reset-bias", "1000"]
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received, typed = "", ["hello\n", "\x04"]
    with contextlib.suppress(OSError):  # how Linux says that the other end was closed
        while data := os.read(ours, 4096):
            received += data.decode(errors="replace")
            if typed and received.endswith("> ") and received.count("> ") == 3 - len(typed):
                os.write(ours, typed.pop(0).encode())
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert "hello\r\n" in received and "\x1b[2m[RESET]\x1b[0m\r\n" in received
    assert "Ctrl-D ends" in received and "Traceback" not in received and not typed


# ── Help ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_shows_the_defaults(monkeypatch):
    """Those that parse_args() really has."""
    out, _ = command("--help")
    text = " ".join(out.split())
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", "x"])
    defaults = vars(sample.parse_args())
    parts = re.split(r" (?=--[a-z-]+ )", text.split("options:")[1])
    shown = {}
    for part in parts:
        if match := re.search(r"^--([a-z-]+).*\(default: (.*)\)$", part):
            shown[match[1].replace("-", "_")] = match[2]
    for name in ("temperature", "top_p", "reset_bias", "max_resets", "on_reset", "max_new_tokens", "seed", "dtype"):
        assert shown[name] == str(defaults[name]), name
    assert sample.__doc__.split("\n\n")[1] in out  # the examples, as they are written


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "--ckpt"),
        (("--ckpt", "gone"), "gone"),
        ((..., "--device", "foo"), "'foo'"),
        ((..., "--dtype", "int8"), "invalid choice"),
        ((..., "--on-reset", "maybe"), "invalid choice"),
        ((..., "--temperature", "hot"), "invalid float"),
        ((..., "--temperature", -1), "--temperature: -1 is not 0 or from 0.001"),
        ((..., "--temperature", "nan"), "--temperature: nan is not"),
        ((..., "--top-p", 0), "--top-p: 0 is not above 0"),
        ((..., "--top-p", 1.5), "--top-p: 1.5 is not"),
        ((..., "--max-resets", -1), "--max-resets: -1 is not from 0"),
        ((..., "--num-samples", 0), "--num-samples: 0 is not from 1 to 1,000"),
        ((..., "--max-new-tokens", 0), "--max-new-tokens: 0 is not a positive number"),
        ((..., "--num-samples", 2_000_000), "--num-samples: 2000000 is not from 1 to 1,000"),
        ((..., "--reset-bias", "nan"), "--reset-bias: nan is not"),
        ((..., "--seed", -1), "--seed: -1 is not from 0"),
        ((..., "--max-new-tokens", 5000), "too long"),
        ((..., "--prompt", "x " * 5000), "too long"),
        ((..., "--seed", "x"), "invalid int"),
        ((..., "--colour"), "unrecognized arguments"),
        ((..., "--trace", "--num-samples", 2), "--trace shows one answer"),
        ((..., "--trace", "--temperature", -1), "--temperature: -1 is not 0 or from 0.001"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ckpt, words, complaint):
    full = ("--ckpt", ckpt, "--prompt", "Hi", "--device", "cpu")
    out, err = command(*[w for word in words for w in (full if word is ... else (word,))], code=2)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == err.splitlines()[-1] and complaint in errors[0]
    assert errors[0].startswith("sample.py: ") or err.count("\n") == 1  # argparse says how it is used, too
    assert out == ""


def test_a_damaged_checkpoint(ckpt, tmp_path):
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((ckpt / name).read_bytes())
    _, err = command("--ckpt", tmp_path, "--prompt", "Hi", code=2)
    [line] = err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line
