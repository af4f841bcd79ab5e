"""Writing files so that a kill or a full disk at any moment leaves the old content or the new, never a mix.

    with atomic_directory("runs/sft") as new: …       # fill `new`; it then takes the place of runs/sft in one step
    write_text("…", "results/tables.md")
    write_tensors({"w": w}, new / "model.safetensors")
    with locked("runs/sft"): …                        # one process at a time writes there
    try_save("runs/sft"); check_file("results.json")  # before hours of work: will writing there succeed?

The new content is built beside the old one, brought to the disk (fsync) and exchanged with it by one system call. A
directory that is a mount cannot be exchanged: the error says to choose a directory inside it.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.errors import InputError
from model.slices import whole

MARK = "config.json"  # a directory that has it is a checkpoint
STATE = "optimizer.state"  # of an unfinished run. Safetensors, but servers load every file with that suffix
WEIGHTS = (".safetensors", ".safetensors.index.json", STATE)

# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_text(text: str, path: str | Path) -> None:
    """Write a text file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        draft.write_text(text, encoding="utf-8")
        _fsync(draft)
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_file(path: str | Path) -> None:
    """Raise now, before the work, the error that writing this file would raise afterwards."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft_of(path).unlink()


def draft_of(path: Path) -> Path:
    """An empty file beside `path`, to be filled and then put in its place."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not an ordinary file; name a file to write")
    draft = _beside(Path(os.path.realpath(path)), f"tmp-{os.getpid()}")
    draft.touch()
    return draft


def put(draft: Path, path: Path) -> None:
    """Let the draft take the place of `path`, or of what `path` links to."""
    os.replace(draft, os.path.realpath(path))


DTYPES = dict(float64="F64", float32="F32", bfloat16="BF16", float16="F16", int64="I64", int32="I32", uint8="U8")


def write_tensors(
    tensors: dict[str, torch.Tensor],
    file: Path,
    metadata: dict[str, str] | None = None,
    numbers: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write a safetensors file, one tensor after another. A failure is an OSError that names the file.

    A DTensor, of which every process holds a slice, is gathered when its turn comes, so that only one of them is ever
    whole in memory. All processes must gather in the order of `tensors`, so the dtypes of DTensors must all be alike.
    numbers(name): where the numbers come from if `tensors` are on the meta device.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, the header in JSON, the numbers.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # each begins at a multiple of its size
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = DTYPES[str(tensors[name].dtype).removeprefix("torch.")], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                f.write(_bytes_of(tensors[name] if numbers is None else numbers(name)))
        _fsync(file)
    except OSError as error:
        raise OSError(f"{file}: cannot write ({error}); the previous checkpoint, if any, is untouched") from None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(whole(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


# ── Directories ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def atomic_directory(path: str | Path):
    """Yields an empty directory to fill; on success it takes the place of `path` in one step, on error it vanishes.

    What the old directory holds besides its checkpoint (logs, notes) is carried over. Raises InputError where that
    directory holds no checkpoint, where it cannot be replaced, and while another process writes there.
    """
    path = Path(path).resolve()
    if holds_strangers(path):
        raise InputError(f"{path}: holds files but no checkpoint; choose an empty or new directory")
    with _directory_beside(path) as new:
        yield new
        if path.is_dir():
            _carry_over(path, new)
        for root, _, names in os.walk(new):
            for entry in (*names, "."):
                _fsync(Path(root, entry))
        with _refused_clearly(path):
            (_swap if path.is_dir() else os.rename)(new, path)
        _fsync(path.parent)


def try_save(path: str | Path) -> None:
    """Go through the motions of a save with one small file, raise what would go wrong, and change nothing."""
    path = Path(path).resolve()
    with _directory_beside(path) as new, _refused_clearly(path):
        write_tensors({"trial": torch.zeros(1)}, new / "trial.safetensors")
        try:
            if path.is_dir():
                os.rename(path, new)  # cannot succeed, for `new` is not empty; a mount fails with another error
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def holds_strangers(path: str | Path) -> bool:
    """Whether a directory holds somebody's files and no checkpoint. (Its metrics may be there before one is.)"""
    path = Path(path)
    ours = (path / MARK).exists() or (path / "metrics.jsonl").exists()
    return path.is_dir() and not ours and any(path.iterdir())


def sweep(path: str | Path) -> None:
    """Remove what a killed save to this directory left. Call it where no save is going on: see locked."""
    shutil.rmtree(_beside(Path(path).resolve(), "tmp"), ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    """.NAME.suffix in the same directory."""
    return path.with_name(f".{path.name}.{suffix}")


@contextlib.contextmanager
def _directory_beside(path: Path):
    """An empty directory in which to build what is to replace `path`. It is locked, and removed in the end."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is not a directory; choose another path")
    with locked(path):
        sweep(path)
        new = _beside(path, "tmp")
        with _refused_clearly(path):
            new.mkdir()
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after a swap this is the old directory


@contextlib.contextmanager
def _refused_clearly(path: Path):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
            raise
        why = f"cannot be replaced ({error.strerror}): it is a mount, or {path.parent} may not be written to"
        raise InputError(f"{path}: {why}; choose a path inside it, such as {path / 'run'}") from None


def _carry_over(old: Path, new: Path) -> None:
    """Put into `new` what `old` holds besides weights and what was just written anew."""
    for entry in old.iterdir():
        if (new / entry.name).exists() or entry.name.endswith(WEIGHTS):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, copy_function=_link, symlinks=True)
        else:
            _link(entry, new / entry.name)


def _link(a: str | Path, b: str | Path) -> None:
    try:
        os.link(a, b, follow_symlinks=False)
    except OSError:  # a file system without hard links, or a file that is somebody else's
        shutil.copy2(a, b, follow_symlinks=False)


def _swap(new: Path, path: Path) -> None:
    """Exchange two directories by one system call: renameat2 on Linux, renamex_np on macOS.

    Where the file system does not offer it (NFS), two renames must do: killed between them, the previous checkpoint is
    whole under `path`.old, and load_model says so.
    """
    libc, a, b = ctypes.CDLL(None, use_errno=True), os.fsencode(new), os.fsencode(path)
    exchange, at_cwd = ctypes.c_uint(2), -100  # RENAME_EXCHANGE, RENAME_SWAP; AT_FDCWD
    if sys.platform == "darwin" and libc.renamex_np(a, b, exchange) == 0:
        return
    if hasattr(libc, "renameat2") and libc.renameat2(at_cwd, a, at_cwd, b, exchange) == 0:
        return
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for a directory
            raise
    finally:
        os.close(fd)


# ── One process at a time ────────────────────────────────────────────────────────────────────────────────────────────

HELD: set[Path] = set()  # what this process has locked: a run saves to its own directory


@contextlib.contextmanager
def locked(path: str | Path):
    """Keep other processes from writing to `path`, a directory or a file, while this block runs.

    Raises InputError that says who holds it. The kernel lets go when a process ends, however it ends. On a file system
    without locks nobody is stopped.
    """
    path = Path(path).resolve()
    if path in HELD:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".lock-{path.name}")
    with _refused_clearly(path):
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(fd, path)
        HELD.add(path)
        yield
    finally:
        if path in HELD:
            HELD.discard(path)
            file.unlink(missing_ok=True)  # while it is still ours
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(fd, 500).decode(errors="replace") or "another process"
        raise InputError(f"{path}: {who} writes there; wait until it has ended, or choose another --out") from None
    except OSError:
        return
    if os.fstat(fd).st_nlink == 0:  # its holder unlinked it between our open and our flock
        raise InputError(f"{path}: another process has just finished writing there; start again")
    os.truncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %T')})".encode())
