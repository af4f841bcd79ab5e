"""A suffix among the tokens of a prompt: where it stands, its loss, and the gradient of that loss.

    send = partial(with_suffix, messages)                           # text of a suffix -> the chat that is sent
    slots = make_slots(tok, send, target, " x x x x")               # before ⊕ suffix ⊕ after, then the target
    suffix_gradient(model, slots, slots.suffix, m, objective)       # (n, V)
    Scorer(model, slots, rows=64).losses(suffixes, m, objective)    # (N,)

All candidates share what precedes the suffix, so its keys and values are computed once.

Shapes: N candidates, n suffix tokens, m target tokens, V vocabulary, D width of the model, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from model import InputError, KVCache, Transformer

Send = Callable[[str], list[dict]]  # text of a suffix -> the chat that has it
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (N, m + 1, V), target (m,) -> (N,): gcg.Objective


@dataclass
class Slots:
    """A prompt with a gap: the model reads before ⊕ suffix ⊕ after, and then should say target."""

    before: list[int]
    suffix: list[int]  # the one to start from
    after: list[int]
    target: list[int]


# ── The prompt with a gap ────────────────────────────────────────────────────────────────────────────────────────────


def with_suffix(messages: list[dict], text: str, at: int = -1) -> list[dict]:
    """The chat with `text` at the end of message number `at`."""
    changed = list(messages)
    content = messages[at]["content"].rstrip()  # as rendering does: a stripped space must not come back with the text
    changed[at] = {**messages[at], "content": content + text}
    return changed


def make_slots(tok, send: Send, target: list[int], suffix: str) -> Slots:
    """Find the suffix in the rendered prompt, by comparison with the prompt that has none.

    Raises InputError if its first token merges with the message's last: then it has no place of its own.
    """
    bare, full = tok.render(send("")), tok.render(send(suffix))
    n = len(full) - len(bare)
    for head in range(len(bare), -1, -1):  # the latest position where it reads as the same text
        if bare[:head] == full[:head] and bare[head:] == full[head + n :]:
            slots = Slots(full[:head], full[head : head + n], full[head + n :], target)
            if survives(tok, send, slots, slots.suffix):
                return slots
    raise InputError(f"suffix {suffix!r} merges with the end of the message; begin it with a space")


def text_of(tok, slots: Slots, suffix: list[int]) -> str:
    """The suffix as text, as it reads after `before`: alone it loses the space before its first word in Llama 2."""
    return tok.decode(slots.before + suffix)[len(tok.decode(slots.before)) :]


def survives(tok, send: Send, slots: Slots, suffix: list[int]) -> bool:
    """Does the suffix, written out as text and sent as a user would, come back as the same ids?

    Nor does one that the template refuses, because it spells a mark such as [INST].
    """
    try:
        return tok.render(send(text_of(tok, slots, suffix))) == slots.before + suffix + slots.after
    except InputError:
        return False


@lru_cache(maxsize=1)  # asked for every prompt; a vocabulary of 128,000 takes its time
def allowed_ids(tok) -> list[int]:
    """Ids that may stand in a suffix: ordinary text, whole characters, never a special token."""
    texts = ((i, tok.decode([i])) for i in range(tok.vocab_size) if i not in tok.special_ids)
    return [i for i, text in texts if text and "\ufffd" not in text and text.isprintable()]


# ── Gradient and scores ──────────────────────────────────────────────────────────────────────────────────────────────


def suffix_gradient(model: Transformer, slots: Slots, suffix: list[int], m: int, objective: Loss) -> torch.Tensor:
    """∂L / ∂ one_hot of the suffix, (n, V) fp32: how L changes if a little of another token is mixed in."""
    table = model.model.embed_tokens.weight  # (V, D)
    a, b = len(slots.before), len(slots.before) + len(suffix)
    tokens = torch.tensor([slots.before + suffix + slots.after + slots.target[:m]], device=table.device)
    one_hot = torch.nn.functional.one_hot(tokens[0, a:b], len(table)).to(table.dtype).requires_grad_()  # (n, V)

    def mixed(module, args, embedded):  # (1, T, D): the suffix's embeddings, now as a function of one_hot
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
    """L of many suffixes, `rows` at a time; the keys and values of what precedes them are computed once."""

    def __init__(self, model: Transformer, slots: Slots, rows: int):
        self.model, self.slots, self.rows = model, slots, rows
        self.before: KVCache | None = None  # one batch row

    @torch.inference_mode()
    def losses(self, suffixes: list[list[int]], m: int, objective: Loss) -> torch.Tensor:
        """(N,) fp32, on the CPU. The suffixes have one length."""
        chunks = [suffixes[start : start + self.rows] for start in range(0, len(suffixes), self.rows)]
        return torch.cat([self._losses(chunk, m, objective).cpu() for chunk in chunks])

    def _losses(self, suffixes: list[list[int]], m: int, objective: Loss) -> torch.Tensor:
        target = self.slots.target[:m]
        tokens = torch.tensor([s + self.slots.after + target for s in suffixes], device=self.model.device)
        hidden = self.model.model(tokens, self._cache(*tokens.shape))[:, -m - 1 :]  # (N, m + 1, D)
        return objective(self.model.logits(hidden), tokens.new_tensor(target))

    def _cache(self, rows: int, length: int) -> KVCache:
        """`rows` equal batch rows that hold `before`, with room for `length` tokens more."""
        model, n = self.model, len(self.slots.before)
        if self.before is None:
            self.before = KVCache(model.config, 1, n, model.device, model.dtype)
            model.model(torch.tensor([self.slots.before], device=model.device), self.before)
        cache = KVCache(model.config, rows, n + length, model.device, model.dtype)
        for wide, narrow in zip(cache.k + cache.v, self.before.k + self.before.v, strict=True):
            wide[:, :, :n] = narrow
        cache.grow(n)
        return cache

    @torch.inference_mode()
    def says(self, suffix: list[int], m: int) -> bool:
        """Does greedy decoding after this suffix say y_1 … y_m, if nothing stops it?"""
        slots = self.slots
        tokens = torch.tensor([slots.before + suffix + slots.after + slots.target[:m]], device=self.model.device)
        logits = self.model.logits(self.model.model(tokens)[:, -m - 1 : -1])[0]  # (m, V)
        return logits.argmax(dim=-1).tolist() == slots.target[:m]
