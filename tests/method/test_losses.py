"""The two losses by closed form, by the published formulas, and by loops that feed every prefix alone to a model.

Also what is reported beside them, from numbers picked by hand.
"""

import argparse
import math
import random

import pytest
import torch
from models import FAMILIES, network_of
from training import close, gradients, logprobs_of, plain_dpo, plain_nll, prefixes

import train
from backtrack.examples import Pair, View, dpo_pairs
from backtrack.rows import Row
from backtrack.run import chunks, metrics
from backtrack.trees import make_batch, pair_tree, pairs_of, view_tree

V, RESET = 41, 40
KINDS = ("elicit", "discourage", "restart", "baseline")
ONES = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(scope="module", params=list(FAMILIES))
def network(request):
    return network_of(FAMILIES[request.param], vocab_size=V)


@pytest.fixture(scope="module", params=list(FAMILIES))
def both(request):
    """A policy and its reference."""
    config = FAMILIES[request.param]
    return network_of(config, vocab_size=V), network_of(config, seed=2, scale=0.2, vocab_size=V)


def ids(n, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(1, RESET) for _ in range(n)]


# ── Supervised ────────────────────────────────────────────────────────────────────────────────────

VIEWS = [
    View("answer", ids(9, 1), 5, 0.5),
    View("backtrack", ids(17, 2), 11, 0.5),
    View("restart", ids(7, 3), 6, 0.25),
    View("text", ids(12, 4), 1, 1.0),
    View("answer", ids(14, 5), 13, 0.5),
    View("reset", [*ids(9, 1)[:6], RESET], 6, 0.5 / 7),
]


def batch_of(views):
    return make_batch([view_tree(views[:3], 64), view_tree(views[3:], 64)])


def test_sft_loss_by_closed_form():
    """Σ weight · −log π, from numbers picked by hand; its gradient is −weight."""
    values = torch.tensor([-1.0, -2.5, -0.25, -8.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 0.5, 1.0, 0.25], dtype=torch.float64)
    loss = train.sft_loss(values, weight)
    assert loss.item() == 0.5 + 1.25 + 0.25 + 2.0
    loss.backward()
    assert torch.equal(values.grad, -weight)
    assert torch.autograd.gradcheck(lambda v: train.sft_loss(v, weight), values)


def test_sft_loss_and_its_gradient_against_a_loop(network):
    batch = batch_of(VIEWS)
    values = train.logprobs(network, batch)
    assert values.dtype == torch.float32 and (values < 0).all()
    loss = train.sft_loss(values, batch.weight)
    expected, weight, sums = plain_nll(network, VIEWS)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)
    close(gradients(network, loss), gradients(network, expected), atol=1e-4)
    assert batch.weight.sum().item() == pytest.approx(weight)
    report = metrics.of_views(values.detach(), batch, RESET)
    chance = report.pop("reset_after_unsafe")
    assert report.keys() == {f"loss/{name}" for name in sums}
    for name, found in sums.items():
        assert report[f"loss/{name}"] == pytest.approx(found, rel=1e-5)
    assert chance == pytest.approx((math.exp(-sums["reset"][0]), 1), rel=1e-5)


def test_a_view_counts_by_its_weight_and_twice_if_it_is_there_twice(network):
    for view in VIEWS:
        losses = []
        for views in ([view], [view, view], [View(view.name, view.tokens, view.loss_from, 1.0)]):
            batch = make_batch([view_tree(views, 64)])
            losses.append(train.sft_loss(train.logprobs(network, batch), batch.weight).item())
        assert losses[0] == pytest.approx(view.weight * losses[2], rel=1e-5)
        assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_logits_are_built_where_something_is_predicted_and_once(network, monkeypatch):
    """A vocabulary of 128,000 makes them dearer than all the rest."""
    rows, logits = [], network.logits

    def counted(hidden):
        rows.append(hidden.shape[:-1].numel())
        return logits(hidden)

    monkeypatch.setattr(network, "logits", counted)
    x, y = ids(6, 7), ids(5, 8)
    views = [View("answer", x + y, 6, 0.5), View("backtrack", x + y[:2] + [RESET, 3], 8, 0.5)]
    views += [View("reset", x + y[:n] + [RESET], 6 + n, 0.1) for n in range(1, 6)]
    train.logprobs(network, make_batch([view_tree(views, 64)]))
    predicting = {tuple(v.tokens[:t]) for v in views for t in range(v.loss_from, len(v.tokens))}
    assert rows == [len(predicting)]
    assert len(predicting) < len(prefixes([v.tokens for v in views]))


