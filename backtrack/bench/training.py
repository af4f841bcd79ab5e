"""What do row trees save? Training on trees against the same sequences one by one, padded.

    python -m backtrack.bench.training --rows hh.jsonl --tokenizer llama3-tokenizer [--out bench.json]

First the tokens that go through the network per row, padding included, over all rows. Then rows per second and peak
memory (Linux) of a step without optimizer, forward and backward, on a Llama of 125M parameters, random weights, fp32.
Its vocabulary has 32,000 ids; larger ones are folded in (id mod 32,000), which changes no cost.

The plain side is the usual way: each sequence a batch row of its own, padded on the right, causal attention, logits at
the targets alone. The two sides take the same rows and turns (ABAB…), and their losses and gradients must agree, or the
benchmark ends. A ratio is of total times. Three minutes on two quiet cores.
"""

import argparse
import ctypes
import gc
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from backtrack.bench.__main__ import LLAMA_125M, random_model, ratio
from backtrack.evaluate.results import write_result
from backtrack.examples import View, dpo_pairs, draw_prefix, sft_views
from backtrack.rows import Row, load_rows
from backtrack.run.parallel import micro_batches
from backtrack.trees import Tree, make_batch, pair_tree, view_tree
from model import InputError, Transformer, load_tokenizer
from model.errors import positive, run
from model.files import check_file
from train import logprobs

MAX_LENGTH = 2048
# What is trained, rows per micro-batch, the options of its sequences.
KINDS = {
    "sft, one k": (4, {"resets": "drawn"}),
    "sft, every k": (4, {"resets": "every"}),
    "dpo": (2, {}),
}


def both_ways(kind: str, row: Row, index: int, tok) -> tuple[Tree, list[View]]:
    """The tree of a row, and its sequences one by one, of which `weight · log π` is to be summed up."""
    _, options = KINDS[kind]
    room = MAX_LENGTH - len(row.prompt) - 2
    k_rejected = draw_prefix(0, 0, index, min(len(row.rejected), room))
    k_chosen = draw_prefix(1, 0, index, min(len(row.chosen), room))
    if kind == "dpo":
        pairs = dpo_pairs(row, k_rejected, k_chosen, tok)
        sides = [(pair.prompt, *side) for pair in pairs for side in ((pair.chosen, 1.0), (pair.rejected, -1.0))]
        plain = [View("side", prompt + answer, len(prompt), weight) for prompt, answer, weight in sides]
        tree = pair_tree(pairs, {"elicit": 1.0, "discourage": 1.0}, MAX_LENGTH)
        tree.target_weight = [(1.0, -1.0)[s % 2] for s in tree.target_sequence]
        return tree, plain
    # The plain side draws one k in either kind: nobody would train |y−| sequences for one [RESET] each.
    plain = sft_views(row, k_rejected, tok, resets="drawn")
    return view_tree(sft_views(row, k_rejected, tok, **options), MAX_LENGTH), plain


def tree_loss(model: Transformer, trees: list[Tree]) -> torch.Tensor:
    """Σ weight · log π over all targets."""
    batch = make_batch(trees)
    return (batch.weight * logprobs(model, batch)).sum()


