"""The sampler: on [RESET] what has been said is thrown away and the answer starts again.

    answer, discarded = one_answer(model, prompt_ids, reset_id=tok.reset_id, …)      # the method
    for g in generate(model, [prompt_ids], reset_id=tok.reset_id, stop_ids=tok.stop_ids, …):
        print(tok.decode(g.tokens), g.resets)      # surviving text, how often it began again
    for event in stream(model, [prompt_ids], …):   # Token | Reset | Done, as they happen

    python -m backtrack.generate runs/toy-0/sft "Tell me how …"    # one_answer, to step through

`one_answer` is what the paper describes, for one prompt. `generate` does the same for a batch, with
temperature, prefilled answers and more resets: one decode step serves all rows, whatever each of
them is doing. A reset is one `torch.where` on the lengths of the cache (see `feed`), so a step with
resets costs what a step without them costs, and the device never waits for the host.

No beam search, no speculative decoding, no batch that grows while it runs.

Shapes: B rows of the batch, V vocabulary.
"""

import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

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
    """Answer every prompt. Options and errors as in `stream`; the Generations are in order."""
    answers: list[Generation | None] = [None] * len(prompts)
    for event in stream(model, prompts, **options):
        if isinstance(event, Done):
            answers[event.row] = event.generation
    return answers


def stream(
    model: Transformer,
    prompts: list[list[int]],
    *,
    reset_id: int | None,
    stop_ids,
    max_new_tokens: int,
    vocab_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    reset_bias: float = 0.0,
    max_resets: int = 1,
    on_reset: str = "truncate",
    prefill: list[list[int]] | None = None,
    seed: int = 0,
    sample_ids: list[int] | None = None,
    batch_size: int | None = None,
    hold_back: int = 0,
    watch: Callable[[torch.Tensor, KVCache], None] | None = None,
) -> Iterator[Token | Reset | Done]:
    """Sample an answer to every prompt (token ids, any lengths); yields what happens.

    reset_id        the id of [RESET]; None makes this an ordinary sampler.
    stop_ids        ids that end an answer (not part of it).
    max_new_tokens  most tokens sampled in each attempt; prefilled tokens do not count.
    vocab_size      the tokenizer's: ids from there on only pad the vocabulary, never sampled.
    temperature     0 is greedy. top_p keeps the smallest set of tokens that has this probability.
    reset_bias      added to the logit of [RESET]: the paper's dial between safety and efficiency.
    max_resets      after that many, [RESET] is masked (1 in the paper).
    on_reset        "truncate": a retry sees prompt ⊕ [RESET]^r. "keep" (paper): all that was said.
    prefill         tokens forced at the start of each answer. A reset discards them like the rest.
    seed            row i's sample depends on (seed, i) only, not on the rows beside it.
    sample_ids      numbers in place of i: so it matters not how a list is cut into batches.
    batch_size      most rows at once, one batch after another; None: all in one.
    hold_back       a row's Token events come this many sampled tokens late: see `held_back`.
    watch           called with the model's logits (B, V) and the cache before each token is picked.

    A row's Token events since its last Reset are, in order, its surviving tokens (prefill first).
    On a reset a user has to forget what they were shown; hold_back makes that less.
    Raises InputError for prompts, ids and options out of range, and logits that are not finite.
    """
    prefill = [[] for _ in prompts] if prefill is None else prefill
    sample_ids = list(range(len(prompts))) if sample_ids is None else sample_ids
    options = Options(
        reset_id=reset_id,
        stop_ids=sorted(set(stop_ids)),
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        temperature=temperature,
        top_p=top_p,
        reset_bias=reset_bias,
        max_resets=0 if reset_id is None else max_resets,
        on_reset=on_reset,
        batch_size=batch_size,
        watch=watch,
    )
    check(options, prompts, prefill, sample_ids, model.config)
    seeds = [f"{seed}/{i}" for i in sample_ids]
    events = batches(model, prompts, prefill, options, seeds)
    return held_back(events, hold_back, prefill)


