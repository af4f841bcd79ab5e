"""Hugging Face model directory <-> Transformer. Weights are safetensors only, every save is atomic.

    model = load_model("path/to/Meta-Llama-3-8B", device="cuda", dtype=torch.bfloat16)
    save_model(model, "runs/mine", tokenizer=tok)      # transformers loads it unchanged

Loading writes each tensor from the file to its place on the device, 32 MiB at a time: the peak is the model itself.
Saving builds a complete directory beside the old one and swaps the two in one system call, so a kill at any moment
leaves the old directory or the new one. No pickles, no downloads, no conversion of other formats.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model.config import ModelConfig
from model.errors import InputError, read_json, refuse_pointer
from model.files import atomic_directory, write_tensors
from model.slices import own_rows
from model.transformer import Transformer

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 32 << 20
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD_BYTES = 5_000_000_000  # what the hub and transformers' writers settled on


def load_model(
    path: str | Path,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """Read a Hugging Face directory into a Transformer in eval mode, on `device`, in `dtype`.

    prepare(model) is called before a weight takes memory. It may turn weights into DTensors (backtrack.run.parallel),
    of which each process reads its own rows, and add parameters, whose numbers it sets itself.

    Raises InputError naming the file and the tensor when anything is missing, unknown, truncated or misshapen.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(f"{path}: is a file; name the directory of a model")
    if not path.is_dir():
        old = path.with_name(path.name + ".old")
        left = f"; a save was interrupted and left the previous checkpoint at {old}: rename it back" * old.is_dir()
        raise InputError(f"{path}: no such directory{left}")
    config, files = ModelConfig.load(path), _tensor_files(path)
    stored_as = _names(files, config)
    notes, both = [f"config.json: {note}" for note in config.notes], {HEAD, EMBEDDING} <= stored_as.keys()
    if config.tie_word_embeddings and both and not _equal(files, stored_as[HEAD], stored_as[EMBEDDING]):
        notes.append(f"config.json says tie_word_embeddings, but the files hold an {HEAD} of its own: not tied")
        config = dataclasses.replace(config, tie_word_embeddings=False)  # as transformers decides
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    with torch.device("meta"):  # shapes only: memory is taken tensor by tensor below
        model = Transformer(config)
    if config.tie_word_embeddings and HEAD in stored_as:  # one tensor, under either name or both
        stored_as.setdefault(EMBEDDING, stored_as.pop(HEAD))
    params = [name for name, _ in model.named_parameters()]  # lists a tied head once, as the embedding

    together = "config.json and the weights do not belong together, or the download is incomplete"
    for name in params:
        if name not in stored_as:
            raise InputError(f"{path}: tensor {name!r} is missing from the *.safetensors; {together}")
    extra = [stored for name, stored in stored_as.items() if name not in set(params)]
    if extra:
        found = f"tensor {extra[0]!r} is not part of this {config.model_type} model ({len(extra)} such)"
        raise InputError(f"{files[extra[0]]}: {found}; {together}")
    model.to(dtype)
    if prepare is not None:
        prepare(model)
    take_memory(model, device)
    for name in params:
        _read_tensor(files[stored_as[name]], stored_as[name], model.get_parameter(name).detach())
    return model.eval()


def _names(files: dict[str, Path], config: ModelConfig) -> dict[str, str]:
    """Our name of each tensor -> the one it is stored under, which differs where the text model was part of another."""
    found = {}
    for stored, file in files.items():
        if "vision_config" in config.other and ("vision_tower." in stored or "multi_modal_projector." in stored):
            if config.other["vision_config"]:
                way_out = f"to leave out what sees images delete 'vision_config' from {file.parent / 'config.json'}"
                raise InputError(f"{file}: tensor {stored!r} is for images, and only text models are read; {way_out}")
        elif not stored.endswith("rotary_emb.inv_freq"):  # tables, in early Llama files
            name = stored.removeprefix("language_model.").replace("model.language_model.", "model.")
            found[name] = stored
    return found


