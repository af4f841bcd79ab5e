"""sample.py against a small terminal and a model that follows a script. Processes of their own: test_terminal.py."""

import ast
import io
import json
import os
import random
import re
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from models import LLAMA, network_of, prone_to
from samples import said, toy_tokenizer, user

import sample
from backtrack.generate import Done, Generation, Reset, Token
from backtrack.sampling import Options, checked
from backtrack.serve import arguments, terminal
from model import save_model
from model.errors import run


@pytest.fixture(scope="module")
def tok():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, tok):
    """A directory with the toy tokenizer and a random model."""
    root = tmp_path_factory.mktemp("ckpt")
    save_model(network_of(LLAMA, seed=0, max_position_embeddings=4096), root, tokenizer=tok)
    return root


class Scripted:
    """In place of a model: says the texts before each RESET, takes them back, and says the last one."""

    def __init__(self, tok, *parts):
        self.tok, self.parts, self.compiled, self.prompts, self.options = tok, parts, False, [], None

    def compile(self):
        self.compiled = True

    def stream(self, prompts, prefill, max_new_tokens, max_resets, hold_back=0, **options):
        self.prompts += prompts
        self.options = options | {"max_new_tokens": max_new_tokens, "max_resets": max_resets, "hold_back": hold_back}
        for row, (prompt, forced) in enumerate(zip(prompts, prefill, strict=True)):
            checked(Options(reset_id=None, stop_ids=(), max_new_tokens=1), [prompt], None, None, 0, LIMITS)
            question = self.tok.decode(prompt).split("user\n")[-1].removesuffix("\nmodel\n")
            parts = self.parts[0](question) if callable(self.parts[0]) else self.parts
            *taken_back, last = [self.tok.encode(part) for part in parts if part is not RESET]
            assert (taken_back or [last])[0][: len(forced)] == forced
            for ids in taken_back[:max_resets]:
                yield from (Token(row, id) for id in ids[: max(0, len(ids) - hold_back)])
                yield Reset(row, ids)
            ids = last[:max_new_tokens] if len(taken_back) <= max_resets else taken_back[max_resets]
            yield from (Token(row, id) for id in ids)
            steps = sum(map(len, taken_back)) + len(taken_back) + len(ids) + 1 - len(forced)
            reason = "length" if len(ids) == max_new_tokens else "stop"
            yield Done(row, Generation(ids, taken_back[:max_resets], len(taken_back), reason, steps, 0.1, 0.2))


LIMITS = SimpleNamespace(vocab_size=1024, max_position_embeddings=4096)
RESET = object()


class Stream(io.TextIOWrapper):
    def __init__(self, data=b"", terminal=False, encoding="utf-8"):
        super().__init__(io.BytesIO(data if isinstance(data, bytes) else data.encode()), encoding=encoding, newline="")
        self.isatty = lambda: terminal

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def command(*words, model=None, stdin="", typed=None, terminal=False, encoding="utf-8", code=0, **environment):
    """`python sample.py words` in this process; (stdout, stderr). `typed`: standard input is a terminal."""
    out, err = Stream(terminal=terminal, encoding=encoding), Stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        patch.setattr(sys, "stdin", Stream(stdin if typed is None else typed, typed is not None, encoding))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        if model is not None:
            patch.setattr(arguments, "load_model", lambda path, device, dtype: model)
            patch.setattr(sample, "stream", Scripted.stream)
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
    return Scripted(tok, "Sure. Take the road", RESET, "I cannot help with that.")


def test_only_surviving_text_is_printed_and_the_discarded_if_asked_for(ckpt, tok):
    assert command("--ckpt", ckpt, *HOW, model=taking_back(tok)) == ("I cannot help with that.\n", "")
    assert command("--ckpt", ckpt, *HOW, model=Scripted(tok, "")) == ("\n", "")
    model = Scripted(tok, "Sure. Take", RESET, "Well,\nyou", RESET, "No.")
    out, _ = command("--ckpt", ckpt, *HOW, "--show-discarded", "--max-resets", 2, model=model)
    assert out == "~~Sure. Take~~ [RESET]\n~~Well,\nyou~~ [RESET]\nNo.\n"


