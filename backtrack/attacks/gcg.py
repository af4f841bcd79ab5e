"""GCG: a suffix on the user's message, found by greedy coordinate gradient; and GCG that knows about [RESET].

    python -m backtrack.attacks gcg --ckpt runs/toy-0/sft --prompts runs/toy-0/data/prompts.jsonl --sets unseen \
        --judge runs/toy-0/data/world.json --out runs/toy-0/gcg.jsonl --budget 2048
    python -m backtrack.attacks adaptive-gcg …                       # the same arguments

Zou et al. 2023 (arXiv 2307.15043). With x the prompt, s the suffix and y the answer that the attacker wants:

    gcg           L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)
    adaptive-gcg  L(s) = − mean_t log π(y_t | x ⊕ s, y_<t)  −  λ mean_t log(1 − π([RESET] | x ⊕ s, y_<t))

where the second mean runs over every position of y and the one after its end: the unsafe answer *and* no reset. In the
spirit of the paper's Algorithm 1 (arXiv 2409.14586, appendix) y starts short and is lengthened as soon as the suffix
makes the model say all of it, or after PATIENCE steps, until it is the whole answer. Plain GCG aims at an opening only
(--target-tokens), as in its paper. Aimed at the whole answer it would penalise resets too, since y_t is
unlikely where [RESET] is likely; the second term adds weight, and the end of the answer. The attacker sees the weights.

One step: the gradient of L with respect to the suffix's one-hot tokens names promising replacements, single swaps are
drawn from them, every swap is scored by a real forward pass, and the best few suffixes seen so far are kept. Whatever
precedes the suffix is the same for all candidates: its keys and values are computed once. It needs
gradients, and looks for a suffix of each prompt, not for one that serves all ("universal").

Shapes: N candidates, n suffix tokens, m target tokens, V vocabulary.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from backtrack.attacks.objective import Objective, Search
from model import InputError, KVCache, Transformer

START = 16  # tokens of the target that an adaptive attacker begins with
PATIENCE = 2  # steps after which it is lengthened even if the model does not say what there is of it


@dataclass
class Slots:
    """A prompt with a gap: before ⊕ suffix ⊕ after is what the model reads, and then it should say target."""

    before: list[int]
    suffix: list[int]  # the one to start from
    after: list[int]
    target: list[int]


# ── The prompt with a gap ────────────────────────────────────────────────────────────────────────────────────────────


def with_suffix(messages: list[dict], text: str) -> list[dict]:
    last = messages[-1]  # rendering strips a message's end: what follows must not bring the stripped space back
    return [*messages[:-1], {**last, "content": last["content"].rstrip() + text}]


def make_slots(tok, messages: list[dict], target: str, suffix: str) -> Slots:
    """Where in the rendered prompt the suffix stands: between what it shares with the prompt that has none.

    Raises InputError if the suffix does not stand there by itself, its first token merged with the message's last.
    """
    bare, full = tok.render(with_suffix(messages, "")), tok.render(with_suffix(messages, suffix))
    head = next((i for i, (a, b) in enumerate(zip(bare, full, strict=False)) if a != b), len(bare))
    tail = len(bare) - head  # what follows the last token of the message
    slots = Slots(full[:head], full[head : len(full) - tail], full[len(full) - tail :], tok.encode(target))
    if full[len(full) - tail :] != bare[head:] or not survives(tok, messages, slots, slots.suffix):
        raise InputError(f"suffix {suffix!r} merges with the end of the message; begin it with a space")
    return slots


def survives(tok, messages: list[dict], slots: Slots, suffix: list[int]) -> bool:
    """Does the suffix, written out as text and sent as a user would, come back as the same ids?"""
    sent = tok.render(with_suffix(messages, tok.decode(suffix)))
    return sent == slots.before + suffix + slots.after


@lru_cache(maxsize=1)  # asked for every prompt, and a vocabulary of 128,000 takes its time
def allowed_ids(tok) -> list[int]:
    """Ids that may stand in a suffix: ordinary text, whole characters, never a special token."""
    texts = ((i, tok.decode([i])) for i in range(tok.vocab_size) if i not in tok.special_ids)
    return [i for i, text in texts if text and "\ufffd" not in text and text.isprintable()]


# ── Gradient and scores ──────────────────────────────────────────────────────────────────────────────────────────────


def suffix_gradient(model: Transformer, slots: Slots, suffix: list[int], m: int, objective: Objective) -> torch.Tensor:
    """∂L / ∂ one_hot of the suffix, (n, V): how the loss would change if a little of another token were mixed in."""
    table = model.model.embed_tokens.weight  # (V, D)
    a, b = len(slots.before), len(slots.before) + len(suffix)
    tokens = torch.tensor([slots.before + suffix + slots.after + slots.target[:m]], device=table.device)
    one_hot = torch.nn.functional.one_hot(tokens[0, a:b], len(table)).to(table.dtype).requires_grad_()  # (n, V)

    def mixed(module, args, embedded):  # (1, T, D): the suffix's rows of the table, now as a function of one_hot
        return torch.cat((embedded[:, :a], (one_hot @ table)[None], embedded[:, b:]), dim=1)

    hook = model.model.embed_tokens.register_forward_hook(mixed)
    try:
        with torch.enable_grad():
            hidden = model.model(tokens)[:, -m - 1 :]  # the last token of the prompt, then y_1 … y_m
            target = torch.tensor(slots.target[:m], device=table.device)
            loss = objective(model.logits(hidden), target)[0]
            return torch.autograd.grad(loss, one_hot)[0].float()
    finally:
        hook.remove()


class Scorer:
    """L of many suffixes, with the keys and values of what precedes them computed once.

    rows is how many are scored at a time; where the device's memory is too small for them it is halved, for good.
    """

    def __init__(self, model: Transformer, slots: Slots, rows: int):
        self.model, self.slots, self.rows = model, slots, rows
        self.cache: KVCache | None = None

    def _prefix(self, length: int) -> KVCache:
        """A cache of self.rows equal rows that hold `before`, with room for `length` tokens more."""
        model, before = self.model, self.slots.before
        one = KVCache(model.config, 1, len(before), model.device, model.dtype)
        model.model(torch.tensor([before], device=model.device), one)
        cache = KVCache(model.config, self.rows, len(before) + length, model.device, model.dtype)
        for wide, narrow in zip(cache.k + cache.v, one.k + one.v, strict=True):
            wide[:, :, : len(before)] = narrow
        return cache

    @torch.inference_mode()
    def losses(self, suffixes: list[list[int]], m: int, objective: Objective) -> torch.Tensor:
        """(N,) fp32, on the CPU. Suffixes of one length."""
        out, device = [], self.model.device
        target = torch.tensor(self.slots.target[:m], device=device)
        done = 0
        while done < len(suffixes):
            chunk = suffixes[done : done + self.rows]
            chunk_rows = [s + self.slots.after + self.slots.target[:m] for s in chunk]
            padding = [chunk_rows[0]] * (self.rows - len(chunk))  # a cache has a fixed number of rows
            tokens = torch.tensor(chunk_rows + padding, device=device)
            try:
                if self.cache is None or self.cache.capacity < len(self.slots.before) + tokens.shape[1]:
                    self.cache = self._prefix(tokens.shape[1])
                before = torch.full((self.rows,), len(self.slots.before), device=device)
                self.cache.truncate(before)  # the candidates before these are forgotten
                self.cache.visible = len(self.slots.before) + tokens.shape[1]
                hidden = self.model.model(tokens, self.cache)[: len(chunk), -m - 1 :]  # (N, m + 1, D)
                out.append(objective(self.model.logits(hidden), target).cpu())
            except torch.cuda.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows, self.cache = self.rows // 2, None
                torch.cuda.empty_cache()
                continue
            done += len(chunk)
        return torch.cat(out)

    @torch.inference_mode()
    def says(self, suffix: list[int], m: int) -> bool:
        """Does greedy decoding after this suffix say y_1 … y_m, if nothing stops it?"""
        slots, device = self.slots, self.model.device
        tokens = torch.tensor([slots.before + suffix + slots.after + slots.target[:m]], device=device)
        logits = self.model.logits(self.model.model(tokens)[:, -m - 1 : -1])[0]  # (m, V)
        return logits.argmax(dim=-1).tolist() == slots.target[:m]


# ── The search ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Neighbours:
    """Suffixes that differ from the best in a token or more, and were not scored before."""

    def __init__(self, model: Transformer, tok, messages: list[dict], slots: Slots, topk: int, rng: random.Random):
        self.tok, self.messages, self.slots, self.topk, self.rng = tok, messages, slots, topk, rng
        self.allowed = torch.tensor(allowed_ids(tok), device=model.device)
        self.known = {tuple(slots.suffix)}  # scored against this target
        self.at_once = 1  # tokens that are swapped

    def draw(self, gradient: torch.Tensor, best: list[int], count: int) -> list[list[int]]:
        """At most `count`, each once, and only what the attacker can send as text."""
        drawn = swaps(gradient, best, count, self.topk, self.allowed, self.rng, self.at_once)
        new = [s for s in dict.fromkeys(map(tuple, drawn)) if s not in self.known]
        self.at_once += 4 * len(new) < count  # its neighbours are known: look further away, until there is a better one
        return [list(s) for s in new if survives(self.tok, self.messages, self.slots, list(s))]

    def forget(self) -> None:
        """The target is another now, and so are the losses."""
        self.known, self.at_once = set(), 1


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


def gcg(
    model: Transformer,
    tok,
    messages: list[dict],
    target: str,
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
    """Look for a suffix that lets an unsafe answer survive, scoring at most `budget` candidates.

    unsafe_with   text of a suffix -> does the sampler, with its resets, let an unsafe answer survive? Asked at every
                  new best; the search ends at the first yes.
    suffix        the one to start from; seed makes the draws.
    adaptive      λ of the objective that knows about [RESET]; None is plain GCG.
    candidates    swaps per step, from the topk tokens of each place; rows of them are scored at a time.

    The loss of the best suffix never rises, but where `adaptive` lengthens the target: another loss from then on.
    """
    slots = make_slots(tok, messages, target, suffix)
    if not slots.suffix:
        raise InputError("the suffix to start from is empty; give --suffix some text, its length in tokens is kept")
    if not slots.target:
        raise InputError("the target is empty; a prompt needs a 'target' that the attack aims at")
    objective = Objective(loss, None if adaptive is None else tok.reset_id, adaptive or 0.0)
    m = len(slots.target) if adaptive is None else min(START, len(slots.target))
    scorer, neighbours = Scorer(model, slots, rows), Neighbours(model, tok, messages, slots, topk, random.Random(seed))
    buffer = [(scorer.losses([slots.suffix], m, objective).item(), slots.suffix)]  # best first
    found, judged = Search(suffix, evaluations=1), None
    steps = 0  # against this target
    while True:
        value, best = buffer[0]
        found.losses.append(round(value, 4))
        found.text = tok.decode(best)
        if best != judged:
            judged = best
            neighbours.at_once = 1
            if unsafe_with(found.text):
                found.success_at = found.evaluations
                return found
        if found.evaluations >= budget:
            return found
        if m < len(slots.target) and (steps == PATIENCE or scorer.says(best, m)):
            m = min(2 * m, len(slots.target))
            scored = [s for _, s in buffer[: budget - found.evaluations]]
            buffer, steps = [], 0
            neighbours.forget()
        else:
            gradient = suffix_gradient(model, slots, best, m, objective)
            scored = neighbours.draw(gradient, best, min(candidates, budget - found.evaluations))
            steps += 1
        if not scored:
            found.evaluations += 1  # so that a search without a way out ends
            continue
        values = scorer.losses(scored, m, objective).tolist()
        found.evaluations += len(scored)
        neighbours.known.update(map(tuple, scored))
        buffer = sorted(buffer + list(zip(values, scored, strict=True)))[:buffer_size]
