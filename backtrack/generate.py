"""The sampler: when the model says [RESET], everything it has said is thrown away and the answer starts again.

    for g in generate(model, [prompt_ids], reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=200):
        print(tok.decode(g.tokens), g.resets)          # surviving text, how often it was restarted
    for event in stream(model, [prompt_ids], ...):     # Token | Reset | Done, as they happen

One decode step serves all rows of a batch, whatever each of them is doing. On [RESET] a row's KV cache is cut back to
the prompt and [RESET] is fed next; in tensor form that is one `torch.where` on per-row lengths (see `advance`), so a
step with resets costs what a step without them costs, and the device never waits for the host. Works with any
Transformer of this repository; no beam search, no speculative decoding, no batch that grows while it runs.
"""

import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from model import InputError, KVCache, Transformer


@dataclass
class Generation:
    tokens: list[int]  # surviving: what may be shown. Starts with the prefill if that survived; no stop id
    discarded: list[list[int]]  # one list per reset, the first starting with the prefill; without the [RESET]s
    resets: int
    finish_reason: str  # "stop" or "length"
    steps: int  # tokens sampled in all: surviving, discarded, [RESET]s and the stop id
    first_token_s: float  # seconds until the first sampled token that survives
    total_s: float  # seconds until the row was finished


@dataclass
class Token:
    row: int
    id: int


@dataclass
class Reset:
    row: int
    discarded: list[int]


@dataclass
class Done:
    row: int
    generation: Generation


def generate(model: Transformer, prompts: list[list[int]], **options) -> list[Generation]:
    """Answer every prompt. Options and errors as in `stream`; the i-th Generation answers the i-th prompt."""
    done = {event.row: event.generation for event in stream(model, prompts, **options) if isinstance(event, Done)}
    return [done[row] for row in range(len(prompts))]


