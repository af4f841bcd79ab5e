"""From rows to what the network sees: the sequences of a row as one tree, several trees a batch.

With x the prompt, y+ chosen and y− rejected, supervised backtracking shows the model (arXiv
2409.14586, section 3):

    answer     x ⊕ y+ ⊕ eos                            loss on y+ eos          every row
    backtrack  x ⊕ prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos   loss on [RESET] y+ eos  unsafe, k ~ U{1…|y−|}
    reset      x ⊕ prefix_j(y−) ⊕ [RESET]              loss on [RESET]         unsafe, every j; ours
    safe       x ⊕ prefix_j(y+) ⊕ [RESET]              none: it is watched     held-out rows; ours
    restart    x ⊕ [RESET] ⊕ y+ ⊕ eos                  loss on y+ eos          optional; ours
    in place   x ⊕ prefix_k(y−) ⊕ y+ ⊕ eos             loss on y+ eos          the control; ours

Preference pairs for DPO, chosen over rejected, both given x (section 3.2):

    elicit      prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos  ≻  y− ⊕ eos                unsafe rows
    discourage  y+ ⊕ eos  ≻  prefix_k(y+) ⊕ [RESET] ⊕ y− ⊕ eos                rows with a y−
    restart     y+ ⊕ eos  ≻  y− ⊕ eos, both given x ⊕ [RESET]                 optional; ours
    baseline    y+ ⊕ eos  ≻  y− ⊕ eos                                         without backtracking

In supervised training no loss ever falls on the prefix: the model must learn to leave it, not to
say it. In a pair of DPO a prefix that both sides share cancels. The restart view is what the model
will see after a truncating reset; it puts no loss on [RESET], which would teach to reset out of
nothing.

These sequences begin alike, so they are written as a tree and each prefix is computed once:

    x ─┬─ y+                                           (answer)
       └─ y−_1 … y−_k ─┬─ [RESET] ─ y+                 (backtrack)
                       └─ y−_k+1 …                     (reset, elicit)

A node is a token. It sees its ancestors and itself, its position is its depth, and it predicts the
tokens that follow it.

Everything here is ids: prefixes are cut and joined in token space, never by re-encoding text.
"""

import math
import random
from dataclasses import dataclass, field

import torch

from backtrack.rows import Row
from model.errors import InputError

# ── Rows to sequences ─────────────────────────────────────────────────────────────────────────────

# What each target of a view counts. Views add up, as in the paper: a safe row counts once, an
# unsafe row twice, once for its answer and once for the way back. The resets of a row count as one
# target together. Plain text counts double, so that little of it is enough to go on remembering.
WEIGHT = {
    "text": 1.0,
    "answer": 0.5,
    "backtrack": 0.5,
    "reset": 0.5,
    "in place": 0.5,
    "restart": 0.25,
}


@dataclass
class View:
    """One sequence to train on. Loss falls on tokens[loss_from:], in every view the tail."""

    name: str
    tokens: list[int]
    loss_from: int
    weight: float  # of each target


@dataclass
class Pair:
    """One preference: x ⊕ chosen over x ⊕ rejected."""

    kind: str
    prompt: list[int]  # x
    chosen: list[int]
    rejected: list[int]
    nll_from: int  # an NLL term may fall on chosen[nll_from:]: never on an unsafe prefix


