"""Checkpoints: transformers' files to ours and back, bit for bit; broken files as one line each; saves that are killed.

The oracles are transformers' own reader and writer, the safetensors package, and the bytes on disk.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import models
import pytest
import torch
from command import at_every_line
from models import network_of
from safetensors.torch import load_file, save_file

from model import InputError, ModelConfig, checkpoint, files, load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
V = 512

SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=24, head_dim=6, max_position_embeddings=64)
LLAMA = models.LLAMA | SIZES | dict(tie_word_embeddings=False)
GEMMA = models.GEMMA | SIZES
GEMMA |= dict(query_pre_attn_scalar=6, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=8)
STRETCHED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
STRETCHED |= dict(original_max_position_embeddings=32)
KINDS = {
    "llama": LLAMA,
    "llama-tied": LLAMA | dict(tie_word_embeddings=True),
    "llama-3.1": LLAMA | dict(rope_scaling=STRETCHED),
    "gemma2": GEMMA,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = torch.arange(0, 40)[None] * 7 % V


def random_model(fields=LLAMA, seed=0, dtype=torch.float32):
    return network_of(fields, seed, scale=0.5, mean=0.5).to(dtype)


def write_transformers(directory, fields, dtype, **options):
    """A random checkpoint, written by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.2, 0.3, generator=generator)
    theirs.save_pretrained(directory, **options)
    return theirs


def read_transformers(directory, dtype):
    """What transformers makes of a directory; it must be content with it."""
    transformers = pytest.importorskip("transformers")
    options = dict(dtype=dtype, output_loading_info=True)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(report.values()), report
    return theirs.eval()


def tensors_of(directory):
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_tensors(a, b):
    raw = [{n: t.contiguous().view(torch.uint8) for n, t in tensors.items()} for tensors in (a, b)]
    return raw[0].keys() == raw[1].keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(raw[0][n], raw[1][n]) for n in a
    )


