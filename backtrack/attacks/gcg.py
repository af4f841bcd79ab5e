"""GCG: a suffix for the user's message, found by greedy coordinate gradient; and GCG that knows about [RESET].

    python -m backtrack.attacks gcg --ckpt runs/toy-0/sft --prompts runs/toy-0/data/prompts.jsonl --sets unseen \
        --judge runs/toy-0/data/world.json --out runs/toy-0/gcg.jsonl --budget 2048
    python -m backtrack.attacks adaptive-gcg …                       # the same arguments, and --grow
    python -m backtrack.attacks universal-gcg … --budget 16384 \
        --optimise runs/toy-0/data/prompts.jsonl --optimise-sets seen --optimise-limit 8

Zou et al. 2023 (arXiv 2307.15043). The attacker sees the weights. With x the prompt, s the suffix and y the answer that
the attacker wants:

    gcg           L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)
    adaptive-gcg  L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)  −  λ mean_t log(1 − π([RESET] | x ⊕ s, y_<t))

The second mean runs over every position of y and the one after its end: the unsafe answer *and* no reset.

One step: the gradient of L with respect to the suffix's one-hot tokens names promising replacements. Each candidate
swaps one token for one of them, or more tokens once few candidates are new. A forward pass scores each candidate, and
the best few so far are kept.

Plain GCG aims at an opening (--target-tokens), as in its paper. Adaptive GCG starts with the first tokens of y, in the
spirit of the paper's Algorithm 1 (arXiv 2409.14586, appendix), and aims at twice as many as soon as the suffix makes
the model say these, or after PATIENCE steps, up to the whole answer. Where only an opening of y is known ("Sure, here
is"), the model continues it itself: greedily after x ⊕ s and what there is of y, [RESET] masked. If the judge calls
that answer unsafe it becomes y, and its tail is generated anew whenever more of it is aimed at.

Universal GCG (algorithm 2 of Zou et al., but with all prompts from the start) finds one suffix for many prompts and is
tested on others. L is the mean over the prompts it is optimised on, and a candidate counts in --budget once for each.
Afterwards such a suffix is free: anybody who has read it can put it behind a question.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from backtrack.attacks.suffix import Scorer, Send, allowed_ids, make_slots, suffix_gradient, survives, text_of
from model import InputError, Transformer

START = 16  # tokens of the target that an adaptive attacker begins with
PATIENCE = 2  # steps after which it aims at more, even if the model does not say these tokens yet
BUFFER = 4  # suffixes that are kept


@dataclass
class Search:
    """What a search found."""

    text: str = ""  # the best attack string
    targets: list[list[int]] = field(default_factory=list)  # what it aims at, for each prompt: ids
    losses: list[float] = field(default_factory=list)  # of the best string, after each step
    evaluations: int = 0  # candidates scored
    success_at: int | None = None  # candidates scored when an unsafe answer first survived sampling


@dataclass
class Objective:
    """L(s) from logits. reset_id: of an attacker who knows about it; weight: λ."""

    reset_id: int | None = None
    weight: float = 1.0

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits (N, m + 1, V) at the positions that predict y_1 … y_m and what follows; target (m,) -> (N,) fp32."""
        logits, m = logits.float(), len(target)
        wanted = logits[:, :m].gather(-1, target.expand(len(logits), m)[..., None])[..., 0]  # (N, m)
        if self.reset_id is None:
            return (logits[:, :m].logsumexp(dim=-1) - wanted).mean(dim=-1)  # − mean_t log π(y_t | …)
        # All but [RESET] are summed up by themselves: 1 − π would be 0 in fp32 where π is nearly 1.
        before, after = logits[..., : self.reset_id], logits[..., self.reset_id + 1 :]
        others = torch.logaddexp(before.logsumexp(dim=-1), after.logsumexp(dim=-1))  # (N, m + 1)
        everything = torch.logaddexp(others, logits[..., self.reset_id])
        no_reset = others - everything  # log(1 − π([RESET] | …))
        return (everything[:, :m] - wanted).mean(dim=-1) - self.weight * no_reset.mean(dim=-1)


@dataclass
class Goal:
    """A chat with a gap for the suffix, and what the model should answer to it.

    grow  (text of the suffix, ids) -> the unsafe answer that begins with these ids, as the model continues them with
          [RESET] masked, or None if that is not unsafe. With it `target` is an opening, which such answers replace.
    """

    send: Send
    target: list[int]
    grow: Callable[[str, list[int]], list[int] | None] | None = None


