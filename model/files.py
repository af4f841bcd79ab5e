"""Writing files so that a kill or a full disk at any moment leaves the old content or the new.

    with atomic_directory("runs/sft") as new: …       # a checkpoint, put in place as a whole
    write_text("…", "results/tables.md")
    write_tensors({"w": w}, new / "model.safetensors")
    with locked("runs/sft"): …                        # one process at a time writes there
    try_save("runs/sft"); check_file("results.json")  # what is to be written later: does it work?

Where a directory may not be exchanged (a mount, a volume, a parent that may not be written), its new content is built
in a directory inside, and then moved up file by file. config.json goes first and comes last, so that a reader finds the
old checkpoint, for a moment none, or the new one, never a mix; a kill in between is mended by finish_save.

Where a file may not be replaced (the same, for files), it is written over in place: there a kill can leave half of it.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from model.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

MARK = "config.json"  # a directory that has it is a checkpoint
STATE = "optimizer.state"  # of a run that goes on: safetensors by another suffix, for servers read all *.safetensors
WEIGHTS = (".safetensors", ".safetensors.index.json", STATE)
SAVE = ".save"  # inside the directory: a whole save, to be moved up
OURS = (SAVE, ".lock", ".reference", "metrics.jsonl")  # names begin so that are no strangers in a directory of ours


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_text(text: str, path: str | Path) -> None:
    """Write a text file atomically: the old content or the new, never half of it."""
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
    """Raises now, before the work, what would go wrong with writing this file afterwards."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft_of(path).unlink()


def draft_of(path: Path) -> Path:
    """An empty file in which to write what is to become `path`: beside it, else where temporary files go."""
    draft = _beside(Path(os.path.realpath(path)), f"tmp-{os.getpid()}")
    try:
        draft.touch()
    except OSError:
        if not os.access(path, os.W_OK):
            raise
        fd, name = tempfile.mkstemp()
        os.close(fd)
        draft = Path(name)
    return draft