def snapshot(directory):
    """Path -> bytes of everything below a directory."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(Path(directory).rglob("*")) if f.is_file()}


def write_tokenizer(directory):
    """The smallest Llama-3 tokenizer there is: a tiktoken file of the 256 bytes, and 256 special tokens after them."""
    lines = [b64encode(bytes([i])) + f" {i}".encode() for i in range(256)]
    (directory / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")


# ── There and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind, dtype", zip(KINDS, [*DTYPES, torch.bfloat16], strict=True), ids=str)
@torch.no_grad()
def test_round_trip_with_transformers_is_bit_exact(tmp_path, kind, dtype):
    theirs = write_transformers(tmp_path / "theirs", KINDS[kind], dtype)
    ours = load_model(tmp_path / "theirs", dtype=dtype)
    assert not ours.training and {p.dtype for p in ours.parameters()} == {dtype}
    save_model(ours, tmp_path / "ours")
    stored = tensors_of(tmp_path / "theirs")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert same_tensors(stored, tensors_of(tmp_path / "ours"))
    again = read_transformers(tmp_path / "ours", dtype)
    assert again.dtype == dtype == read_transformers(tmp_path / "ours", "auto").dtype
    assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)
    assert load_model(tmp_path / "ours", dtype=dtype).config == ours.config


@torch.no_grad()
def test_shards(tmp_path):
    """Those of transformers are read, ours are read by it; and no old file survives a save, which it would prefer."""
    write_transformers(tmp_path / "theirs", GEMMA, torch.bfloat16, max_shard_size="6KB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    model = load_model(tmp_path / "theirs", dtype=torch.bfloat16)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    assert same_tensors(weights, tensors_of(tmp_path / "theirs"))
    for limit, count in ((10**9, 1), (3000, None), (10**9, 1), (20_000, None)):
        save_model(model, tmp_path / "a", shard_bytes=limit)
        shards = sorted(f.name for f in (tmp_path / "a").glob("*.safetensors"))
        assert same_tensors(tensors_of(tmp_path / "a"), weights)
        if count == 1:
            assert shards == ["model.safetensors"] and not (tmp_path / "a" / INDEX).exists()
            continue
        index = json.loads((tmp_path / "a" / INDEX).read_text())
        assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        held = {shard: load_file(tmp_path / "a" / shard) for shard in shards}
        assert index["weight_map"] == {name: shard for shard in shards for name in held[shard]} and len(shards) > 1
        assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit for part in held.values())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    theirs = read_transformers(tmp_path / "a", torch.bfloat16)
    assert same_tensors({n: p.detach() for n, p in theirs.named_parameters()}, weights)
    assert torch.equal(load_model(tmp_path / "a", dtype=torch.bfloat16)(TOKENS), model(TOKENS))


def test_what_index_and_files_disagree_about(tmp_path):
    """A tensor in two shards is the one that the index names. A single file beside shards is refused: transformers
    would read the one, vLLM the others."""
    model = random_model()
    save_model(model, tmp_path, shard_bytes=6000)
    one, two = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(one)))
    edit_tensors(tmp_path, lambda t: t.update({name: torch.zeros(3)}), two.name)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][name] = two.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{two}: tensor '{name}' has shape"):
        load_model(tmp_path)
    save_model(random_model(seed=2), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match=rf"^{tmp_path}/model.safetensors: lies beside the shards of {INDEX}; delete"):
        load_model(tmp_path)


def test_what_config_json_leaves_out_is_taken_as_transformers_does_and_said(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    for fields in (models.LLAMA, models.GEMMA, *models.OTHERS.values()):
        fields = {k: v for k, v in fields.items() if k != "max_position_embeddings"}
        config = ModelConfig.from_hf(fields)
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
        assert config.max_position_embeddings == theirs.max_position_embeddings, config.model_type
    gaps = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    config = ModelConfig.from_hf({k: v for k, v in models.GEMMA3.items() if k not in gaps} | dict(num_hidden_layers=7))
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.local_layers == (True, True, True, True, True, False, True)
    save_model(random_model(LLAMA | dict(hidden_size=18)), tmp_path)
    assert capsys.readouterr().err == ""
    edit_config(tmp_path, drop=["max_position_embeddings"])
    assert load_model(tmp_path).config.max_position_embeddings == 2048
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}: config.json: no max_position_embeddings: taken to be 2048, as transformers")
    # With head_dim given we need no hidden_size that the heads divide; transformers does, of these families.
    assert "hidden_size 18 is not a multiple of num_attention_heads 4: transformers 5 refuses" in second


def test_unknown_keys_of_config_json_survive(tmp_path):
    write_transformers(tmp_path / "a", GEMMA, torch.float32)
    file = tmp_path / "a" / "config.json"
    raw = json.loads(file.read_text()) | {"x_notes": {"deep": [1, None, "ü"]}, "reset_token_id": 300}
    raw |= {"use_cache": False, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": None}
    file.write_text(json.dumps(raw))
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    kept = raw.keys() - {"rope_parameters", "torch_dtype", "dtype"}  # which are said in other words
    assert {k: written.get(k, "missing") for k in kept} == {k: raw[k] for k in kept}
    assert written["torch_dtype"] == "float32"
    a, b = ModelConfig.load(tmp_path / "a"), ModelConfig.load(tmp_path / "b" / "config.json")
    assert a == b and b.reset_token_id == 300
    assert read_transformers(tmp_path / "b", torch.float32).config.reset_token_id == 300


@pytest.mark.parametrize("stored, asked", [(torch.bfloat16, torch.float16), (torch.float64, torch.bfloat16)], ids=str)
def test_conversion_on_load_is_that_of_torch(tmp_path, monkeypatch, stored, asked):
    """Also when a tensor is read in many pieces."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64)
    save_model(random_model(LLAMA | dict(vocab_size=20)), tmp_path)
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_of(tmp_path)
    for name, t in tensors.items():  # numbers of every size, some too small or too large for float16
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (values * 2.0 ** torch.randint(-30, 20, t.shape, generator=generator)).to(stored)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = {n: p.detach() for n, p in load_model(tmp_path, dtype=asked).named_parameters()}
    assert same_tensors(loaded, {n: t.to(asked) for n, t in tensors.items()})


# ── Broken checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────


