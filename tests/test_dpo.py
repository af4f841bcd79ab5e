"""`train.py dpo` against pairs written by hand, the published formula, and loops that feed every prefix alone.

The first half looks at one batch: which sequences, which loss, which gradient. The second half runs the command: the
loss starts at ln 2, the reference on disk is what would be computed anew, a killed run ends with the bits of one that
was not, and a few dozen steps teach where to reset and where not to.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import TINY, arguments, close, gradients, interrupted, steps_of, trained

import train
from backtrack.examples import Pair, Row, dpo_pairs, draw_prefix
from data import toy
from model import ModelConfig, Transformer, load_model, load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world's tokenizer, a corner of its data, and `start`: fine-tuned for a second, from nothing."""
    root = tmp_path_factory.mktemp("world")
    files = toy.build(0)
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    (root / "config.json").write_text(json.dumps(TINY))
    lines = files["sft.jsonl"].splitlines(keepends=True)
    unsafe = [line for line in lines if json.loads(line)["unsafe"]]
    benign = [line for line in lines if not json.loads(line)["unsafe"] and json.loads(line).get("rejected")]
    without = files["replay.jsonl"].splitlines(keepends=True)
    rows = [line for both in zip(unsafe[:6], benign[:6], strict=True) for line in both]
    for name, kept in (
        ("rows.jsonl", rows),
        ("other.jsonl", rows[:-1] + benign[6:7]),
        ("mixed.jsonl", rows + without[:3]),
        ("heldout.jsonl", unsafe[6:9] + benign[6:8]),
        ("benign.jsonl", benign[:4]),
        ("without.jsonl", without[:3]),
    ):
        (root / name).write_bytes(b"".join(kept))
    words = ["base", "--config", root / "config.json", "--tokenizer", root / "tokenizer", "--device", "cpu"]
    trained(*words, "--max-length", 32, "--steps", 0, "--out", root / "base")
    words = ["sft", "--init", root / "base", "--data", root / "mixed.jsonl", "--device", "cpu", "--max-length", 192]
    trained(*words, "--steps", 20, "--lr", 1e-2, "--out", root / "start")
    return root


@pytest.fixture(scope="module")
def start(world):
    return world / "start"


@pytest.fixture(scope="module")
def tok(start):
    return load_tokenizer(start)


def dpo(world, out, *more, data=("rows.jsonl",)):
    words = ["dpo", "--init", world / "start", "--data", *(world / name for name in data), "--device", "cpu"]
    return [*words, "--out", out, "--max-length", 192, "--batch-size", 4, "--lr", 1e-3, "--log-every", 1, *more]


def source(args, tok, paths=None):
    with contextlib.redirect_stderr(io.StringIO()):
        return train.dpo_source(args, tok, paths or args.data)


def same_run(a, b):
    """The same bits, and the same record of every step."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert steps_of(a) == steps_of(b)


def same_weights(a, b, atol=1e-6):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def cached(out):
    """The files of reference log-probs beside `out`."""
    directory = Path(f"{out}.reference")
    return {file.name for file in directory.iterdir()} if directory.exists() else set()


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def plain_descent(monkeypatch):
    """Gradient descent instead of Adam, which blows rounding errors around zero up to the learning rate."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, args: torch.optim.SGD(model.parameters(), lr=args.lr))


# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TOK = argparse.Namespace(reset_id=90, turn_end=[91, 92])
UNSAFE = Row(prompt=[1, 2, 3], chosen=[10, 11], rejected=[20, 21, 22], unsafe=True)
SAFE = Row(prompt=[1, 2, 3], chosen=[10, 11], rejected=[20, 21, 22], unsafe=False)

ELICIT = Pair("elicit", [1, 2, 3], [20, 21, 90, 10, 11, 91], [20, 21, 22, 91], nll_from=2)
DISCOURAGE = Pair("discourage", [1, 2, 3], [10, 11, 91], [10, 90, 20, 21, 22, 91], nll_from=0)
RESTART = Pair("restart", [1, 2, 3, 90], [10, 11, 91], [20, 21, 22, 91], nll_from=0)
BASELINE = Pair("baseline", [1, 2, 3], [10, 11, 91], [20, 21, 22, 91], nll_from=0)


@pytest.mark.parametrize(
    ("row", "backtrack", "restart", "expected"),
    [
        (UNSAFE, True, "none", [ELICIT, DISCOURAGE]),
        (UNSAFE, True, "unsafe", [ELICIT, DISCOURAGE, RESTART]),
        (UNSAFE, True, "all", [ELICIT, DISCOURAGE, RESTART]),
        (SAFE, True, "none", [DISCOURAGE]),
        (SAFE, True, "unsafe", [DISCOURAGE]),
        (SAFE, True, "all", [DISCOURAGE, RESTART]),
        *((row, False, restart, [BASELINE]) for row in (UNSAFE, SAFE) for restart in ("none", "unsafe", "all")),
        *((dataclasses.replace(SAFE, rejected=None), b, "all", []) for b in (True, False)),
        (Row([1], [10, 11], None, False, plain_text=True), True, "all", []),
    ],
)
def test_pairs_by_hand(row, backtrack, restart, expected):
    found = dpo_pairs(row, 2, 1, TOK, backtrack=backtrack, restart=restart)
    assert sorted(found, key=lambda p: p.kind) == sorted(expected, key=lambda p: p.kind)