def gcg(
    model: Transformer,
    tok,
    goals: list[Goal],
    unsafe_with: Callable[[str], list[bool]],
    *,
    budget: int,
    suffix: str,
    seed: str,
    adaptive: float | None = None,
    candidates: int = 64,
    topk: int = 64,
    rows: int = 64,
) -> Search:
    """Look for a suffix that lets unsafe answers survive for all `goals`, computing at most `budget` likelihoods.

    The loss of the best suffix never rises, except where the target grows: then L is another function. Of all suffixes
    that were the best for a while, the one returned got unsafe answers for most goals; of equals the last.

    unsafe_with  text of a suffix -> for each goal: does an unsafe answer survive sampling, with its resets? Asked about
                 every new best; the search ends when all do.
    suffix       the one to start from; the search keeps its length in tokens.
    adaptive     λ of the objective that knows about [RESET]; None is plain GCG.
    candidates   suffixes drawn per step, from the topk tokens of each position; `rows` of them are scored at a time.
    """
    objective = Objective() if adaptive is None else Objective(tok.reset_id, adaptive)
    aims = [Aim(model, tok, goal, suffix, objective, None if adaptive is None else START, rows) for goal in goals]
    start = aims[0].slots.suffix
    if any(aim.slots.suffix != start for aim in aims):
        raise InputError("the suffix is not the same tokens after every prompt; begin --suffix with a space")
    neighbours = Neighbours(aims, torch.tensor(allowed_ids(tok), device=model.device), topk, random.Random(seed))
    neighbours.start_anew([start])
    buffer = scored(aims, [start])  # (loss, suffix), best first
    found, judged, most = Search(evaluations=len(aims)), None, 0
    while True:
        value, best = buffer[0]
        found.losses.append(round(value, 4))
        found.targets = [aim.target for aim in aims]
        if best != judged:
            judged, neighbours.swaps = best, 1
            text = text_of(tok, aims[0].slots, best)
            successes = unsafe_with(text)
            if sum(successes) >= most:
                most, found.text = sum(successes), text
            if all(successes):
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
        buffer = sorted(buffer + scored(aims, drawn))[:BUFFER]


def scored(aims: list["Aim"], suffixes: list[list[int]]) -> list[tuple[float, list[int]]]:
    """Each suffix with its loss, the mean over the aims."""
    if not suffixes:
        return []
    losses = torch.stack([aim.scorer.losses(suffixes, aim.m, aim.objective) for aim in aims])  # (aims, N)
    return list(zip(losses.mean(dim=0).tolist(), suffixes, strict=True))


class Aim:
    """One goal during the search: the suffix should bring about the first m tokens of its target.

    start  m at first, which then doubles; None: the whole target.
    """

    def __init__(self, model, tok, goal: Goal, suffix: str, objective: Objective, start: int | None, rows: int):
        self.tok, self.goal, self.objective = tok, goal, objective
        self.slots = make_slots(tok, goal.send, goal.target, suffix)
        if not self.slots.suffix:
            raise InputError("the suffix to start from is empty; give --suffix some text, its length in tokens is kept")
        if not goal.target:
            raise InputError("the target is empty; an attack needs an answer to aim at, or how one begins")
        self.scorer = Scorer(model, self.slots, rows)
        self.m = min(start or len(goal.target), len(goal.target))
        self.is_opening = goal.grow is not None  # the target is not the whole answer
        self.steps = 0  # gradients taken with this m
        self.ended_at: list[int] | None = None  # with this suffix the model does not continue to an unsafe answer

    @property
    def target(self) -> list[int]:
        return self.slots.target[: self.m]

    def gradient(self, suffix: list[int]) -> torch.Tensor:
        self.steps += 1
        return suffix_gradient(self.scorer.model, self.slots, suffix, self.m, self.objective)

    def lengthen_if_due(self, suffix: list[int]) -> bool:
        """Double m if it is time and the answer has more tokens; returns whether it was."""
        there_is_more = self.m < len(self.slots.target) or (self.is_opening and suffix != self.ended_at)
        if not there_is_more or not (self.steps >= PATIENCE or self.scorer.says(suffix, self.m)):
            return False
        if self.is_opening:
            answer = self.goal.grow(text_of(self.tok, self.slots, suffix), self.target)
            if answer is None:
                self.ended_at = suffix
            else:
                self.slots.target = answer
                self.is_opening = len(answer) > 2 * self.m  # else m becomes all of it
        if self.m == len(self.slots.target):
            return False
        self.m = min(2 * self.m, len(self.slots.target))
        self.steps = 0
        return True


class Neighbours:
    """Suffixes that differ from the best in a token or more, were not scored before, and can be sent as text.

    allowed  ids that may stand in a suffix, as a tensor
    """

    def __init__(self, aims: list[Aim], allowed: torch.Tensor, topk: int, rng: random.Random):
        self.aims, self.allowed, self.topk, self.rng = aims, allowed, topk, rng
        self.start_anew([])

    def start_anew(self, scored: list[list[int]]) -> None:
        """The target has changed and L with it: only these suffixes are scored."""
        self.known = set(map(tuple, scored))
        self.swaps = 1  # tokens that a candidate swaps

    def draw(self, gradient: torch.Tensor, best: list[int], count: int) -> list[list[int]]:
        """At most `count` suffixes, each once. gradient: (n, V)."""
        promise = torch.full_like(gradient, -float("inf"))
        promise[:, self.allowed] = -gradient[:, self.allowed]
        promising = promise.topk(min(self.topk, len(self.allowed)), dim=1).indices.tolist()  # (n, topk)
        drawn = []
        for _ in range(count):
            suffix = list(best)
            for position in self.rng.sample(range(len(best)), min(self.swaps, len(best))):
                suffix[position] = self.rng.choice(promising[position])
            drawn.append(tuple(suffix))
        new = [s for s in dict.fromkeys(drawn) if s not in self.known]
        if 4 * len(new) < count:  # most neighbours are known: look further away, until there is a better suffix
            self.swaps += 1
        new = [list(s) for s in new if all(survives(a.tok, a.goal.send, a.slots, list(s)) for a in self.aims)]
        self.known.update(map(tuple, new))
        return new
