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
from dataclasses import dataclass

from backtrack.rows import Row

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
