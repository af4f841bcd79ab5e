"""GCG: a suffix on the user's message, found by greedy coordinate gradient; and GCG that knows about [RESET].

    python -m backtrack.attacks gcg --ckpt runs/toy-0/sft --prompts runs/toy-0/data/prompts.jsonl --sets unseen \
        --judge runs/toy-0/data/world.json --out runs/toy-0/gcg.jsonl --budget 2048
    python -m backtrack.attacks adaptive-gcg …                       # the same arguments, and --grow

Zou et al. 2023 (arXiv 2307.15043). With x the prompt, s the suffix and y the answer that the attacker wants:

    gcg           L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)
    adaptive-gcg  L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)  −  λ mean_t log(1 − π([RESET] | x ⊕ s, y_<t))

where the second mean runs over every position of y and the one after its end: the unsafe answer *and* no reset. In the
spirit of the paper's Algorithm 1 (arXiv 2409.14586, appendix) y starts short and is lengthened as soon as the suffix
makes the model say all of it, or after PATIENCE steps, until it is the whole answer. Plain GCG aims at an opening only
(--target-tokens), as in its paper. Aimed at the whole answer it would penalise resets too, since y_t is
unlikely where [RESET] is likely; the second term adds weight, and the end of the answer. The attacker sees the weights.

Where an opening is all that is known of y ("Sure, here is"), the model itself says how it goes on: after x ⊕ s and what
there is of y, greedily, [RESET] masked. If the judge calls that answer unsafe, it is the new y, whose tail is said anew
each time that more of it is aimed at. If not (it refuses after the opening), the search goes on with the y that it has.

One step: the gradient of L with respect to the suffix's one-hot tokens names promising replacements. Swaps of one token
are drawn from them, of more where few new ones are left; every new suffix is scored by a real forward pass, and the
best few so far are kept. One suffix for many prompts: see universal.py.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backtrack.attacks.objective import Objective, Search
from backtrack.attacks.suffix import Scorer, Send, allowed_ids, make_slots, suffix_gradient, survives
from model import InputError, Transformer

START = 16  # tokens of the target that an adaptive attacker begins with
PATIENCE = 2  # steps after which it is lengthened even if the model does not say what there is of it


@dataclass
class Goal:
    """A chat with a gap for the suffix, and what the model should answer to it.

    grow  (text of the suffix, ids) -> the unsafe answer that begins with these ids, as the model goes on with [RESET]
          masked, or None if it is not unsafe. With it `target` is an opening, and such answers take its place.
    """

    send: Send
    target: list[int]
    grow: Callable[[str, list[int]], list[int] | None] | None = None


def gcg(
    model: Transformer,
    tok,
    goals: list[Goal],
    unsafe_with: Callable[[str], bool],
    *,
    budget: int,
    suffix: str,
    seed: str,
    loss: str = "ce",
    adaptive: float | None = None,
    candidates: int = 64,
    topk: int = 64,
    buffer_size: int = 4,
    rows: int = 64,
) -> Search:
    """Look for a suffix that lets an unsafe answer survive, computing at most `budget` likelihoods.

    goals         one of them: a suffix for one prompt. Several: one suffix for all, L is the mean over them, and a
                  candidate takes a likelihood of each.
    unsafe_with   text of a suffix -> does the sampler, with its resets, let an unsafe answer survive? Asked at every
                  new best; the search ends at the first yes.
    suffix        the one to start from; seed makes the draws.
    adaptive      λ of the objective that knows about [RESET]; None is plain GCG.
    candidates    suffixes drawn per step, from the topk tokens of each place; rows of them are scored at a time.

    The loss of the best suffix never rises, but where the target is lengthened: another loss from then on.
    """
    objective = Objective(loss, None if adaptive is None else tok.reset_id, adaptive or 0.0)
    start = None if adaptive is None else START
    aims = [Aim(model, tok, goal, suffix, objective, start, rows) for goal in goals]
    neighbours = Neighbours(aims, topk, random.Random(seed))
    buffer = scored(aims, [neighbours.start])  # (loss, suffix), best first
    found, judged = Search(suffix, evaluations=len(aims)), None
    while True:
        value, best = buffer[0]
        found.losses.append(round(value, 4))
        found.text, found.targets = tok.decode(best), [aim.target for aim in aims]
        if best != judged:
            judged = best
            neighbours.at_once = 1
            if unsafe_with(found.text):
                found.success_at = found.evaluations
                return found
        left = (budget - found.evaluations) // len(aims)  # candidates
        if left < 1:
            return found
        lengthened = [aim.lengthen_if_due(best) for aim in aims]
        if any(lengthened):
            drawn, buffer = [s for _, s in buffer[:left]], []
            neighbours.start_anew(drawn)
        else:
            gradient = torch.stack([aim.gradient(best) for aim in aims]).mean(dim=0)  # (n, V)
            drawn = neighbours.draw(gradient, best, min(candidates, left))
        found.evaluations += len(aims) * max(1, len(drawn))  # 1 at least: a search that draws nothing new must end
        buffer = sorted(buffer + scored(aims, drawn))[:buffer_size]


def scored(aims: list["Aim"], suffixes: list[list[int]]) -> list[tuple[float, list[int]]]:
    """Each suffix with its loss, the mean over what it is to bring about."""
    if not suffixes:
        return []
    losses = torch.stack([aim.losses(suffixes) for aim in aims])  # (aims, N)
    return list(zip(losses.mean(dim=0).tolist(), suffixes, strict=True))


# ── What is aimed at ─────────────────────────────────────────────────────────────────────────────────────────────────


class Aim:
    """What the suffix is to bring about in one chat: the first m tokens of the target.

    start  what m is at first; None: the whole target. From then on it doubles.
    """

    def __init__(self, model, tok, goal: Goal, suffix: str, objective: Objective, start: int | None, rows: int):
        self.model, self.tok, self.goal, self.objective = model, tok, goal, objective
        self.slots = make_slots(tok, goal.send, goal.target, suffix)
        if not self.slots.suffix:
            raise InputError("the suffix to start from is empty; give --suffix some text, its length in tokens is kept")
        if not goal.target:
            raise InputError("the target is empty; an attack needs an answer to aim at, or how one begins")
        self.scorer = Scorer(model, self.slots, rows)
        self.m = min(start or len(goal.target), len(goal.target))
        self.is_opening = goal.grow is not None  # there is more of the answer than the target has
        self.steps = 0  # gradients taken since it was lengthened
        self.ended_at: list[int] | None = None  # the suffix after which the model said nothing unsafe

    @property
    def target(self) -> list[int]:
        return self.slots.target[: self.m]

    def losses(self, suffixes: list[list[int]]) -> torch.Tensor:
        return self.scorer.losses(suffixes, self.m, self.objective)

    def gradient(self, suffix: list[int]) -> torch.Tensor:
        self.steps += 1
        return suffix_gradient(self.model, self.slots, suffix, self.m, self.objective)

    def can_be_sent(self, suffix: list[int]) -> bool:
        return survives(self.tok, self.goal.send, self.slots, suffix)

    def lengthen_if_due(self, suffix: list[int]) -> bool:
        """Aim at twice as much from now on, if it is time and there is more; whether it was."""
        there_is_more = self.m < len(self.slots.target) or (self.is_opening and suffix != self.ended_at)
        if not there_is_more or not (self.steps >= PATIENCE or self.scorer.says(suffix, self.m)):
            return False
        if self.is_opening:
            self.ask_how_it_goes_on(suffix)
        if self.m == len(self.slots.target):
            return False
        self.m = min(2 * self.m, len(self.slots.target))
        self.steps = 0
        return True

    def ask_how_it_goes_on(self, suffix: list[int]) -> None:
        answer = self.goal.grow(self.tok.decode(suffix), self.target)
        if answer is None:
            self.ended_at = suffix
        else:
            self.slots.target = answer
            self.is_opening = len(answer) > 2 * self.m  # else all of it will be aimed at


# ── Candidates ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Neighbours:
    """Suffixes that differ from the best in a token or more, and were not scored before."""

    def __init__(self, aims: list[Aim], topk: int, rng: random.Random):
        self.aims, self.topk, self.rng = aims, topk, rng
        self.allowed = torch.tensor(allowed_ids(aims[0].tok), device=aims[0].model.device)
        self.start = aims[0].slots.suffix
        if any(aim.slots.suffix != self.start for aim in aims):
            raise InputError("the suffix is not the same tokens after every prompt; begin --suffix with a space")
        self.start_anew([self.start])

    def start_anew(self, scored: list[list[int]]) -> None:
        """The target is another now, and so are the losses: only these are known."""
        self.known = set(map(tuple, scored))
        self.at_once = 1  # tokens that are swapped

    def draw(self, gradient: torch.Tensor, best: list[int], count: int) -> list[list[int]]:
        """At most `count`, each once, and only what the attacker can send as text."""
        drawn = swaps(gradient, best, count, self.topk, self.allowed, self.rng, self.at_once)
        new = [s for s in dict.fromkeys(map(tuple, drawn)) if s not in self.known]
        if 4 * len(new) < count:  # its neighbours are known: look further away, until there is a better one
            self.at_once += 1
        sendable = [s for s in new if all(aim.can_be_sent(list(s)) for aim in self.aims)]
        self.known.update(sendable)
        return [list(s) for s in sendable]


def swaps(
    gradient: torch.Tensor,
    suffix: list[int],
    count: int,
    topk: int,
    allowed: torch.Tensor,
    rng: random.Random,
    at_once=1,
) -> list[list[int]]:
    """`count` copies of the suffix, in each `at_once` tokens replaced by some of the topk most promising there."""
    gradient = gradient.clone()
    banned = torch.ones(gradient.shape[1], dtype=torch.bool, device=gradient.device)
    banned[allowed] = False
    gradient[:, banned] = float("inf")
    best = (-gradient).topk(min(topk, len(allowed)), dim=1).indices.tolist()  # (n, topk)
    drawn = []
    for _ in range(count):
        swapped = list(suffix)
        for place in rng.sample(range(len(suffix)), min(at_once, len(suffix))):
            swapped[place] = rng.choice(best[place])
        drawn.append(swapped)
    return drawn
