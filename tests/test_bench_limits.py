"""backtrack/bench/limits.py: its FLOPs against PyTorch's own count, and the whole command with everything small."""

import json

import pytest
import torch
from command import command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backtrack.bench import __main__ as bench
from backtrack.bench import limits
from backtrack.trees import make_batch
from model import ModelConfig, save_model

TINY = ModelConfig(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_flops_are_those_that_pytorch_counts_but_for_what_the_mask_hides(kind):
    model, tree = bench.random_model(TINY).train(), limits.random_tree(kind, TINY, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        limits.logprobs(model, make_batch([tree])).sum().backward()
    hidden = len(tree) ** 2 - sum(depth + 1 for depth in tree.depths)
    expected = limits.training_flops(model, tree) + 12 * hidden * 2 * 4 * 16  # layers · heads · head_dim
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_the_whole_command(tmp_path, monkeypatch):
    """On one thread with tiny sizes: a line for each kind of work, and the same numbers as JSON."""
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(limits, "product_speed", lambda config, dtype: 2e11)
    monkeypatch.setattr(limits, "BATCHES", (1, 3))
    monkeypatch.setattr(limits, "NEW_TOKENS", 4)
    save_model(bench.random_model(TINY), tmp_path / "model")
    words = ("--model", tmp_path / "model", "--repeats", 1, "--out", tmp_path / "limits.json")
    printed, _ = command(limits.main, *words)
    found = json.loads((tmp_path / "limits.json").read_text())["limits"]
    assert [r["name"] for r in found] == [text.split(":")[0] for text in printed.splitlines()[1:]] and len(found) == 6
    assert all(0 < r["share"] < 1 and r["tokens_per_s"] > 0 for r in found)
    assert found[2]["limit"] == "bandwidth" and found[2]["of"] == 10 and found[0]["of"] == 200
    by_hand = bench.step_bytes(bench.random_model(TINY), 1, limits.CONTEXT + 2) / 1e10
    assert found[2]["share"] == pytest.approx(by_hand * found[2]["tokens_per_s"], rel=1e-6)
    assert found[-1]["name"] == "decoding, 3 batch rows, bfloat16"
    assert all(r["own_products"] > 0 for r in found) and printed.count("own products") == 6


def test_own_products_are_all_that_a_step_multiplies_with_weights():
    model = bench.random_model(TINY)
    with FlopCounterMode(display=False) as counter:
        limits.own_products(model, 3)
    weights = limits.weights_per_token(model) + model.lm_head.weight.numel()
    assert counter.get_total_flops() == 8 * 2 * 3 * weights  # eight passes, three rows


def test_own_products_of_training_are_all_that_weights_take_part_in():
    """PyTorch's count for a whole step, without what attention multiplies."""
    model = bench.random_model(TINY).train()
    trees = [limits.random_tree("sft", TINY, i) for i in range(5)]
    with FlopCounterMode(display=False) as counter:
        limits.training_products(model, trees)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
        limits.training_step(model, limits.make_optimizer(model, 1e-6, 0.0), trees)
    by_operation = whole.get_flop_counts()["Global"]
    assert counter.get_total_flops() == by_operation[torch.ops.aten.mm]