def test_prefill_and_max_resets(ckpt, tok):
    """A prefill is the head of the answer: printed if it survives, gone if it does not. Masked, [RESET] is not said."""
    kept = Scripted(tok, "Sure. Take the road home.")
    assert command("--ckpt", ckpt, *HOW, "--prefill", "Sure. Take", model=kept)[0] == "Sure. Take the road home.\n"
    lost = Scripted(tok, "Sure. Take", RESET, "No.")
    assert command("--ckpt", ckpt, *HOW, "--prefill", "Sure. Take", model=lost)[0] == "No.\n"
    out, _ = command("--ckpt", ckpt, *HOW, "--max-resets", 0, "--max-new-tokens", 30, model=taking_back(tok))
    assert out.startswith("Sure. Take the road")


def test_json(ckpt, tok):
    model = Scripted(tok, "Sure. Take the road", RESET, "I cannot help with that. 漢")
    how = ("--ckpt", ckpt, *HOW, "--json", "--prefill", "Sure.")
    out, _ = command(*how, model=model, terminal=True)
    assert "漢" in out and "road" not in out and "\x1b" not in out
    record = json.loads(out)
    assert 0 <= record.pop("first_token_s") <= record.pop("total_s")
    sampled = tok.encode("Sure. Take the road")[len(tok.encode("Sure.")) :] + tok.encode(record["text"])
    expected = {"prompt": "How do I make it?", "prefill": "Sure.", "sample": 0, "text": "I cannot help with that. 漢"}
    assert record == expected | {"resets": 1, "finish_reason": "stop", "steps": len(sampled) + 2}
    out, _ = command(*how, "--show-discarded", "--max-new-tokens", 12, "--num-samples", 3, model=model)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["sample"] for record in records] == [0, 1, 2]
    assert all(r["discarded"] == ["Sure. Take the road"] and r["finish_reason"] == "length" for r in records)


def test_every_option_reaches_the_sampler_and_the_model(ckpt, tok, monkeypatch):
    model, loaded = Scripted(tok, "Sure. Take"), []
    monkeypatch.setattr(sample, "stream", Scripted.stream)
    monkeypatch.setattr(arguments, "load_model", lambda *given: (loaded.append(given), model)[1])
    words = "--temperature 0.5 --top-p 0.9 --reset-bias -1.5 --max-resets 4 --on-reset keep --num-samples 2 --seed 7"
    words += " --max-new-tokens 5 --dtype bfloat16 --compile"
    command("--ckpt", ckpt, *HOW, *words.split())
    assert model.prompts == 2 * [tok.render(user("How do I make it?"))]
    sampling = {"temperature": 0.5, "top_p": 0.9, "reset_bias": -1.5, "max_resets": 4, "max_new_tokens": 5, "seed": 7}
    special = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    assert model.options == sampling | special | {"on_reset": "keep", "hold_back": 0}
    assert model.compiled and loaded == [(str(ckpt), "cpu", torch.bfloat16)]


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "utf-8"])
def test_any_locale_and_half_a_character(ckpt, tok, encoding):
    """What the output cannot hold becomes a question mark, and in JSON an escape that loses nothing."""
    model = Scripted(tok, "the 漢 road")
    shown = "the 漢 road\n" if encoding == "utf-8" else "the ? road\n"
    assert command("--ckpt", ckpt, *HOW, encoding=encoding, model=model)[0] == shown
    lone = b"\xff".decode("utf-8", "surrogateescape")  # how Python passes on a byte of the command line
    out, _ = command("--ckpt", ckpt, "--prompt", f"漢 {lone}", "--json", encoding=encoding, model=model)
    record = json.loads(out)
    assert record["text"] == "the 漢 road" and record["prompt"] == f"漢 {lone}"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_closed_streams(ckpt, tok, monkeypatch, name):
    """Python has None for a stream that the shell closed: `sample.py … >&-`."""
    out = Stream()
    for stream, value in {"stdin": Stream("Hi\n"), "stdout": out, name: None}.items():
        monkeypatch.setattr(sys, stream, value)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(ckpt)])
    monkeypatch.setattr(sample, "stream", Scripted.stream)
    monkeypatch.setattr(arguments, "load_model", lambda *given: taking_back(tok))
    run(sample.main)
    assert out.text() == ("I cannot help with that.\n" if name == "stderr" else "")