def edit_config(directory, drop=(), **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def edit_tensors(directory, edit, file="model.safetensors"):
    tensors = load_file(directory / file)
    edit(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def cut(directory):
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[:-100])


def rename_to_bin(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


GATE = "model.layers.1.mlp.gate_proj.weight"
WEIGHTS = "model.safetensors"


def set_tensor(value):
    return lambda d: edit_tensors(d, lambda t: t.update({GATE: value}))


def sharded(name, breaking):
    """Break one shard of six."""

    def breaks(directory):
        save_model(load_model(directory), directory, shard_bytes=6000)
        breaking(directory, name)

    return breaks


SHARD = "model-00003-of-00006.safetensors"
# What is wrong -> (how to make it so, what the message must name)
BROKEN = {
    "not a directory": (shutil.rmtree, ["broken"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "config not JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), ["config.json"]),
    "only bin": (rename_to_bin, ["broken", "*.bin", "safetensors"]),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), ["broken", WEIGHTS]),
    "cut": (cut, [WEIGHTS]),
    "shape": (set_tensor(torch.zeros(25, 16)), [WEIGHTS, GATE, "25", "24"]),
    "int8": (set_tensor(torch.zeros(24, 16, dtype=torch.int8)), [WEIGHTS, GATE, "I8"]),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(GATE)), ["broken", GATE]),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.2.mlp.up_proj.bias": torch.zeros(24)})),
        [WEIGHTS, "model.layers.2.mlp.up_proj.bias"],
    ),
    "another family": (lambda d: edit_config(d, model_type="qwen3"), ["broken", "q_norm", "config.json"]),
    "missing shard": (sharded(SHARD, lambda d, name: (d / name).unlink()), [SHARD]),
    "misplaced tensor": (sharded(SHARD, lambda d, name: edit_tensors(d, lambda t: t.popitem(), name)), [SHARD, INDEX]),
    "index without map": (sharded(INDEX, lambda d, name: (d / name).write_text('{"metadata": {}}')), [INDEX]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["broken", "tokenizer"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    write_tokenizer(directory)
    save_model(random_model(), directory / "ckpt", tokenizer=load_tokenizer(directory))
    return directory / "ckpt"


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints_end_in_one_line(good, tmp_path, what):
    """InputError naming the file and the tensor."""
    directory = tmp_path / "broken"
    shutil.copytree(good, directory)
    breaks, names = BROKEN[what]
    breaks(directory)
    with pytest.raises(InputError) as error:
        load_tokenizer(directory)
        load_model(directory)
    said = str(error.value)
    assert all(name in said for name in [*names, str(directory)]) and "\n" not in said


def test_rotary_tables_of_early_llama_files_are_no_extra_tensors(tmp_path):
    save_model(random_model(), tmp_path)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda t: t.update({table: torch.ones(3)}))
    assert table not in dict(load_model(tmp_path).named_parameters())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_sees_images(tmp_path, prefix):
    """Named as transformers 4 and 5 do, with a config that leaves out its defaults."""
    model = network_of(models.GEMMA3, head_dim=256, rms_norm_eps=1e-6, query_pre_attn_scalar=256)
    save_model(model, tmp_path)
    edit_tensors(tmp_path, lambda t: [t.update({name.replace("model.", prefix, 1): t.pop(name)}) for name in list(t)])
    edit_tensors(tmp_path, lambda t: t.update({"vision_tower.embeddings.weight": torch.zeros(3)}))
    text = json.loads((tmp_path / "config.json").read_text())
    for name in ("head_dim", "rms_norm_eps", "query_pre_attn_scalar", "model_type", "tie_word_embeddings"):
        del text[name]
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"vision_tower.* delete 'vision_config' from"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vision_config": None}))
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(TOKENS), model(TOKENS))
    written = loaded.config.to_hf()
    assert written["model_type"] == "gemma3_text" and written["eos_token_id"] == [1, 106]
    assert "vision_config" not in written and "text_config" not in written


# ── Saves that fail, and saves that are killed ───────────────────────────────────────────────────────────────────────