def plain_loss(model: Transformer, sequences: list[View]) -> torch.Tensor:
    """The same sum over sequences that are batch rows of their own."""
    width = max(len(s.tokens) for s in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    weights = torch.zeros(len(sequences), width)
    for i, s in enumerate(sequences):
        tokens[i, : len(s.tokens)] = torch.tensor(s.tokens)
        weights[i, s.loss_from : len(s.tokens)] = s.weight
    inputs, labels, weights = tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
    is_target = weights != 0
    logits = model(inputs, at=is_target.flatten().nonzero()[:, 0])  # (N, V)
    nll = F.cross_entropy(logits, labels[is_target], reduction="none")  # (N,)
    return -(weights[is_target] * nll).sum()


def computed_tokens(kind: str, rows: list[Row], tok, accumulate: int) -> dict:
    """Tokens through the network per row, in steps of `accumulate` micro-batches."""
    size, _ = KINDS[kind]
    trees, plain = zip(*(both_ways(kind, row, index, tok) for index, row in enumerate(rows)), strict=True)
    computed = separate = 0
    for first in range(0, len(rows), size * accumulate):
        for few in micro_batches(list(trees[first : first + size * accumulate]), size):
            computed += make_batch(few).tokens.numel()
    for first in range(0, len(rows), size):
        lengths = [len(s.tokens) - 1 for sequences in plain[first : first + size] for s in sequences]
        separate += len(lengths) * max(lengths)  # a last token predicts nothing and is not read
    return {
        "name": f"{kind}, micro-batches of {size}, {accumulate} a step",
        "separate": separate / len(rows),
        "trees": computed / len(rows),
        "without_padding": sum(map(len, trees)) / len(rows),
    }


def step_speed(kind: str, model: Transformer, rows: list[Row], tok, steps: int) -> dict:
    """Rows per second and peak memory of both sides over the same rows, forward and backward."""
    size, _ = KINDS[kind]
    seconds, peaks = ([], []), ([], [])
    for step in range(steps + 1):
        both = [both_ways(kind, rows[index], index, tok) for index in range(step * size, (step + 1) * size)]
        trees, plain = [tree for tree, _ in both], [s for _, sequences in both for s in sequences]
        fold(model.config.vocab_size, trees, plain)
        sides, found = [(0, plain_loss, plain), (1, tree_loss, trees)], {}
        for side, loss_of, examples in sides if step % 2 else sides[::-1]:
            found[side], elapsed, peak = descend(model, loss_of, examples)
            if step > 0:  # the first step warms up
                seconds[side].append(elapsed)
                peaks[side].append(peak)
        if kind != "sft, every k":  # whose targets are others
            torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    return {
        "name": f"{kind}, micro-batches of {size}",
        "rows_per_s": size * steps / sum(seconds[1]),
        "separate_rows_per_s": size * steps / sum(seconds[0]),
        "ratio": sum(seconds[0]) / sum(seconds[1]),
        "range": ratio(*seconds)[1:],
        "peak_memory_ratio": max(peaks[1]) / max(peaks[0]),
    }


def fold(vocab_size: int, trees: list[Tree], sequences: list[View]) -> None:
    """Ids of a larger vocabulary into this one."""
    for example in (*trees, *sequences):
        example.tokens = [id % vocab_size for id in example.tokens]
    for tree in trees:
        tree.target_token = [id % vocab_size for id in tree.target_token]


def descend(model: Transformer, loss_of, examples: list):
    """One forward and backward: (the loss and a gradient to compare, seconds, bytes at the peak)."""
    model.zero_grad(set_to_none=True)
    forget_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    loss = loss_of(model, examples)
    loss.backward()
    elapsed, peak = time.perf_counter() - start, max(1, memory("VmHWM") - before)
    return (loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad), elapsed, peak


def forget_peak() -> None:
    """Linux: give freed memory back, and let VmHWM, the peak of what is resident, start anew."""
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Bytes, from /proc/self/status; 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", required=True, help="preference rows (data.prepare hh makes them)")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument("--steps", type=positive, default=6, help="timed steps of each kind")
    parser.add_argument("--out", help="write the results to this file as JSON")
    args = parser.parse_args(argv)
    if args.out:
        check_file(args.out)
    tok = load_tokenizer(args.tokenizer)
    rows = [row for row in load_rows(args.rows, tok, MAX_LENGTH) if row.unsafe]
    random.Random(0).shuffle(rows)
    needed = (args.steps + 1) * max(size for size, _ in KINDS.values())
    if len(rows) < needed:
        raise InputError(f"{len(rows)} rows with an unsafe answer, {needed} are needed; lower --steps")

    print(f"{len(rows)} rows. Tokens per row: separate and padded, trees, trees without padding")
    cost = [computed_tokens(kind, rows, tok, n) for kind in KINDS for n in (1, 32)]
    for r in cost:
        print("{name}: {separate:.0f}, {trees:.0f}, {without_padding:.0f}".format(**r), flush=True)
    print("\nRows per second: separate, trees, ratio (range of the steps), peak memory")
    model, speed = random_model(LLAMA_125M).train(), []
    for kind in KINDS:
        speed.append(step_speed(kind, model, rows, tok, args.steps))
        line = "{name}: {separate_rows_per_s:.2f}, {rows_per_s:.2f}, {ratio:.2f} ({range[0]:.2f}–{range[1]:.2f}), "
        print((line + "{peak_memory_ratio:.2f} times").format(**speed[-1]), flush=True)
    if args.out:
        write_result(args.out, cost=cost, speed=speed)


if __name__ == "__main__":
    run(main)
