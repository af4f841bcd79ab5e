"""Hugging Face model directory <-> Transformer. Weights are safetensors only, every save is atomic.

    model = load_model("path/to/Meta-Llama-3-8B", device="cuda", dtype=torch.bfloat16)
    save_model(model, "runs/mine", tokenizer=tok)      # transformers loads it unchanged

Loading writes each tensor from the file to its place on the device, 32 MiB at a time: the peak is the model itself.
Saving builds a complete directory beside the old one and swaps the two in one system call, so a kill at any moment
leaves the old directory or the new one. No pickles, no downloads, no conversion of other formats.
"""

import contextlib
import ctypes
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model.config import ModelConfig
from model.errors import InputError
from model.transformer import Transformer

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 32 << 20
SHARD_BYTES = 5_000_000_000  # what the hub and transformers' writers settled on


def load_model(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Read a Hugging Face directory into a Transformer in eval mode, on `device`, in `dtype`.

    Raises InputError naming the file and the tensor when anything is missing, unknown, truncated or misshapen.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory{_left_by_a_crash(path)}")
    config = ModelConfig.load(path)
    with torch.device("meta"):  # shapes only: memory is taken tensor by tensor below
        model = Transformer(config)
    files = _tensor_files(path)
    params = dict(model.named_parameters())  # a tied lm_head is listed once, as the embedding

    for name in params.keys() - files.keys():
        raise InputError(f"{path}: tensor {name!r} is missing from the *.safetensors; download the checkpoint again")
    extra = [n for n in files if n not in params and not n.endswith("rotary_emb.inv_freq")]  # Llama-2 files hold those
    if config.tie_word_embeddings:  # some writers store the tied head a second time
        extra = [n for n in extra if n != "lm_head.weight"]
    if extra:
        raise InputError(
            f"{files[extra[0]]}: tensor {extra[0]!r} is not part of this {config.model_type} model"
            f" ({len(extra)} such); config.json and weights do not belong together"
        )
    for name, meta in params.items():
        parent, leaf = name.rsplit(".", 1)
        weight = torch.empty(meta.shape, device=device, dtype=dtype)
        _read_tensor(files[name], name, weight)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(weight))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _left_by_a_crash(path: Path) -> str:
    old = path.with_name(path.name + ".old")
    return f"; a save was interrupted and left the previous checkpoint at {old}: rename it back" if old.is_dir() else ""


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the single file or from the shard index."""
    single, index = path / "model.safetensors", path / INDEX
    if single.is_file():
        shards = [single]
        weight_map = None
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = [path / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{index}: not a shard index (no 'weight_map'); download it again") from None
    else:
        binary = " (*.bin files are pickles and are not read)" if list(path.glob("*.bin")) else ""
        raise InputError(f"{path}: neither model.safetensors nor {INDEX}{binary}; download the safetensors files")
    files = {}
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard}: shard listed in {INDEX} is missing; download it")
        with _open(shard) as f:
            files.update(dict.fromkeys(f.keys(), shard))
    for name, shard in (weight_map or {}).items():
        if files.get(name) != path / shard:
            raise InputError(f"{path / shard}: tensor {name!r} is not in this file, though {INDEX} says so")
    return files


@contextlib.contextmanager
def _open(file: Path):
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error}); download it again") from None


def _read_tensor(file: Path, name: str, out: torch.Tensor) -> None:
    """Copy one stored tensor into `out`, converting the dtype on the way.

    The file is memory-mapped, and mapped pages count as ours for as long as the mapping lives. So at most CHUNK_BYTES
    are read per mapping: with one mapping for all, the peak would be the model twice.
    """
    with _open(file) as f:
        stored = f.get_slice(name)
        shape, kind = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(out.shape):
        raise InputError(f"{file}: tensor {name!r} has shape {shape}, config.json asks for {tuple(out.shape)}")
    if kind not in ("BF16", "F16", "F32", "F64"):
        raise InputError(f"{file}: tensor {name!r} is stored as {kind}; quantized weights are not supported")
    rows = max(1, CHUNK_BYTES // (8 * max(1, out[0].numel())))
    for start in range(0, len(out), rows):
        with _open(file) as f:
            out[start : start + rows] = f.get_slice(name)[start : start + rows]


def save_model(model: Transformer, path: str | Path, tokenizer=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model` (and the tokenizer's files) as a Hugging Face directory, atomically.

    An existing checkpoint at `path` is replaced as a whole; other files in it stay. Dtype is kept.
    """
    with atomic_directory(path) as directory:
        write_model(model, directory, tokenizer, shard_bytes, None if tokenizer is None else tokenizer.reset_id)


def write_model(
    model: Transformer, directory: Path, tokenizer=None, shard_bytes: int = SHARD_BYTES, reset_id: int | None = None
) -> None:
    """save_model's files, written into an existing directory; for callers who add files of their own."""
    config = model.config if reset_id is None else dataclasses.replace(model.config, reset_token_id=reset_id)
    raw = config.to_hf()
    raw["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if tokenizer is not None:
        tokenizer.save(directory)
        raw |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

    shards, size = [{}], 0
    for name, p in model.named_parameters():  # lists a tied head once
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p.detach().contiguous()
        size += p.nbytes
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, name))
        write_tensors(tensors, directory / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.nbytes for p in model.parameters())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
    """Yields an empty directory to fill; on success it takes the place of `path` in one step, on error it vanishes.

    Files that the old directory holds beside its checkpoint (logs, notes) are carried over as hard links.
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

    Where neither the system nor the file system offers it, two renames must do: killed between them, the previous
    checkpoint is whole under `path`.old, and load_model says so.
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


def weights_digest(directory: str | Path) -> str:
    """16 hex digits that stand for a model: its tensors and its config, without reading either into memory."""
    sha = hashlib.sha256()
    for path in [*sorted(Path(directory).glob("*.safetensors")), Path(directory) / "config.json"]:
        if path.name != "training_state.safetensors" and path.is_file():
            with open(path, "rb") as f:
                sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]


def write_text(text: str, path: str | Path) -> None:
    """Write a text file atomically: the old content or the new, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