def take_memory(model: Transformer, device) -> None:
    """Put a model that was made on the meta device on `device`, its numbers still to be set."""
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty made two of them
        model.lm_head.weight = model.model.embed_tokens.weight


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the single file or from the shard index."""
    single, index, weight_map = path / "model.safetensors", path / INDEX, {}
    if index.is_file():
        try:
            weight_map = {name: path / shard for name, shard in read_json(index)["weight_map"].items()}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a shard index (no 'weight_map'); download it again") from None
    elif not single.is_file():
        binary = " (*.bin files are pickles and are not read)" if list(path.glob("*.bin")) else ""
        raise InputError(f"{path}: neither model.safetensors nor {INDEX}{binary}; download the safetensors files")
    shards = sorted(set(weight_map.values())) or [single]
    if single.is_file() and single not in shards:  # transformers would read the one, vLLM the others
        raise InputError(f"{single}: lies beside the shards of {INDEX}; delete whichever is older")
    files = {}
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard}: shard listed in {INDEX} is missing; download it")
        with _open(shard) as f:  # of a tensor in two shards, the one that the index names counts
            # An open file is no dict: its keys() are all there is to loop over.
            files |= {name: shard for name in f.keys() if weight_map.get(name, shard) == shard}  # noqa: SIM118
    for name in weight_map.keys() - files.keys():
        raise InputError(f"{weight_map[name]}: tensor {name!r} is not in this file, though {INDEX} says so")
    return files


@contextlib.contextmanager
def _open(file: Path):
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error}); download it again") from None


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with _open(file) as f:
        return tuple(f.get_slice(name).get_shape())


def _chunks(file: Path, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
    """`count` rows of a stored tensor from row `first` on, in chunks that are valid until the next is asked for.

    The file is memory-mapped, and mapped pages count as ours for as long as the mapping lives. So at most CHUNK_BYTES
    are read per mapping: with one mapping for all, the peak would be the model twice.
    """
    rows = max(1, CHUNK_BYTES // (8 * max(1, math.prod(_shape(file, name)[1:]))))
    for start in range(first, first + count, rows):
        with _open(file) as f:
            yield f.get_slice(name)[start : min(start + rows, first + count)]


def _equal(files: dict[str, Path], a: str, b: str) -> bool:
    """Whether two stored tensors hold the same numbers."""
    shape = _shape(files[a], a)
    if shape != _shape(files[b], b):
        return False
    chunks = (_chunks(files[name], name, 0, shape[0]) for name in (a, b))
    return all(torch.equal(x, y) for x, y in zip(*chunks, strict=True))


def _read_tensor(file: Path, name: str, out: torch.Tensor) -> None:
    """Copy one stored tensor into `out`, converting the dtype on the way; of a DTensor the rows that are held here."""
    shape = _shape(file, name)
    if shape != tuple(out.shape):
        raise InputError(f"{file}: tensor {name!r} has shape {shape}, config.json asks for {tuple(out.shape)}")
    with _open(file) as f:
        kind = f.get_slice(name).get_dtype()
    if kind not in ("BF16", "F16", "F32", "F64"):
        raise InputError(f"{file}: tensor {name!r} is stored as {kind}; quantized weights are not supported")
    here, first = own_rows(out)
    done = 0
    for chunk in _chunks(file, name, first, len(here)):
        here[done : done + len(chunk)] = chunk
        done += len(chunk)


def save_model(model: Transformer, path: str | Path, tokenizer=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model` (and the tokenizer's files) as a Hugging Face directory, atomically.

    With a tokenizer the directory tells others how to use the model: the chat template trained with, and where to stop,
    which is at [RESET] too (see _where_servers_stop); the rest of the source's generation_config.json stays as it was.
    An existing checkpoint at `path` is replaced as a whole; other files in it stay. Dtype is kept.
    """
    with atomic_directory(path) as directory:
        write_model(model, directory, tokenizer, shard_bytes, None if tokenizer is None else tokenizer.reset_id)


def write_model(
    model: Transformer,
    directory: Path,
    tokenizer=None,
    shard_bytes: int = SHARD_BYTES,
    reset_id: int | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """save_model's files, written into an existing directory; for callers who add files of their own, or have other
    weights than the model's parameters."""
    weights = dict(model.named_parameters()) if weights is None else weights  # lists a tied head once
    config = model.config if reset_id is None else dataclasses.replace(model.config, reset_token_id=reset_id)
    raw = config.to_hf()
    raw["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if tokenizer is not None:
        tokenizer.save(directory)
        (directory / "chat_template.jinja").write_text(tokenizer.jinja, encoding="utf-8")
        file = directory / "generation_config.json"
        source = json.loads(file.read_bytes()) if file.is_file() else {}  # load_tokenizer has seen that it is JSON
        stops = _where_servers_stop(tokenizer, source.get("eos_token_id"), config.reset_token_id)
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops}
        reset = config.reset_token_id
        if reset is not None and reset in (raw.get("pad_token_id"), source.get("pad_token_id")):
            ends["pad_token_id"] = stops[0]  # padding behind an answer must not look like a reset
        raw |= ends
        file.write_text(json.dumps(source | ends, indent=2) + "\n", encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if config.reset_token_id is not None:  # for users of transformers: how to reset there
        (directory / "custom_generate").mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).parent / "custom_generate.py", directory / "custom_generate" / "generate.py")

    write_weights(weights, directory, shard_bytes)


def write_weights(
    weights: dict[str, torch.Tensor], directory: Path, shard_bytes: int = SHARD_BYTES, numbers: Callable | None = None
) -> None:
    """One safetensors file, or shards and their index. numbers: see write_tensors."""
    shards, size = [{}], 0
    for name, p in weights.items():
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p
        size += p.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(shard, directory / name, numbers=numbers)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(p.nbytes for p in weights.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _where_servers_stop(tokenizer, before: object, reset_id: int | None) -> list[int]:
    """eos_token_id: our stop ids, those named before and, in a model that was taught it, [RESET].

    A server that knows nothing of [RESET] stops there: what it shows may be cut short, but is never the retracted
    answer and the retry in one text. Our own sampler stops at tok.stop_ids, in which [RESET] is not. It comes last, for
    transformers pads with the first.
    """
    named = before if isinstance(before, list) else [before]
    others = [id for id in named if id in tokenizer.special_ids and id != reset_id]
    return [*dict.fromkeys([*tokenizer.stop_ids, *others])] + ([] if reset_id is None else [reset_id])


def weights_digest(directory: str | Path) -> str:
    """16 hex digits that stand for a model: its tensors and its config, without reading either into memory."""
    sha = hashlib.sha256()
    for path in [*sorted(Path(directory).glob("*.safetensors")), Path(directory) / "config.json"]:
        if path.is_file():
            with open(path, "rb") as f:
                sha.update(hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]
