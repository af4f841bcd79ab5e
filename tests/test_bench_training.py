"""What the training benchmark counts and compares, on rows that are counted by hand. No timing is asserted anywhere."""

import json
import math

import pytest
import torch
from command import command
from models import LLAMA, network_of
from samples import EOT, RESET, llama_tokenizer, row_of, write

from backtrack import plain
from backtrack.bench import training as bench
from backtrack.bench.training import both_ways, computed_tokens, plain_loss, step_speed, tree_loss
from backtrack.examples import View
from backtrack.rows import Row

KINDS = ("sft, one k", "sft, every k", "dpo")
TOK, V = llama_tokenizer(), 512  # ids are bytes; eos is EOT


def rows_of(*answers):
    """Prompts of 3 tokens."""
    return [Row([1, 2, 3], list(good.encode()), list(bad.encode()), True) for good, bad in answers]


# y− of one token, so that k is 1 and nothing is drawn; y+ of one token as well, for DPO's other prefix.
SHORT = rows_of(("n", "y"), ("m", "z"), ("o", "y"), ("p", "q"))
LONGER = rows_of(("no way", "yes, of course"), ("I will not say", "sure"), ("n", "y"), ("abcabc", "abdabd"))


def test_sequences_of_a_row():
    x, n, y = [1, 2, 3], *b"ny"
    _, sequences = both_ways("sft, one k", SHORT[0], 0, TOK)
    assert [(s.tokens, s.loss_from, s.weight) for s in sequences] == [
        ([*x, n, EOT], 3, 0.5),
        ([*x, y, RESET, n, EOT], 4, 0.5),
    ]
    assert both_ways("sft, every k", SHORT[0], 0, TOK)[1] == sequences
    _, sequences = both_ways("dpo", SHORT[0], 0, TOK)
    assert sorted((s.tokens, s.loss_from, s.weight) for s in sequences) == sorted(
        [
            ([*x, y, RESET, n, EOT], 3, 1.0),  # elicit
            ([*x, y, EOT], 3, -1.0),
            ([*x, n, EOT], 3, 1.0),  # discourage
            ([*x, n, RESET, y, EOT], 3, -1.0),
        ]
    )


@torch.no_grad()
def by_hand(model, sequences):
    """Σ weight · log π, a sequence at a time."""
    parts = ((s.weight, plain.logprobs(model, s.tokens[: s.loss_from], s.tokens[s.loss_from :])) for s in sequences)
    return sum(weight * log_p.double().sum().item() for weight, log_p in parts)


@pytest.mark.parametrize("kind", ["sft, one k", "dpo"])
def test_trees_and_plain_sequences_have_one_loss_and_one_gradient(kind):
    model = network_of(LLAMA, vocab_size=V)
    pairs = [both_ways(kind, row, index, TOK) for index, row in enumerate(LONGER)]
    trees, sequences = [tree for tree, _ in pairs], [s for _, some in pairs for s in some]
    losses, expected = (tree_loss(model, trees), plain_loss(model, sequences)), by_hand(model, sequences)
    assert abs(expected) > 10
    assert [loss.item() for loss in losses] == [pytest.approx(expected, rel=1e-4, abs=1e-3)] * 2
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_every_k_is_the_mean_over_k():
    """Σ over all [RESET] targets is what one drawn k has in expectation."""
    model, [row] = network_of(LLAMA, vocab_size=V), rows_of(("no", "yes, of course"))
    tree, (answer, back) = both_ways("sft, every k", row, 0, TOK)
    assert back.tokens[: back.loss_from] == [1, 2, 3, *row.rejected[: back.loss_from - 3]]
    tail = View("tail", back.tokens, back.loss_from + 1, 0.5)  # y+ eos behind the [RESET] that was drawn
    n = len(row.rejected)
    resets = [View("reset", [1, 2, 3, *row.rejected[:j], RESET], 3 + j, 0.5 / n) for j in range(1, n + 1)]
    assert tree_loss(model, [tree]).item() == pytest.approx(by_hand(model, [answer, tail, *resets]), rel=1e-4)