class Tokenizer:
    """Enough of one for save_model; what it writes tells which save it was."""

    bos_id, stop_ids, reset_id, special_ids, jinja = 1, (2, 3), 4, {1, 2, 3, 4}, "{{ chat }}"

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def save(self, directory):
        (directory / "tokenizer.model").write_text(self.name)
        if self.error:
            raise self.error


def in_a_fork(child) -> int:
    """Run `child` in a fork, which ends without cleaning up after pytest: its exit code, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            child()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_line(n, save):
    """Run save(), but SIGKILL this process before the n-th line (from 0) that it runs through in these files."""
    lines = iter(range(n, -1, -1))
    at_every_line(save, lambda: next(lines) or os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture
def unsynced(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it has written. Without it saves are much faster."""
    monkeypatch.setattr(files.os, "fsync", lambda fd: None)


class Alternating:
    """Two checkpoints that differ in every file, number of files included, and their saves to one directory."""

    def __init__(self, root):
        self.path = root / "runs" / "ckpt"
        self.models = [random_model(LLAMA | {"x_run": name}, seed) for seed, name in enumerate("AB")]
        self.full = []
        for which in range(2):
            self.save(which)
            if which == 0:  # what others left in the directory goes along from save to save
                (self.path / "metrics.jsonl").write_text('{"loss": 1}\n')
                (self.path / "notes" / "deep").mkdir(parents=True)
                (self.path / "notes" / "deep" / "a.txt").write_text("mine")
                self.save(which)
            self.full.append(snapshot(self.path))
        assert all({"metrics.jsonl", "notes/deep/a.txt"} < files.keys() for files in self.full)
        assert len(self.full[0]) != len(self.full[1])
        assert all(self.full[0][name] != self.full[1][name] for name in ("config.json", "tokenizer.model"))

    def save(self, which):
        tokenizer = Tokenizer("AB"[which])
        save_model(self.models[which], self.path, tokenizer, shard_bytes=(10**9, 20_000)[which])

    def what_is_there(self):
        """0 or 1: the checkpoint that is there in full. Anything else fails."""
        assert not self.path.with_name("ckpt.old").exists()
        assert self.path.is_dir()
        return self.full.index(snapshot(self.path))

    def leftovers(self):
        return [entry.name for entry in self.path.parent.iterdir() if entry != self.path]