def held_back(events, n: int, prefill: list[list[int]]) -> Iterator[Token | Reset | Done]:
    """The events of a stream, but a Token only when its row has sampled n more without a reset.

    What a reset takes back before that is never shown, though Reset.discarded still has it. The end
    of an answer releases the rest. Prefilled tokens wait like all others, and count for none.
    """
    if n < 0:
        raise InputError(f"hold_back is {n}, must be 0 or more")
    return late(events, n, prefill) if n else events


def late(events, n: int, prefill: list[list[int]]) -> Iterator[Token | Reset | Done]:
    held: list[deque] = [deque() for _ in prefill]
    sampled = [-len(forced) for forced in prefill]  # in this attempt; below 0: being forced
    for event in events:
        row = event.row
        if isinstance(event, Token):
            held[row].append(event)
            sampled[row] += 1
            while sampled[row] >= n and len(held[row]) > n:
                yield held[row].popleft()
            continue
        if isinstance(event, Reset):
            held[row].clear()
            sampled[row] = 0
        yield from held[row]
        held[row].clear()
        yield event


@dataclass
class Options:
    reset_id: int | None
    stop_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    reset_bias: float = 0.0
    max_resets: int = 1
    on_reset: str = "truncate"
    batch_size: int | None = None
    watch: Callable[[torch.Tensor, KVCache], None] | None = None
    vocab_size: int | None = None


@dataclass
class Rows:
    """What the device knows of each row besides its cache: (B,) int64 each."""

    prompt: torch.Tensor  # tokens in the prompt
    resets: torch.Tensor  # resets so far


@dataclass
class Record:
    """What the host knows of a row."""

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
    """The loop: pick a token in every row, tell the host, feed the tokens back."""
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
            active, rows, token = close_ranks(kept, active, rows, token, cache)
        cache.visible = farthest(active, cache, lag)
        with torch.inference_mode():
            logits = feed(model, token, rows, cache, options)  # (B, V)


def feed(model, token: torch.Tensor, rows: Rows, cache: KVCache, options: Options) -> torch.Tensor:
    """Read each row's `token` (B,), after cutting the row back if it is [RESET]. Returns (B, V)."""
    if options.reset_id is not None:
        is_reset = token == options.reset_id
        lengths = cache.lengths
        # ── Backtracking, all of it ───────────────────────────────────────────────────────────────
        # Cut the row back to its prompt and the resets before this one. The forward pass below then
        # writes this [RESET] there, and all that came after is forgotten. With on_reset="keep"
        # nothing is cut: [RESET] follows what it retracts.
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
    order = None
    if options.top_p < 1.0:
        probs, order = probs.sort(dim=-1, descending=True)
        mass_before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(mass_before >= options.top_p, 0.0)  # never the first: 0 before it
    cdf = probs.cumsum(dim=-1)
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)  # (B, 1)
    index = index.clamp(max=cdf.shape[-1] - 1)
    if order is not None:
        index = order.gather(-1, index)
    return index.squeeze(-1), best


def read_prompts(model, records: list[Record], options: Options):
    """Read all prompts with their prefills in one go: the logits (B, V), the cache, the rows."""
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
        yield from told(record, id, options, now)


def told(record: Record, id: int, options: Options, now: float) -> Iterator[Token | Reset | Done]:
    """Note what the sampled token `id` means for its row, and say so."""
    record.steps += 1
    if id == options.reset_id:
        yield Reset(record.row, begin_again(record, options))
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


def begin_again(record: Record, options: Options) -> list[int]:
    """Note a reset; returns what was taken back."""
    discarded = record.tokens
    record.discarded.append(discarded)
    record.tokens, record.sampled, record.first_token_s = [], 0, None
    record.entries += 1
    if options.on_reset == "truncate":
        record.entries = len(record.prompt) + len(record.discarded)
    return discarded


def finish(record: Record, reason: str, now: float) -> Done:
    record.done = True
    first = record.first_token_s
    if first is None:  # an empty answer is complete when it stops
        first = now
    generation = Generation(
        tokens=record.tokens,
        discarded=record.discarded,
        resets=len(record.discarded),
        finish_reason=reason,
        steps=record.steps,
        first_token_s=first,
        total_s=now,
    )
    return Done(record.row, generation)


