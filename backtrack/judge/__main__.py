"""Fit a judge on answers that people have labelled: of refusals (refusals.py) or of harm (harm.py).

python -m backtrack.judge fit --data xstest_v2_completions_*.csv --out runs/refusal-judge    # 40 s on one core
python -m backtrack.judge fit --kind harm --data train.csv --test evaluate.csv --out runs/harm-judge    # 10 s
"""

import argparse

import torch

from backtrack.judge import fitted, harm, refusals
from model.errors import Help, InputError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("fit", help="on answers that people have labelled").add_argument
    add("--kind", choices=("refusals", "harm"), default="refusals", help="what the labels say")
    add("--data", nargs="+", required=True, metavar="FILE", help="XSTest's completions, or GPTFuzzer's train.csv")
    add("--test", nargs="+", metavar="FILE", help="of harm: answers to other questions, GPTFuzzer's evaluate.csv")
    add("--out", required=True, metavar="NAME", help="writes NAME.json and NAME.safetensors")
    args = parser.parse_args()
    if args.test and args.kind != "harm":
        parser.error("--test goes with --kind harm; the refusal judge leaves out one model after the other")
    torch.set_num_threads(1)  # with two, they wait for each other: ten times as long on a busy machine
    fit_harm(args) if args.kind == "harm" else fit_refusals(args)


def fit_refusals(args: argparse.Namespace) -> None:
    fitted.check_out(args.out, refusals.KIND)
    answers = refusals.read_answers(args.data)
    left_out = refusals.leave_out_models(answers)
    for r in left_out:
        print(
            f"{r['model']}, left out: right on {100 * r['accuracy']:.1f}% of {r['answers']} answers, AUC {r['auc']:.3f}"
        )
    file = refusals.save(refusals.fit(answers), args.out, answers, left_out, args.data)
    print(f"fitted on all {len(answers)} answers; judge with --judge {file}")


def fit_harm(args: argparse.Namespace) -> None:
    fitted.check_out(args.out, harm.KIND)
    answers, test = harm.read_answers(args.data), harm.read_answers(args.test) if args.test else []
    if shared := {a.question for a in answers} & {a.question for a in test}:
        raise InputError(f"{args.test[0]}: {len(shared)} of its questions are in --data as well; they prove nothing")
    regression = refusals.fit(answers, harm.CHARACTERS)
    if test:
        r = harm.measured(regression, test)
        right = f"right on {100 * r['accuracy']:.1f}% of {r['answers']} answers, AUC {r['auc']:.3f}, F1 {r['f1']:.3f}"
        print(f"questions left out: {right}")
    file = harm.save(regression, args.out, answers, args.data, test)
    print(f"fitted on {len(answers)} answers; judge with --judge {file}")


if __name__ == "__main__":
    run(main)
