"""What the commands that train have in common: `train.py sft`, `train.py dpo`, `python -m data.base`."""

import argparse
import os
from collections.abc import Callable

import torch

from backtrack.rows import HELDOUT
from backtrack.run import launch
from backtrack.run.progress import alone
from backtrack.run.say import warn_of_slow_bfloat16
from model.errors import ABOVE_ZERO, SEED, device, not_negative, positive


def train(parse_args: Callable[[], argparse.Namespace], commands: dict[str, Callable]) -> None:
    """Parse the arguments and do what they say, under torchrun together with the other processes."""
    with launch.together():
        args = parse_args()
        if args.plan:
            from backtrack.run.plan import say_plan  # its imports take a second

            say_plan(args)
            return
        launch.check_device(args.device)
        warn_of_slow_bfloat16(args.dtype, args.device)
        with alone(args.out):
            commands[args.command](args)


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, if they make sense together; else exit code 2."""
    args = parser.parse_args()
    if not args.data and args.steps != 0 and not args.plan:
        parser.error("--data is needed; only --steps 0, which saves the start, goes without")
    if args.offload and "RANK" not in os.environ and not args.plan:
        parser.error("--offload needs torchrun, for one device too: --nproc-per-node 1")
    return args


def run_arguments(p) -> None:
    """The arguments of every kind of training."""
    steps, on = not_negative(int), "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--data", nargs="+", default=[], help=".jsonl or .jsonl.gz files")
    about = f"files of which {HELDOUT} rows are measured at every log line"
    p.add_argument("--heldout", nargs="+", default=[], help=about)
    p.add_argument("--out", required=True, help="model directory to write")

    group = p.add_argument_group("the optimizer's (AdamW; gradient norms are clipped to 1)")
    default = p.get_default("lr")
    group.add_argument("--lr", type=ABOVE_ZERO, default=default, help="peak learning rate")
    group.add_argument("--batch-size", type=positive, default=8, help="rows per micro-batch")
    group.add_argument("--grad-accum", type=positive, default=1, help="micro-batches per step")
    length = group.add_mutually_exclusive_group()
    number = not_negative(float)
    length.add_argument("--epochs", type=number, default=1.0, help="times through the data")
    length.add_argument("--steps", type=steps, help="instead of --epochs; 0 saves the start")
    about = "longest sequence in tokens"
    group.add_argument("--max-length", type=positive, default=1024, help=about)
    about = "of data order, prefixes, fresh weights"
    group.add_argument("--seed", type=SEED, default=0, help=about)

    group = p.add_argument_group("the machine's")
    group.add_argument("--device", type=device, default=on, help="of PyTorch")
    dtypes = ("float32", "bfloat16")
    group.add_argument("--dtype", choices=dtypes, default="float32", help="of the computation")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    about = "keep the input of each block alone, and compute the rest again: less memory, slower"
    group.add_argument("--checkpoint-activations", action="store_true", help=about)
    about = "keep weights and optimizer in the memory of the host; under torchrun"
    group.add_argument("--offload", action="store_true", help=about)
    about = "say what N devices need of memory for this, from config.json alone, and end"
    group.add_argument("--plan", type=positive, metavar="N", help=about)

    group = p.add_argument_group("the run's")
    about = "go on from what --out holds, if anything"
    group.add_argument("--resume", action="store_true", help=about)
    group.add_argument("--log-every", type=positive, default=10, help="steps")
    group.add_argument("--save-every", type=positive, default=500, help="steps")
