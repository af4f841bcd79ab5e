"""Saving where it is made hard: mounts, file systems without links, long names, two runs at once, Ctrl-C.

What a system refuses is played by patched system calls, and once, where this process may mount, by a mount. Training is
run as its users run it.
"""

import errno
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from models import LLAMA, network_of
from samples import row_of, toy_tokenizer, write
from training import contents, interrupted, steps_of, trained

import train
from backtrack.run import reference
from model import InputError, files, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`start`: a random model with the toy's tokenizer; corpus.jsonl and rows.jsonl."""
    root = tmp_path_factory.mktemp("world")
    save_model(network_of(LLAMA), root / "start", tokenizer=toy_tokenizer())
    write(root / "corpus.jsonl", *({"text": f"word{i} other{i} thing{i * i}. " * 9} for i in range(30)))
    write(root / "rows.jsonl", *(row_of(f"Hi {i}", "no", "yes", unsafe=i % 2 == 0) for i in range(12)))
    return root


def base(world, out, *more):
    words = ["base", "--config", world / "start/config.json", "--tokenizer", world / "start", "--device", "cpu"]
    words += ["--data", world / "corpus.jsonl", "--out", out, "--max-length", 32, "--batch-size", 2]
    return [*words, "--steps", 4, "--save-every", 2, "--log-every", 1, *more]


def dpo(world, out, *more):
    words = ["dpo", "--init", world / "start", "--data", world / "rows.jsonl", "--device", "cpu", "--out", out]
    return [*words, "--max-length", 96, "--batch-size", 2, "--lr", 1e-3, "--save-every", 2, "--log-every", 1, *more]


def same_run(a, b):
    assert contents(a).keys() == contents(b).keys()
    assert contents(a)["model.safetensors"] == contents(b)["model.safetensors"]
    assert steps_of(a) == steps_of(b)


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    trained(*base(world, out))
    return out


# ── What a system may refuse ─────────────────────────────────────────────────────────────────────────────────────────


def refuse(monkeypatch, name, number, when=lambda *paths: True):
    """The system call os.NAME fails with this error, for the paths that `when` picks."""
    real = getattr(os, name)

    def call(*paths, **more):
        if when(*paths):
            raise OSError(number, os.strerror(number), str(paths[0]))
        return real(*paths, **more)

    monkeypatch.setattr(files.os, name, call)


def test_a_directory_that_cannot_be_replaced_is_one_clear_line(world, tmp_path, monkeypatch):
    """A mount, found out before the first step; and nothing is left of the trial, nor of a save that fails."""
    out = tmp_path / "out"
    save_model(network_of(LLAMA), out)
    before = contents(tmp_path)
    for number in (errno.EBUSY, errno.EXDEV):
        with monkeypatch.context() as patch:
            refuse(patch, "rename", number, lambda a, b: Path(a) == out.resolve())
            said = trained(*base(world, out, "--resume"), code=2)
            assert f"{out}: holds a model but no" in said  # asked first
            with pytest.raises(InputError, match=f"{out}: cannot be replaced .* such as {out}/run"):
                files.try_save(out)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_swap", lambda *a: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        with pytest.raises(InputError, match=f"such as {out}/run"):
            save_model(network_of(LLAMA, 2), out)
    with monkeypatch.context() as patch:  # a parent that may not be written
        refuse(patch, "open", errno.EACCES, lambda path, *more: Path(path).name.startswith(".lock"))
        assert f"such as {out}/run" in trained(*base(world, out), code=2)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_hard_links_files_are_copied(world, tmp_path, monkeypatch, unbroken):
    refuse(monkeypatch, "link", errno.EPERM)
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "metrics.jsonl").touch()
    (out / "logs/a").write_text("mine")
    trained(*base(world, out))
    assert (out / "logs/a").read_text() == "mine"
    shutil.rmtree(out / "logs")
    same_run(out, unbroken)