@pytest.mark.parametrize("few", [1, 3, 100])
def test_log_probs_of_bf16_logits_against_the_plain_form(monkeypatch, few):
    """Some places predict twice, or the same target twice, and one predicts nothing."""
    monkeypatch.setattr(chunks, "NUMBERS", few * V)
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    head = torch.randn(V, 5, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16) * 3
    predicted_by, target = (
        torch.tensor([0, 1, 1, 3, 3, 2, 6, 5]),
        torch.tensor([4, 2, 9, 7, 7, 0, 40, 1]),
    )
    found = []
    for take in (
        chunks.BF16Logprobs.apply,
        lambda logits, at, t: logits.float().log_softmax(-1)[at, t],
    ):
        leaf = hidden.clone().requires_grad_()
        values = take(leaf @ head.T, predicted_by, target)
        (values * torch.arange(1, 9)).sum().backward()
        found.append((values.detach(), leaf.grad))
    (values, gradient), (plain, plain_gradient) = found
    assert values.dtype == torch.float32 and torch.allclose(values, plain, rtol=1e-6, atol=1e-6)
    assert (
        torch.allclose(gradient, plain_gradient, rtol=2e-2, atol=2e-2) and gradient.abs().max() > 1
    )


def test_bf16_training_takes_the_log_probs_of_bf16_logits(network, monkeypatch):
    """And they are near those of fp32. Where logits are capped, or nothing is autocast, they are built in fp32."""
    calls, apply = [], chunks.BF16Logprobs.apply
    monkeypatch.setattr(chunks.BF16Logprobs, "apply", lambda *args: calls.append(1) or apply(*args))
    batch = batch_of(VIEWS)
    plain = train.logprobs(network, batch)
    with torch.autocast("cpu", torch.bfloat16):
        values = train.logprobs(network, batch)
    assert len(calls) == (0 if network.config.final_logit_softcapping else 1)
    assert torch.allclose(values, plain, rtol=0.05, atol=0.05)


# ── DPO ───────────────────────────────────────────────────────────────────────────────────────────

PI_C, PI_R = [-12.5, -3.25, -40.0, -7.0], [-11.0, -9.75, -38.5, -7.0]
REF_C, REF_R = [-13.0, -2.0, -90.0, -7.0], [-10.0, -10.0, -31.0, -7.0]
MARGINS = [1.5, -1.5, 57.5, 0.0]  # before β


def picked(dtype=torch.float64):
    return [torch.tensor(values, dtype=dtype) for values in (PI_C, PI_R, REF_C, REF_R)]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 2.0])
def test_dpo_loss_by_closed_form(beta):
    """By `math`, and by TRL's published lines for loss_type="sigmoid"."""
    pi_c, pi_r, ref_c, ref_r = picked()
    losses = train.dpo_loss(pi_c, pi_r, ref_c, ref_r, beta)
    expected = [-math.log(1 / (1 + math.exp(-beta * m))) for m in MARGINS]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    logits = (pi_c - pi_r) - (ref_c - ref_r)
    trl = -torch.nn.functional.logsigmoid(beta * logits)
    torch.testing.assert_close(losses, trl, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_gradient_by_closed_form(beta):
    """−β · σ(−β · margin) on the chosen side, the opposite on the rejected, nothing on other pairs."""
    pi_c, pi_r, ref_c, ref_r = picked()
    for values in (pi_c, pi_r):
        values.requires_grad_()
    train.dpo_loss(pi_c, pi_r, ref_c, ref_r, beta).sum().backward()
    expected = [-beta / (1 + math.exp(beta * m)) for m in MARGINS]
    assert pi_c.grad.tolist() == pytest.approx(expected, abs=1e-12)
    assert pi_r.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda c, r: train.dpo_loss(c, r, ref_c, ref_r, beta), (pi_c, pi_r)
    )


