"""backtrack/plain.py against a loop in float64 that shares no code with it, and train.py's losses against plain.py."""

import math
import re

import pytest
import torch
from command import command
from models import LLAMA, network_of, random_ids
from samples import UNSAFE, row_of, toy_tokenizer, write

import train
from backtrack import plain
from backtrack.examples import dpo_pairs, sft_views
from backtrack.rows import Row
from backtrack.trees import make_batch, pair_tree, pairs_of, view_tree
from model import save_model

TOK = toy_tokenizer()
K, J, BETA = 3, 2, 0.3


@pytest.fixture(scope="module")
def both():
    """A policy and its reference."""
    return network_of(LLAMA), network_of(LLAMA, seed=2, scale=0.2)


@pytest.fixture(params=[True, False])
def row(request):
    prompt, chosen, rejected = random_ids(6, 5, 8, vocab=1024)
    return Row(prompt, chosen, rejected, unsafe=request.param)


def one_by_one(model, context, answer) -> float:
    """Σ log π in float64: a forward pass for each token of the answer, and of its logits softmax by its formula."""
    total = 0.0
    with torch.no_grad():
        for n, token in enumerate(answer):
            scores = model(torch.tensor([context + answer[:n]]))[0, -1].double()
            total += math.log(scores[token].exp() / scores.exp().sum())
    return total


def test_both_losses_by_a_loop(both, row):
    model, reference = both
    x, good, bad, reset = row.prompt, [*row.chosen, TOK.eos_id], [*row.rejected, TOK.eos_id], TOK.reset_id
    expected = {"answer": -one_by_one(model, x, good)}
    pairs = {"discourage": (good, [*row.chosen[:J], reset, *bad])}
    if row.unsafe:
        expected["backtrack"] = -one_by_one(model, x + row.rejected[:K], [reset, *good])
        pairs["elicit"] = ([*row.rejected[:K], reset, *good], bad)
    found = plain.sft_losses(model, row, K, TOK)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-5)
    expected = {}
    for name, sides in pairs.items():
        chosen, rejected = (one_by_one(model, x, side) - one_by_one(reference, x, side) for side in sides)
        expected[name] = math.log(1 + math.exp(-BETA * (chosen - rejected)))
    found = plain.dpo_losses(model, reference, row, K, J, TOK, BETA)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected, rel=1e-4)


def test_train_computes_the_same(both, row):
    """Each target of both views counts one half there; a pair counts once."""
    model, reference = both
    batch = make_batch([view_tree(sft_views(row, K, TOK, resets="drawn"), 64)])
    loss = 2 * train.sft_loss(train.logprobs(model, batch), batch.weight)
    torch.testing.assert_close(loss, sum(plain.sft_losses(model, row, K, TOK).values()), rtol=1e-5, atol=0)
    every = sft_views(row, K, TOK, resets="every", reset_weight=4)  # its mean over k, instead of one k
    batch = make_batch([view_tree(every, 64)])
    expected = plain.sft_losses(model, row, K, TOK)
    if row.unsafe:
        x, reset = row.prompt, [TOK.reset_id]
        at = [-plain.logprobs(model, x + row.rejected[:k], reset)[0] for k in range(1, len(row.rejected) + 1)]
        expected["backtrack"] += 4 * sum(at) / len(at) - at[K - 1]
    loss = 2 * train.sft_loss(train.logprobs(model, batch), batch.weight)
    torch.testing.assert_close(loss, sum(expected.values()), rtol=1e-5, atol=0)
    pairs = dpo_pairs(row, K, J, TOK)
    batch = make_batch([pair_tree(pairs, {"elicit": 1.0, "discourage": 1.0}, 64)])
    policy, before = (pairs_of(batch.by_sequence(train.logprobs(network, batch))) for network in both)
    losses = dict(zip(batch.names[::2], train.dpo_loss(*policy, *before, BETA).tolist(), strict=True))
    expected = plain.dpo_losses(model, reference, row, K, J, TOK, BETA)
    assert losses == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-4)


def test_the_command(tmp_path, both):
    save_model(both[1], tmp_path / "ckpt", tokenizer=TOK)
    rows = write(tmp_path / "rows.jsonl", row_of("Hi", "yes", "no"), UNSAFE)
    printed, _ = command(plain.main, tmp_path / "ckpt", rows)
    losses = [float(loss) for loss in re.findall(r"step: loss ([\d.]+)", printed)]
    assert len(losses) == 4 and losses[1] < losses[0] and losses[3] < losses[2]  # a step goes down
    assert "DPO before the step: loss 1.3863 = discourage 0.6931 + elicit 0.6931" in printed
    safe = write(tmp_path / "safe.jsonl", row_of("Hi", "yes", "no"))
    for words, expected in ((["x"], "usage: "), ([tmp_path / "ckpt", safe], f'{safe}: no row says "unsafe": true')):
        assert command(plain.main, *words, code=2)[1].startswith(f"error: {expected}")