def test_at_any_line_the_directory_is_old_or_new(tmp_path, unsynced):
    """What a kill at a line would leave is what lies on disk then: looked at before every line, killed at some."""
    runs, seen, new = Alternating(tmp_path), [], 1
    runs.save(1 - new)
    at_every_line(lambda: runs.save(new), lambda: seen.append(runs.what_is_there() == new))
    # There is one moment at which old becomes new.
    turn = seen.index(True)
    assert len(seen) > 60 and seen == [False] * turn + [True] * (len(seen) - turn)
    for n in (0, turn // 2, turn - 1, turn, len(seen) - 1):
        runs.save(1 - new)
        assert runs.leftovers() == []  # the last save swept what the kill before it had left
        assert in_a_fork(lambda n=n: killed_at_line(n, lambda: runs.save(new))) == -signal.SIGKILL
        assert runs.what_is_there() == (new if n >= turn else 1 - new)
        assert bool(runs.leftovers()) == (0 < n < len(seen) - 1)


def test_the_first_save_leaves_all_or_nothing(tmp_path, unsynced):
    """The same where there is no old checkpoint."""
    model, path, seen = random_model(), tmp_path / "ckpt", []

    def save():
        save_model(model, path, shard_bytes=20_000)

    at_every_line(save, lambda: seen.append(snapshot(path) if path.exists() else None))
    turn = seen.index(snapshot(path))
    assert turn > 40 and seen == [None] * turn + [snapshot(path)] * (len(seen) - turn)
    shutil.rmtree(path)
    assert in_a_fork(lambda: killed_at_line(turn - 1, save)) == -signal.SIGKILL
    assert not path.exists() and {f.name for f in tmp_path.iterdir()} == {".ckpt.tmp", ".lock-ckpt"}
    save()
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_raises_leaves_the_old_checkpoint(tmp_path):
    save_model(random_model(seed=1), tmp_path / "ckpt", Tokenizer("A"))
    before = snapshot(tmp_path)
    for name in ("ckpt", "other"):
        with pytest.raises(KeyboardInterrupt):
            save_model(random_model(seed=2), tmp_path / name, Tokenizer("B", KeyboardInterrupt()))
        assert snapshot(tmp_path) == before
    assert [f.name for f in tmp_path.iterdir()] == ["ckpt"]


def test_without_an_atomic_exchange_load_model_says_where_the_old_one_is(tmp_path, monkeypatch):
    """Where the file system offers none (NFS) two renames must do; killed between them, the old one is at hand."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: object())
    monkeypatch.setattr(files.sys, "platform", "other")
    path = tmp_path / "ckpt"
    for seed in (1, 2):
        save_model(random_model(seed=seed), path)
    assert [f.name for f in tmp_path.iterdir()] == ["ckpt"]
    second = tensors_of(path)
    assert same_tensors(second, {n: p.detach() for n, p in random_model(seed=2).named_parameters()})
    renames = []

    def rename(a, b):
        renames.append((a, b))
        if len(renames) == 2:
            raise KeyboardInterrupt
        os.replace(a, b)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(seed=3), path)
    with pytest.raises(InputError, match=r"ckpt\.old"):
        load_model(path)
    assert same_tensors(tensors_of(tmp_path / "ckpt.old"), second)


def test_foreign_directories_are_not_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="home"):
        save_model(random_model(), home)
    assert snapshot(tmp_path) == {"home/thesis.tex": b"years of work"}
    with pytest.raises(InputError, match=r"thesis\.tex"):
        save_model(random_model(), home / "thesis.tex")
    assert snapshot(tmp_path) == {"home/thesis.tex": b"years of work"}
    (tmp_path / "empty").mkdir()
    save_model(random_model(), tmp_path / "empty")  # nothing to lose
    load_model(tmp_path / "empty")


def test_symlinks_lead_on(tmp_path):
    real = tmp_path / "disk" / "ckpt"
    save_model(random_model(seed=1), real)
    (real / "metrics.jsonl").write_text("1\n")
    (real / "best").symlink_to("metrics.jsonl")
    (tmp_path / "link").symlink_to(real)
    save_model(random_model(seed=2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (real / "best").is_symlink()
    assert same_tensors(tensors_of(real), {n: p.detach() for n, p in random_model(seed=2).named_parameters()})


# ── The digest ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_digest_is_that_of_weights_and_config(tmp_path):
    """One bit of either changes it; what else lies in the directory, and where that is, does not."""
    save_model(random_model(), tmp_path / "a", shard_bytes=30_000)
    shards = sorted(file.name for file in (tmp_path / "a").glob("model-*.safetensors"))
    digest = checkpoint.weights_digest(tmp_path / "a")
    assert len(digest) == 16 and int(digest, 16) >= 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("optimizer.state", "training.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "b" / name).write_bytes(b"{}")
    assert checkpoint.weights_digest(str(tmp_path / "b")) == digest
    for name in (*shards, "config.json"):
        file = tmp_path / "b" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert checkpoint.weights_digest(tmp_path / "b") != digest
        file.write_bytes(whole)


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# Most memory ever resident (VmHWM, mapped files included) while loading, less what was resident before. Writing 5 to
# clear_refs sets VmHWM back to the present. A small checkpoint goes first, so that code and threads are there already.
MEASURE = """
import re, sys, torch
from pathlib import Path
from model import load_model

def resident(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load_model(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
assert resident("VmHWM") < before + 2**20
model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(resident("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_than_the_model(tmp_path, dtype):
    """200 MB of bf16 in shards: as they are stored, and into fp32."""
    fields = LLAMA | dict(hidden_size=1024, num_attention_heads=8, head_dim=128, vocab_size=24_000)
    for name, changes in (("small", dict(vocab_size=10)), ("large", dict(intermediate_size=6000))):
        save_model(network_of(fields | changes).to(torch.bfloat16), tmp_path / name, shard_bytes=60_000_000)
    words = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", dtype]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > (300e6 if dtype == "float32" else 150e6) and 0.95 * size <= peak <= 1.1 * size