def close_ranks(kept: list[int], active: list[Record], rows: Rows, token, cache: KVCache):
    """Drop the rows that are not kept; those at the end of the batch move into the holes."""
    movers = [slot for slot in kept if slot >= len(kept)]
    order = []
    for slot in range(len(kept)):
        order.append(movers.pop() if active[slot].done else slot)
    index = torch.tensor(order, device=token.device)
    cache.keep_rows(order)
    rows = Rows(rows.prompt[index], rows.resets[index])
    return [active[slot] for slot in order], rows, token[index]


def farthest(active: list[Record], cache: KVCache, lag: int) -> int:
    """How many cache entries attention has to look at in the step to come.

    On CUDA the host lags by a step, and the number is rounded up: few shapes, few compilations.
    """
    entries = max(record.entries for record in active) + lag
    if lag:
        entries = math.ceil(entries / 256) * 256
    return min(entries, cache.capacity)


# ── Complaints ────────────────────────────────────────────────────────────────────────────────────


def check(options: Options, prompts, prefill, sample_ids, config) -> None:
    """config: what knows the model's vocab_size and max_position_embeddings."""
    check_options(options, config.vocab_size)
    for what, given in (("prefills", prefill), ("sample_ids", sample_ids)):
        if len(given) != len(prompts):
            raise InputError(f"{len(given)} {what} for {len(prompts)} prompts")
    for row, (prompt, forced) in enumerate(zip(prompts, prefill, strict=True)):
        check_prompt(row, prompt, forced, options, config)


def check_options(options: Options, vocab_size: int) -> None:
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {options.max_new_tokens}, must be at least 1")
    if not options.temperature >= 0.0:
        raise InputError(f"temperature is {options.temperature}, must be 0 (greedy) or positive")
    if not 0.0 < options.top_p <= 1.0:
        raise InputError(f"top_p is {options.top_p}, must be in (0, 1]")
    if options.max_resets < 0:
        raise InputError(f"max_resets is {options.max_resets}, must be 0 or more")
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}, must be at least 1")
    if options.on_reset not in ("truncate", "keep"):
        raise InputError(f"on_reset is {options.on_reset!r}, must be 'truncate' or 'keep'")
    if options.reset_id in options.stop_ids:
        raise InputError(f"reset_id {options.reset_id} is also a stop id")
    if options.vocab_size is not None:
        vocab_size = min(vocab_size, options.vocab_size)
    special = list(options.stop_ids)
    if options.reset_id is not None:
        special.append(options.reset_id)
    for id in special:
        if not 0 <= id < vocab_size:
            raise InputError(
                f"stop or reset id {id} is outside the model's vocabulary of {vocab_size}"
            )


def check_prompt(row: int, prompt: list[int], forced: list[int], options: Options, config) -> None:
    if not prompt:
        raise InputError(f"prompt {row} is empty; it needs at least one token (BOS)")
    if not all(0 <= id < config.vocab_size for id in (*prompt, *forced)):
        raise InputError(
            f"prompt {row} has ids outside the model's vocabulary of {config.vocab_size};"
            " wrong tokenizer?"
        )
    if options.reset_id in forced or not set(options.stop_ids).isdisjoint(forced):
        raise InputError(
            f"prefill {row} contains [RESET] or a stop id; it must be the plain beginning of an"
            " answer"
        )
    need = len(prompt) + len(forced) + room_for_answer(options)
    if need > config.max_position_embeddings:
        raise InputError(
            f"prompt {row} is too long: {len(prompt)} tokens, and {need} with room for the answer,"
            f" but the model has {config.max_position_embeddings} positions; shorten it or lower"
            " max_new_tokens"
        )


def room_for_answer(options) -> int:
    """Positions that an answer may take, resets included, besides its prompt and its prefill.

    Cut back, one attempt at a time; keeping all, every attempt.
    """
    attempts = options.max_new_tokens
    if options.on_reset == "keep":
        attempts *= options.max_resets + 1
    return options.max_resets + attempts


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
