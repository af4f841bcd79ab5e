"""The sampler: on [RESET] what has been said is thrown away and the answer starts again.

    answer, discarded = one_answer(model, prompt_ids, reset_id=tok.reset_id, …)      # the method
    for g in generate(model, [prompt_ids], reset_id=tok.reset_id, stop_ids=tok.stop_ids, …):
        print(tok.decode(g.tokens), g.resets)      # surviving text, how often it began again
    for event in stream(model, [prompt_ids], …):   # Token | Reset | Done, as they happen

    python -m backtrack.generate runs/toy-0/sft "Tell me how …"    # one_answer, to step through

`one_answer` is what the paper describes, for one prompt. `generate` does the same for a batch, with
temperature, prefilled answers and more resets: one decode step serves all batch rows, whatever each
of them is doing. A reset is one `torch.where` on the lengths of the cache (see `feed`), so a step
with resets costs what a step without them costs, and the device never waits for the host.

It has no beam search and no speculative decoding, and a batch does not grow while it runs.

Shapes: B batch rows, V vocabulary.
"""

import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from backtrack.sampling import Options, checked, room_for_answer
from model import InputError, KVCache, Transformer, load_model, load_tokenizer
from model.errors import run


def one_answer(
    model: Transformer,
    prompt: list[int],
    *,
    reset_id: int,
    stop_ids,
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> tuple[list[int], list[int]]:
    """Greedy, one prompt, at most one reset. Returns (answer, discarded): ids; [] if no reset."""
    cache = KVCache(model.config, 1, len(prompt) + 1 + max_new_tokens, model.device, model.dtype)
    answer, discarded = [], []
    may_reset = True
    unread = prompt
    while len(answer) < max_new_tokens:
        with torch.inference_mode():
            logits = model(torch.tensor([unread], device=model.device), cache)[0, -1]  # (V,)
            if not may_reset:
                logits[reset_id] = float("-inf")
            token = logits[:vocab_size].argmax().item()
        unread = [token]
        if token in stop_ids:
            break
        if token == reset_id:
            # Back to the prompt. [RESET] is read next, so the retry sees prompt ⊕ [RESET].
            cache.truncate(torch.tensor([len(prompt)], device=model.device))
            discarded, answer = answer, []
            may_reset = False
        else:
            answer.append(token)
    return answer, discarded


# ── The same for a batch ──────────────────────────────────────────────────────────────────────────


@dataclass
class Generation:
    tokens: list[int]  # surviving: what may be shown. The prefill first, if it survived; no stop id
    discarded: list[list[int]]  # one per reset, without the [RESET]s; the first has the prefill
    resets: int
    finish_reason: str  # "stop" or "length"
    steps: int  # tokens sampled in all: surviving, discarded, [RESET]s and the stop id
    first_token_s: float  # seconds until the first sampled token that survives
    total_s: float  # seconds until the answer was finished


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
    """Answer every prompt. Options and errors as in `stream`; the Generations are in order."""
    return in_order(stream(model, prompts, **options), len(prompts))


def in_order(events: Iterable[Token | Reset | Done], count: int) -> list[Generation]:
    """Read a stream of `count` answers to its end."""
    done = {event.row: event.generation for event in events if isinstance(event, Done)}
    return [done[row] for row in range(count)]


def stream(
    model: Transformer,
    prompts: list[list[int]],
    *,
    prefill: list[list[int]] | None = None,
    seed: int = 0,
    sample_ids: list[int] | None = None,
    **options,
) -> Iterator[Token | Reset | Done]:
    """Sample an answer to every prompt (token ids, any lengths); yields what happens.

    prefill     tokens forced at the start of each answer. A reset discards them like the rest.
    seed        sample i depends on (seed, i), not on the batch rows beside it. In fp32 this holds
                token for token; in bf16 a batch of another size changes the last bits of the
                logits, and now and then a token.
    sample_ids  the numbers i; the index in `prompts` by default. With them a list may be cut into
                batches in any way.
    options     see `Options`.

    A row's Token events since its last Reset are, in order, its surviving tokens (prefill first).
    On a reset, text that was shown must be withdrawn; hold_back reduces how much.
    Raises InputError for prompts, ids and options out of range, and logits that are not finite.
    """
    options = Options(**options)
    prefill, seeds = checked(options, prompts, prefill, sample_ids, seed, model.config)
    events = batches(model, prompts, prefill, options, seeds)
    return delay_tokens(events, options.hold_back, prefill)


def delay_tokens(events, n: int, prefill) -> Iterator[Token | Reset | Done]:
    """Hand on a Token only when its row has sampled n more without a reset.

    What a reset takes back before that is never shown, though Reset.discarded still has it. The end
    of an answer releases the rest. Prefilled tokens wait like the others but do not count.
    """
    waiting: list[deque] = [deque() for _ in prefill]
    sampled = [-len(forced) for forced in prefill]  # in this attempt; below 0 while being forced
    for event in events:
        row, queue = event.row, waiting[event.row]
        if isinstance(event, Token):
            queue.append(event)
            sampled[row] += 1
            while sampled[row] >= n and len(queue) > n:
                yield queue.popleft()
            continue
        if isinstance(event, Reset):
            queue.clear()
            sampled[row] = 0
        yield from queue
        queue.clear()
        yield event


@dataclass
class Rows:
    """What the device knows of each batch row besides its cache: (B,) int64 each."""

    prompt: torch.Tensor  # tokens in the prompt
    resets: torch.Tensor  # resets so far


@dataclass
class Record:
    """What the host knows of a batch row."""

    row: int
    prompt: list[int]
    tokens: list[int]  # of this attempt, prefill included
    entries: int  # of the cache, once the latest token is read
    sampled: int = 0  # tokens of this attempt
    discarded: list[list[int]] = field(default_factory=list)
    steps: int = 0
    first_token_s: float | None = None
    done: bool = False


def batches(model, prompts, prefill, options: Options, seeds: list[str]):
    """The events of one batch after another."""
    size = options.batch_size or max(1, len(prompts))
    for first in range(0, len(prompts), size):
        some = slice(first, first + size)
        for event in decode(model, prompts[some], prefill[some], options, seeds[some]):
            event.row += first
            yield event


def decode(model, prompts, prefill, options: Options, seeds: list[str]):
    """The loop: pick a token in every batch row, tell the host, feed the tokens back."""
    start = time.perf_counter()
    records = []
    for row, (prompt, forced) in enumerate(zip(prompts, prefill, strict=True)):
        records.append(Record(row, prompt, list(forced), entries=len(prompt) + len(forced)))
        for id in forced:
            yield Token(row, id)

    logits, cache, rows = read_prompts(model, records, options)
    draws = Draws(seeds) if options.temperature > 0 else None
    # On CUDA the host reads a step's tokens while the device is already at the next one; elsewhere
    # it reads at once.
    lag = 1 if model.device.type == "cuda" else 0
    unread: deque = deque()
    active = records
    while True:
        with torch.inference_mode():
            if options.watch is not None:
                options.watch(logits, cache)
            u = None if draws is None else draws.next(active, model.device)  # (B, 1)
            token, best = pick(logits, rows, u, options)  # (B,), (B,)
            unread.append((*to_host(token, best), active))

        while len(unread) > lag:
            yield from read_tokens(*unread.popleft(), options, start)
        kept = [slot for slot, record in enumerate(active) if not record.done]
        if not kept:
            return
        # On CUDA finished rows go only when half the batch is finished: each new batch size costs a
        # compilation there under --compile, and idle rows of a memory-bound step cost next to
        # nothing.
        if len(kept) < len(active) and (lag == 0 or 2 * len(kept) <= len(active)):
            active, rows, token = drop_finished(kept, active, rows, token, cache)
        cache.visible = entries_in_use(active, cache, lag)
        with torch.inference_mode():
            logits = feed(model, token, rows, cache, options)  # (B, V)


def feed(model, token: torch.Tensor, rows: Rows, cache: KVCache, options: Options) -> torch.Tensor:
    """Feed each row's `token` (B,); if it is [RESET], cut the row's cache back first. -> (B, V)."""
    if options.reset_id is not None:
        is_reset = token == options.reset_id
        lengths = cache.lengths
        # ── Backtracking, all of it ───────────────────────────────────────────────────────────────
        # Cut the row back to its prompt and the resets before this one. The forward pass below then
        # writes this [RESET] there, and all that came after is forgotten. With on_reset="keep"
        # nothing is cut: [RESET] follows what it retracts. The host changes nothing in the cache;
        # `ids_in_cache` tells it what this rule leaves there.
        if options.on_reset == "truncate":
            lengths = torch.where(is_reset, rows.prompt + rows.resets, lengths)
        # ──────────────────────────────────────────────────────────────────────────────────────────
        cache.truncate(lengths)
        rows.resets = rows.resets + is_reset
    if token.is_cuda:  # a finished row may still be in the batch: it must not run off its cache
        cache.truncate(cache.lengths.clamp(max=cache.capacity - 1))
    return model(token[:, None], cache)[:, -1]


def pick(
    logits: torch.Tensor, rows: Rows, u: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's next token from logits (B, V), with u (B, 1) uniform in [0, 1) or greedily.

    Returns (B,) int64 and the greatest logit of each row, (B,): not finite if there was a NaN.
    """
    logits = logits[:, : options.vocab_size]
    if options.reset_id is not None:
        may_reset = rows.resets < options.max_resets  # (B,)
        bias = torch.where(may_reset, options.reset_bias, float("-inf"))
        logits[:, options.reset_id].add_(bias)
    best, token = logits.max(dim=-1)
    if options.temperature == 0:
        return token, best
    # One uniform number per token and the inverse of the distribution function, instead of
    # torch.multinomial: a row's random stream is then its own, whatever else is in the batch.
    probs = torch.softmax(logits / options.temperature, dim=-1)
    if options.top_p < 1.0:
        # The nucleus stays in the order of ids. In the order of probabilities a difference in the
        # last bit would swap two tokens, and u would pick the other one.
        ranked, _ = probs.sort(dim=-1, descending=True)
        mass_before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.masked_fill(mass_before >= options.top_p, 2.0)  # never the first: 0 before
        probs = probs.masked_fill(probs < ranked.amin(dim=-1, keepdim=True), 0.0)
    cdf = probs.cumsum(dim=-1)
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # (B, 1)
    return index.clamp(max=cdf.shape[-1] - 1).squeeze(-1), best  # V if there was a NaN


def read_prompts(model, records: list[Record], options: Options):
    """Read all prompts with their prefills in one go: logits (B, V), cache, Rows."""
    device, B = model.device, len(records)
    width = max(record.entries for record in records)
    capacity = width + room_for_answer(options)
    cache = KVCache(model.config, B, capacity, device, model.dtype)

    # Padded on the right with anything, which is cut off again: see Decoder.forward.
    tokens = torch.zeros(B, width, dtype=torch.int64)
    for record in records:
        tokens[record.row, : record.entries] = torch.tensor(record.prompt + record.tokens)
    lengths = torch.tensor([record.entries for record in records], device=device)
    prompt = torch.tensor([len(record.prompt) for record in records], device=device)
    last = torch.arange(B, device=device) * width + lengths - 1
    cache.visible = width
    with torch.inference_mode():
        # forward, not (): under --compile only the decode step is compiled, not every width.
        logits = model.forward(tokens.to(device), cache, at=last)
        cache.truncate(lengths)
        return logits, cache, Rows(prompt, torch.zeros_like(prompt))


class Draws:
    """Uniform numbers, a stream of its own for each row, drawn 256 at a time."""

    def __init__(self, seeds: list[str]):
        numbers = [random.Random(seed).getrandbits(63) for seed in seeds]
        self.generators = [torch.Generator().manual_seed(number) for number in numbers]
        self.count, self.rows = 0, None

    def next(self, active: list[Record], device) -> torch.Tensor:
        """(B, 1): the next number of every active row."""
        column = self.count % 256
        if column == 0:
            self.numbers = torch.stack([torch.rand(256, generator=g) for g in self.generators])
            # Below 1 by more than a rounding error, or u · total could pass the last token.
            self.numbers = self.numbers.clamp(max=1 - 1e-6).to(device)
        self.count += 1
        if self.rows is not active:  # the batch has changed
            self.rows = active
            self.index = torch.tensor([record.row for record in active], device=device)
        return self.numbers[self.index, column, None]


def to_host(token: torch.Tensor, best: torch.Tensor):
    """Both on the host, or on their way there: then with the event that tells of their arrival."""
    if not token.is_cuda:
        return token, best, None
    token = token.to("cpu", non_blocking=True)
    best = best.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return token, best, arrived


def read_tokens(token, best, arrived, active: list[Record], options: Options, start: float):
    """Wait for one step's tokens, then tell row by row what they mean."""
    if arrived is not None:
        arrived.synchronize()
    now = time.perf_counter() - start
    for record, id, logit in zip(active, token.tolist(), best.tolist(), strict=True):
        if record.done:
            continue
        if not math.isfinite(logit):
            raise InputError(
                f"row {record.row}: logits are not finite (NaN or inf) at step {record.steps};"
                " check the weights"
            )
        yield from note_token(record, id, options, now)


def note_token(record: Record, id: int, options: Options, now: float):
    """Note what the sampled token `id` means for its row; yields the events."""
    record.steps += 1
    if id == options.reset_id:
        discarded = record.tokens
        record.discarded.append(discarded)
        record.tokens, record.sampled, record.first_token_s = [], 0, None
        record.entries = len(ids_in_cache(record, options))
        yield Reset(record.row, discarded)
    elif id in options.stop_ids:
        yield finish(record, "stop", now)
    else:
        record.tokens.append(id)
        record.sampled += 1
        record.entries += 1
        if record.first_token_s is None:
            record.first_token_s = now
        yield Token(record.row, id)
        if record.sampled == options.max_new_tokens:
            yield finish(record, "length", now)


def ids_in_cache(record: Record, options: Options) -> list[int]:
    """What the model sees of a row once its latest token is read: what the box in `feed` keeps.

    remote.py sends a server just these ids.
    """
    if options.on_reset == "keep":
        earlier = [id for attempt in record.discarded for id in (*attempt, options.reset_id)]
    else:
        earlier = [options.reset_id] * len(record.discarded)
    return record.prompt + earlier + record.tokens


def finish(record: Record, reason: str, now: float) -> Done:
    record.done = True
    first = record.first_token_s  # None: an empty answer, complete when it stops
    generation = Generation(
        tokens=record.tokens,
        discarded=record.discarded,
        resets=len(record.discarded),
        finish_reason=reason,
        steps=record.steps,
        first_token_s=now if first is None else first,
        total_s=now,
    )
    return Done(record.row, generation)


def drop_finished(kept: list[int], active: list[Record], rows: Rows, token, cache: KVCache):
    """Drop the batch rows that are not kept; those at the end of the batch move into the holes."""
    movers = [slot for slot in kept if slot >= len(kept)]
    order = []
    for slot in range(len(kept)):
        order.append(movers.pop() if active[slot].done else slot)
    index = torch.tensor(order, device=token.device)
    cache.keep_rows(order)
    rows = Rows(rows.prompt[index], rows.resets[index])
    return [active[slot] for slot in order], rows, token[index]


def entries_in_use(active: list[Record], cache: KVCache, lag: int) -> int:
    """How many cache entries the longest batch row has in the step to come.

    On CUDA the host lags by a step, and the number is rounded up: few shapes, few compilations.
    """
    entries = max(record.entries for record in active) + lag
    if lag:
        entries = math.ceil(entries / 256) * 256
    return min(entries, cache.capacity)


def main() -> None:
    """`one_answer` at work, to be stepped through."""
    if len(sys.argv) != 3:
        raise InputError("usage: python -m backtrack.generate CKPT PROMPT")
    ckpt, prompt = sys.argv[1:]
    tok, model = load_tokenizer(ckpt), load_model(ckpt)
    answer, discarded = one_answer(
        model,
        tok.render([{"role": "user", "content": prompt}]),
        reset_id=tok.reset_id,
        stop_ids=tok.stop_ids,
        max_new_tokens=80,
        vocab_size=tok.vocab_size,
    )
    if discarded:
        print(f"~~{tok.decode(discarded)}~~ [RESET]")
    print(tok.decode(answer))


if __name__ == "__main__":
    run(main)
