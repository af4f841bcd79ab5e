"""The benchmark's arithmetic, its refusal to time different outputs, its errors. No timing is asserted anywhere."""

import functools
import json
import sys

import pytest
import torch
from command import command

from backtrack.bench import __main__ as bench
from model import ModelConfig

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
TINY = ModelConfig(**SIZES, num_key_value_heads=2, head_dim=6, max_position_embeddings=600)


@pytest.fixture(scope="module")
def both():
    return bench.load_both(TINY, pytest.importorskip("transformers"))


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied):
    """Counted by hand: per layer q, k, v, o, gate, up, down and two norms; then the last norm and the output matrix."""
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": tied})
    weights = 2 * (16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 24 + 2 * 16) + 16 + 50 * 16
    entries = 3 * 20.5 * (2 * 2 * 2 * 6)  # rows · context · (k and v · layers · heads · head_dim)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = bench.random_model(config, dtype=dtype)
        assert bench.step_bytes(model, batch=3, context=20.5) == size * (weights + entries)


def test_ratios_and_lines():
    assert bench.ratio([2.0, 8.0, 4.0], [1.0, 2.0, 4.0]) == (4.0 / 2.0, 1.0, 4.0)  # of medians, with the pairs' range
    rate = {"tokens_per_s": 300.4, "transformers_tokens_per_s": 100.2, "ratio": 3.0, "range": [2.5, 3.5]}
    said = "toy: 300 tokens/s, transformers 100, ratio 3.00 (2.50–3.50); of the bandwidth limit"
    assert bench.line({"name": "toy", **rate}).startswith(f"{said} — (weights sit in")
    assert bench.line({"name": "toy", **rate, "bandwidth_share": 0.456}) == f"{said} 46%"


def test_sides_alternate_and_different_outputs_end_the_benchmark():
    calls = []
    first, *seconds = bench.alternate(
        lambda: calls.append("a") or len(calls), lambda: calls.append("b") or len(calls), 3, same=int.__lt__
    )
    assert "".join(calls) == "abababab" and first == [3, 5, 7]  # the first round does not count
    assert list(map(len, seconds)) == [3, 3]
    outputs = iter([1, 1, 1, 2])  # equal in the warm-up, different later
    with pytest.raises(AssertionError, match="disagree"):
        bench.alternate(lambda: next(outputs), lambda: next(outputs), repeats=1, same=int.__eq__)


def test_compare_finds_equal_tokens_and_refuses_another_model(both, monkeypatch):
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)
    monkeypatch.setattr(bench, "REPEATS", 2)
    model, theirs = both
    row = bench.compare("tiny", model, theirs, 3, bandwidth=1e9)
    assert row["name"] == "tiny, batch 3" and row["bandwidth_share"] > 0
    assert row["tokens_per_s"] / row["transformers_tokens_per_s"] == pytest.approx(row["ratio"])
    other = bench.random_model(TINY)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    with pytest.raises(AssertionError, match="disagree"):
        bench.compare("tiny", other, theirs, 1, bandwidth=None)
    # Random models do not just repeat themselves, or equal outputs would prove nothing.
    tied = bench.random_model(ModelConfig(**{**vars(TINY), "tie_word_embeddings": True}))
    prompts = bench.random_prompts(TINY, 4, 10)
    done = bench.generate(tied, prompts, reset_id=None, stop_ids=(), max_new_tokens=20)
    assert all(len(set(g.tokens)) > 3 for g in done)


def test_errors(monkeypatch, tmp_path):
    assert "is a directory" in command(bench.main, "--out", tmp_path, code=2)[1]
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail
    assert "pip install -r requirements-dev.txt" in command(bench.main, code=2)[1]


@pytest.mark.parametrize("compiler", [None, pytest.param("g++", marks=pytest.mark.slow)])
def test_the_whole_command(tmp_path, monkeypatch, compiler):
    """With everything small: prints what was measured, and writes the same numbers as JSON."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench, "LLAMA_125M", TINY)
    load = bench.ModelConfig.load
    monkeypatch.setattr(bench.ModelConfig, "load", lambda path: load(path) and ModelConfig(**vars(TINY)))
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(bench, "REPEATS", 2)
    traced = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # generating code would take a minute
    monkeypatch.setattr(bench.Transformer, "compile", traced)
    monkeypatch.setattr(bench.shutil, "which", lambda name: compiler)
    printed, _ = command(bench.main, "--out", tmp_path / "bench.json")
    report = json.loads((tmp_path / "bench.json").read_text())
    names = ["toy, batch 1", "toy, batch 32", "125M, batch 1", "125M, batch 8"]
    assert [r["name"] for r in report["speed"] if "compiled" not in r["name"]] == names
    assert len(report["speed"]) == (8 if compiler else 4) and ("no C++ compiler found" in printed) == (not compiler)
    assert report["memory"][0]["read_bytes_per_s"] == 1e10 and {"command", "commit", "machine"} < set(report)
    assert all(r["name"] in printed for r in report["speed"] + report["retries"]) and len(report["retries"]) == 2
