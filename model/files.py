"""Writing files so that a kill or a full disk at any moment leaves the old content or the new.

    with atomic_directory("runs/sft") as new: …       # a checkpoint, swapped in as a whole
    write_text("…", "results/tables.md")
    write_tensors({"w": w}, new / "model.safetensors")
"""

import contextlib
import ctypes
import glob
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.errors import InputError


def write_text(text: str, path: str | Path) -> None:
    """Write a text file atomically: the old content or the new, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)


def write_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' save_file, with a full disk reported as the OSError that it is."""
    try:
        save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(file, 0o666 & ~mask)  # save_file makes it readable by its owner alone
        _fsync(file)
    except SafetensorError as error:
        raise OSError(f"{file}: cannot write ({error}); the previous checkpoint, if any, is untouched") from None


@contextlib.contextmanager
def atomic_directory(path: str | Path):
    """Yields an empty directory to fill; on success it takes the place of `path` in one step, on
    error it vanishes.

    Files that the old directory holds beside its checkpoint (logs, notes) are carried over as hard
    links.
    """
    path = Path(os.path.abspath(path)).resolve()
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in ("config.json", "metrics.jsonl")):
        raise InputError(f"{path}: holds files but no checkpoint; choose an empty or new directory")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is not a directory; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):  # of a save that was killed
        shutil.rmtree(leftover)
    new = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    new.mkdir()
    try:
        yield new
        _fsync_tree(new)
        if path.is_dir():
            _carry_over(path, new)
            _swap(new, path)
        else:
            os.rename(new, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after the swap this is the old directory


def _carry_over(old: Path, new: Path) -> None:
    """Link into `new` what `old` holds besides weights and what was just written anew."""
    for entry in old.iterdir():
        if (new / entry.name).exists() or entry.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, copy_function=os.link, symlinks=True)
        else:
            os.link(entry, new / entry.name, follow_symlinks=False)


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
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            _fsync(Path(root, name))
        _fsync(Path(root))
