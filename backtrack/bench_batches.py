"""What is gained by letting waiting prompts into a running batch? Against batches that are answered one after another.

    python -m backtrack.bench_batches --ckpt runs/smollm2 --prompts runs/real/dev.jsonl --limit 96

Both sides answer the same prompts, the shortest first, --batch-size rows at once: one call of `stream` for each batch,
whose last answer all others wait for, or one call for all. They take turns every few steps, so that what else the
machine has to do slows both alike. In float32 their answers must be equal. In bfloat16 a batch of another shape rounds
otherwise, so some are not, and how many is said.

Seconds are this machine's; those of the processor, of all threads together, tell more where other programs run beside.
What is counted depends on no machine: decode steps; the rows that went through them, which cost where computing is the
limit; how often prompts were read, and their tokens with padding. Where memory is the limit, as on a GPU, a step costs
the same whatever its rows, and reading a few prompts as much as a step: there the ratio of calls, steps and readings
together, is what to expect.
"""

import argparse
import statistics
import time
from itertools import islice

import torch

from backtrack.bench import ratio, table
from backtrack.generate import Done, Generation, generate, stream
from backtrack.prompts import read_prompts, render
from backtrack.results import made_by
from backtrack.rows import evenly
from model import InputError, Transformer, load_model, load_tokenizer
from model.errors import SEED, TEMPERATURE, device, positive, run

TURN = 256  # events


class Side:
    """One way to answer all prompts: how long it takes, what the model is called for, and the answers."""

    def __init__(self, model: Transformer, events):
        self.model, self.events = model, events
        self.seconds = self.processor_seconds = 0.0
        self.steps = self.rows = self.readings = self.tokens = 0
        self.answers: dict[int, Generation] = {}

    def take_turn(self) -> None:
        forward = self.model.forward
        self.model.forward = lambda tokens, cache, **more: self.count(tokens) or forward(tokens, cache, **more)
        start, processor = time.perf_counter(), time.process_time()
        for event in islice(self.events, TURN):
            if isinstance(event, Done):
                self.answers[event.row] = event.generation
        self.processor_seconds += time.process_time() - processor
        self.seconds += time.perf_counter() - start
        del self.model.forward

    def count(self, tokens: torch.Tensor) -> None:
        rows, width = tokens.shape
        if width == 1:
            self.steps += 1
            self.rows += rows
        else:
            self.readings += 1
            self.tokens += rows * width


def outcome(g: Generation) -> tuple:
    return g.tokens, g.discarded, g.finish_reason


def measured(model: Transformer, prompts: list[list[int]], prefill: list[list[int]], size: int, options):
    """(one batch after another, prompts that come in, how many answers differ). InputError if some do in float32."""

    def batches():
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            ids, forced = [prompts[i] for i in batch], [prefill[i] for i in batch]
            for event in stream(model, ids, prefill=forced, sample_ids=list(batch), **options):
                event.row += start
                yield event

    before = Side(model, batches())
    now = Side(model, stream(model, prompts, prefill=prefill, batch_size=size, **options))
    while len(before.answers) < len(prompts) or len(now.answers) < len(prompts):
        before.take_turn()
        now.take_turn()
    differ = sum(outcome(before.answers[row]) != outcome(now.answers[row]) for row in range(len(prompts)))
    if differ and model.dtype == torch.float32:
        raise InputError(f"{differ} answers differ between the two sides; their times cannot be compared")
    return before, now, differ


def report(before: list[Side], now: list[Side]) -> str:
    """Each side as often as it was measured."""
    lines = [["", "one batch after another", "prompts come in", "ratio (range)"]]
    for what, name in (("seconds", "seconds"), ("processor seconds", "processor_seconds")):
        a, b = ([getattr(side, name) for side in sides] for sides in (before, now))
        spread = "{:.2f} ({:.2f}–{:.2f})".format(*ratio(a, b))
        lines.append([what, f"{statistics.median(a):.1f}", f"{statistics.median(b):.1f}", spread])
    one, other = before[-1], now[-1]
    for what, a, b in (
        ("decode steps", one.steps, other.steps),
        ("rows in them", one.rows, other.rows),
        ("readings of prompts", one.readings, other.readings),
        ("tokens in them", one.tokens, other.tokens),
        ("calls: steps and readings", one.steps + one.readings, other.steps + other.readings),
    ):
        lines.append([what, f"{a:,}", f"{b:,}", f"{a / b:.2f}"])
    return table(lines)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="model directory")
    add("--prompts", nargs="+", required=True, help="prompt files, as for backtrack.evaluate")
    add("--limit", type=positive, help="so many prompts, evenly spread over the files")
    add("--batch-size", type=positive, default=32, help="rows at once")
    add("--max-new-tokens", type=positive, default=80, help="per attempt")
    add("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    add("--repeats", type=positive, default=2, help="times that all is answered")
    add("--seed", type=SEED, default=0, help="of the sampling")
    add("--device", type=device, default="cuda" if cuda else "cpu", help="of PyTorch")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32", help="of the weights")
    args = parser.parse_args()
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    chosen = evenly([p for path in args.prompts for p in read_prompts(path)], args.limit)
    rows = [(render(tok, p), tok.encode(p["prefill"])) for p in chosen]
    rows.sort(key=lambda row: len(row[0]))
    prompts, prefill = [prompt for prompt, _ in rows], [forced for _, forced in rows]
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    options |= {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed")}
    warm_up = options | {"max_new_tokens": 2}
    generate(model, prompts[: args.batch_size], prefill=prefill[: args.batch_size], **warm_up)
    before, now = [], []
    for _ in range(args.repeats):
        one, other, differ = measured(model, prompts, prefill, args.batch_size, options)
        before.append(one)
        now.append(other)
    print(f"{made_by()['machine']}\n{len(prompts)} prompts, {differ} of them answered otherwise\n")
    print(report(before, now))


if __name__ == "__main__":
    run(main)
