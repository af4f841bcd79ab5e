"""What a suffix does to a model: where it stands among the tokens, its loss, and the gradient of that.

    send = partial(with_suffix, messages)                    # the text of a suffix -> the chat that is sent
    slots = make_slots(tok, send, target, " x x x x")        # before ⊕ suffix ⊕ after, then the target
    suffix_gradient(model, slots, slots.suffix, m, objective)               # (n, V)
    Scorer(model, slots, rows=64).losses(suffixes, m, objective)            # (N,)

Whatever precedes the suffix is the same for all candidates: its keys and values are computed once.

Shapes: N candidates, n suffix tokens, m target tokens, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from backtrack.attacks.objective import Objective
from model import InputError, KVCache, Transformer

Send = Callable[[str], list[dict]]  # the text of a suffix -> the chat that has it


@dataclass
class Slots:
    """A prompt with a gap: before ⊕ suffix ⊕ after is what the model reads, and then it should say target."""

    before: list[int]
    suffix: list[int]  # the one to start from
    after: list[int]
    target: list[int]


# ── The prompt with a gap ────────────────────────────────────────────────────────────────────────────────────────────


def with_suffix(messages: list[dict], text: str, at: int = -1) -> list[dict]:
    """The chat with `text` at the end of one of its messages, usually the last."""
    changed = list(messages)
    content = messages[at]["content"].rstrip()  # as rendering does: a stripped space must not come back with the text
    changed[at] = {**messages[at], "content": content + text}
    return changed


def make_slots(tok, send: Send, target: list[int], suffix: str) -> Slots:
    """Where in the rendered prompt the suffix stands: between what it shares with the prompt that has none.

    Raises InputError if the suffix does not stand there by itself, its first token merged with the message's last.
    """
    bare, full = tok.render(send("")), tok.render(send(suffix))
    head = next((i for i, (a, b) in enumerate(zip(bare, full, strict=False)) if a != b), len(bare))
    tail = len(bare) - head  # what follows the last token of the message
    slots = Slots(full[:head], full[head : len(full) - tail], full[len(full) - tail :], target)
    if full[len(full) - tail :] != bare[head:] or not survives(tok, send, slots, slots.suffix):
        raise InputError(f"suffix {suffix!r} merges with the end of the message; begin it with a space")
    return slots


def survives(tok, send: Send, slots: Slots, suffix: list[int]) -> bool:
    """Does the suffix, written out as text and sent as a user would, come back as the same ids?"""
    return tok.render(send(tok.decode(suffix))) == slots.before + suffix + slots.after


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

    def _cache(self, rows: int, length: int) -> KVCache:
        """The first rows of self.cache, in its memory, and of what they hold `before` alone."""
        before = len(self.slots.before)
        if self.cache is None or self.cache.capacity < before + length:
            self.cache = self._prefix(length)
        cache = copy.copy(self.cache)
        cache.k, cache.v = list(cache.k), list(cache.v)  # keep_rows puts others into these lists
        cache.keep_rows(list(range(rows)))
        cache.truncate(torch.full((rows,), before, device=self.model.device))
        cache.visible = before + length
        return cache

    def _prefix(self, length: int) -> KVCache:
        """A cache of self.rows equal rows that hold `before`, with room for `length` tokens more."""
        model, before = self.model, self.slots.before
        one = KVCache(model.config, 1, len(before), model.device, model.dtype)
        model.model(torch.tensor([before], device=model.device), one)
        cache = KVCache(model.config, self.rows, len(before) + length, model.device, model.dtype)
        for wide, narrow in zip(cache.k + cache.v, one.k + one.v, strict=True):
            wide[:, :, : len(before)] = narrow
        cache.grow(len(before))
        return cache

    @torch.inference_mode()
    def losses(self, suffixes: list[list[int]], m: int, objective: Objective) -> torch.Tensor:
        """(N,) fp32, on the CPU. Suffixes of one length."""
        out, device = [], self.model.device
        target = torch.tensor(self.slots.target[:m], device=device)
        done = 0
        while done < len(suffixes):
            chunk = suffixes[done : done + self.rows]
            tokens = torch.tensor([s + self.slots.after + self.slots.target[:m] for s in chunk], device=device)
            try:
                cache = self._cache(*tokens.shape)
                hidden = self.model.model(tokens, cache)[:, -m - 1 :]  # (N, m + 1, D)
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