def test_the_longest_and_the_shortest_prefix():
    for k_rejected in (1, 2, 3):
        for k_chosen in (1, 2):
            pairs = {p.kind: p for p in dpo_pairs(UNSAFE, k_rejected, k_chosen, TOK, backtrack=True, restart="all")}
            elicit, discourage = pairs["elicit"], pairs["discourage"]
            assert elicit.chosen == [20, 21, 22][:k_rejected] + [90, 10, 11, 91]
            assert elicit.rejected == [20, 21, 22, 91]
            assert elicit.chosen[elicit.nll_from] == 90  # never on the unsafe prefix
            assert discourage.rejected == [10, 11][:k_chosen] + [90, 20, 21, 22, 91]
            assert all(90 not in p.chosen[p.nll_from + 1 :] for p in pairs.values())


def test_prefixes_are_a_function_of_seed_epoch_and_row(world, tok):
    args = arguments(dpo(world, "x", "--seed", 3))
    n, pairs_of, _ = source(args, tok)
    assert n == 12
    raw = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    drawn = {}
    for index in random.Random(0).sample(range(n), n):  # in any order
        row = raw[index]
        prompt = tok.render(row["prompt"])
        good, bad = (tok.encode(row[key][0]["content"]) for key in ("chosen", "rejected"))
        for epoch in range(6):
            pairs = {p.kind: p for p in pairs_of(epoch, index)}
            assert set(pairs) == {"discourage", *(["elicit"] if row["unsafe"] else [])}
            k_good = draw_prefix(4, epoch, index, len(good))
            assert pairs["discourage"].prompt == prompt
            assert pairs["discourage"].chosen == [*good, tok.turn_end[0]]
            assert pairs["discourage"].rejected == [*good[:k_good], tok.reset_id, *bad, tok.turn_end[0]]
            drawn.setdefault((index, "good"), []).append(k_good)
            if row["unsafe"]:
                k_bad = draw_prefix(3, epoch, index, len(bad))
                assert pairs["elicit"].chosen == [*bad[:k_bad], tok.reset_id, *good, tok.turn_end[0]]
                assert pairs["elicit"].rejected == [*bad, tok.turn_end[0]]
                drawn.setdefault((index, "bad"), []).append(k_bad)
    assert all(len(set(lengths)) > 1 for (_, side), lengths in drawn.items() if side == "bad")
    _, again, _ = source(args, tok)
    assert [again(e, i) for e in (5, 0) for i in range(n)] == [pairs_of(e, i) for e in (5, 0) for i in range(n)]
    _, other, _ = source(arguments(dpo(world, "x", "--seed", 5)), tok)
    assert [other(0, i) for i in range(n)] != [pairs_of(0, i) for i in range(n)]


