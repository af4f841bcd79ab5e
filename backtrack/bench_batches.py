"""What is gained by letting waiting prompts into a running batch? Against batches that are answered one after another.

    python -m backtrack.bench_batches --ckpt runs/smollm2 --prompts runs/real/dev.jsonl --limit 96

Both sides answer the same prompts in turns (ABAB), the shortest first, --batch-size rows at once: one call of
`generate` for each batch, whose last answer all others wait for, or one call for all. In float32 their answers must be
equal. In bfloat16 a batch of another shape rounds otherwise, so some are not, and how many is said.

Seconds are this machine's; those of the processor, of all threads together, tell more where other programs run beside.
What is counted depends on no machine: decode steps; the rows that went through them, which cost where computing is the
limit; how often prompts were read, and their tokens with padding. Where memory is the limit, as on a GPU, a step costs
the same whatever its rows, and reading a few prompts as much as a step: there the ratio of calls, steps and readings
together, is what to expect.
"""

import argparse
import statistics
import time

import torch

from backtrack.bench import ratio, table
from backtrack.generate import Generation, generate
from backtrack.prompts import read_prompts, render
from backtrack.results import made_by
from backtrack.rows import evenly
from model import InputError, Transformer, load_model, load_tokenizer
from model.errors import SEED, TEMPERATURE, device, positive, run


class Counted:
    """A side of the comparison: its answers, how long they take, and what the model is called for."""

    def __init__(self, model: Transformer, answer):
        self.model, self.answer = model, answer
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def __call__(self) -> list[Generation]:
        self.steps = self.rows = self.readings = self.tokens = 0
        forward = self.model.forward
        self.model.forward = lambda tokens, cache, **more: self.count(tokens) or forward(tokens, cache, **more)
        start, processor = time.perf_counter(), time.process_time()
        answers = self.answer()
        self.processor_seconds.append(time.process_time() - processor)
        self.seconds.append(time.perf_counter() - start)
        del self.model.forward
        return answers

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


def measured(model: Transformer, prompts: list[list[int]], prefill: list[list[int]], size: int, repeats: int, options):
    """(the two sides, how many answers differ). InputError if some do in float32."""

    def batches():
        answers = []
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            ids, forced = [prompts[i] for i in batch], [prefill[i] for i in batch]
            answers += generate(model, ids, prefill=forced, sample_ids=list(batch), **options)
        return answers

    def entering():
        return generate(model, prompts, prefill=prefill, batch_size=size, **options)

    generate(model, prompts[:size], prefill=prefill[:size], **options | {"max_new_tokens": 2})  # warms up
    before, now = Counted(model, batches), Counted(model, entering)
    for _ in range(repeats):
        answers, others = before(), now()
    differ = sum(outcome(a) != outcome(b) for a, b in zip(answers, others, strict=True))
    if differ and model.dtype == torch.float32:
        raise InputError(f"{differ} answers differ between the two sides; their times cannot be compared")
    return before, now, differ


def report(before: Counted, now: Counted) -> str:
    lines = [["", "one batch after another", "prompts come in", "ratio (range)"]]
    for what, a, b in (
        ("seconds", before.seconds, now.seconds),
        ("processor seconds", before.processor_seconds, now.processor_seconds),
    ):
        spread = "{:.2f} ({:.2f}–{:.2f})".format(*ratio(a, b))
        lines.append([what, f"{statistics.median(a):.1f}", f"{statistics.median(b):.1f}", spread])
    for what, a, b in (
        ("decode steps", before.steps, now.steps),
        ("rows in them", before.rows, now.rows),
        ("readings of prompts", before.readings, now.readings),
        ("tokens in them", before.tokens, now.tokens),
        ("calls: steps and readings", before.steps + before.readings, now.steps + now.readings),
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
    add("--repeats", type=positive, default=2, help="turns of each side")
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
    before, now, differ = measured(model, prompts, prefill, args.batch_size, args.repeats, options)
    print(f"{made_by()['machine']}\n{len(prompts)} prompts, {differ} of them answered otherwise\n")
    print(report(before, now))


if __name__ == "__main__":
    run(main)