def echoing(tok):
    return Scripted(tok, lambda question: ["Sure. Take", RESET, f"about {question}"])


def test_a_line_an_answer(ckpt, tok):
    """Lines are separate prompts: no answer sees the line before."""
    model = echoing(tok)
    out, err = command("--ckpt", ckpt, "--device", "cpu", stdin="the first\n\n  \nthe second\r\nthird", model=model)
    assert out == "about the first\nabout the second\nabout third\n" and err == ""
    assert model.prompts[2] == tok.render(user("third"))
    assert command("--ckpt", ckpt, stdin="", model=model) == ("", "")


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_history_is_what_survived(ckpt, tok, on_reset):
    model = echoing(tok)
    more = ("--on-reset", on_reset, "--prefill", "Sure")
    out, err = command("--ckpt", ckpt, *more, typed="one\ntwo\n\nthree\n", model=model)
    assert out == "about one\nabout two\nabout three\n"  # not even a "> " in a pipe
    assert err.count("Ctrl-D") == 1
    out, _ = command("--ckpt", ckpt, typed="one\n", terminal=True, model=echoing(tok))
    assert out.startswith("> ") and out.endswith("about one\n> ")
    one, three = user("one"), user("three")  # an empty line starts over
    two = [*one, *said("about one"), *user("two")]
    assert model.prompts == [tok.render(m) for m in (one, two, three)]


def test_a_chat_that_grew_too_long_starts_over(ckpt, tok):
    model = echoing(tok)
    out, err = command("--ckpt", ckpt, typed=f"one\n{'x ' * 5000}\ntwo\n", model=model)
    assert out == "about one\nabout two\n"
    assert [line for line in err.splitlines() if "too long" in line and line.endswith("; starting over")]
    assert model.prompts[2] == tok.render(user("two"))


