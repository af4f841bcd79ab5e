"""Pictures of your own runs: how a training went, and how checkpoints compare.

    python -m backtrack.report curves runs/toy-0/sft runs/toy-0/dpo --out curves.png
    python -m backtrack.report compare runs/toy-0/eval.json --out compare.png

The tables and pictures of results/ are made by backtrack.report.tables and backtrack.report.figures.
"""

import argparse
from pathlib import Path

from backtrack.report import compare, curves
from model.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="curves | compare")
    for module, name, metavar, what in (
        (curves, "curves", "RUN", "directories that train.py wrote, with their metrics.jsonl"),
        (compare, "compare", "EVAL.json", "files that `python -m backtrack.evaluate --out` wrote"),
    ):
        command = commands.add_parser(name, description=module.__doc__, formatter_class=parser.formatter_class)
        command.set_defaults(do=module)
        command.add_argument("paths", nargs="+", type=Path, metavar=metavar, help=what)
        default = Path("curves.png") if module is curves else None
        command.add_argument("--out", type=Path, default=default, help="the .png to write")
    args = parser.parse_args()
    args.do.show(args.paths, args.out)


if __name__ == "__main__":
    run(main)