def sft_views(
    row: Row,
    k: int,
    tok,
    *,
    method: str = "backtrack",
    resets: str = "drawn",
    part: tuple[float, float] = (0.0, 1.0),
    reset_weight: float = 1.0,
    restart: str = "none",
) -> list[View]:
    """The views of one row; k is the length of the unsafe prefix.

    method   "backtrack", "baseline" (the answer alone) or "in-place".
    resets   "drawn": [RESET] is learned after the k tokens drawn. "every": after every prefix that
             ends in this part of y−, the expectation over k written out; together they count
             reset_weight.
    restart  which rows have that view: "none", "unsafe" or "all".
    """
    if row.plain_text:
        text = row.prompt + row.chosen + [tok.text_end_id]
        return [View("text", text, 1, WEIGHT["text"])]

    x, reset = row.prompt, [tok.reset_id]
    answer = row.chosen + [tok.eos_id]  # y+ ⊕ eos
    views = [View("answer", x + answer, len(x), WEIGHT["answer"])]
    if method == "baseline":
        return views
    if row.unsafe:
        prefix = row.rejected[:k]
        begun = x + prefix  # what the model must leave
        if method == "in-place":
            views.append(View("in place", begun + answer, len(begun), WEIGHT["in place"]))
        elif resets == "drawn":
            views.append(View("backtrack", begun + reset + answer, len(begun), WEIGHT["backtrack"]))
        else:
            after = begun + reset
            views.append(View("backtrack", after + answer, len(after), WEIGHT["backtrack"]))
            weight = reset_weight * WEIGHT["reset"]
            views += every_reset("reset", x, row.rejected, reset, weight, part)
    if method == "backtrack" and (restart == "all" or (restart == "unsafe" and row.unsafe)):
        views.append(View("restart", x + reset + answer, len(x) + 1, WEIGHT["restart"]))
    return views


def every_reset(
    name: str, x: list[int], y: list[int], reset: list[int], weight: float, part=(0.0, 1.0)
) -> list[View]:
    """weight · E_k[−log π([RESET] | x ⊕ prefix_k(y))] in full. As branches they cost little."""
    views, lengths = [], lengths_in(part, len(y))
    for k in lengths:
        begun = x + y[:k]
        views.append(View(name, begun + reset, len(begun), weight / len(lengths)))
    return views


def lengths_in(part: tuple[float, float], longest: int) -> range:
    """Lengths of the prefixes that end in this part of an answer: (0.5, 1.0) is its second half."""
    low, high = (math.ceil(fraction * longest) for fraction in part)
    least, most = max(1, min(low + 1, high)), max(1, high)
    return range(least, most + 1)


def resets_after_safe(row: Row, tok) -> list[View]:
    """[RESET] after every prefix of y+: to be watched, not to be learned, so it weighs nothing."""
    if row.plain_text:
        return []
    return every_reset("safe", row.prompt, row.chosen, [tok.reset_id], weight=0.0)


def dpo_pairs(
    row: Row, k_rejected: int, k_chosen: int, tok, *, method="backtrack", restart="none"
) -> list[Pair]:
    """The pairs of one row; the k are the lengths of the prefixes of y− and y+."""
    if row.rejected is None:
        return []
    x, reset, eos = row.prompt, [tok.reset_id], [tok.eos_id]
    good, bad = row.chosen + eos, row.rejected + eos
    if method == "baseline":
        return [Pair("baseline", x, good, bad, nll_from=0)]
    pairs = [Pair("discourage", x, good, row.chosen[:k_chosen] + reset + bad, nll_from=0)]
    if row.unsafe:
        prefix = row.rejected[:k_rejected]
        pairs.append(Pair("elicit", x, prefix + reset + good, bad, nll_from=len(prefix)))
    if restart == "all" or (restart == "unsafe" and row.unsafe):
        pairs.append(Pair("restart", x + reset, good, bad, nll_from=0))
    return pairs


def draw_prefix(
    seed: int, epoch: int, index: int, longest: int, part: tuple[float, float] = (0.0, 1.0)
) -> int:
    """k ~ U{1..longest}, a function of (seed, epoch, row) alone: a resumed run draws the same.

    The paper draws from the whole answer; part = (0.5, 1.0) from its second half.
    """
    return random.Random(f"{seed}/{epoch}/{index}").choice(lengths_in(part, longest))


# ── Sequences to a tree ───────────────────────────────────────────────────────────────────────────