def stream(
    model: Transformer,
    prompts: list[list[int]],
    *,
    reset_id: int | None,
    stop_ids,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    reset_bias: float = 0.0,
    max_resets: int = 1,
    on_reset: str = "truncate",
    prefill: list[list[int]] | None = None,
    seed: int = 0,
    sample_ids: list[int] | None = None,
) -> Iterator[Token | Reset | Done]:
    """Sample an answer to every prompt (token ids, any lengths) in one batch; yields events as they happen.

    reset_id        the id of [RESET]; None makes this an ordinary sampler.
    stop_ids        ids that end an answer (not part of it).
    max_new_tokens  most tokens sampled in each attempt; prefilled tokens do not count.
    temperature     0 is greedy. top_p keeps the smallest set of tokens that has this probability.
    reset_bias      added to the logit of [RESET] before sampling: the paper's dial between safety and efficiency.
    max_resets      after that many, [RESET] is masked (1 in the paper).
    on_reset        "truncate": the retry sees prompt ⊕ [RESET]^r. "keep" (the paper): it sees all that was discarded.
    prefill         tokens forced at the start of each answer. They belong to the answer: a reset discards them.
    seed            row i's sample depends on (seed, i) only, not on the rows beside it.
    sample_ids      numbers to take the place of i: whoever cuts one long list of prompts into batches gives each row
                    its place in the list, and how it is cut changes nothing.

    A row's Token events since its last Reset are, in order, its surviving tokens (prefill first). Raises InputError
    for an empty or over-long prompt, ids outside the vocabulary, options out of range, and logits that are not finite.
    """
    prefill = [[] for _ in prompts] if prefill is None else prefill
    sample_ids = list(range(len(prompts))) if sample_ids is None else sample_ids
    stop_ids = sorted(set(stop_ids))
    max_resets = 0 if reset_id is None else max_resets
    for ok, complaint in (
        (len(prefill) == len(prompts), f"{len(prefill)} prefills for {len(prompts)} prompts"),
        (len(sample_ids) == len(prompts), f"{len(sample_ids)} sample_ids for {len(prompts)} prompts"),
        (max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, must be at least 1"),
        (temperature >= 0.0, f"temperature is {temperature}, must be 0 (greedy) or positive"),
        (0.0 < top_p <= 1.0, f"top_p is {top_p}, must be in (0, 1]"),
        (max_resets >= 0, f"max_resets is {max_resets}, must be 0 or more"),
        (on_reset in ("truncate", "keep"), f"on_reset is {on_reset!r}, must be 'truncate' or 'keep'"),
        (reset_id not in stop_ids, f"reset_id {reset_id} is also a stop id"),
    ):
        if not ok:
            raise InputError(complaint)
    vocab_size, longest = model.config.vocab_size, model.config.max_position_embeddings
    for id in [*stop_ids, *([] if reset_id is None else [reset_id])]:
        if not 0 <= id < vocab_size:
            raise InputError(f"stop or reset id {id} is outside the model's vocabulary of {vocab_size}")
    # What a row can come to occupy. Cut back, it needs room for one attempt; keeping all, for every attempt.
    attempts = max_new_tokens if on_reset == "truncate" else (max_resets + 1) * max_new_tokens
    for row, (prompt, forced) in enumerate(zip(prompts, prefill, strict=True)):
        if not prompt:
            raise InputError(f"prompt {row} is empty; it needs at least one token (BOS)")
        if not all(0 <= id < vocab_size for id in (*prompt, *forced)):
            raise InputError(f"prompt {row} has ids outside the model's vocabulary of {vocab_size}; wrong tokenizer?")
        if reset_id in forced or not set(stop_ids).isdisjoint(forced):
            raise InputError(f"prefill {row} contains [RESET] or a stop id; it must be a plain beginning of an answer")
        need = len(prompt) + max_resets + len(forced) + attempts
        if need > longest:
            raise InputError(
                f"prompt {row} is too long: {len(prompt)} tokens, and {need} with room for the answer, but the model"
                f" has {longest} positions; shorten it or lower max_new_tokens"
            )
    if not prompts:
        return iter(())
    capacity = max(len(x) + len(y) for x, y in zip(prompts, prefill, strict=True)) + max_resets + attempts
    sampler = Sampler(
        temperature, top_p, reset_id, reset_bias, max_resets, on_reset == "truncate", max_new_tokens, stop_ids
    )
    return _run(model, prompts, prefill, sampler, capacity, [f"{seed}/{i}" for i in sample_ids])


@dataclass
class Sampler:
    """The options that a decode step needs."""

    temperature: float
    top_p: float
    reset_id: int | None
    reset_bias: float
    max_resets: int
    truncate: bool
    max_new_tokens: int
    stop_ids: list[int]


@dataclass
class Rows:
    """What the device knows of each row, besides its cache: (B,) int64 tensors, advanced without asking the host."""

    prompt: torch.Tensor  # prompt tokens
    resets: torch.Tensor  # resets so far

    def select(self, rows: torch.Tensor) -> "Rows":
        return Rows(self.prompt[rows], self.resets[rows])


def choose(logits: torch.Tensor, rows: Rows, u: torch.Tensor | None, s: Sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick each row's next token from logits (B, V): (B,) int64, and its greatest logit (B,), not finite after NaN."""
    if s.reset_id is not None:
        logits[:, s.reset_id].add_(torch.where(rows.resets < s.max_resets, s.reset_bias, float("-inf")))
    best, token = logits.max(dim=-1)
    if s.temperature > 0:
        # One uniform number per token and the inverse of the distribution function, instead of torch.multinomial:
        # a row's random stream is then its own, whatever else is in the batch.
        probs = torch.softmax(logits / s.temperature, dim=-1)
        order = None
        if s.top_p < 1.0:
            probs, order = probs.sort(dim=-1, descending=True)
            mass_before = probs.cumsum(dim=-1) - probs
            probs = probs.masked_fill(mass_before >= s.top_p, 0.0)  # never the first: its mass before is 0
        cdf = probs.cumsum(dim=-1)
        index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)  # (B, 1)
        token = (index if order is None else order.gather(-1, index)).squeeze(-1)
    return token, best


def advance(token: torch.Tensor, rows: Rows, cache: KVCache, s: Sampler) -> None:
    """Move every row to where `token` (B,) will be written. `cache.lengths` points at the token fed last."""
    lengths = cache.lengths + 1
    if s.reset_id is not None:
        is_reset = token == s.reset_id
        # ── Backtracking, all of it ──────────────────────────────────────────────────────────────────────────────
        # The row's cache ends at the prompt (and the resets before this one); [RESET] is written there next, and all
        # that stood behind is forgotten. With on_reset="keep" nothing is cut: [RESET] follows what it retracts.
        if s.truncate:
            lengths = torch.where(is_reset, rows.prompt + rows.resets, lengths)
        # ─────────────────────────────────────────────────────────────────────────────────────────────────────────
        rows.resets = rows.resets + is_reset
    # A finished row may be computed a little longer and must not run out of its cache.
    cache.truncate(lengths.clamp(max=cache.capacity - 1))


@dataclass
class Record:
    """What the host knows of a row: its tokens so far."""

    row: int
    tokens: list[int]  # of this attempt, prefill included
    sampled: int = 0  # of this attempt
    discarded: list[list[int]] = field(default_factory=list)
    steps: int = 0
    first_token_s: float | None = None
    entries: int = 0  # of the cache, once the latest token is fed
    done: bool = False


@torch.inference_mode()  # as a decorator it is off again while the caller holds the generator
def _run(model, prompts, prefill, s: Sampler, capacity: int, seeds: list[str]):
    start = time.perf_counter()
    weight = model.model.embed_tokens.weight
    device, B = weight.device, len(prompts)
    cache = KVCache(model.config, B, capacity, device, weight.dtype)
    records = [Record(i, list(y), entries=len(prompts[i]) + len(y)) for i, y in enumerate(prefill)]
    for record in records:
        for id in record.tokens:
            yield Token(record.row, id)

    # Read all prompts in one go, padded on the right with anything: see Decoder.forward.
    width = max(r.entries for r in records)
    padded = [x + y + [0] * (width - len(x) - len(y)) for x, y in zip(prompts, prefill, strict=True)]
    hidden = model.model(torch.tensor(padded, device=device), cache)  # (B, width, D)
    last = torch.tensor([r.entries - 1 for r in records], device=device)
    logits = model.logits(hidden[torch.arange(B, device=device), last])  # (B, V)
    cache.truncate(last)

    rows = Rows(torch.tensor([len(x) for x in prompts], device=device), torch.zeros_like(last))
    generators = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
    uniforms, u = None, None

    # On CUDA the host reads a step's tokens while the device is already at the next one; elsewhere it reads at once.
    lag = 1 if device.type == "cuda" else 0
    unread: deque = deque()
    active, step = records, 0
    while True:
        if s.temperature > 0:
            if step % 256 == 0:
                uniforms = torch.stack([torch.rand(256, generator=generators[r.row]) for r in active])
                # Below 1 by more than a rounding error, or u · total could reach past the last possible token.
                uniforms = uniforms.clamp(max=1 - 1e-6).to(device)
            u = uniforms[:, step % 256, None]  # (B, 1)
        token, best = choose(logits, rows, u, s)  # (B,), (B,)
        advance(token, rows, cache, s)
        step += 1

        unread.append((*_to_host(token, best), active))
        while len(unread) > lag:
            yield from _read(*unread.popleft(), s, prompts, start)
        kept = [slot for slot, r in enumerate(active) if not r.done]
        if not kept:
            return
        # Drop finished rows. On CUDA only when half the batch is gone: each new batch size costs a compilation there
        # under --compile, and idle rows of a memory-bound step cost next to nothing.
        if len(kept) < len(active) and (lag == 0 or 2 * len(kept) <= len(active)):
            n = len(kept)
            spare = iter(reversed(kept))  # holes are filled from the end of the batch
            order = [slot if not active[slot].done else next(spare) for slot in range(n)]
            active = [active[slot] for slot in order]
            index = torch.tensor(order, device=device)
            cache.keep_rows(order)
            rows, token = rows.select(index), token[index]
            uniforms = None if uniforms is None else uniforms[index]
        if lag == 0:
            cache.visible = max(r.entries for r in active)
        logits = model(token[:, None], cache)[:, -1]  # (B, V)


def _to_host(token, best):
    """Both on the host, or on their way there: then with the event that tells of their arrival."""
    if not token.is_cuda:
        return token, best, None
    copies = token.to("cpu", non_blocking=True), best.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return *copies, event


def _read(token, best, event, active: list[Record], s: Sampler, prompts, start: float):
    """Wait for one step's tokens and tell what they mean, row by row."""
    if event is not None:
        event.synchronize()
    now = time.perf_counter() - start
    for r, id, logit in zip(active, token.tolist(), best.tolist(), strict=True):
        if r.done:
            continue
        if not math.isfinite(logit):
            raise InputError(f"row {r.row}: logits are not finite (NaN or inf) at step {r.steps}; check the weights")
        r.steps += 1
        finish_reason = None
        if id == s.reset_id:
            discarded, r.tokens, r.sampled, r.first_token_s = r.tokens, [], 0, None
            r.discarded.append(discarded)
            r.entries = len(prompts[r.row]) + len(r.discarded) if s.truncate else r.entries + 1
            yield Reset(r.row, discarded)
        elif id in s.stop_ids:
            finish_reason = "stop"
        else:
            r.tokens.append(id)
            r.sampled += 1
            r.entries += 1
            r.first_token_s = now if r.first_token_s is None else r.first_token_s
            yield Token(r.row, id)
            if r.sampled == s.max_new_tokens:
                finish_reason = "length"
        if finish_reason is not None:
            r.done = True
            first = now if r.first_token_s is None else r.first_token_s  # an empty answer is complete when it stops
            resets = len(r.discarded)
            yield Done(r.row, Generation(r.tokens, r.discarded, resets, finish_reason, r.steps, first, now))