def test_computed_tokens_by_hand():
    """Every row is x1 x2 x3, one y−, one y+: the last token of a sequence is never read.

    sft   x n eos | x y R n eos: 4 and 6 tokens read, padded to 6 each.
          The tree: x (3), n, y, R, n below R: 7.
    dpo   x y R n eos, x y eos, x n eos, x n R y eos: four sequences of at most 6.
          The tree: x (3), y, R, n, and n, R, y: 9.
    """
    for kind, size, separate, tree in (("sft, one k", 4, 12, 7), ("sft, every k", 4, 12, 7), ("dpo", 2, 24, 9)):
        found = computed_tokens(kind, SHORT, TOK, 2)
        assert found.pop("name") == f"{kind}, micro-batches of {size}, 2 a step"
        assert found == {"separate": separate, "trees": tree, "without_padding": tree}
    # Answers of 1 and of 5 tokens. By themselves: 4 and 6 tokens, 8 and 10. Trees of 7 and of 3 + 5 + 1 + 1 + 5 = 15.
    short, long = rows_of(("n", "y"), ("nopqr", "y"))
    found = computed_tokens("sft, one k", [short, long, short, long], TOK, 1)
    assert found["separate"] == 2 * 10 and found["without_padding"] == (7 + 15) / 2
    assert found["trees"] == 2 * 22 / 4  # two lanes of 15 + 7: nothing is padded


def test_sides_that_disagree_end_the_benchmark(monkeypatch):
    def without_eos(model, sequences):
        return plain_loss(model, [View(s.name, s.tokens[:-1], s.loss_from, s.weight) for s in sequences])

    def same_loss_other_gradient(model, sequences):
        loss = plain_loss(model, sequences)
        return loss.detach() + 0.5 * (loss - loss.detach())

    monkeypatch.setattr(bench, "forget_peak", lambda: None)
    for other in (without_eos, same_loss_other_gradient):
        monkeypatch.setattr(bench, "plain_loss", other)
        with pytest.raises(AssertionError):
            step_speed("dpo", network_of(LLAMA, vocab_size=V), LONGER, TOK, steps=0)


def test_the_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LLAMA_125M", network_of(LLAMA).config)
    monkeypatch.setattr(bench.gc, "collect", lambda: None)  # takes a quarter of a second each time
    rows = [row_of(f"Say {i}", "no" * (i % 3 + 1), "yes" * (i % 4 + 1), unsafe=i % 5 > 0) for i in range(40)]
    words = ["--rows", write(tmp_path / "rows.jsonl", *rows), "--tokenizer", tmp_path]
    TOK.save(tmp_path)
    printed, _ = command(bench.main, *words, "--steps", 1, "--out", tmp_path / "bench.json")
    report = json.loads((tmp_path / "bench.json").read_text())
    assert printed.startswith("32 rows. ") and {"command", "commit", "machine"} < set(report)
    assert len(report["cost"]) == 2 * len(KINDS)
    for r in report["cost"]:
        assert r["without_padding"] <= r["trees"] < r["separate"]
        assert f"{r['name']}: {r['separate']:.0f}, {r['trees']:.0f}, {r['without_padding']:.0f}\n" in printed
    for kind, r in zip(KINDS, report["speed"], strict=True):
        assert r["name"].startswith(f"{kind}, micro") and r["range"][0] <= r["range"][1]
        assert r["rows_per_s"] / r["separate_rows_per_s"] == pytest.approx(r["ratio"])
        assert all(math.isfinite(v) and v > 0 for k, v in r.items() if k.endswith(("_s", "ratio")))
    _, said = command(bench.main, *words, "--steps", 12, code=2)
    assert said == "error: 32 rows with an unsafe answer, 52 are needed; lower --steps\n"
