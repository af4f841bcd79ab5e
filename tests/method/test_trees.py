"""Row trees against their plain form: every sequence by itself, a forward pass of that sequence alone, a Python loop.

A batch of trees is worth nothing unless it is exactly that: the same log-probs, losses and gradients, in every model,
however the sequences share, are cut, or lie in lanes. And no node may see anything but its own ancestors.
"""

import argparse
import dataclasses
import random

import pytest
import torch
from models import GEMMA, LLAMA, network_of
from training import close, gradients, prefixes

import train
from backtrack.examples import Pair, View, dpo_pairs, sft_views
from backtrack.rows import Row
from backtrack.run.options import Machine
from backtrack.trees import Tree, grow, make_batch, pair_tree, pairs_of, share_lanes, view_tree

V, RESET, EOS = 41, 40, 39
TOK = argparse.Namespace(reset_id=RESET, eos_id=EOS, text_end_id=38)

# Tied and untied; a key for each head, for two, for all; caps and windows, and masks without a cap.
MODELS = {
    "llama": LLAMA,
    "llama untied": LLAMA | {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "gemma": GEMMA,
    "gemma uncapped": GEMMA
    | {
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
        "attn_logit_softcapping": None,
        "sliding_window": 13,  # longer than some batches are wide
    },
}


@pytest.fixture(scope="module", params=list(MODELS))
def network(request):
    return network_of(MODELS[request.param], vocab_size=V)


# ── What is batched: trees, and the sequences that they must be worth ─────────────────────────────


@dataclasses.dataclass
class Scene:
    trees: list[Tree]
    sequences: list[list[int]]
    starts: list[int]  # targets are tokens[start:]
    weights: list[float] | None  # of each target, by sequence; None: pairs

    def of_tree(self, tree: Tree) -> list[list[int]]:
        """A tree's own sequences."""
        before = sum(len(t.names) for t in self.trees[: self.trees.index(tree)])
        return self.sequences[before : before + len(tree.names)]


def ids(n, seed):
    rng = random.Random(seed)
    return [rng.randrange(1, 38) for _ in range(n)]


def row(x, good, bad, unsafe=True, seed=0):
    """Random tokens, so many in the prompt and in each answer."""
    return Row(ids(x, seed), ids(good, seed + 100), ids(bad, seed + 200) if bad else None, unsafe)


def sft(rows, max_length=200, **options):
    scene = Scene([], [], [], [])
    for n, some in enumerate(rows):
        k = random.Random(n).randint(1, len(some.rejected)) if some.unsafe else 0
        add_views(scene, sft_views(some, k, TOK, **options), max_length)
    return scene


def add_views(scene, views, max_length=200):
    scene.trees.append(view_tree(views, max_length))
    scene.sequences += [v.tokens[:max_length] for v in views]
    scene.starts += [v.loss_from for v in views]
    scene.weights += [v.weight for v in views]


def dpo(rows, max_length=200, **options):
    scene, kinds = Scene([], [], [], None), {"elicit": 1, "discourage": 1, "restart": 1}
    for n, some in enumerate(rows):
        k, j = (random.Random(n).randint(1, len(a)) for a in (some.rejected, some.chosen))
        pairs = dpo_pairs(some, k, j, TOK, **options)
        scene.trees.append(pair_tree(pairs, kinds | {"baseline": 1}, max_length))
        answers = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
        scene.sequences += [(x + answer)[:max_length] for x, answer in answers]
        scene.starts += [len(x) for x, _ in answers]
    return scene


def forest():
    """Views that begin differently: a tree with several roots."""
    scene = Scene([], [], [], [])
    views = [View("text", [n, *ids(6 + n, n)], 2, 0.5 + n) for n in (3, 1, 2)]
    add_views(scene, views)
    add_views(scene, views[:1])
    return scene


ROWS = [row(9, 5, 7), row(4, 8, 3, seed=1), row(7, 2, 9, False, 2), row(3, 4, 0, False, 3)]
ROWS += [Row([1], ids(11, 4), None, False, plain_text=True), row(12, 6, 1, seed=5)]
PAIRS = [some for some in ROWS if some.rejected]
X, Y = ids(8, 6), ids(5, 7)
# Answers that are alike: one the other's beginning, or the same, or the same row again.
ALIKE = [Row(X, Y, Y + ids(4, 8), True), Row(X, Y + ids(3, 9), Y, True), Row(X, Y, Y, True)]
ALIKE += [ALIKE[0], Row(X, Y, [7, 7, 7, 7], True), Row(X, [RESET], [RESET], True)]
SHORT = [
    row(3, 1, 1, seed=20 + n) for n in range(7)
]  # several of them fit in the lane of a long one

SCENES = {
    "sft": lambda: sft(ROWS, restart="all"),
    "sft, every reset": lambda: sft(ROWS, resets="every", restart="unsafe"),
    "sft, in place": lambda: sft(ROWS, method="in-place", resets="drawn"),
    "sft, in place, every turn": lambda: sft(ROWS, method="in-place"),
    "sft, baseline": lambda: sft(ROWS, method="baseline"),
    "sft, cut": lambda: sft(ROWS, 15, restart="all"),
    "sft, cut, every reset": lambda: sft(ROWS, 15, resets="every"),
    "sft, one row": lambda: sft(ROWS[:1], resets="every", restart="all"),
    "sft, one sequence": lambda: sft(ROWS[2:3]),
    "sft, answers alike": lambda: sft(ALIKE, resets="every", restart="all"),
    "sft, shared lanes": lambda: sft([row(20, 9, 9), *SHORT], restart="all"),
    "sft, sequences in shared lanes": lambda: sft(
        [row(20, 9, 0, False), *SHORT], method="baseline"
    ),
    # Too long to share lanes, without a branch, of different lengths: plain causal attention beside padding.
    "sft, padded": lambda: sft([row(x, 5, 0, False, x) for x in (14, 10, 12)]),
    "nothing shared": forest,
    "dpo": lambda: dpo(PAIRS, restart="all"),
    "dpo, baseline": lambda: dpo(PAIRS, method="baseline"),
    "dpo, cut": lambda: dpo(PAIRS, 15, restart="all"),
    "dpo, one row": lambda: dpo(PAIRS[:1]),
    "dpo, answers alike": lambda: dpo(ALIKE, restart="all"),
    "dpo, shared lanes": lambda: dpo([row(20, 9, 9), *SHORT], restart="unsafe"),
}


@pytest.fixture(params=list(SCENES))
def scene(request):
    return SCENES[request.param]()


def test_the_scenes_are_what_they_are_called():
    for name, make in SCENES.items():
        scene = make()
        batch = make_batch(scene.trees)
        assert len(batch.tokens) < len(scene.trees) or "lanes" not in name
        assert max(map(len, scene.sequences)) == 15 or "cut" not in name
        assert ("one" in name) == (len(scene.trees) == 1)
        assert batch.is_causal == (name in ("sft, padded", "sft, one sequence"))
    padded = SCENES["sft, padded"]().trees
    assert make_batch(padded).tokens.numel() > sum(map(len, padded))
    widths = {make_batch(make().trees).tokens.shape[1] for make in SCENES.values()}
    assert min(widths) <= MODELS["gemma uncapped"]["sliding_window"] < max(widths)


# ── The plain form ────────────────────────────────────────────────────────────────────────────────


def plain_logprobs(network, scene):
    """log π of every target of every sequence."""
    found = []
    for tokens, start in zip(scene.sequences, scene.starts, strict=True):
        logits = network(torch.tensor([tokens]))[0]
        for t in range(start, len(tokens)):
            found.append(logits[t - 1].log_softmax(dim=-1)[tokens[t]])
    return torch.stack(found)


def owners(scene):
    """Of every target in that order: its sequence, and its token."""
    both = []
    for s, (tokens, start) in enumerate(zip(scene.sequences, scene.starts, strict=True)):
        both += [(s, token) for token in tokens[start:]]
    return both


def in_plain_order(batch, values):
    """A batch lists targets in another order, sequence by sequence in the same."""
    return values[torch.sort(batch.sequence, stable=True).indices]


def plain_loss(scene, values):
    """Σ weight · −log π; or of pairs Σ −log σ(0.3 · margin), the reference being 0, −1, −2, … of the sequences."""
    total = 0.0
    if scene.weights is not None:
        for value, (s, _) in zip(values, owners(scene), strict=True):
            total = total - scene.weights[s] * value
        return total
    sums = [1.0 * s for s in range(len(scene.sequences))]
    for value, (s, _) in zip(values, owners(scene), strict=True):
        sums[s] = sums[s] + value
    for chosen, rejected in zip(sums[0::2], sums[1::2], strict=True):
        total = total + torch.log1p(torch.exp(-0.3 * (chosen - rejected)))
    return total


def tree_loss(scene, batch, values):
    if scene.weights is not None:
        return train.sft_loss(values, batch.weight)
    reference = -torch.arange(float(len(batch.names)))
    sums = batch.by_sequence(values)
    return train.dpo_loss(*pairs_of(sums), *pairs_of(reference), beta=0.3).sum()


def test_logprobs_losses_and_gradients(network, scene):
    batch = make_batch(scene.trees)
    values = train.logprobs(network, batch)
    assert values.dtype == torch.float32
    found = zip(
        in_plain_order(batch, batch.sequence), in_plain_order(batch, batch.target), strict=True
    )
    assert [(s.item(), token.item()) for s, token in found] == owners(scene)
    expected = plain_logprobs(network, scene)
    torch.testing.assert_close(in_plain_order(batch, values), expected, atol=1e-5, rtol=1e-5)
    loss, plain = tree_loss(scene, batch, values), plain_loss(scene, expected)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)
    close(gradients(network, loss), gradients(network, plain), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sft", "sft, shared lanes", "sft, baseline", "dpo"])
def test_bfloat16(network, name):
    """As near to the truth in fp32 as the plain form in bf16 is, which rounds as often but elsewhere."""
    scene = SCENES[name]()
    batch = make_batch(scene.trees)
    truth = plain_logprobs(network, scene)
    with Machine(dtype="bfloat16").autocast():
        values = train.logprobs(network, batch)
        plain = plain_logprobs(network, scene)
    assert values.dtype == torch.float32
    off, plain_off = (in_plain_order(batch, values) - truth).abs(), (plain - truth).abs()
    assert 0 < plain_off.mean() < 0.05  # it did compute in bf16
    assert off.mean() < 1.5 * plain_off.mean() and off.max() < 2 * plain_off.max()

    exact = gradients(network, plain_loss(scene, truth))
    errors = []
    for loss in (tree_loss(scene, batch, values), plain_loss(scene, plain)):
        found = gradients(network, loss)
        errors.append(sum((found[name] - exact[name]).square().sum() for name in exact).sqrt())
    size = sum(g.square().sum() for g in exact.values()).sqrt()
    assert errors[0] < 1.5 * errors[1] < 0.1 * size


# ── Who sees whom ─────────────────────────────────────────────────────────────────────────────────


def nodes_of(scene, batch) -> dict[int, tuple]:
    """Place in the flattened batch -> (which tree, all tokens from its root down to the node), from depths alone."""
    found, places = {}, batch.predicting[batch.predicted_by].tolist()
    target = 0
    for n, tree in enumerate(scene.trees):
        offset = places[target] - tree.target_node[0]
        target += len(tree.target_node)
        path: list[int] = []
        for i, (token, depth) in enumerate(zip(tree.tokens, tree.depths, strict=True)):
            path = path[:depth] + [token]
            assert len(path) == depth + 1
            assert batch.tokens.flatten()[offset + i] == token
            assert batch.positions.flatten()[offset + i] == depth
            assert offset + i not in found
            found[offset + i] = (n, *path)
    return found


def test_each_distinct_prefix_is_one_node(scene):
    batch = make_batch(scene.trees)
    nodes = list(nodes_of(scene, batch).values())
    expected = {(n, *p) for n, t in enumerate(scene.trees) for p in prefixes(scene.of_tree(t))}
    assert len(nodes) == len(set(nodes)) == len(expected)
    assert set(nodes) == expected


def test_a_target_sees_its_sequence_and_nothing_else(scene):
    """Read in order, what the predicting node sees is what stands before the target."""
    batch = make_batch(scene.trees)
    B, T = batch.tokens.shape
    visible = (
        torch.ones(T, T).tril().bool().expand(B, T, T) if batch.visible is None else batch.visible
    )
    done = [start for start in scene.starts]
    for n, s in enumerate(batch.sequence.tolist()):
        b, t = divmod(batch.predicting[batch.predicted_by[n]].item(), T)
        before = scene.sequences[s][: done[s]]
        assert batch.tokens[b][visible[b, t]].tolist() == before
        assert batch.positions[b][visible[b, t]].tolist() == list(range(len(before)))
        done[s] += 1
    assert done == [
        max(len(tokens), start) for tokens, start in zip(scene.sequences, scene.starts, strict=True)
    ]


@pytest.mark.parametrize("name", list(SCENES))
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_a_token_is_felt_by_its_descendants_and_by_nobody_else(model, name):
    """Another token in one branch: bit for bit the same in every other branch, tree and lane; different below it."""
    network, scene = network_of(MODELS[model], vocab_size=V), SCENES[name]()
    batch = make_batch(scene.trees)
    nodes = nodes_of(scene, batch)

    def hidden(tokens):
        with torch.no_grad():
            return network.model(tokens, None, batch.positions, batch.visible).flatten(0, 1)

    before = hidden(batch.tokens)
    padding = [i for i in range(batch.tokens.numel()) if i not in nodes]
    chosen = random.Random(0).sample(sorted(nodes), min(25, len(nodes))) + padding[:3]
    for changed in chosen:
        tokens = batch.tokens.clone()
        tokens.view(-1)[changed] = (tokens.view(-1)[changed] + 1) % V
        same = (hidden(tokens) == before).all(dim=1).tolist()
        path = nodes.get(changed)
        for i, other in nodes.items():
            below = path is not None and other[: len(path)] == path
            assert same[i] != below, (changed, i)


def test_padding_gets_no_gradient(network, scene):
    """Nor is it ever a place that predicts."""
    batch = make_batch(scene.trees)
    real = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
    real[list(nodes_of(scene, batch))] = True
    assert real[batch.predicting].all()
    batch.tokens.view(-1)[~real] = 37 if 37 not in batch.tokens.view(-1)[real] else V - 1
    loss = tree_loss(scene, batch, train.logprobs(network, batch))
    expected = tree_loss(
        scene, make_batch(scene.trees), train.logprobs(network, make_batch(scene.trees))
    )
    assert loss.item() == expected.item()
    close(gradients(network, loss), gradients(network, expected), atol=1e-7, rtol=0)


def test_is_causal_only_where_each_node_sees_all_before_it(network, scene):
    """And without the flag, by the mask alone, the log-probs are the same."""
    batch = make_batch(scene.trees)
    nodes = nodes_of(scene, batch)
    T = batch.tokens.shape[1]
    sees_all = True
    for i, path in nodes.items():
        before = [nodes[j] for j in range(i - i % T, i)]
        sees_all &= before == [path[: 2 + n] for n in range(len(path) - 2)]
    assert batch.is_causal == sees_all
    by_mask = dataclasses.replace(batch, is_causal=False)
    assert by_mask.visible is not None and (batch.visible is None) == sees_all
    values = train.logprobs(network, batch), train.logprobs(network, by_mask)
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


# ── Trees of any shape ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(40))
def test_trees_of_random_sequences(seed):
    """Of two or three different tokens, so that they share much, repeat each other and begin each other."""
    rng = random.Random(seed)
    sequences, starts = [], []
    for _ in range(rng.randint(1, 8)):
        sequences.append([rng.randint(1, rng.choice((2, 3))) for _ in range(rng.randint(2, 7))])
        starts.append(rng.randint(1, len(sequences[-1])))
    tree = Tree(["text"] * len(sequences), 0.0)
    grow(tree, sequences, starts)

    paths: list[tuple] = []
    for token, depth in zip(tree.tokens, tree.depths, strict=True):
        paths.append((*(paths[-1][:depth] if paths else ()), token))
    assert sorted(paths) == sorted(prefixes(sequences))
    for i, path in enumerate(paths):
        below = [j for j, other in enumerate(paths) if other[: len(path)] == path]
        assert below == list(range(i, tree.last[i] + 1))
    targets = zip(tree.target_sequence, tree.target_node, tree.target_token, strict=True)
    found = sorted((s, *paths[node], token) for s, node, token in targets)
    expected = []
    for s, (tokens, start) in enumerate(zip(sequences, starts, strict=True)):
        expected += [(s, *tokens[: t + 1]) for t in range(start, len(tokens))]
    assert found == sorted(expected)


def test_the_weights_of_a_tree():
    """The loss of a step is divided by the sum of them: of what was not cut off."""
    views = [
        View("answer", [1, 2, 3, 4, 5], 2, 0.5),
        View("text", [1, 2, 9], 1, 1.0),
        View("reset", [1, 2, 3, 8], 3, 0.1),
    ]
    for max_length, expected in (
        (9, 3 * 0.5 + 2 * 1.0 + 0.1),
        (4, 2 * 0.5 + 2 + 0.1),
        (3, 0.5 + 2),
        (2, 1.0),
    ):
        tree = view_tree(views, max_length)
        assert tree.divisor == pytest.approx(sum(tree.target_weight)) == pytest.approx(expected)
        for s, weight in zip(tree.target_sequence, tree.target_weight, strict=True):
            assert weight == views[s].weight
    kinds = {"elicit": 0.25, "discourage": 3.0, "restart": 1.5, "baseline": 9.0}
    pairs = dpo_pairs(ROWS[0], 3, 2, TOK, restart="all")
    assert pair_tree(pairs, kinds, 200).divisor == 0.25 + 3.0 + 1.5
    assert pair_tree(pairs[:1], kinds, 200).divisor == 3.0


def test_where_an_nll_term_may_fall():
    """On the chosen answer, but on the unsafe prefix never, and on no rejected one."""
    pairs = [Pair("elicit", [1, 2], [3, 4, 9, 5, 6], [3, 4, 7, 6], nll_from=2)]
    pairs += [Pair("discourage", [1, 2], [5, 6], [5, 9, 3, 6], nll_from=0)]
    kinds = {"elicit": 1.0, "discourage": 1.0}
    for max_length, expected in (
        (99, [[0, 0, 1, 1, 1], [0, 0, 0, 0], [1, 1], [0, 0, 0, 0]]),
        (5, [[0, 0, 1], [0, 0, 0], [1, 1], [0, 0, 0]]),
    ):
        tree = pair_tree(pairs, kinds, max_length)
        assert tree.names == ["elicit", "elicit", "discourage", "discourage"]
        found = [[], [], [], []]
        for s, weight in zip(tree.target_sequence, tree.target_weight, strict=True):
            found[s].append(weight)
        assert found == expected


# ── Lanes ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(60))
def test_lanes(seed):
    """Every tree once; no lane over 1.5 times the longest; never more area than a lane for each tree."""
    rng = random.Random(seed)
    longest = rng.choice((1, 2, 10, 300))
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 12))]
    lanes = share_lanes(lengths)
    assert sorted(i for lane in lanes for i in lane) == list(range(len(lengths)))
    assert all(lanes)
    width = max(sum(lengths[i] for i in lane) for lane in lanes)
    assert width <= 1.5 * max(lengths)
    assert len(lanes) * width <= len(lengths) * max(lengths)