def put(draft: Path, path: Path) -> None:
    """Let the draft take the place of `path`; where the file may not be replaced, write it over."""
    try:
        if path.exists() and not path.is_file():  # /dev/null, /dev/stdout
            raise OSError(errno.EBUSY, "not an ordinary file")
        os.replace(draft, os.path.realpath(path))
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        with open(draft, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
            target.flush()
            with contextlib.suppress(OSError):  # a pipe has nothing to sync
                os.fsync(target.fileno())
        draft.unlink()


# As the format calls them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor after another. A failure is an OSError that names the file.

    A DTensor, of which every rank holds a slice, is gathered when its turn comes: so no more than one of them is ever
    whole in memory. All ranks must do so, in the order of `tensors`, whose dtypes are then all alike.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, the header in JSON, the numbers.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # each begins at a multiple of its size
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                f.write(_bytes_of(tensors[name]))
        _fsync(file)
    except OSError as error:
        raise OSError(f"{file}: cannot write ({error}); the previous checkpoint, if any, is untouched") from None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return memoryview(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


# ── Directories ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def atomic_directory(path: str | Path):
    """Yields an empty directory to fill; on success it takes the place of `path` in one step, on
    error it vanishes.

    Files that the old directory holds beside its checkpoint (logs, notes) are carried over as hard
    links, or copied where the file system has none.
    """
    path = _resolved(path)
    if holds_strangers(path):
        raise InputError(f"{path}: holds files but no checkpoint; choose an empty or new directory")
    _refuse_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_save(path)
    new, claim = _new_directory(path)
    try:
        yield new
        _fsync_tree(new)
        if new.parent == path:
            os.rename(new, path / SAVE)  # from here on the save counts
            _fsync(path)
            finish_save(path)
        elif path.is_dir():
            _carry_over(path, new)
            _swap(new, path)
            _fsync(path.parent)
        else:
            os.rename(new, path)
            _fsync(path.parent)
    finally:
        os.close(claim)
        shutil.rmtree(new, ignore_errors=True)  # after the swap this is the old directory


def _refuse_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is not a directory; choose another path")


def holds_strangers(path: str | Path) -> bool:
    """Whether a directory holds somebody's files and no checkpoint. (Its metrics may be there before one is.)"""
    path = Path(path)
    if not path.is_dir() or (path / MARK).exists() or (path / "metrics.jsonl").exists():
        return False
    return not all(entry.name.startswith(OURS) for entry in path.iterdir())


def try_save(path: str | Path) -> bool:
    """Go through the motions of a save with one small file, and leave everything as it was.

    Raises the OSError that the first save would raise, hours later. Returns whether saves replace the directory in one
    step; False: they are built inside it.
    """
    path = _resolved(path)
    _refuse_file(path)
    missing = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        finish_save(path)
        new, claim = _new_directory(path)
        try:
            write_tensors({"trial": torch.zeros(1)}, new / "trial.safetensors")
            _fsync_tree(new)
            if new.parent == path:
                os.replace(new / "trial.safetensors", path / f"{SAVE}.trial")
                (path / f"{SAVE}.trial").unlink()
            else:
                _carry_over(path, new)
            return new.parent != path
        finally:
            os.close(claim)
            shutil.rmtree(new, ignore_errors=True)
    finally:
        if missing:
            path.rmdir()


def finish_save(path: str | Path) -> None:
    """Move up what a save inside `path` has built; also where a kill interrupted that. Else nothing happens."""
    path = _resolved(path)
    whole, moving = path / SAVE, path / f"{SAVE}.moving"
    if whole.is_dir():
        (path / MARK).unlink(missing_ok=True)  # no checkpoint from here on …
        for old in path.iterdir():
            if old.name.endswith(WEIGHTS):
                old.unlink()
        os.rename(whole, moving)
    if moving.is_dir():
        for entry in sorted(moving.iterdir(), key=lambda entry: entry.name == MARK):
            if entry.is_dir():  # takes the place of an empty directory only
                shutil.rmtree(path / entry.name, ignore_errors=True)
            os.replace(entry, path / entry.name)  # … until here, when the last one is config.json
            _fsync(path)
        moving.rmdir()


def is_half_moved(path: Path) -> bool:
    """Whether a save inside `path` is being moved up, or was when it was killed: then it is no checkpoint."""
    return not (path / MARK).exists() and any((path / name).is_dir() for name in (SAVE, f"{SAVE}.moving"))


def kept_beside(path: str | Path, suffix: str) -> Path:
    """Where to keep what is not to vanish with a checkpoint: PATH.suffix, or inside where saves are built inside."""
    path = _resolved(path)
    beside = path.with_name(f"{path.name}.{suffix}")
    inside = len(os.fsencode(beside.name)) > 255 or (path.is_dir() and not _may_be_swapped(path))
    return path / f".{suffix}" if inside else beside


def sweep(path: str | Path) -> None:
    """Remove what saves to this directory left when they were killed. A save that is going on is let alone."""
    path = _resolved(path)
    pattern = glob.escape(_beside(path, "tmp-").name) + "*"
    for leftover in [*path.parent.glob(pattern), *path.glob(f"{SAVE}.tmp-*")]:
        claim = _claim(leftover)
        if claim is not None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(leftover)
            os.close(claim)


def _resolved(path: str | Path) -> Path:
    return Path(os.path.abspath(path)).resolve()


def _beside(path: Path, suffix: str) -> Path:
    """.NAME.suffix in the same directory."""
    return path.with_name(f".{_short(path.name)}.{suffix}")


def _short(name: str) -> str:
    """A name may have 255 bytes: of one that has nearly as many, a digest."""
    return name if len(os.fsencode(name)) < 220 else hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _new_directory(path: Path) -> tuple[Path, int]:
    """An empty directory to build in, claimed: beside `path` if it may take its place, else inside."""
    sweep(path)
    new = _beside(path, f"tmp-{os.getpid()}")
    if not _may_be_swapped(path):
        path.mkdir(parents=True, exist_ok=True)
        new = path / f"{SAVE}.tmp-{os.getpid()}"
    new.mkdir()
    return new, _claim(new)


def _may_be_swapped(path: Path) -> bool:
    """Whether a directory beside `path` can take its place: tried out, without moving anything."""
    probe = _beside(path, f"tmp-{os.getpid()}")
    try:
        probe.mkdir()
    except OSError:  # a parent that may not be written
        return False
    try:
        if not path.is_dir():
            return True
        (probe / "full").touch()
        os.replace(path, probe)  # cannot succeed, since `probe` is not empty; that the error says so is what we ask
        os.replace(probe, path)
        return False
    except OSError as error:  # others: a mount, a volume, a parent with a sticky bit
        return error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _claim(directory: Path) -> int | None:
    """Lock a directory that is being built, until the file descriptor is closed; None if another process has it."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        pass  # a file system without locks
    return fd


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
    """Exchange two directories. One system call on Linux (renameat2) and macOS (renamex_np).

    Where neither the system nor the file system offers it, two renames must do: killed between
    them, the previous checkpoint is whole under `path`.old, and load_model says so.
    """
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    a, b = os.fsencode(new), os.fsencode(path)
    if sys.platform == "darwin" and libc.renamex_np(a, b, ctypes.c_uint(2)) == 0:  # RENAME_SWAP
        return
    at_cwd, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and libc.renameat2(at_cwd, a, at_cwd, b, exchange) == 0:
        return
    old = path.with_name(path.name + ".old")
    if len(os.fsencode(old.name)) > 255:
        old = _beside(path, "old")
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


def _fsync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            _fsync(Path(root, name))
        _fsync(Path(root))


# ── One process at a time ────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def locked(path: str | Path):
    """Keep other processes from writing to `path`, a directory or a file, while this block runs.

    Raises InputError that says who holds it. The kernel lets go when a process ends, however it ends. A file system
    without locks does not stop anybody.
    """
    path = _resolved(path)
    fd, file = _lock(path)
    try:
        yield
    finally:
        if file is not None:  # while it is still ours
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        if fd is not None:
            os.close(fd)


def _lock(path: Path) -> tuple[int | None, Path | None]:
    """(the file descriptor that holds the lock, the file that says who does)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = (
        path / ".lock" if path.is_dir() and not _may_be_swapped(path) else path.with_name(f".lock-{_short(path.name)}")
    )
    while fcntl is not None:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None, None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(fd, 500).decode(errors="replace") or "another process"
            os.close(fd)
            raise InputError(f"{path}: {who} writes there; wait until it has ended, or choose another --out") from None
        except OSError:
            return fd, file
        if file.exists() and os.path.samestat(os.stat(file), os.fstat(fd)):
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            os.truncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {socket.gethostname()} (since {now})".encode())
            return fd, file
        os.close(fd)  # its last holder has just removed it
    return None, None
