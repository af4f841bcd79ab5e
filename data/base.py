"""Pretrain a small base on plain text: the toy world's model before it learns to answer.

    python -m data.base --config data/toy.json --tokenizer DIR --data corpus.jsonl --out runs/base

The texts become one stream, <bos> text <end> <bos> text <end> …, which is cut into windows of
--max-length tokens, at another offset in each epoch. Loop and loss are train.py's.
"""

import argparse
import random

import torch

from backtrack.examples import WEIGHT, View
from backtrack.rows import few_of, read_rows
from backtrack.run import metrics
from backtrack.run.command import checked, run_arguments, train
from backtrack.run.load import fresh, load
from backtrack.run.progress import start
from backtrack.trees import Batch, Tree, view_tree
from model import InputError, load_tokenizer
from model.errors import Help, run
from train import fit, rows_in_order, sft_loss


def base(args: argparse.Namespace) -> None:
    tok = load_tokenizer(args.tokenizer)
    length = args.max_length
    stream = read_stream(args.data, tok)
    trains = args.steps != 0  # else nothing has to fit into --max-length
    count = count_windows(stream, args.data, length) if trains else 0

    def tree_of(epoch: int, index: int) -> Tree:
        offset = random.Random(f"{args.seed}/{epoch}").randrange(length)
        return window_tree(stream, offset + index * length, length)

    def loss(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, metrics.Sums]:
        return sft_loss(values, batch.weight), metrics.of_views(values.detach(), batch)

    heldout = []
    if args.heldout and trains:
        text = read_stream(args.heldout, tok)
        for index in few_of(range(count_windows(text, args.heldout, length))):
            heldout.append(window_tree(text, index * length, length))
    this = start(args, tok, count, stream)
    model = load(args.out, this) if this.position.step else fresh(args.config, this)
    trees_of = rows_in_order(this.options, count, tree_of)
    fit(this, model, trees_of, heldout, loss, weight_decay=0.1)


def read_stream(paths: list[str], tok) -> list[int]:
    """Plain text as one stream of ids: <bos> text <end> <bos> text <end> …"""
    stream = []
    for path in paths:
        for where, row in read_rows(path):
            if "text" not in row:
                raise InputError(f'{where}: the base learns plain text, {{"text": "…"}} in each line')
            stream += [tok.text_start_id, *tok.encode(row["text"]), tok.text_end_id]
    return stream


def window_tree(stream: list[int], first: int, length: int) -> Tree:
    """A window of plain text, for pretraining: one sequence without branches."""
    view = View("text", stream[first : first + length], loss_from=1, weight=WEIGHT["text"])
    return view_tree([view], length)


def count_windows(stream: list[int], paths: list[str], length: int) -> int:
    """How many windows a stream has, whatever the offset of the first."""
    if length < 2:
        raise InputError(f"--max-length {length}: a window needs two tokens, one to predict from")
    count = len(stream) // length - 1
    if paths and count < 1:
        raise InputError(f"{paths[0]}: {len(stream)} tokens, not 2 × --max-length {length}")
    return count


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    about = "a Hugging Face config.json: the shape of the model"
    parser.add_argument("--config", required=True, help=about)
    about = "directory with tokenizer.model or .json"
    parser.add_argument("--tokenizer", required=True, help=about)
    parser.set_defaults(command="base", lr=1e-3, lora=None)
    run_arguments(parser)
    return checked(parser)


def main() -> None:
    train(parse_args, {"base": base})


if __name__ == "__main__":
    run(main, ranks=True)