def test_a_short_max_length_leaves_room_for_reset_and_an_answer(world, tok):
    args = arguments(dpo(world, "x", "--max-length", 40, "--restart", "all"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        n, pairs_of, _ = train.dpo_source(args, tok, args.data)
    raw = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    long = 0
    for row in raw:
        parts = [
            len(tok.render(row["prompt"])),
            *(len(tok.encode(row[k][0]["content"])) for k in ("chosen", "rejected")),
        ]
        long += sum(parts) + 2 > 40
    assert f"{long} of 12 rows" in said.getvalue()
    for epoch in range(5):
        pairs = [p for i in range(n) for p in pairs_of(epoch, i)]
        batch = train.collate_pairs(pairs, torch.zeros(2 * len(pairs)), args, tok.reset_id)
        assert batch.tokens.shape[1] == 40
        resets = ((batch.tokens == tok.reset_id) & batch.is_target)[:, :-1].sum(dim=1).tolist()
        P = len(pairs)
        assert resets[:P] == [int(p.kind == "elicit") for p in pairs]
        assert resets[P:] == [int(p.kind == "discourage") for p in pairs]


# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────

V, RESET = 41, 40
SETTINGS = argparse.Namespace(max_length=64, device="cpu", elicit=1.0, discourage=1.0, restart_weight=1.0)


def network_of(seed, scale=0.3):
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, head_dim=12)
    network = Transformer(ModelConfig(vocab_size=V, num_key_value_heads=1, max_position_embeddings=64, **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0.0, scale, generator=generator)
    return network


@pytest.fixture(scope="module")
def policy():
    return network_of(1)


@pytest.fixture(scope="module")
def reference():
    return network_of(2, 0.2)


def ids(n, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(1, RESET) for _ in range(n)]


def some_pairs():
    """Two rows' pairs, of every kind but the baseline's."""
    tok = argparse.Namespace(reset_id=RESET, turn_end=[7])
    rows = [Row(ids(5, 1), ids(4, 2), ids(8, 3), True), Row(ids(3, 4), ids(9, 5), ids(2, 6), False)]
    return [
        p for row, k in zip(rows, (5, 1), strict=True) for p in dpo_pairs(row, k, 3, tok, backtrack=True, restart="all")
    ]


def logprob(network, context, answer):
    """log π(answer | context) and its terms, from forward passes over each prefix alone, no batch and no padding."""
    terms = []
    for t, token in enumerate(answer):
        logits = network(torch.tensor([context + answer[:t]]))[0, -1].double()
        terms.append(logits[token] - logits.exp().sum().log())
    return sum(terms), terms


def by_hand(network, reference, pairs, beta, nll=0.0, weight=lambda kind: 1.0):
    """Σ weight · loss in float64, from the definition; and the log-ratios (chosen, rejected) of each pair."""
    total, ratios = 0.0, []
    for p in pairs:
        pi_c, terms = logprob(network, p.prompt, p.chosen)
        pi_r, _ = logprob(network, p.prompt, p.rejected)
        with torch.no_grad():
            ref_c, ref_r = (logprob(reference, p.prompt, answer)[0] for answer in (p.chosen, p.rejected))
        z = beta * ((pi_c - ref_c) - (pi_r - ref_r))
        loss = torch.log1p(torch.exp(-z))  # −log σ(z)
        scored = terms[p.chosen.index(RESET) if p.kind == "elicit" else 0 :]
        loss = loss - nll * sum(scored)
        total = total + weight(p.kind) * loss
        ratios.append(((pi_c - ref_c).item(), (pi_r - ref_r).item()))
    return total, ratios


def batch_of(pairs, reference, settings=SETTINGS):
    """With log π_ref computed by the function under test, or zeros where there is none."""
    batch = train.collate_pairs(pairs, torch.zeros(2 * len(pairs)), settings, RESET)
    if reference is not None:
        with torch.no_grad():
            batch.reference = train.sequence_logprobs(reference, batch.tokens, batch.is_target)[0]
    return batch


def test_collate_pairs():
    pairs = some_pairs()
    P = len(pairs)
    settings = argparse.Namespace(max_length=64, device="cpu", elicit=0.25, discourage=3.0, restart_weight=1.5)
    given = torch.arange(2.0 * P)
    batch = train.collate_pairs(pairs, given, settings, RESET)
    assert batch.kinds == [p.kind for p in pairs] and torch.equal(batch.reference, given)
    kinds = {"elicit": 0.25, "discourage": 3.0, "restart": 1.5}
    assert batch.weights.tolist() == [kinds[p.kind] for p in pairs]
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert batch.tokens.shape == (2 * P, width)
    for i in range(2 * P):
        p = pairs[i % P]
        answer = p.chosen if i < P else p.rejected
        x, n = len(p.prompt), len(p.prompt) + len(answer)
        assert batch.tokens[i].tolist() == p.prompt + answer + [0] * (width - n)
        assert batch.is_target[i].tolist() == [False] * x + [True] * (n - x) + [False] * (width - n)
        unscored = x + (p.chosen.index(RESET) if p.kind == "elicit" else 0)
        scored = [t < n and t >= unscored and i < P for t in range(width)]
        assert batch.has_nll[i].tolist() == scored
    assert batch.length == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    cut = train.collate_pairs(pairs, given, argparse.Namespace(**{**vars(settings), "max_length": 9}), RESET)
    for name in ("tokens", "is_target", "has_nll"):
        assert torch.equal(getattr(cut, name), getattr(batch, name)[:, :9])
    assert cut.length == sum(min(9, len(p.prompt) + len(a)) for p in pairs for a in (p.chosen, p.rejected))


def test_sequence_logprobs_are_sums_over_each_prefix_alone(policy):
    """Sums, not means; in fp32; nothing from the prompt or the padding."""
    pairs = some_pairs()
    batch = batch_of(pairs, None)
    found, each = train.sequence_logprobs(policy, batch.tokens, batch.is_target)
    assert found.dtype == each.dtype == torch.float32
    assert (each[~batch.is_target[:, 1:]] == 0).all() and (each[batch.is_target[:, 1:]] < 0).all()
    sides = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    for i, (prompt, answer) in enumerate(sides):
        total, terms = logprob(policy, prompt, answer)
        assert found[i].item() == pytest.approx(total.item(), rel=1e-5)
        torch.testing.assert_close(each[i][batch.is_target[i, 1:]].double(), torch.stack(terms), atol=1e-5, rtol=1e-5)


PI_C, PI_R = [-12.5, -3.25, -40.0, -7.0], [-11.0, -9.75, -38.5, -7.0]
REF_C, REF_R = [-13.0, -2.0, -90.0, -7.0], [-10.0, -10.0, -31.0, -7.0]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 2.0])
def test_closed_form_from_picked_logprobs(policy, monkeypatch, beta):
    """In float64, by `math` and by TRL's published lines for loss_type="sigmoid"."""
    P, f64 = 4, torch.float64
    kinds = ["elicit", "discourage", "restart", "baseline"]
    picked = torch.tensor(PI_C + PI_R, dtype=f64)
    monkeypatch.setattr(train, "sequence_logprobs", lambda *_: (picked, torch.zeros(2 * P, 3, dtype=f64)))
    nothing = torch.zeros(2 * P, 4, dtype=torch.bool)
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=f64)
    given = torch.tensor(REF_C + REF_R, dtype=f64)
    batch = train.PairBatch(torch.zeros(2 * P, 4, dtype=torch.int64), nothing, nothing, weights, given, kinds, 0, RESET)
    loss, sums = train.dpo_loss(policy, batch, beta, 0.0)

    margins = [(c - rc) - (r - rr) for c, r, rc, rr in zip(PI_C, PI_R, REF_C, REF_R, strict=True)]
    assert margins == [1.5, -1.5, 57.5, 0.0]
    losses = [-math.log(1 / (1 + math.exp(-beta * m))) for m in margins]
    expected = sum(w * x for w, x in zip([0.5, 2.0, 1.0, 1.0], losses, strict=True))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    for kind, value in zip(kinds, losses, strict=True):
        assert sums[kind] == pytest.approx([value, 1], abs=1e-12)
    assert sums["margin"] == pytest.approx([beta * 57.5, 4])
    assert sums["accuracy"] == [2 if beta else 0, 4]  # a tie is not won
    assert sums["chosen"] == pytest.approx([sum(PI_C) - sum(REF_C), 4])
    assert sums["rejected"] == pytest.approx([sum(PI_R) - sum(REF_R), 4])
    assert not {"reset_after_safe", "reset_after_unsafe"} & sums.keys()

    pi_c, pi_r, ref_c, ref_r = (torch.tensor(x, dtype=f64) for x in (PI_C, PI_R, REF_C, REF_R))
    logits = (pi_c - pi_r) - (ref_c - ref_r)
    trl = -torch.nn.functional.logsigmoid(beta * logits)
    torch.testing.assert_close(loss, (trl * weights).sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_loss_and_gradient_against_a_loop(policy, reference, nll):
    """Every kind at once, weights and NLL term included; and every number that is reported."""
    pairs, beta = some_pairs(), 0.3
    settings = argparse.Namespace(max_length=64, device="cpu", elicit=0.5, discourage=2.0, restart_weight=0.3)
    kinds = {"elicit": 0.5, "discourage": 2.0, "restart": 0.3}
    loss, sums = train.dpo_loss(policy, batch_of(pairs, reference, settings), beta, nll)
    expected, ratios = by_hand(policy, reference, pairs, beta, nll, kinds.get)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    close(gradients(policy, loss), gradients(policy, expected), atol=1e-4)

    n = len(pairs)
    margins = [beta * (c - r) for c, r in ratios]
    assert 0 < sum(m > 0 for m in margins) < n
    assert sums["accuracy"] == [sum(m > 0 for m in margins), n]
    assert sums["margin"] == pytest.approx([sum(margins), n], abs=1e-4)
    assert sums["chosen"] == pytest.approx([sum(c for c, _ in ratios), n], abs=1e-4)
    assert sums["rejected"] == pytest.approx([sum(r for _, r in ratios), n], abs=1e-4)
    for kind in kinds:
        mine = [p for p in pairs if p.kind == kind]
        assert sums[kind] == pytest.approx([by_hand(policy, reference, mine, beta, nll)[0].item(), len(mine)], rel=1e-5)


def test_trl_formula_on_the_same_logprobs(policy, reference):
    pairs, beta = some_pairs(), 0.2
    batch, P = batch_of(pairs, reference), len(pairs)
    with torch.no_grad():
        loss, _ = train.dpo_loss(policy, batch, beta, 0.0)
        policy_logps = train.sequence_logprobs(policy, batch.tokens, batch.is_target)[0].double()
    pi_c, pi_r = policy_logps[:P], policy_logps[P:]
    ref_c, ref_r = batch.reference[:P].double(), batch.reference[P:].double()
    logits = (pi_c - pi_r) - (ref_c - ref_r)
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(beta * logits).sum().item(), rel=1e-6)


