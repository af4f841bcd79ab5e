"""Saving where it is made hard: mounts, file systems without links, long names, two runs at once, Ctrl-C.

What a system refuses is played by patched system calls, and once, where this process may mount, by a mount. Training is
run as its users run it.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import at_every_line, command
from models import LLAMA, network_of
from safetensors.torch import load_file, save_file
from samples import UNSAFE, row_of, toy_tokenizer, write
from training import contents, interrupted, steps_of, trained

import train
from data.prepare import __main__ as prepare
from model import InputError, files, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
STATE = train.log.STATE


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


def a_mount(monkeypatch, out, number=errno.EBUSY):
    """`out` may neither be renamed nor replaced; what is in it may."""
    for name in ("replace", "rename"):
        refuse(monkeypatch, name, number, lambda a, b: out.resolve() in (Path(a), Path(b)))


def a_closed_parent(monkeypatch, out):
    real = Path.mkdir

    def mkdir(path, *more, **options):
        if path.parent == out.resolve().parent and path != out.resolve():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize("what", ["EBUSY", "EXDEV", "closed parent"])
def test_saves_are_built_inside_a_mount(world, tmp_path, monkeypatch, unbroken, what):
    """A killed run goes on there, and ends with the bits of any other. It says beforehand how it saves."""
    out = tmp_path / "out"
    out.mkdir()
    if what == "closed parent":
        a_closed_parent(monkeypatch, out)
    else:
        a_mount(monkeypatch, out, getattr(errno, what))
    said = interrupted(base(world, out), at=4)
    told, first = said.index("saves are built inside it"), said.index("step     1/4")
    assert told < first
    assert set(contents(out)) == {*contents(unbroken), STATE} and load_model(out)
    (out / "notes.txt").write_text("mine")
    trained(*base(world, out, "--resume"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    same_run(out, unbroken)
    assert not [p.name for p in tmp_path.iterdir() if p != out]


@pytest.mark.parametrize("number", [38, 95, errno.EPERM])
def test_without_hard_links_files_are_copied(world, tmp_path, monkeypatch, unbroken, number):
    refuse(monkeypatch, "link", number)
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "metrics.jsonl").touch()
    (out / "logs/a").write_text("mine")
    trained(*base(world, out))
    assert (out / "logs/a").read_text() == "mine"
    shutil.rmtree(out / "logs")
    same_run(out, unbroken)


def test_a_real_mount(world, tmp_path, unbroken):
    """A bind mount, which no rename may touch and none may cross, in a namespace of its own."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    mount = f"mount --bind {disk} {out}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        pytest.skip("this process may not mount")
    run = " ".join(map(str, [sys.executable, "train.py", *base(world, out)]))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {run}"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same_run(disk, unbroken)

    rows, target = write(tmp_path / "rows.jsonl", UNSAFE), tmp_path / "target.jsonl"
    (disk / "rows.jsonl").write_text("old")
    target.touch()
    mount = f"mount --bind {disk / 'rows.jsonl'} {target}"
    run = f"{sys.executable} -m data.prepare prompts --in {rows} --out {target}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} && {run}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"Hi"' in (disk / "rows.jsonl").read_text()


