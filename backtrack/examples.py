"""Which sequences a row teaches, and where loss falls on them.

    views = sft_views(row, k, tok)         # SFT: the sequences of a row
    pairs = dpo_pairs(row, k, j, tok)      # DPO: what is better than what
    k = draw_prefix(seed, epoch, i, n)     # k ~ U{1…n}

With x the prompt, y+ chosen and y− rejected, supervised backtracking shows the model (arXiv
2409.14586, section 3):

    answer     x ⊕ y+ ⊕ eos                            loss on y+ eos          every row
    backtrack  x ⊕ prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos   loss on [RESET] y+ eos  unsafe, k ~ U{1…|y−|}

and, beyond the paper,

    reset      x ⊕ prefix_k(y−) ⊕ [RESET]              loss on [RESET]         unsafe rows, every k
    restart    x ⊕ [RESET] ⊕ y+ ⊕ eos                  loss on y+ eos          optional
    in place   x ⊕ prefix_k(y−) ⊕ y+ ⊕ eos             loss on y+ eos          control, unsafe rows
    turn       x ⊕ prefix_k(y−) ⊕ y+_1                 loss on y+_1            … every k
    safe       x ⊕ prefix_j(y+) ⊕ [RESET]              none, only measured     held-out rows

Preference pairs for DPO, chosen ≻ rejected, both given x (section 3.2):

    elicit      prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos  ≻  y− ⊕ eos                unsafe rows
    discourage  y+ ⊕ eos  ≻  prefix_j(y+) ⊕ [RESET] ⊕ y− ⊕ eos                rows with a y−
    baseline    y+ ⊕ eos  ≻  y− ⊕ eos                                         without backtracking
    restart     y+ ⊕ eos  ≻  y− ⊕ eos, both given x ⊕ [RESET]                 optional, ours

The control in place turns round without [RESET], and what has been said stays said. It is taught in
the same way: after the same prefixes, with the same weights; the first token of y+, "I" or "No",
stands where [RESET] would.

In SFT no loss ever falls on the prefix: the model must learn to leave it, not to say it. In DPO a
prefix that both sides share cancels. The restart view is what the model sees after a reset that
cuts the cache; it puts no loss on [RESET], which would teach to reset before anything is said.
"""

import random
from dataclasses import dataclass

from backtrack.rows import Row

# How much each target of a view counts. Views add up, as in the paper: a safe row counts once, an
# unsafe row twice, once for its answer and once for the way back. Plain text counts double, so that
# a little of it is enough to go on remembering.
WEIGHT = {
    "text": 1.0,
    "answer": 0.5,
    "backtrack": 0.5,
    "reset": 0.5,  # all resets of a row together
    "in place": 0.5,
    "turn": 0.5,  # as "reset"
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
    resets: str = "every",
    reset_weight: float = 1.0,
    restart: str = "none",
) -> list[View]:
    """The views of one row; k is the length of the unsafe prefix.

    method   "backtrack", "baseline" (the answer alone) or "in-place".
    resets   "drawn" (the paper): [RESET] is learned after the k tokens drawn. "every": after every
             prefix of y−, the exact expectation over k; together they count reset_weight. In place
             has no [RESET], so it learns the first token of y+ there.
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
        begun = x + row.rejected[:k]  # what the model must leave
        if method == "backtrack":
            name, each, turn, rest = "backtrack", "reset", reset, answer
        else:  # the first token of the answer turns round
            name, each, turn, rest = "in place", "turn", answer[:1], answer[1:]
        if resets == "drawn":
            views.append(View(name, begun + turn + rest, len(begun), WEIGHT[name]))
        else:
            views.append(View(name, begun + turn + rest, len(begun + turn), WEIGHT[name]))
            weight = reset_weight * WEIGHT[each]
            views += after_every_prefix(each, x, row.rejected, turn, weight)
    if method == "backtrack" and (restart == "all" or (restart == "unsafe" and row.unsafe)):
        views.append(View("restart", x + reset + answer, len(x) + 1, WEIGHT["restart"]))
    return views


def after_every_prefix(
    name: str, x: list[int], y: list[int], turn: list[int], weight: float
) -> list[View]:
    """weight · E_k[−log π(turn | x ⊕ prefix_k(y))]: instead of sampling k, a target after every
    prefix. In a tree (trees.py) each costs one more target and no more tokens."""
    views = []
    for k in range(1, len(y) + 1):
        begun = x + y[:k]
        views.append(View(name, begun + turn, len(begun), weight / len(y)))
    return views


def resets_after_safe(row: Row, tok) -> list[View]:
    """[RESET] after every prefix of y+, where it should not be said: measured, never learned."""
    if row.plain_text:
        return []
    return after_every_prefix("safe", row.prompt, row.chosen, [tok.reset_id], weight=0.0)


def dpo_pairs(
    row: Row, k: int, j: int, tok, *, method: str = "backtrack", restart: str = "none"
) -> list[Pair]:
    """The pairs of one row; k cuts y−, j cuts y+. method: "backtrack", "baseline" or "in-place"."""
    if row.rejected is None:
        return []
    x, eos = row.prompt, [tok.eos_id]
    reset = [tok.reset_id] if method == "backtrack" else []  # "in-place" turns round without it
    good, bad = row.chosen + eos, row.rejected + eos
    if method == "baseline":
        return [Pair("baseline", x, good, bad, nll_from=0)]
    pairs = [Pair("discourage", x, good, row.chosen[:j] + reset + bad, nll_from=0)]
    if row.unsafe:
        prefix = row.rejected[:k]
        pairs.append(Pair("elicit", x, prefix + reset + good, bad, nll_from=len(prefix)))
    if method == "backtrack" and (restart == "all" or (restart == "unsafe" and row.unsafe)):
        pairs.append(Pair("restart", x + reset, good, bad, nll_from=0))
    return pairs


def draw_prefix(seed: int, epoch: int, index: int, longest: int) -> int:
    """k ~ U{1..longest}, a function of (seed, epoch, row) alone: a resumed run draws the same."""
    return random.Random(f"{seed}/{epoch}/{index}").choice(range(1, max(1, longest) + 1))
