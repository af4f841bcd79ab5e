"""sample.py in processes of its own: on a real pseudo-terminal, with keys as a keyboard sends them, and compiled."""

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from command import command
from models import LLAMA, network_of
from samples import toy_tokenizer, user, write

from backtrack.attacks import __main__ as attacks
from backtrack.run import say
from backtrack.run.say import Ticker
from model import save_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A random model that never says [RESET] unless told to."""
    root = tmp_path_factory.mktemp("ckpt")
    save_model(network_of(LLAMA, seed=0, max_position_embeddings=16384), root, tokenizer=toy_tokenizer())
    return root


def on_stderr(monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: is_terminal
    return Ticker()


def test_a_ticker_writes_over_its_line_on_a_terminal(monkeypatch):
    ticker = on_stderr(monkeypatch, True)
    for text in ("1/10, 100 s left", "2/10, 9 s left"):
        ticker.show(text)
    ticker.done()
    assert sys.stderr.getvalue() == "\r1/10, 100 s left\r2/10, 9 s left  \n"
    on_stderr(monkeypatch, True).done()  # nothing was to be done
    assert sys.stderr.getvalue() == ""


def test_a_ticker_writes_a_line_now_and_then_into_a_file(monkeypatch):
    ticker, now = on_stderr(monkeypatch, False), [1000.0]
    monkeypatch.setattr(say.time, "monotonic", lambda: now[0])
    for count in range(100):
        ticker.show(f"{count}/99")
        now[0] += 1.0
    ticker.done()
    ticker.done()
    assert sys.stderr.getvalue() == "0/99\n30/99\n60/99\n90/99\n99/99\n"


class Person:
    """Somebody at a terminal in front of `sample.py words`, who reads before typing."""

    def __init__(self, ckpt, *words, **environment):
        self.ours, theirs = pty.openpty()
        unset = ("NO_COLOR", "INPUTRC")
        inherited = {key: value for key, value in os.environ.items() if key not in unset}
        words = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(ckpt), "--device", "cpu", *map(str, words)]
        self.process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=inherited | {"TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.received = ""

    def reads(self, text: str) -> str:
        """Waits for the text; what came up to its end."""
        while text not in self.received:
            assert self.reads_some(120), self.received
        before, self.received = self.received.split(text, 1)
        return before + text

    def types(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def reads_some(self, seconds: float) -> bool:
        """What comes next, if anything does in so many seconds."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        data = os.read(self.ours, 65536)
        self.received += data.decode(errors="replace")
        return bool(data)

    def leaves(self) -> str:
        """Ctrl-D at the prompt; the rest of what came."""
        self.types("\x04")
        with contextlib.suppress(OSError):  # how Linux says that the other end was closed
            while self.reads_some(120):
                pass
        os.close(self.ours)
        assert self.process.wait(timeout=60) == 0, self.received
        assert "Traceback" not in self.received
        return self.received


def take_terminal() -> None:
    """Make the pseudo-terminal the new session's own, so that Ctrl-C comes as a signal; heed it, as shells have it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_chat_with_arrow_keys_and_ctrl_c(ckpt):
    """Left and a letter: the letter goes in front of the last one. Up: the line is there again."""
    person = Person(ckpt, "--max-new-tokens", 15000, "--reset-bias", 1000, NO_COLOR="")  # empty counts as not set
    person.reads("> ")
    for keys in ("ac\x1b[Db\n", "\x1b[A\n"):
        person.types(keys)
        person.reads("abc\r\n" if keys[0] == "\x1b" else "\r\n")
        person.reads("\x1b[2m[RESET]\x1b[0m\r\n")
        assert person.reads_some(120)  # the answer has begun
        person.types("\x03")
        person.reads("stopped")
        person.reads("> ")
    # Once more, at the prompt. Python forgets a Ctrl-C between its "> " and its waiting: then, as anybody would, again.
    while "Ctrl-D ends the chat" not in person.received:
        person.types("\x03")
        person.reads_some(2)
    person.reads("> ")
    assert "^[[" not in person.leaves()


@pytest.mark.slow
def test_no_escapes_where_none_are_wanted(ckpt):
    """Not even readline's. The answer is printed once it is finished: what cannot be erased must not be shown."""
    person = Person(ckpt, "--max-new-tokens", 3, "--reset-bias", 1000, "--show-discarded", NO_COLOR="1")
    shown = person.reads("> ")
    person.types("hello\n")
    shown += person.reads("~~~~ [RESET]") + person.reads("> ")
    assert "\x1b" not in shown + person.leaves()


@pytest.mark.slow
def test_compile(ckpt, tmp_path):
    """Compiled it says the same; without a compiler it says so."""
    words = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "Hi", "--device", "cpu"]
    words += ["--max-new-tokens", "30", "--num-samples", "4", "--reset-bias", "9", "--temperature", "1", "--json"]
    no_compiler = os.environ | {"CXX": str(tmp_path / "gone"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([*words, "--compile"], env=no_compiler, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: torch.compile failed") and "leave out --compile" in last
    if shutil.which("g++"):
        plain, compiled = (
            [json.loads(line)["text"] for line in subprocess.check_output([*words, *more], text=True).splitlines()]
            for more in ([], ["--compile"])
        )
        assert plain == compiled


def test_attacks_write_half_a_character(ckpt, tmp_path):
    """The file is UTF-8, a line of JSON each, and what was read comes out again."""
    text = "how \ud800 now 漢"
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": user(text), "target": "Sure", "set": "s"})
    judge = "from backtrack.judge import Verdict\ndef judge(prompt, answer):\n    return Verdict(unsafe=False)\n"
    (tmp_path / "lenient.py").write_text(judge)
    out = tmp_path / "out.jsonl"
    words = ["--ckpt", ckpt, "--prompts", prompts, "--judge", "lenient:judge", "--out", out, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        command(attacks.main, "instruct", *words, "--max-new-tokens", 2, "--dtype", "float32")
    _, line = out.read_text(encoding="utf-8").splitlines()
    sent = [variant["sent"][-1]["content"] for variant in json.loads(line)["variants"].values()]
    assert sent and all(one.startswith(text) for one in sent)


def test_too_little_memory_is_one_line():
    def main():
        torch.empty(1 << 60, dtype=torch.uint8)

    main.__module__ = "tests.memory"
    _, err = command(main, code=2)
    assert "out of memory" in err and "lower the batch size" in err
