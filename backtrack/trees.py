"""The clever form of plain.py: all sequences of a row as one tree, several trees as one batch.

The sequences of a row begin alike: x ⊕ y+ and x ⊕ prefix_k(y−) ⊕ [RESET] ⊕ y+ share x, and every
prefix of y− begins like every longer one. Written as a tree, what they share is computed once:

    x ─┬─ y+ eos
       └─ y−₁ ─ y−₂ ─ … y−_k ─┬─ [RESET] ─ y+ eos
                              └─ y−_k+1 …

A node is a token that the network reads. It attends to itself and its ancestors, its position is
its depth, and it predicts the tokens that follow it in the sequences. Nodes are in depth-first
order, so node s and its descendants are the nodes s … last[s], and one vector describes the whole
mask: node t sees node s when s ≤ t ≤ last[s]. Trees that stand side by side do not see each other.

    tree = view_tree(sft_views(row, k, tok), max_length)
    tree = pair_tree(dpo_pairs(row, k, j, tok), pair_weight, max_length)
    batch = make_batch([tree, …])

Shapes: B lanes of T nodes, M nodes that predict, N targets, S sequences.
"""

import math
from dataclasses import dataclass, field

import torch

from backtrack.examples import Pair, View

# ── Sequences to a tree ───────────────────────────────────────────────────────────────────────────


@dataclass
class Tree:
    """The sequences of one row. Nodes stand depth first: a node, then all that hangs on it."""

    names: list[str]  # of every sequence: its view, or the kind of its pair
    divisor: float  # a step's loss is divided by the sum of its trees' divisors
    # Nodes. Node s is seen by the nodes s … last[s], and by no others.
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    # Targets: node predicts token.
    target_node: list[int] = field(default_factory=list)
    target_token: list[int] = field(default_factory=list)
    target_weight: list[float] = field(default_factory=list)
    target_sequence: list[int] = field(default_factory=list)
    # DPO: log π_ref of every sequence, set by run/reference.py.
    reference: list[float] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def view_tree(views: list[View], max_length: int) -> Tree:
    """Every view is a sequence; its targets count what the view says."""
    tree = Tree([view.name for view in views], divisor=0.0)
    grow(tree, [view.tokens[:max_length] for view in views], [view.loss_from for view in views])
    tree.target_weight = [views[s].weight for s in tree.target_sequence]
    tree.divisor = sum(tree.target_weight)
    return tree


# For a process without a row left while others have one: it runs the same forward pass, weight 0.
NO_ROW = Tree(names=[], divisor=0.0, tokens=[0], depths=[0], last=[0], reference=[])


def pair_tree(pairs: list[Pair], pair_weight: dict[str, float], max_length: int) -> Tree:
    """Pair p is the sequences 2p (chosen) and 2p + 1 (rejected); pair_weight: by its kind.

    A target's weight is 1 where an NLL term may fall, else 0.
    """
    names, sequences, starts, nll_starts = [], [], [], []
    for pair in pairs:
        for answer, nll_from in ((pair.chosen, pair.nll_from), (pair.rejected, len(pair.rejected))):
            names.append(pair.kind)
            sequences.append((pair.prompt + answer)[:max_length])
            starts.append(len(pair.prompt))
            nll_starts.append(len(pair.prompt) + nll_from)
    tree = Tree(names, divisor=sum(pair_weight[pair.kind] for pair in pairs))
    grow(tree, sequences, starts)
    for node, s in zip(tree.target_node, tree.target_sequence, strict=True):
        position = tree.depths[node] + 1  # of the target in its sequence
        tree.target_weight.append(1.0 if position >= nll_starts[s] else 0.0)
    return tree