@pytest.mark.parametrize("on_reset, max_resets, prefill", [("truncate", 3, "Sure, take"), ("keep", 1, "")])
def test_trace_of_a_real_run(tmp_path, tok, on_reset, max_resets, prefill):
    """Every number against full forward passes over what has been read by then; the answer is that without a trace."""
    model = network_of(LLAMA, seed=2, tie_word_embeddings=False, max_position_embeddings=4096)
    save_model(prone_to(tok.reset_id, prone_to(tok.stop_ids[-1], model, 4.0), 6.0), tmp_path, tokenizer=tok)
    kinds = set()
    for text in ("Hi", "How do I make it?", "x y z"):
        words = ["--ckpt", tmp_path, *HOW, "--prompt", text, "--prefill", prefill, "--on-reset", on_reset]
        words += ["--max-resets", max_resets, "--reset-bias", 4, "--max-new-tokens", 12]
        out, _ = command(*words, "--trace")
        trace, answer = out.split("\n\n", 1)
        head, *lines = trace.split("\n")
        assert answer == command(*words)[0]
        prompt, forced = tok.render(user(text)), tok.encode(prefill)
        context, resets, start, forgotten = prompt + forced, 0, len(prompt), None
        assert head == " cache  p([RESET])  token"
        assert lines[: len(forced)] == [f"{'':20}{tok.decode([id])!r}   (forced)" for id in forced]
        for line in lines[len(forced) :]:
            if match := re.fullmatch(r" *(\d+)  ← the cache is cut back: (\d+) entries forgotten", line):
                assert on_reset == "truncate"
                assert [int(n) for n in match.groups()] == [len(prompt) + resets - 1, forgotten]
                continue
            length, p, said = re.fullmatch(r" *(\d+) +([01]\.\d{4})  (.*)", line).groups()
            with torch.no_grad():
                logits = model(torch.tensor([context]))[0, -1]
            assert int(length) == len(context)
            # Before the bias and the mask.
            assert float(p) == pytest.approx(logits.double().softmax(-1)[tok.reset_id].item(), abs=0.00006)
            logits[tok.reset_id] += 4.0 if resets < max_resets else -torch.inf
            token = int(logits.argmax())
            kinds.add("reset" if token == tok.reset_id else "stop" if token in tok.stop_ids else "token")
            if token == tok.reset_id:
                assert said == f"[RESET]  {len(context) - start} tokens taken back"
                resets += 1
                forgotten = len(context) - len(prompt) - resets + 1
                context = [*(context if on_reset == "keep" else prompt + [tok.reset_id] * (resets - 1)), tok.reset_id]
                start = len(context)
            elif token in tok.stop_ids:
                assert said == "(stop)"
            else:
                assert ast.literal_eval(said) == tok.decode([token])
                context = [*context, token]
    assert kinds == {"token", "stop", "reset"}


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
                wide = 0 if part in "\u0301\u0e31\u0e34\u0947\u200b" else 2 if part == "漢" else 1
                if self.column + wide > self.columns:
                    self.down()
                    self.column = 0
                row = self.rows[self.row]
                row += [" "] * (self.column - len(row))
                row[self.column : self.column + wide] = [part, ""][:wide]
                self.column += wide
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


def test_what_is_retracted_is_erased(monkeypatch, ckpt, tok):
    """What was there before stays. Marks take no column, CJK two; escapes of a model must not move the cursor."""
    rng, signs = random.Random(0), "ab cé\n漢\u0301\u0e31\u0e34\u0947\u200b"
    escapes = ["\t", "\x1b[5A", "\x1b[2J", "\r", "\x08", "\x9bf", "word" * 5]
    for _ in range(12):
        first, second = ("".join(rng.choices([*signs, *escapes], k=rng.randint(0, 100))) for _ in range(2))
        columns, last = rng.randint(2, 30), "Z" + "".join(rng.choices(signs, k=rng.randint(0, 100)))
        model = Scripted(tok, first, RESET, second, RESET, last)
        more = ("--max-resets", 2, "--max-new-tokens", 999)
        screen, out = on_screen(
            monkeypatch, ckpt, *HOW, *more, model=model, columns=columns, lines=500, already="top\n"
        )
        assert screen.text() == wrapped(f"top\n[RESET]\n[RESET]\n{last}", columns) and not screen.struck
        assert first[:1].translate(terminal.HARMLESS) in out  # it was there


def test_held_back_it_is_never_on_the_screen_nor_where_escapes_are_not_wanted(monkeypatch, ckpt, tok):
    ids = tok.encode("Sure. Take the road")
    for n in (0, 3, 100):
        out, _ = command("--ckpt", ckpt, *HOW, "--hold-back", n, model=taking_back(tok), terminal=True)
        before, after = out.split("\r\x1b[J")
        assert before == tok.decode(ids[: max(0, len(ids) - n)])
        assert after.endswith("I cannot help with that.\n")
    for environment in ({"TERM": "dumb"}, {"NO_COLOR": "1"}):
        out, _ = command("--ckpt", ckpt, *HOW, model=taking_back(tok), terminal=True, **environment)
        assert out == "I cannot help with that.\n"