@dataclass
class Tree:
    """The sequences of one row. Nodes stand depth first: a node, then all that hangs on it."""

    names: list[str]  # of every sequence: its view, or the kind of its pair
    weight: float  # of the row: a step's loss is divided by the sum over its rows
    # Nodes. Node i is seen by the nodes i … last[i], and by no others.
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    # Targets: node predicts token.
    target_node: list[int] = field(default_factory=list)
    target_token: list[int] = field(default_factory=list)
    target_weight: list[float] = field(default_factory=list)
    target_sequence: list[int] = field(default_factory=list)
    # DPO: log π_ref of every sequence, set by train.py.
    reference: list[float] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def view_tree(views: list[View], max_length: int) -> Tree:
    """Every view is a sequence; its targets count what the view says."""
    tree = Tree([view.name for view in views], weight=0.0)
    grow(tree, [view.tokens[:max_length] for view in views], [view.loss_from for view in views])
    tree.target_weight = [views[s].weight for s in tree.target_sequence]
    tree.weight = sum(tree.target_weight)
    return tree


def window_tree(stream: list[int], first: int, length: int) -> Tree:
    """A window of plain text, for pretraining: one sequence without branches."""
    view = View("text", stream[first : first + length], loss_from=1, weight=WEIGHT["text"])
    return view_tree([view], length)


# For a process that has no row where others have one: it computes as they do, and nothing counts.
NO_ROW = Tree(names=[], weight=0.0, tokens=[0], depths=[0], last=[0], reference=[])


def count_windows(stream: list[int], paths: list[str], length: int) -> int:
    """How many windows a stream has, whatever the offset of the first."""
    if length < 2:
        raise InputError(f"--max-length {length}: a window needs two tokens, one to predict from")
    count = len(stream) // length - 1
    if paths and count < 1:
        raise InputError(f"{paths[0]}: {len(stream)} tokens, not 2 × --max-length {length}")
    return count


def pair_tree(pairs: list[Pair], kind_weight: dict[str, float], max_length: int) -> Tree:
    """Pair p is the sequences 2p (chosen) and 2p + 1 (rejected).

    A target's weight is 1 where an NLL term may fall, else 0. The tree's is the sum over its pairs.
    """
    names, sequences, starts, nll_starts = [], [], [], []
    for pair in pairs:
        for answer, nll_from in ((pair.chosen, pair.nll_from), (pair.rejected, len(pair.rejected))):
            names.append(pair.kind)
            sequences.append((pair.prompt + answer)[:max_length])
            starts.append(len(pair.prompt))
            nll_starts.append(len(pair.prompt) + nll_from)
    tree = Tree(names, weight=sum(kind_weight[pair.kind] for pair in pairs))
    grow(tree, sequences, starts)
    for node, s in zip(tree.target_node, tree.target_sequence, strict=True):
        place = tree.depths[node] + 1  # of the target in its sequence
        tree.target_weight.append(1.0 if place >= nll_starts[s] else 0.0)
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
        for place in range(targets_from[s], len(tokens)):
            tree.target_node.append(path[place - 1])
            tree.target_token.append(tokens[place])
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
    """Some trees in the B lanes of a rectangle. S sequences in all, N targets, M places.

    Several trees share a lane, one behind the other, since no tree sees another.
    """

    tokens: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (B, T) int64: a node's depth in its tree
    last: torch.Tensor  # (B, T) int64: node t is seen by the nodes t … last[t] of its lane
    is_causal: bool  # no lane has a branch: each node sees all before it
    places: torch.Tensor  # (M,) int64 in the flattened B·T: nodes that predict something
    place: torch.Tensor  # (N,) int64: which of the places predicts a target
    target: torch.Tensor  # (N,) int64: the token it predicts
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
    # dtypes are said for the sake of a batch without targets.
    places, place = torch.unique(torch.tensor(node, dtype=torch.int64), return_inverse=True)
    no_branch = all(max(tree.depths) + 1 == len(tree) for tree in trees)
    return Batch(
        tokens=tokens.to(device),
        positions=positions.to(device),
        last=last.to(device),
        is_causal=no_branch and len(lanes) == len(trees),
        places=places.to(device),
        place=place.to(device),
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