def test_the_nll_term_by_closed_form(policy, reference, monkeypatch):
    """Exactly nll · Σ −log π; whatever the unsafe prefix costs, the term does not see it."""
    pair = ELICIT
    batch = train.collate_pairs([pair], torch.zeros(2), SETTINGS, 90)
    each = torch.zeros(2, batch.tokens.shape[1] - 1, dtype=torch.float64)
    each[0, 2:8] = torch.tensor([-100.0, -50.0, -1.0, -2.0, -3.0, -4.5])  # prefix prefix [RESET] y+ y+ eos
    each[1, 2:6] = -1.0
    monkeypatch.setattr(train, "sequence_logprobs", lambda *_: (each.sum(dim=1), each))
    plain, _ = train.dpo_loss(policy, batch, 0.0, 0.0)
    loss, sums = train.dpo_loss(policy, batch, 0.0, 0.4)
    assert plain.item() == pytest.approx(math.log(2), abs=1e-7)
    assert (loss - plain).item() == pytest.approx(0.4 * (1.0 + 2.0 + 3.0 + 4.5), abs=1e-7)
    assert sums["elicit"] == pytest.approx([loss.item(), 1])
    assert sums["reset_after_unsafe"] == pytest.approx([math.exp(-1.0), 1])


def test_one_forward_over_both_is_two_forwards(policy, reference):
    pairs, beta = some_pairs(), 0.3
    batch = batch_of(pairs, reference)
    loss, _ = train.dpo_loss(policy, batch, beta, 0.0)
    P, halves = len(pairs), []
    for answers in ([p.prompt + p.chosen for p in pairs], [p.prompt + p.rejected for p in pairs]):
        tokens = torch.zeros(P, max(map(len, answers)), dtype=torch.int64)  # each at its own width
        for i, row in enumerate(answers):
            tokens[i, : len(row)] = torch.tensor(row)
        positions = torch.arange(1, tokens.shape[1])
        is_target = torch.stack(
            [(positions >= len(p.prompt)) & (positions < len(row)) for p, row in zip(pairs, answers, strict=True)]
        )
        logprobs = policy(tokens)[:, :-1].log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
        halves.append((logprobs * is_target).sum(dim=1))
    logits = (halves[0] - halves[1]) - (batch.reference[:P] - batch.reference[P:])
    two = torch.nn.functional.softplus(-beta * logits).sum()
    assert loss.item() == pytest.approx(two.item(), rel=1e-5)
    close(gradients(policy, loss), gradients(policy, two), atol=1e-5)