def test_lanes_are_shared_where_that_saves():
    assert len(share_lanes([10, 5, 5])) == 2  # 20 instead of 30
    assert len(share_lanes([10, 4, 4, 4, 4])) == 2  # 28 instead of 50
    assert len(share_lanes([10, 2, 2])) == 1  # 14 instead of 30
    assert len(share_lanes([10, 10, 10])) == 3  # no room
    assert len(share_lanes([7])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_trees_does_not_matter(seed):
    """A tree's log-probs are its own, whatever lies beside it and wherever it lies."""
    network, scene = network_of(GEMMA, vocab_size=V), SCENES["sft, shared lanes"]()
    alone = {id(t): train.logprobs(network, make_batch([t])) for t in scene.trees}
    trees = random.Random(seed).sample(scene.trees, len(scene.trees))
    values = train.logprobs(network, make_batch(trees)).split([len(t.target_node) for t in trees])
    for tree, some in zip(trees, values, strict=True):
        torch.testing.assert_close(some, alone[id(tree)], atol=1e-5, rtol=1e-5)


# ── Every k at once ───────────────────────────────────────────────────────────────────────────────


def test_every_reset_is_the_expectation_over_k(network):
    """The mean over k of −log π([RESET] | x ⊕ prefix_k(y−)), each k a sequence by itself; y+ after the one drawn."""
    for some in (ROWS[0], ROWS[1], ROWS[5], ALIKE[4], row(2, 1, 1)):
        x, bad, answer = some.prompt, some.rejected, [*some.chosen, EOS]
        for k in (1, len(bad)):
            views = sft_views(some, k, TOK, resets="every")
            batch = make_batch([view_tree(views, 200)])
            loss = train.sft_loss(train.logprobs(network, batch), batch.weight)

            def nll(before, tokens):
                logits = network(torch.tensor([before + tokens]))[0].log_softmax(dim=-1)
                return -sum(logits[len(before) + t - 1, token] for t, token in enumerate(tokens))

            resets = [nll(x + bad[:j], [RESET]) for j in range(1, len(bad) + 1)]
            expected = 0.5 * sum(resets) / len(bad)
            expected = expected + 0.5 * nll(x, answer) + 0.5 * nll(x + bad[:k] + [RESET], answer)
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
            close(gradients(network, loss), gradients(network, expected), atol=2e-5)
            # The same weight in all as the paper's view, and no node more than y− and that view have anyway.
            assert batch.weight.sum().item() == pytest.approx(0.5 * (2 * len(answer) + 1))
            sequences = [x + answer, x + bad[:k] + [RESET] + answer, x + bad + [0]]
            assert len(views) == 2 + len(bad)
            assert len(view_tree(views, 200)) == len(prefixes(sequences))