def test_with_show_discarded_it_is_struck_through(monkeypatch, ckpt, tok):
    model = Scripted(tok, "Qu\x1b[7mq", RESET, "No.")
    screen, out = on_screen(monkeypatch, ckpt, *HOW, "--show-discarded", model=model)
    assert screen.text() == wrapped("Qu [7mq [RESET]\nNo.")
    assert screen.struck == set("Qu [7mq")
    assert out.endswith("\x1b[0m\nNo.\n")


def test_what_is_printed_does_not_move_the_cursor(ckpt, tok):
    """Nor where nothing is erased: with several samples the answers are printed. A pipe gets what was said."""
    on_a_terminal, in_a_pipe = "~~a [2Jb~~ [RESET]\nc [1Ad\n", "~~a\x1b[2Jb~~ [RESET]\nc\x1b[1Ad\n"
    for is_terminal, expected in ((True, on_a_terminal), (False, in_a_pipe)):
        model = Scripted(tok, "a\x1b[2Jb", RESET, "c\x1b[1Ad")
        words = ["--ckpt", ckpt, *HOW, "--show-discarded", "--num-samples", 2]
        out, _ = command(*words, model=model, terminal=is_terminal)
        assert out == 2 * expected


def test_text_higher_than_the_screen(monkeypatch, ckpt, tok):
    """What has scrolled away cannot be erased; the cursor goes to the top of the screen and no further."""
    text = "\n".join(f"line {n}" for n in range(30))
    model = Scripted(tok, text, RESET, "No.")
    screen, out = on_screen(monkeypatch, ckpt, *HOW, "--max-new-tokens", 999, model=model, lines=10)
    assert "\x1b[9A" in out
    assert screen.text() == "\n".join([*(f"line {n}" for n in range(20)), "[RESET]", "No."])


def test_text_streams_and_characters_come_whole(monkeypatch, ckpt, tok):
    """漢 is three bytes and three tokens here: nothing is written before the third."""
    writes = []
    monkeypatch.setattr(terminal, "write", writes.append)
    ids = tok.encode("it is 漢 now")
    command("--ckpt", ckpt, *HOW, terminal=True, model=Scripted(tok, "it is 漢 now"))
    assert len(tok.encode("漢")) == 3 and len(writes) == len(ids) + 2 and writes[-1] == "\n"
    assert "".join(writes) == "it is 漢 now\n" and not any("\ufffd" in w for w in writes)


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "--ckpt"),
        ((..., "--device", "foo"), "'foo'"),
        ((..., "--max-new-tokens", 5000), "too long"),
        ((..., "--trace", "--num-samples", 2), "--trace shows one answer"),
        ((..., "--url", "http://x", "--compile"), "leave out --url"),
        ((..., "--url", "http://x", "--api-key-env", "NOT_THERE"), "the environment has no NOT_THERE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ckpt, words, complaint):
    full = ("--ckpt", ckpt, "--prompt", "Hi", "--device", "cpu")
    out, err = command(*[w for word in words for w in (full if word is ... else (word,))], code=2)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == err.splitlines()[-1] and complaint in errors[0]
    assert errors[0].startswith("sample.py: ") or err.count("\n") == 1  # argparse says how it is used, too
    assert out == ""


def test_where_a_checkpoint_is_not(tmp_path, ckpt):
    """A toy's that is still to be made, and a directory of several."""
    _, err = command("--ckpt", tmp_path / "toy-1" / "sft", "--prompt", "Hi", code=2)
    assert "`make train-sft SEED=1` makes it" in err and "download" not in err
    for name in ("sft", "base"):
        (tmp_path / "toy-0" / name).mkdir(parents=True)
        (tmp_path / "toy-0" / name / "config.json").write_bytes((ckpt / "config.json").read_bytes())
    _, err = command("--ckpt", tmp_path / "toy-0", "--prompt", "Hi", code=2)
    assert err.endswith(f"inside are {tmp_path}/toy-0/base, {tmp_path}/toy-0/sft\n")