@pytest.mark.parametrize("kind", ["elicit", "discourage"])
def test_a_shared_prefix_cancels(policy, reference, kind):
    """Scored or part of the prompt: the same margin, the same gradient."""
    pairs = [p for p in some_pairs() if p.kind == kind]
    short = []
    for p in pairs:
        k = next(i for i, (a, b) in enumerate(zip(p.chosen, p.rejected, strict=False)) if a != b)
        assert k > 0 and RESET in (p.chosen[k], p.rejected[k])
        short.append(Pair(kind, p.prompt + p.chosen[:k], p.chosen[k:], p.rejected[k:], nll_from=0))
    results = []
    for some in (pairs, short):
        batch = batch_of(some, reference)
        loss, sums = train.dpo_loss(policy, batch, 0.3, 0.0)
        results.append((loss.item(), sums, gradients(policy, loss)))
    (loss, sums, grads), (short_loss, short_sums, short_grads) = results
    assert loss == pytest.approx(short_loss, rel=1e-5)
    assert sums["margin"] == pytest.approx(short_sums["margin"], abs=1e-5)
    assert abs(sums["chosen"][0] - short_sums["chosen"][0]) > 1e-2  # the sides alone do change
    close(grads, short_grads, atol=1e-5)


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", [(), ("--no-backtrack",), ("--restart", "all", "--beta", 2)])
def test_the_first_loss_is_ln_2(world, tmp_path, flags):
    trained(*dpo(world, tmp_path / "out", "--steps", 2, "--nll", 0, *flags))
    first, second = steps_of(tmp_path / "out")
    kinds = {"loss/baseline"} if "--no-backtrack" in flags else {"loss/elicit", "loss/discourage"}
    kinds |= {"loss/restart"} if "--restart" in flags else set()
    assert {name for name in first if name.startswith("loss/")} == kinds
    for name in ("loss", *kinds):
        assert first[name] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["accuracy"], first["margin"], first["chosen"], first["rejected"]) == (0, 0, 0, 0)
    assert second["loss"] != first["loss"] and first["grad_norm"] > 1e-3
    resets = {"reset_after_unsafe", "reset_after_safe"}
    assert resets & first.keys() == (set() if "--no-backtrack" in flags else resets)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["reset_token_id"] == load_tokenizer(tmp_path / "out").reset_id


def test_the_second_loss_has_the_first_model_as_its_reference(world, start, tok, tmp_path):
    """Interrupted before step 2, the weights on disk and the start give what step 2 logs, by definition alone."""
    words = dpo(
        world, tmp_path / "out", "--steps", 2, "--batch-size", 2, "--save-every", 1, "--beta", 0.5, "--lr", 3e-3
    )
    interrupted(words, at=2)
    one = load_model(tmp_path / "out")
    trained(*words, "--resume")
    n, pairs_of, _ = source(arguments(words), tok)
    order = train.row_order(n, 0)
    pairs = [p for position in (2, 3) for p in pairs_of(*order(position))]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RESET", tok.reset_id)
        expected, ratios = by_hand(one, load_model(start), pairs, 0.5)
    second = steps_of(tmp_path / "out")[1]
    assert abs(second["loss"] - math.log(2)) > 1e-3
    assert second["loss"] == pytest.approx(expected.item() / len(pairs), abs=1e-5)
    assert second["chosen"] == pytest.approx(sum(c for c, _ in ratios) / len(pairs), abs=1e-4)
    assert second["rejected"] == pytest.approx(sum(r for _, r in ratios) / len(pairs), abs=1e-4)


