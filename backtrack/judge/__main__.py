"""Fit the refusal judge on answers that people have labelled (refusals.py).

python -m backtrack.judge fit --data xstest_v2_completions_*.csv --out runs/refusal-judge    # 40 s on one core
"""

import argparse

import torch

from backtrack.judge import fitted, refusals
from model.errors import Help, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("fit", help="the refusal judge, on answers that people have labelled").add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="XSTest's completions, a CSV file for each model")
    add("--out", required=True, metavar="NAME", help="writes NAME.json and NAME.safetensors")
    args = parser.parse_args()
    fitted.check_out(args.out, refusals.KIND)
    torch.set_num_threads(1)  # with two, they wait for each other: ten times as long on a busy machine
    answers = refusals.read_answers(args.data)
    left_out = refusals.leave_out_models(answers)
    for r in left_out:
        print(
            f"{r['model']}, left out: right on {100 * r['accuracy']:.1f}% of {r['answers']} answers, AUC {r['auc']:.3f}"
        )
    file = refusals.save(refusals.fit(answers), args.out, answers, left_out, args.data)
    print(f"fitted on all {len(answers)} answers; judge with --judge {file}")


if __name__ == "__main__":
    run(main)