def test_far_off_pairs_stay_finite():
    """In fp32 e^1000 is none; the loss is the margin then, or nothing."""
    sides = torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2)
    assert train.dpo_loss(*sides, 0.1).tolist() == [1000.0, 0.0]


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_a_policy_that_is_its_reference_loses_ln_2(both, beta):
    policy, _ = both
    batch = make_batch([pair_tree(some_pairs(), ONES, 64)])
    with torch.no_grad():
        sums = batch.by_sequence(train.logprobs(policy, batch))
    losses = train.dpo_loss(*pairs_of(sums), *pairs_of(sums), beta)
    assert losses.tolist() == pytest.approx([math.log(2)] * len(some_pairs()), abs=1e-7)


def some_pairs():
    """Two rows' pairs, of every kind but the baseline's."""
    tok = argparse.Namespace(reset_id=RESET, eos_id=7)
    rows = [Row(ids(5, 1), ids(4, 2), ids(8, 3), True), Row(ids(3, 4), ids(9, 5), ids(2, 6), False)]
    found = []
    for row, k in zip(rows, (5, 1), strict=True):
        found += dpo_pairs(row, k, 3, tok, restart="all")
    return found


def dpo_terms(policy, reference, pairs, beta):
    """The loss of each pair from trees, and its (chosen, rejected) log-ratios."""
    batch = make_batch(
        [pair_tree(pairs[:3], ONES, 64), pair_tree(pairs[3:], ONES, 64)][: len(pairs) // 2]
    )
    with torch.no_grad():
        ref = batch.by_sequence(train.logprobs(reference, batch))
    sums = batch.by_sequence(train.logprobs(policy, batch))
    losses = train.dpo_loss(*pairs_of(sums), *pairs_of(ref), beta)
    chosen, rejected = pairs_of((sums - ref).detach())
    return losses, chosen.tolist(), rejected.tolist()


def test_dpo_loss_and_its_gradient_against_a_loop(both):
    """Sums over tokens, not means; the prompt is no part of them; every kind of pair."""
    pairs, beta = some_pairs(), 0.3
    losses, chosen, rejected = dpo_terms(*both, pairs, beta)
    expected, kinds, ratios = plain_dpo(*both, pairs, beta)
    assert {p.kind for p in pairs} == {"elicit", "discourage", "restart"} and len(pairs) == 5
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for kind, (value, count) in kinds.items():
        mine = [loss.item() for loss, p in zip(losses, pairs, strict=True) if p.kind == kind]
        assert (sum(mine), len(mine)) == pytest.approx((value, count), rel=1e-5)
    assert list(zip(chosen, rejected, strict=True)) == [pytest.approx(r, abs=1e-4) for r in ratios]
    close(gradients(both[0], losses.sum()), gradients(both[0], expected), atol=1e-4)


def test_trl_formula_on_log_probs_of_separate_sequences(both):
    policy, reference = both
    pairs, beta = some_pairs(), 0.2
    with torch.no_grad():
        losses, _, _ = dpo_terms(policy, reference, pairs, beta)
        sides = []
        for model in both:
            for answers in ("chosen", "rejected"):
                whole = [(p.prompt + getattr(p, answers), len(p.prompt)) for p in pairs]
                sides.append(torch.stack([sum(logprobs_of(model, *some)) for some in whole]))
    pi_c, pi_r, ref_c, ref_r = sides
    logits = (pi_c - pi_r) - (ref_c - ref_r)
    trl = -torch.nn.functional.logsigmoid(beta * logits)
    torch.testing.assert_close(losses.double(), trl, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["elicit", "discourage"])
def test_a_shared_prefix_cancels(both, kind):
    """Scored or part of the prompt: the same margin, the same gradient."""
    pairs = [p for p in some_pairs() if p.kind == kind]
    short = []
    for p in pairs:
        together = zip(p.chosen, p.rejected, strict=False)
        k = next(i for i, (a, b) in enumerate(together) if a != b)
        assert k > 0 and RESET in (p.chosen[k], p.rejected[k])
        short.append(Pair(kind, p.prompt + p.chosen[:k], p.chosen[k:], p.rejected[k:], nll_from=0))
    results = []
    for some in (pairs, short):
        batch = make_batch([pair_tree([p], ONES, 64) for p in some])
        with torch.no_grad():
            ref = batch.by_sequence(train.logprobs(both[1], batch))
        sums = batch.by_sequence(train.logprobs(both[0], batch))
        losses = train.dpo_loss(*pairs_of(sums), *pairs_of(ref), 0.3)
        results.append((losses.tolist(), pairs_of(sums - ref), gradients(both[0], losses.sum())))
    (losses, sides, grads), (short_losses, short_sides, short_grads) = results
    assert losses == pytest.approx(short_losses, rel=1e-5)
    assert (sides[0] - short_sides[0]).abs().max() > 1e-2  # the sides alone do change
    close(grads, short_grads, atol=1e-5)


# ── What is reported ──────────────────────────────────────────────────────────────────────────────


def one_token_pairs():
    """Each side a single token, so that one number picked is the log-prob of one sequence."""
    pairs = [Pair(kind, [1, 2 + n], [10], [11], nll_from=0) for n, kind in enumerate(KINDS)]
    trees = [pair_tree(pairs[:2], ONES, 64), pair_tree(pairs[2:], ONES, 64)]
    trees[0].reference = [REF_C[0], REF_R[0], REF_C[1], REF_R[1]]
    trees[1].reference = [REF_C[2], REF_R[2], REF_C[3], REF_R[3]]
    batch = make_batch(trees)
    by_sequence = torch.tensor([x for pair in zip(PI_C, PI_R, strict=True) for x in pair])
    return batch, by_sequence[batch.sequence]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_report_of_pairs_by_hand(beta):
    batch, values = one_token_pairs()
    assert batch.by_sequence(values).tolist() == [
        x for p in zip(PI_C, PI_R, strict=True) for x in p
    ]
    report = metrics.of_pairs(values, batch, torch.tensor([0.1, 0.2, 0.3, 0.4]), beta, RESET)
    for kind, loss in zip(KINDS, (0.1, 0.2, 0.3, 0.4), strict=True):
        assert report[f"loss/{kind}"] == pytest.approx((loss, 1))
    assert report["margin"] == pytest.approx((beta * sum(MARGINS), 4))
    assert report["accuracy"] == ((2 if beta else 0), 4)  # a tie is not won
    assert report["chosen"] == pytest.approx((sum(PI_C) - sum(REF_C), 4))
    assert report["rejected"] == pytest.approx((sum(PI_R) - sum(REF_R), 4))
    assert not {"reset_after_safe", "reset_after_unsafe"} & report.keys()


def test_how_likely_a_reset_is_where_it_belongs_and_where_not():
    """In a chosen answer it does, in a rejected one it does not; other tokens are not counted."""
    pairs = [Pair("elicit", [1, 2], [5, RESET, 6], [5, 9, 8], 1)]
    pairs += [
        Pair("discourage", [1, 2], [6], [6, RESET, 5], 0),
        Pair("discourage", [1, 3], [6], [RESET, 5], 0),
    ]
    tree = pair_tree(pairs, ONES, 64)
    tree.reference = [0.0] * 6
    batch = make_batch([tree])
    values = torch.full(batch.target.shape, -7.0)
    resets = {0: math.log(0.5), 3: math.log(0.25), 5: math.log(0.125)}
    for s, value in resets.items():
        values[(batch.sequence == s) & (batch.target == RESET)] = value
    report = metrics.of_pairs(values, batch, torch.zeros(3), 0.1, RESET)
    assert report["reset_after_unsafe"] == pytest.approx((0.5, 1))
    assert report["reset_after_safe"] == pytest.approx((0.25 + 0.125, 2))


def test_reports_add_up():
    sums = {}
    metrics.add(sums, {"a": (1.0, 2), "b": (0.5, 1)})
    metrics.add(sums, {"a": (2.0, 4), "c": (0.0, 0)})
    assert sums == {"a": (3.0, 6), "b": (0.5, 1), "c": (0.0, 0)}
    assert metrics.means(sums) == {"a": 0.5, "b": 0.5, "c": 0.0}