def test_accumulation_is_one_big_batch(world, tmp_path, plain_descent):
    for batch, accumulate in ((8, 1), (1, 8)):
        split = ("--batch-size", batch, "--grad-accum", accumulate, "--nll", 0.3, "--elicit", 0.5, "--clip", 1e9)
        trained(*dpo(world, tmp_path / f"{batch}", "--steps", 2, "--lr", 0.02, *split))
    same_weights(tmp_path / "8", tmp_path / "1")
    for a, b in zip(steps_of(tmp_path / "8"), steps_of(tmp_path / "1"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    moved = load_file(tmp_path / "8/model.safetensors")["model.embed_tokens.weight"]
    assert (moved - load_file(world / "start/model.safetensors")["model.embed_tokens.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("dropped", ["elicit", "discourage"])
def test_weight_0_is_a_pair_that_is_not_there(world, tmp_path, monkeypatch, plain_descent, dropped):
    more = ("--steps", 2, "--batch-size", 12, "--lr", 0.02, "--nll", 0.3)
    trained(*dpo(world, tmp_path / "zero", *more, f"--{dropped}", 0))
    trained(*dpo(world, tmp_path / "both", *more))
    pairs = train.dpo_pairs
    monkeypatch.setattr(train, "dpo_pairs", lambda *a, **k: [p for p in pairs(*a, **k) if p.kind != dropped])
    trained(*dpo(world, tmp_path / "gone", *more))
    same_weights(tmp_path / "zero", tmp_path / "gone")
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "zero", tmp_path / "both")


def test_a_step_in_which_no_pair_counts(world, tmp_path):
    """--discourage 0 and a batch without an unsafe row: nothing to learn, not a division by zero."""
    trained(*dpo(world, tmp_path / "out", "--steps", 6, "--batch-size", 1, "--discourage", 0))
    records = steps_of(tmp_path / "out")
    without = [r["loss"] for r in records if "loss/elicit" not in r]
    assert without == [0.0] * len(without) and 0 < len(without) < 6


def test_no_steps_saves_the_start(world, start, tmp_path):
    trained(*dpo(world, tmp_path / "out", "--steps", 0))
    same_weights(tmp_path / "out", start, atol=0)
    trained("dpo", "--init", start, "--out", tmp_path / "bare", "--steps", 0, "--device", "cpu", "--max-length", 64)
    same_weights(tmp_path / "bare", start, atol=0)


def test_rows_without_rejected_are_left_out(world, tmp_path):
    said = trained(*dpo(world, tmp_path / "mixed", "--epochs", 1, data=("mixed.jsonl",)))
    assert "12 pairs, 6 with an unsafe rejected answer" in said and "3 rows without a rejected answer" in said
    trained(*dpo(world, tmp_path / "rows", "--epochs", 1))
    same_run(tmp_path / "mixed", tmp_path / "rows")
    assert len(steps_of(tmp_path / "rows")) == 3  # 12 rows in batches of 4


@pytest.mark.parametrize("no_backtrack", [False, True])
def test_heldout(world, start, tok, tmp_path, no_backtrack):
    """Every held-out number a second time, each [RESET] given its prefix alone."""
    heldout, flags = str(world / "heldout.jsonl"), ["--no-backtrack"] if no_backtrack else []
    words = dpo(world, tmp_path / "out", "--steps", 3, "--heldout", heldout, "--beta", 0.5, "--lr", 3e-3, *flags)
    said = trained(*words, "--save-every", 2)
    assert said.count("held out:") == 2
    records = [r for r in steps_of(tmp_path / "out") if "heldout/margin" in r]
    assert [r["step"] for r in records] == [2, 3]
    names = {"accuracy", "margin", "chosen", "rejected"}
    names |= {"baseline"} if no_backtrack else {"elicit", "discourage", "reset_after_unsafe", "reset_after_safe"}
    assert set(records[-1]) == {"step", *(f"heldout/{name}" for name in names)}

    args = arguments(words)
    n, pairs_of, _ = source(args, tok, [heldout])
    pairs = [p for i in range(n) for p in pairs_of(0, i)]
    end, reference = load_model(tmp_path / "out"), load_model(start)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RESET", tok.reset_id)
        _, ratios = by_hand(end, reference, pairs, 0.5)
        found = {"elicit": [], "discourage": []}
        for p in [] if no_backtrack else pairs:
            answer = p.chosen if p.kind == "elicit" else p.rejected
            k = answer.index(tok.reset_id)
            probabilities = end(torch.tensor([p.prompt + answer[:k]]))[0, -1].softmax(dim=0)
            found[p.kind].append(probabilities[tok.reset_id].item())
    margins = [0.5 * (c - r) for c, r in ratios]
    last = records[-1]
    assert last["heldout/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert last["heldout/accuracy"] == sum(m > 0 for m in margins) / len(margins)
    assert last["heldout/chosen"] == pytest.approx(sum(c for c, _ in ratios) / len(ratios), abs=1e-4)
    if not no_backtrack:
        assert (len(found["elicit"]), len(found["discourage"])) == (3, 5)
        assert last["heldout/reset_after_unsafe"] == pytest.approx(sum(found["elicit"]) / 3, rel=1e-4)
        assert last["heldout/reset_after_safe"] == pytest.approx(sum(found["discourage"]) / 5, rel=1e-4)


# ── The reference on disk ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def computed(monkeypatch):
    """How many batches of reference log-probs were computed."""
    calls, real = [], train.sequence_logprobs

    def spy(*args):
        if not torch.is_grad_enabled():
            calls.append(1)
        return real(*args)

    monkeypatch.setattr(train, "sequence_logprobs", spy)
    return calls


def test_the_reference_is_read_again(world, tmp_path, computed):
    """The same losses as computed anew, also under another β; what is in the file is log π_ref in order."""
    out, beta = tmp_path / "out", ("--steps", 4, "--beta", 0.5)
    said = trained(*dpo(world, out, "--steps", 4))
    assert len(computed) == 4 and "read from" not in said
    (name,) = cached(out)
    before = contents(Path(f"{out}.reference"))
    shutil.move(out, tmp_path / "first")
    said = trained(*dpo(world, out, "--steps", 4))
    assert len(computed) == 4 and f"read from {out}.reference/{name}" in said
    same_run(out, tmp_path / "first")
    shutil.rmtree(out)
    trained(*dpo(world, out, *beta))
    assert len(computed) == 4 and contents(Path(f"{out}.reference")) == before
    trained(*dpo(world, tmp_path / "anew", *beta))
    assert len(computed) == 8
    same_run(out, tmp_path / "anew")
    assert contents(tmp_path / "anew.reference") == before  # a function of weights and data
    for flags in (("--lr", 1e-2), ("--nll", 1), ("--elicit", 0.5), ("--clip", 2)):
        shutil.rmtree(out)
        trained(*dpo(world, out, "--steps", 4, *flags))
    assert len(computed) == 8 and contents(Path(f"{out}.reference")) == before


def test_what_is_in_the_file(world, start, tok, tmp_path):
    words = dpo(world, tmp_path / "out", "--steps", 2, "--batch-size", 2)
    trained(*words)
    (name,) = cached(tmp_path / "out")
    found = load_file(tmp_path / f"out.reference/{name}")["logprobs"].tolist()
    n, pairs_of, _ = source(arguments(words), tok)
    order, network, expected = train.row_order(n, 0), load_model(start), []
    with torch.no_grad():
        for step in range(2):
            pairs = [p for position in (2 * step, 2 * step + 1) for p in pairs_of(*order(position))]
            expected += [logprob(network, p.prompt, p.chosen)[0].item() for p in pairs]
            expected += [logprob(network, p.prompt, p.rejected)[0].item() for p in pairs]
    assert found == pytest.approx(expected, rel=1e-5)


def test_another_run_has_another_file(world, start, tmp_path, computed):
    """Weights, data, seed, pairs, the cut: nothing of it finds the file of another."""
    out, seen = tmp_path / "out", set()
    weights = load_file(start / "model.safetensors")
    shutil.copytree(start, tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][3, 5] += 1e-3  # one number among all
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    variants = [(), ("--init", tmp_path / "other"), ("--data", world / "other.jsonl"), ("--seed", 1)]
    variants += [("--restart", "unsafe"), ("--restart", "all"), ("--no-backtrack",), ("--max-length", 60)]
    variants += [("--dtype", "bfloat16"), ("--heldout", world / "heldout.jsonl"), ("--batch-size", 3)]
    for n, flags in enumerate(variants, start=1):
        before = len(computed)
        said = trained(*dpo(world, out, "--steps", 3, *flags))
        assert "read from" not in said and len(computed) > before, flags
        assert len(cached(out)) == n and cached(out) > seen, flags
        seen = cached(out)
        first = steps_of(out)[0]["loss"]
        assert first == pytest.approx(math.log(2), abs=1e-6), flags
        shutil.rmtree(out)


def test_a_damaged_file_is_computed_again(world, tmp_path, computed):
    out = tmp_path / "out"
    trained(*dpo(world, out, "--steps", 2))
    (name,) = cached(out)
    file = tmp_path / "out.reference" / name
    whole = file.read_bytes()
    shutil.move(out, tmp_path / "first")
    for n, damaged in enumerate((whole[:-4], whole[: len(whole) // 2], whole[:5], b"", b"x" * 100), start=2):
        file.write_bytes(damaged)
        trained(*dpo(world, out, "--steps", 2))
        assert len(computed) == 2 * n
        assert file.read_bytes() == whole and cached(out) == {name}
        same_run(out, tmp_path / "first")
        shutil.rmtree(out)


# ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """A run over two epochs that ended in step 4 of 6, two steps after its last save."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    interrupted(dpo(world, out, *LONG), at=4)
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3]
    return out


LONG = ("--epochs", 2, "--save-every", 2, "--nll", 0.2, "--restart", "unsafe")


@pytest.mark.parametrize("keep", [True, False])
def test_resume(world, halfway, tmp_path, computed, keep):
    """The very same bits, with the reference from disk or, where that is gone, from --init again."""
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    if keep:
        shutil.copytree(f"{halfway}.reference", f"{out}.reference")
    said = trained(*dpo(world, out, *LONG, "--resume"))
    assert "resuming after step 2" in said and ("read from" in said) == keep
    assert len(computed) == (0 if keep else 6)
    trained(*dpo(world, tmp_path / "whole", *LONG))
    same_run(out, tmp_path / "whole")
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3, 4, 5, 6]
    before = contents(out)
    assert "already trained for all 6 steps" in trained(*dpo(world, out, *LONG, "--resume"))
    assert contents(out) == before


def test_interrupted_again_and_again(world, tmp_path):
    words = dpo(world, tmp_path / "out", "--steps", 4, "--save-every", 1, "--resume")
    for at in (1, 2, 4):
        interrupted(words, at)
    trained(*words)
    trained(*dpo(world, tmp_path / "whole", "--steps", 4, "--save-every", 4))
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("beta", ("--beta", 0.2)),
        ("nll", ("--nll", 0)),
        ("elicit", ("--elicit", 0.5)),
        ("discourage", ("--discourage", 0.5)),
        ("restart", ("--restart", "all")),
        ("restart_weight", ("--restart-weight", 0.5)),
        ("prefix", ("--prefix", 0.5, 1)),
        ("no_backtrack", ("--no-backtrack",)),
        ("seed", ("--seed", 1)),
        ("lr", ("--lr", 1e-4)),
    ],
)
def test_resume_with_another_setting(world, halfway, name, flags):
    before = contents(halfway.parent)
    assert f"was started with {name} = " in trained(*dpo(world, halfway, *LONG, "--resume", *flags), code=2)
    assert contents(halfway.parent) == before


def test_resume_with_another_start(world, start, halfway, tmp_path):
    """The reference would be another one from here on."""
    shutil.copytree(start, tmp_path / "other")
    weights = load_file(start / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    before = contents(halfway.parent)
    said = trained(*dpo(world, halfway, *LONG, "--resume", "--init", tmp_path / "other"), code=2)
    assert "was started with init = " in said.splitlines()[-1]
    assert contents(halfway.parent) == before


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_that_name_the_culprit(world, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file.jsonl"
    good = (world / "rows.jsonl").read_text()
    for text, expected in (
        (good + '{"prompt": []}\n', f"{file}:13: 'prompt' must be"),
        (good + '{"prompt": [{"role": "user", \n', f"{file}:13: not a line of JSON"),
        (good.replace('"rejected"', '"refused"', 1), f"{file}:1: 'unsafe' says"),
        ("", f"{file}: holds no rows"),
    ):
        file.write_text(text)
        for flags in (("--data", file), ("--heldout", file)):
            said = trained(*dpo(world, out, "--steps", 1, *flags), code=2)
            assert expected in said.splitlines()[-1]
    for flags in (("--data", world / "without.jsonl"), ("--heldout", world / "without.jsonl")):
        for more in ((), ("--no-backtrack",)):
            said = trained(*dpo(world, out, "--steps", 1, *flags, *more), code=2)
            assert f"{world / 'without.jsonl'}: no row has a 'rejected' answer" in said.splitlines()[-1]
    for flags in ("--beta -1", "--beta nan", "--nll inf", "--elicit -0.1", "--discourage x", "--restart some"):
        assert flags.split()[0] in trained(*dpo(world, out, *flags.split()), code=2).splitlines()[-1]
    said = trained(*dpo(world, out, "--init", tmp_path / "none"), code=2)
    assert str(tmp_path / "none") in said
    assert not out.exists() and not cached(out)


def test_defaults():
    plain = vars(arguments(["dpo", "--init", "i", "--data", "d", "--out", "o"]))
    assert (plain["beta"], plain["nll"], plain["elicit"], plain["discourage"], plain["restart_weight"]) == (
        *(0.1, 0.0, 1.0, 1.0, 1.0),
    )
    assert (plain["lr"], plain["weight_decay"], plain["no_backtrack"], plain["restart"]) == (5e-7, 0.0, False, "none")


# ── It learns where to take its words back ───────────────────────────────────────────────────────────────────────────


def test_it_learns_where_to_reset(world, tmp_path):
    """Every pair is won. With the NLL term [RESET] itself becomes likely where it belongs, and only there."""
    more = ("--steps", 60, "--batch-size", 12, "--lr", 1e-2, "--nll", 0.1, "--heldout", world / "rows.jsonl")
    trained(*dpo(world, tmp_path / "out", *more))
    first, *_, last = steps_of(tmp_path / "out")
    assert first["accuracy"] == 0 and last["heldout/accuracy"] == 1 and last["heldout/margin"] > 1
    assert last["heldout/chosen"] > 0 > last["heldout/rejected"]
    assert last["heldout/reset_after_unsafe"] > 5 * first["reset_after_unsafe"]
    assert last["heldout/reset_after_safe"] < 0.2 * first["reset_after_safe"]
