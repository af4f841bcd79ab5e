"""How often is an answer unsafe, helpful, refused, reset, and when does it come? Checkpoints side by side.

    python -m backtrack.evaluate --ckpt runs/toy-0/sft-baseline runs/toy-0/sft \
        --prompts runs/toy-0/data/prompts.jsonl --judge runs/toy-0/data/world.json --out runs/toy-0/eval.json
    python -m backtrack.evaluate --merge runs/toy-*/eval.json         # the same tables, pooled over seeds
    python -m backtrack.evaluate --ckpt runs/sft --prompts mt_bench.jsonl --mt-bench answers/   # for FastChat's judge

A prompt file is JSON lines: {"prompt": [messages] or a text, "set": NAME, "benign": bool}, optionally with "prefill",
text forced at the start of the answer. --judge is the toy world's world.json, a refusal judge, a Llama Guard directory
or a module:function of your own (backtrack/judge); it sees surviving text only. Without --judge nothing is judged; the
same command with it judges those answers later, when the models' memory is free. Every combination of --on-reset,
--reset-bias and --max-resets is run. --filter puts a filter in place of [RESET] (filter.py). A prompt for which one of
the models has no room is left out for all, and counted as skipped. With torchrun --nproc-per-node N the prompts are
shared out, one model on each device.

Every answer goes to a file beside OUT, ending in .answers.jsonl, as soon as it is there, and its verdict as soon as
that is there; the same command again goes on from there. OUT has the counts per checkpoint, combination and set, with
95% intervals (statistics.py), and McNemar's test of every checkpoint against the first. Timings mean most with
--batch-size 1, because answers of one batch wait for each other.
"""

import argparse
import json
from pathlib import Path

from backtrack.evaluate import mt_bench
from backtrack.evaluate.answers import CONDITION, adding_to, answer_all, answers_file, resolved
from backtrack.evaluate.counts import count, pool, print_side_by_side, print_table, with_intervals
from backtrack.evaluate.prompts import add_device, add_prompts, chosen
from backtrack.evaluate.results import write_result
from backtrack.run import launch, parallel
from backtrack.run.say import warn_of_slow_bfloat16
from model import InputError
from model.errors import BIAS, PROBABILITY, RESETS, SEED, TEMPERATURE, Help, between, positive, run
from model.files import check_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", nargs="+", help="model directories; the others are tested against the first")
    what.add_argument("--merge", nargs="+", help="earlier --out files to pool, one per seed")
    add_prompts(parser, required=False)
    add = parser.add_argument
    add("--url", nargs="+", help="vLLM servers that have the --ckpt, in their order; see backtrack/serve/remote.py")
    add("--judge", nargs="+", help="world.json, fitted judge, Llama Guard directory, module:function; or several")
    add("--judge-continuation", action="store_true", help="judge an answer without what it was forced to begin with")
    add("--judge-url", help="a vLLM server that has the guard; --judge is then for its tokenizer")
    add("--threshold", type=between(0, 1, float), default=0.5, help="a guard's: unsafe is a probability above it")
    add("--filter", help="a filter in place of [RESET]; made by backtrack.evaluate.filter")
    add("--any-depth", type=positive, metavar="N", help="ask anew after every N tokens, a control (any_depth.py)")
    add("--on-reset", nargs="+", choices=("truncate", "keep"), default=["truncate"], help="what a retry sees")
    add("--reset-bias", nargs="+", type=BIAS, default=[0.0], help="added to the logit of [RESET]")
    add("--max-resets", nargs="+", type=RESETS, default=[1], help="after so many, [RESET] is masked")
    add("--samples", type=positive, default=1, help="answers per prompt; for more than 1 set --temperature")
    add("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    add("--top-p", type=PROBABILITY, default=1.0, help="sample from the likeliest tokens of this total probability")
    add("--max-new-tokens", type=positive, default=80, help="of each attempt")
    add("--batch-size", type=positive, default=64, help="prompts answered at once")
    add("--seed", type=SEED, default=0, help="of the sampling")
    add_device(parser)
    add("--out", help="summary to write (.json); answers go beside it (.answers.jsonl)")
    add("--show", type=positive, metavar="N", help="print N prompts per set with their answers")
    add("--mt-bench", metavar="DIR", help="write answers for FastChat's judge to DIR, judge nothing")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together; drop what is said twice."""
    for name in ("sets", *CONDITION):
        if getattr(args, name):
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.judge and len(args.judge) == 1:
        args.judge = args.judge[0]
    if args.ckpt and not args.url:  # however it is spelled
        args.ckpt = list({resolved(ckpt): str(Path(ckpt)) for ckpt in reversed(args.ckpt)}.values())[::-1]
    conditions = len(args.on_reset) * len(args.reset_bias) * len(args.max_resets)
    for refused, why in (
        (args.url and len(args.url) != len(args.ckpt or []), "there must be one --url for each --ckpt"),
        (args.filter and (len(args.ckpt or []) != 1 or args.url), "--filter takes one --ckpt, on this machine"),
        (args.filter and args.mt_bench, "--mt-bench takes no --filter"),
        (args.any_depth and (args.url or args.filter or args.mt_bench), "--any-depth is for models on this machine"),
        (args.any_depth and not args.judge, "--any-depth needs a --judge that tells refusals"),
        (args.ckpt and not args.prompts, "--ckpt needs --prompts"),
        (args.ckpt and not args.mt_bench and not args.out, "--ckpt needs --out, or --mt-bench"),
        (
            args.samples > 1 and args.temperature == 0,
            "--samples needs a --temperature: greedy answers are all the same",
        ),
        (args.mt_bench and conditions > 1, "--mt-bench takes one --on-reset, --reset-bias and --max-resets"),
        (args.mt_bench and (args.samples > 1 or args.temperature), "--mt-bench: each category has its --temperature"),
    ):
        if refused:
            parser.error(why)


def merged(paths: list[str]) -> tuple[list[dict], list[dict]]:
    """The records and pairs of earlier results, pooled."""
    records, paired = [], []
    for path in paths:
        try:
            result = json.loads(Path(path).read_bytes())
            pool(result["records"] + result["paired"])  # fails on records that are not ours
            records += result["records"]
            paired += result["paired"]
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            raise InputError(f"{path}: not a result of this program; make it with --out") from None
    if not records:
        raise InputError(f"{paths[0]}: holds no results")
    return pool(records), pool(paired)


def evaluate(args) -> None:
    launch.check_device(args.device)
    warn_of_slow_bfloat16(args.dtype, args.device)
    if args.mt_bench:
        if parallel.size() > 1:
            raise InputError("--mt-bench answers in one process; start it without torchrun")
        mt_bench.answer_all(chosen(args), args)
        return
    if args.out:
        check_file(args.out)
    if args.merge:
        records, paired = merged(args.merge)
        skipped = []
    else:
        prompts = chosen(args)
        with adding_to(answers_file(args.out)):
            answers, skipped = answer_all(prompts, args)
        records, paired = count(answers, prompts, skipped)
    records, paired = with_intervals(records, paired)
    if args.out and parallel.rank() == 0:
        write_result(args.out, records=records, paired=paired, **({"skipped": skipped} if skipped else {}))
    print_table(records, paired)
    if args.show and args.ckpt:
        print_side_by_side(answers, prompts, args.show)


def main() -> None:
    with launch.together():
        evaluate(parse_args())


if __name__ == "__main__":
    run(main, ranks=True)