def test_a_save_that_cannot_work_is_found_out_before_the_first_step(world, tmp_path, monkeypatch):
    """And leaves nothing behind. So does the trial of one that can, for base and before dpo's reference."""
    out = tmp_path / "out"
    steps = []
    monkeypatch.setattr(train, "accumulate", lambda *a: steps.append(1))
    monkeypatch.setattr(train, "reference_logprobs", lambda *a: steps.append(1))

    def full(tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_bytes_of", full)
    for words in (base(world, out), dpo(world, out)):
        assert "No space left" in trained(*words, code=2)
    assert not steps and not list(tmp_path.iterdir())
    monkeypatch.undo()
    interrupted(base(world, out), at=3)
    monkeypatch.setattr(train, "accumulate", lambda *a: steps.append(1))
    monkeypatch.setattr(files, "_bytes_of", full)
    assert "No space left" in trained(*base(world, out, "--resume"), code=2) and not steps
    assert "not a directory" in trained(*base(world, world / "rows.jsonl"), code=2)


@pytest.mark.parametrize("existing", [True, False])
def test_a_trial_changes_nothing(tmp_path, existing, monkeypatch):
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    if existing:
        save_model(network_of(LLAMA), out)
        (out / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert files.try_save(out) and contents(tmp_path) == before and out.exists() == existing
    a_mount(monkeypatch, out)
    assert not files.try_save(out) and contents(tmp_path) == before and out.exists() == existing
    assert [p.name for p in out.parent.iterdir()] == (["out"] if existing else [])


def test_names_of_almost_any_length(world, tmp_path, unbroken):
    for name in ("n" * 250, "ü" * 125):
        out = tmp_path / name
        trained(*base(world, out))
        same_run(out, unbroken)
        trained(*dpo(world, tmp_path / name[::-1].replace(name[0], "m"), "--steps", 2))
        files.write_text("text", tmp_path / f"{name}.txt")
        assert (tmp_path / f"{name}.txt").read_text() == "text"


# ── A save inside the directory, at every line ───────────────────────────────────────────────────────────────────────


def test_inside_it_is_old_or_none_or_new_at_any_line(tmp_path, monkeypatch):
    """Never a mix: while config.json is there, so are all its weights. After a kill finish_save makes it old or new."""
    monkeypatch.setattr(files, "_fsync", lambda path: None)
    out, copies = tmp_path / "out", tmp_path / "copies"
    models = [network_of(LLAMA | {"x_run": name}, seed) for seed, name in enumerate("AB")]
    whole = []
    for which, shard_bytes in ((0, 20_000), (1, 10**9)):
        save_model(models[which], tmp_path / "plain", shard_bytes=shard_bytes)
        whole.append(contents(tmp_path / "plain"))
    save_model(models[0], out, shard_bytes=20_000)
    (out / "metrics.jsonl").write_text("1\n")
    a_mount(monkeypatch, out)

    def checkpoint_of(directory):
        return {name: data for name, data in contents(directory).items() if not name.startswith((".save", "metrics"))}

    seen = []

    def look():
        seen.append(whole.index(checkpoint_of(out)) if (out / "config.json").exists() else None)
        shutil.copytree(out, copies / str(len(seen)))

    at_every_line(lambda: save_model(models[1], out), look)
    first, last = seen.index(None), len(seen) - seen[::-1].index(None)
    assert first > 50 and seen == [0] * first + [None] * (last - first) + [1] * (len(seen) - last)
    after = []
    for n in range(1, len(seen) + 1):
        if seen[n - 1] is None:
            with pytest.raises(InputError, match="is being saved"):
                load_model(copies / str(n))
        files.finish_save(copies / str(n))
        after.append(whole.index(checkpoint_of(copies / str(n))))
        files.finish_save(copies / str(n))  # again: nothing to do
        assert (copies / str(n) / "metrics.jsonl").read_text() == "1\n"
    turn = after.index(1)
    assert turn <= first and after == [0] * turn + [1] * (len(after) - turn)
    # A run that goes on finishes it, too; leftovers of a kill are swept.
    monkeypatch.undo()
    save_model(models[1], copies / "1")
    assert checkpoint_of(copies / "1") == whole[1] and not list((copies / "1").glob(".save*"))


def test_text_is_written_over_where_the_file_may_not_be_replaced(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    for number in (errno.EBUSY, errno.EXDEV, errno.EACCES):
        file.write_text("old and long")
        with monkeypatch.context() as patch:
            refuse(patch, "replace", number)
            files.write_text("new", file)
            assert file.read_text() == "new"
            with pytest.raises(OSError):
                files.write_text("new", tmp_path / "absent.json")
    with monkeypatch.context() as patch:  # a full disk is none of these
        refuse(patch, "replace", errno.ENOSPC)
        with pytest.raises(OSError):
            files.write_text("newer", file)
    assert file.read_text() == "new" and [f.name for f in tmp_path.iterdir()] == ["a.json"]
    files.write_text("nowhere", "/dev/null")
    assert not Path("/dev/null").is_file()
    (tmp_path / "link").symlink_to(file)
    files.write_text("through", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and file.read_text() == "through"


def test_prepare_writes_over_a_mounted_file(tmp_path, monkeypatch):
    rows, out = write(tmp_path / "rows.jsonl", UNSAFE), tmp_path / "out.jsonl"
    out.write_text("old")
    refuse(monkeypatch, "replace", errno.EBUSY)
    command(prepare.main, "prompts", "--in", rows, "--out", out)
    assert '"Hi"' in out.read_text() and {f.name for f in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}


# ── Two at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mounted", [False, True])
def test_two_runs_with_one_out(world, tmp_path, monkeypatch, mounted, unbroken):
    """The second says who holds it, however --out is spelled; a kill lets go."""
    out = tmp_path / "out"
    out.mkdir()
    if mounted:
        a_mount(monkeypatch, out)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.locked(out):
            os.write(go, b"x")
            time.sleep(600)
        os._exit(0)
    try:
        os.read(ready, 1)
        (tmp_path / "link").symlink_to(out)
        for spelling in (out, f"{out}/", tmp_path / "link", tmp_path / "x" / ".." / "out"):
            said = trained(*base(world, spelling), code=2)
            assert re.search(rf"error: {out}: process {pid} on \S+ \(since 20\d\d-.*\) writes there", said)
            assert "step" not in said
        trained(*base(world, tmp_path / "other"))  # is none of its business
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    trained(*base(world, out))
    same_run(out, unbroken)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "link", "other"}


def test_a_save_that_is_going_on_is_not_swept(tmp_path):
    """Another process saves to the same place without asking: each directory is that of the last who was ready."""
    with files.atomic_directory(tmp_path / "out") as mine:
        (mine / "config.json").write_text("mine")
        pid = os.fork()
        if pid == 0:
            with files.atomic_directory(tmp_path / "out") as other:
                (other / "config.json").write_text("other's")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert (tmp_path / "out/config.json").read_text() == "other's"
        assert (mine / "config.json").read_text() == "mine"
    assert contents(tmp_path) == {"out/config.json": b"mine"}


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


def test_clip_0_is_off(world, tmp_path):
    """The same as a bound that no gradient reaches; and it trains."""
    for clip in (0, 1e6):
        trained(*base(world, tmp_path / str(clip), "--clip", clip))
    off, far = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "1000000.0"))
    assert all(torch.equal(off[name], far[name]) for name in far)
    trained(*base(world, tmp_path / "start", "--steps", 0))
    assert any(not torch.equal(off[n], w) for n, w in load_file(tmp_path / "start/model.safetensors").items())
    norms = [step["grad_norm"] for step in steps_of(tmp_path / "0")]
    assert min(norms) > 0 and norms == [step["grad_norm"] for step in steps_of(tmp_path / "1000000.0")]


def test_steps_0_needs_no_max_length(world, tmp_path):
    """Nothing is trained, so nothing has to fit; with a step it has to."""
    for length in (1, 10**6):
        trained(*base(world, tmp_path / str(length), "--steps", 0, "--max-length", length))
        assert load_model(tmp_path / str(length))
        trained(*base(world, tmp_path / "not", "--steps", 1, "--max-length", length), code=2)


@pytest.mark.parametrize("slash", ["", "/"])
def test_dpo_goes_on_before_its_first_save(world, tmp_path, slash):
    """Killed while the reference was computed, or in the first steps; with a slash as it is typed by completion."""
    out = tmp_path / "out"
    words = dpo(world, f"{out}{slash}", "--epochs", 1, "--save-every", 9, "--resume")
    assert "nothing is saved yet" in interrupted(words, at=2)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.reference"}
    assert "read from" in trained(*words)
    trained(*dpo(world, tmp_path / "whole", "--epochs", 1, "--save-every", 9))
    same_run(out, tmp_path / "whole")


def killed_in_step(number):
    """The reference log-probs of this step, counted from 0, are the end of the process."""
    real, steps = train.autocast, iter(range(number, -1, -1))

    def autocast(args):
        if next(steps) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(args)

    train.autocast = autocast


@pytest.mark.parametrize("damage", [None, b"", b"x" * 99])
def test_reference_log_probs_are_kept_in_parts(world, tmp_path, monkeypatch, damage):
    """A kill costs those of the last few steps. A part that is damaged is computed again, with those behind it."""
    monkeypatch.setattr(train.log, "PART", 4)
    out, more = tmp_path / "out", ("--steps", 14)
    pid = os.fork()
    if pid == 0:
        killed_in_step(10)
        trained(*dpo(world, out, *more))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    parts = {int(re.search(r"from-(\d+)", p.name)[1]): p for p in Path(f"{out}.reference").iterdir()}
    assert set(parts) == {0, 4}
    if damage is not None:
        parts[4].write_bytes(damage)
    computed, real = [], train.make_batch
    monkeypatch.setattr(train, "make_batch", lambda *a: computed.append(torch.is_grad_enabled()) or real(*a))
    found = 8 if damage is None else 4
    said = interrupted(dpo(world, out, *more), at=1)
    assert f"those of {found} steps are there already" in said and len(computed) == 14 - found
    [file] = Path(f"{out}.reference").iterdir()  # all in one, and no parts
    trained(*dpo(world, tmp_path / "whole", *more))
    assert file.read_bytes() == (tmp_path / "whole.reference" / file.name).read_bytes()


def test_ctrl_c_keeps_the_reference_log_probs(world, tmp_path, monkeypatch):
    real, calls = train.make_batch, iter(range(100))

    def make_batch(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_batch", make_batch)
        said = trained(*dpo(world, tmp_path / "out", "--steps", 6), code=130)
    assert "those of 3 steps are kept" in said
    assert "those of 3 steps are there already" in trained(*dpo(world, tmp_path / "out", "--steps", 6))


def test_foreign_files_are_refused_as_ever(world, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_file({"w": torch.zeros(1)}, out / "adapter.safetensors")
    assert "holds files but no checkpoint" in trained(*base(world, out), code=2)
    with pytest.raises(InputError):
        save_model(network_of(LLAMA), out)
    assert list(contents(tmp_path)) == ["out/adapter.safetensors"]