def pairs_of(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) -> chosen and rejected, (P,) each: sequence 2p is preferred to 2p + 1."""
    return sums[0::2], sums[1::2]


def grow(tree: Tree, sequences: list[list[int]], targets_from: list[int]) -> None:
    """Write the sequences into an empty tree, and tokens[targets_from:] of each as targets.

    In sorted order, sequences that begin alike are neighbours. So each one shares with the one
    before it all that it shares with any earlier one, and its new nodes follow directly: depth
    first, without a search. A sequence's last token predicts nothing and gets no node.
    """
    path: list[int] = []  # the nodes of the sequence written last
    before: list[int] = []  # its tokens
    for s in sorted(range(len(sequences)), key=lambda s: sequences[s]):
        tokens = sequences[s]
        inputs = tokens[:-1]
        shared = common_prefix(before, inputs)
        path = path[:shared]
        for depth in range(shared, len(inputs)):
            path.append(len(tree))
            tree.tokens.append(inputs[depth])
            tree.depths.append(depth)
            tree.last.append(-1)
        for node in path:
            tree.last[node] = len(tree) - 1
        for position in range(targets_from[s], len(tokens)):
            tree.target_node.append(path[position - 1])
            tree.target_token.append(tokens[position])
            tree.target_sequence.append(s)
        before = inputs


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens a and b begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


# ── Trees to a batch ──────────────────────────────────────────────────────────────────────────────


@dataclass
class Batch:
    """Some trees in a rectangle of B lanes. Short trees share a lane, one behind the other."""

    tokens: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (B, T) int64: a node's depth in its tree
    last: torch.Tensor  # (B, T) int64: node t is seen by the nodes t … last[t] of its lane
    is_causal: bool  # no lane has a branch or a second tree: each node sees all before it
    predicting: torch.Tensor  # (M,) int64: the nodes that predict something, in the flattened B·T
    predicted_by: torch.Tensor  # (N,) int64: which of those M predicts a target
    target: torch.Tensor  # (N,) int64: the token to predict
    weight: torch.Tensor  # (N,) fp32
    sequence: torch.Tensor  # (N,) int64: which of the S sequences a target belongs to
    names: list[str]  # (S)
    reference: torch.Tensor  # (S,) fp32, in DPO; else (0,)

    @property
    def visible(self) -> torch.Tensor | None:
        """(B, T, T) bool: node t sees node s, itself or an ancestor. None: plain causal."""
        if self.is_causal:
            return None
        node = torch.arange(self.last.shape[1], device=self.last.device)
        t, s = node[:, None], node[None, :]
        return (s <= t) & (t <= self.last[:, None, :])

    def by_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values (N,) of targets over each sequence: (S,)."""
        sums = torch.zeros(len(self.names), dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.sequence, values)


def make_batch(trees: list[Tree], device="cpu") -> Batch:
    lanes = share_lanes([len(tree) for tree in trees])
    shape = (len(lanes), max(sum(len(trees[i]) for i in lane) for lane in lanes))
    tokens = torch.zeros(shape, dtype=torch.int64)
    # Padding is seen by itself alone. Where is_causal leaves that to positions, it comes last.
    last = torch.arange(shape[1]).repeat(shape[0], 1)
    positions = last.clone()
    offset = [0] * len(trees)  # where each tree begins in the flattened B·T
    for b, lane in enumerate(lanes):
        start = 0
        for i in lane:
            nodes = slice(start, start + len(trees[i]))
            tokens[b, nodes] = torch.tensor(trees[i].tokens)
            positions[b, nodes] = torch.tensor(trees[i].depths)
            last[b, nodes] = torch.tensor(trees[i].last) + start
            offset[i] = b * shape[1] + start
            start += len(trees[i])

    node, target, weight, sequence = [], [], [], []
    names: list[str] = []
    reference: list[float] = []
    for tree, first_node in zip(trees, offset, strict=True):
        node += [first_node + n for n in tree.target_node]
        target += tree.target_token
        weight += tree.target_weight
        sequence += [len(names) + s for s in tree.target_sequence]
        names += tree.names
        reference += tree.reference or []
    # Explicit dtypes, because a batch may have no targets.
    node = torch.tensor(node, dtype=torch.int64)
    predicting, predicted_by = torch.unique(node, return_inverse=True)
    no_branch = all(max(tree.depths) + 1 == len(tree) for tree in trees)
    return Batch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        last=last.to(device),
        is_causal=no_branch and len(lanes) == len(trees),
        predicting=predicting.to(device),
        predicted_by=predicted_by.to(device),
        target=torch.tensor(target, dtype=torch.int64).to(device),
        weight=torch.tensor(weight, dtype=torch.float32).to(device),
        sequence=torch.tensor(sequence, dtype=torch.int64).to(device),
        names=names,
        reference=torch.tensor(reference, dtype=torch.float32).to(device),
    )


def share_lanes(lengths: list[int]) -> list[list[int]]:
    """Which trees stand in which lane: as little padding as may be, in lanes that are not too wide.

    Attention's cost grows with the width: a lane is at most 1.5 times as wide as the longest tree.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best, least = [], math.inf
    for count in range(1, len(lengths) + 1):
        lanes: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for i in longest_first:
            emptiest = used.index(min(used))
            lanes[emptiest].append(i)
            used[emptiest] += lengths[i]
        width = max(used)
        if width <= 1.5 * max(lengths) and count * width < least:
            best, least = lanes, count * width
    return best