def test_a_save_that_cannot_work_is_found_out_before_the_first_step(world, tmp_path, monkeypatch):
    """And leaves nothing behind. So does the trial of one that can, for base and before dpo's reference."""
    out = tmp_path / "out"
    save_model(network_of(LLAMA), tmp_path / "kept")
    before = contents(tmp_path)
    files.try_save(tmp_path / "kept")  # a trial changes nothing
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "kept")
    steps = []
    monkeypatch.setattr(train, "backward", lambda *a: steps.append(1))
    monkeypatch.setattr(reference, "compute", lambda *a: steps.append(1))

    def full(tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_bytes_of", full)
    for words in (base(world, out), dpo(world, out)):
        assert "No space left" in trained(*words, code=2)
    assert not steps and not list(tmp_path.iterdir())
    monkeypatch.undo()
    interrupted(base(world, out), at=3)
    monkeypatch.setattr(train, "backward", lambda *a: steps.append(1))
    monkeypatch.setattr(files, "_bytes_of", full)
    assert "No space left" in trained(*base(world, out, "--resume"), code=2) and not steps
    assert "not a directory" in trained(*base(world, world / "rows.jsonl"), code=2)


def test_text_goes_through_links_and_into_ordinary_files_only(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")
    with monkeypatch.context() as patch:
        refuse(patch, "replace", errno.ENOSPC)
        with pytest.raises(OSError):
            files.write_text("newer", file)
    assert file.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "link").symlink_to(file)
    files.write_text("through", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and file.read_text() == "through"
    for path in ("/dev/null", tmp_path):
        with pytest.raises(InputError, match="name a file"):
            files.check_file(path)


# ── Two at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_writers_with_one_out(world, tmp_path, unbroken):
    """The second, a run or a single save, says who holds it, however --out is spelled; a kill lets go."""
    out = tmp_path / "out"
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.locked(out), files.locked(out):  # again within the process: a run saves
            os.write(go, b"x")
            time.sleep(600)
        os._exit(0)
    try:
        os.read(ready, 1)
        (tmp_path / "link").symlink_to(out)
        for spelling in (f"{out}/", tmp_path / "link", tmp_path / "x" / ".." / "out"):
            said = trained(*base(world, spelling), code=2)
            assert re.search(rf"error: {out}: process {pid} on \S+ \(since 20\d\d-.*\) writes there", said)
            assert "step" not in said
        with pytest.raises(InputError, match=f"process {pid}"):
            save_model(network_of(LLAMA), out)
        save_model(network_of(LLAMA), tmp_path / "other")  # is none of its business
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (tmp_path / ".out.tmp").mkdir()  # of a save that was killed
    trained(*base(world, out))
    same_run(out, unbroken)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "link", "other"}


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", lambda fd, how: (tmp_path / ".lock-out").unlink())
    with pytest.raises(InputError, match="another process has just finished"), files.locked(tmp_path / "out"):
        pass


def test_without_locks_nobody_is_stopped(world, tmp_path, monkeypatch, unbroken):
    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    trained(*base(world, tmp_path / "out"))
    same_run(tmp_path / "out", unbroken)


# ── What is said and what is kept ────────────────────────────────────────────────────────────────────────────────────


def test_ctrl_c_says_what_is_saved(world, tmp_path):
    out = tmp_path / "out"
    assert interrupted(base(world, out), at=2).splitlines()[-1] == "stopped: nothing is saved yet"
    said = interrupted(base(world, out, "--resume"), at=4)
    assert said.splitlines()[-1] == f"stopped: {out} still holds step 2 of 4; --resume goes on from there"


def test_steps_0_needs_no_max_length(world, tmp_path):
    """Nothing is trained, so nothing has to fit; with a step it has to."""
    trained(*base(world, tmp_path / "a", "--steps", 0, "--max-length", 10**6))
    assert load_model(tmp_path / "a")
    trained(*base(world, tmp_path / "not", "--steps", 1, "--max-length", 10**6), code=2)


def test_dpo_goes_on_before_its_first_save(world, tmp_path):
    """Killed while the reference was computed, or in the first steps; with a slash as it is typed by completion."""
    out = tmp_path / "out"
    words = dpo(world, f"{out}/", "--epochs", 1, "--save-every", 9, "--resume")
    assert "nothing is saved yet" in interrupted(words, at=2)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.reference"}
    assert "read from" in trained(*words)
    trained(*dpo(world, tmp_path / "whole", "--epochs", 1, "--save-every", 9))
    same_run(out, tmp_path / "whole")


def test_reference_log_probs_are_kept_step_by_step(world, tmp_path, monkeypatch):
    """Ctrl-C or a kill costs those of one step, and a half line is computed again."""
    out, words, real, computed = tmp_path / "out", dpo(world, tmp_path / "out", "--steps", 6), reference.compute, []

    def compute(*args):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(real(*args))
        return computed[-1]

    monkeypatch.setattr(reference, "compute", compute)
    trained(*words, code=130)
    monkeypatch.setattr(reference, "compute", lambda *args: computed.append(1) or real(*args))
    [file] = Path(f"{out}.reference").iterdir()
    file.write_bytes(file.read_bytes()[:-9])  # as a kill leaves it
    assert "those of 2 steps are there already" in trained(*words) and len(computed) == 3 + 5
    trained(*dpo(world, tmp_path / "whole", "--steps", 6))
    assert file.read_bytes() == (tmp_path / "whole.reference" / file.name).read_bytes()
    same_run(out, tmp_path / "whole")
