"""Published data sets -> the JSON lines that train.py and backtrack.evaluate read.

    python -m data.prepare hh --in harmless-base/train.jsonl.gz --out hh.jsonl --valid valid.jsonl
    python -m data.prepare hh --in harmless-base/train.jsonl.gz --out hh.jsonl --guard GUARD_DIR
    python -m data.prepare oasst2 --in oasst2_ready.trees.jsonl.gz --out oasst.jsonl
    python -m data.prepare prompts --in harmful_behaviors.csv xstest_prompts.csv --out prompts.jsonl
    python -m data.prepare prompts --in safety_only_data_Instructions.json --exclude prompts.jsonl \\
        --out train.jsonl --valid dev.jsonl --valid-percent 20
    python -m data.prepare rows --in mine.jsonl --judge Meta-Llama-Guard-2-8B --out labelled.jsonl
    python -m data.prepare prompts --help       # what the source looks like and where to get it

What does not fit is skipped whole, never repaired, and counted by reason on stderr. The same input
gives the same bytes. Nothing is downloaded, shuffled, deduplicated, or cut to a length.

Which rows `--valid` holds out depends on their first question alone, and what is held out at 5% is
held out at 20% too. For a third part split the held-out file once more, with a smaller percentage.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from backtrack.attacks.no_search import OPENING
from backtrack.judge.refusals import plain_text
from backtrack.rows import read_rows
from backtrack.run.say import say
from data.prepare import Outcome, hh, judged, oasst, prompts, question, words_of
from model.errors import Help, InputError, between, device, positive, run
from model.files import check_file, write_text

UNITS = {"hh": "pairs", "rows": "rows", "prompts": "prompts", **dict.fromkeys(("oasst", "oasst2"), "prompter messages")}


def main() -> None:
    args = parse_args()
    check_paths(args)
    outcomes, notes = read(args), args.out.with_name(f"{args.out.name}.guard.jsonl")
    if args.judge:
        outcomes = judged.judged(outcomes, args, notes, unsafe_only=args.command == "hh")
    files, skipped = sort_out(outcomes, args)
    written, lost = sum(map(len, files.values())), skipped.total()
    if written:
        for path, lines in files.items():
            write_text("".join(lines), path)
    if written and args.judge:
        notes.unlink()
    say(f"{args.command}: {written + lost} {UNITS[args.command]} read, {written} rows written, {lost} skipped")
    for path, lines in files.items():
        say(f"  {len(lines):7d}  written to {path}")
    for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0])):
        say(f"  {count:7d}  skipped: {reason}")
    if not written:
        raise InputError(f"{', '.join(args.inputs)}: no usable row, nothing was written: is this the right command?")


def read(args) -> Iterator[Outcome]:
    """The outcomes of all input files, one after the other."""
    for path in args.inputs:
        if args.command == "hh":
            yield from hh.hh_rows(path, unsafe=not args.helpful)
        elif args.command == "rows":
            yield from (row for _, row in read_rows(path))
        elif args.command in ("oasst", "oasst2"):
            yield from oasst.oasst_rows(path)
        else:
            for outcome in prompts.prompt_rows(path, args.benign):
                yield outcome
                if args.forced and isinstance(outcome, dict) and not outcome["benign"]:
                    yield outcome | {"set": f"{outcome['set']}-forced", "prefill": outcome.get("target", OPENING)}


def sort_out(outcomes: Iterable[Outcome], args) -> tuple[dict[Path, list[str]], Counter]:
    """(the lines of each file to write, how many were skipped for each reason)"""
    files: dict[Path, list[str]] = {path: [] for path in (args.out, args.valid) if path}
    skipped, elsewhere = Counter(), prompts.questions_of(args.exclude)
    for outcome in outcomes:
        line = json.dumps(outcome, ensure_ascii=False) + "\n"
        if isinstance(outcome, dict) and (path := elsewhere.get(words_of(question(outcome)))):
            outcome = f"also in {path}"
        elif isinstance(outcome, dict) and re.search(r"[\ud800-\udfff]", line):
            outcome = "broken Unicode (half a surrogate pair)"
        if isinstance(outcome, str):
            skipped[outcome] += 1
            continue
        path = args.valid if args.valid and is_held_out(outcome, args.valid_percent) else args.out
        files[path].append(line)
        if sum(map(len, files.values())) == args.limit:
            break
    return files, skipped


def is_held_out(row: dict, percent: float) -> bool:
    """By hash of the first user message: all rows of one question go to the same side."""
    # Sets of prompts hold a question twice, with another full stop. Preference rows are split by the text itself.
    text = plain_text(question(row)) if "set" in row else question(row)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 * 100 < percent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data.prepare", description=__doc__, formatter_class=Help)
    parser.set_defaults(judge=None)  # for the commands without it
    commands = parser.add_subparsers(dest="command", required=True)
    sources = {
        "hh": (hh, "Anthropic HH-RLHF pairs"),
        "rows": (judged, "preference rows of your own, labelled by a judge"),
        "oasst2": (oasst, "OpenAssistant trees"),
        "prompts": (prompts, "prompts of safety sets and of harmless ones"),
    }
    for name, (source, what) in sources.items():
        more = {"aliases": ["oasst"]} if name == "oasst2" else {}
        sub = commands.add_parser(name, help=what, description=source.__doc__, formatter_class=Help, **more)
        add_files(sub.add_argument)
        add_own(sub, name)
    return parser.parse_args()


def add_files(add) -> None:
    add("--in", dest="inputs", nargs="+", required=True, metavar="FILE", help="downloaded files, plain or .gz")
    add("--out", type=Path, required=True, help="JSON lines")
    add("--limit", type=positive, help="stop after this many rows (a quick try)")
    add("--valid", type=Path, help="hold out all rows of some questions into this file")
    add("--valid-percent", type=between(0, 99, float, above=True), default=5.0, help="how many, about")
    in_others = "skip rows whose first question is in these files, whatever its case and punctuation"
    add("--exclude", nargs="+", default=[], metavar="FILE", help=f"{in_others}; any that `prompts` reads")


def add_own(sub: argparse.ArgumentParser, name: str) -> None:
    """What one command has and the others have not."""
    add = sub.add_argument
    if name == "hh":
        either = sub.add_mutually_exclusive_group()
        either.add_argument("--helpful", action="store_true", help="helpful-* files: no unsafe flag")
        either.add_argument("--guard", dest="judge", metavar="DIR", help="Llama Guard: keep safe against unsafe")
    if name == "rows":
        add("--judge", required=True, metavar="J", help="Llama Guard, or any that backtrack.judge knows")
    if name in ("hh", "rows"):
        on, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
        add("--judge-url", metavar="URL", help="a vLLM server that has the guard")
        add("--device", type=device, default=on, help="where the guard runs")
        add("--dtype", choices=("float32", "bfloat16"), default=dtype, help="of its weights")
    elif name == "prompts":
        forced = "each forbidden prompt once more, as set NAME-forced: its answer must begin with the target or a yes"
        add("--forced", action="store_true", help=forced)
        of_lists = "the prompts of lists that do not say so are"
        either = sub.add_mutually_exclusive_group()
        either.add_argument("--benign", action="store_true", default=None, help=f"{of_lists} harmless")
        either.add_argument("--unsafe", dest="benign", action="store_false", help=f"{of_lists} forbidden")


def check_paths(args) -> None:
    """Before any work is done, name the path that is wrong."""
    inputs, outputs = [*args.inputs, *args.exclude], [path for path in (args.out, args.valid) if path]
    for name in inputs:
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file; `{args.command} --help` says where to download the data")
    for path in outputs:
        check_file(path)
        if path.suffix == ".gz":
            raise InputError(f"{path}: rows are written plain; name a file without .gz, and gzip it afterwards")
    read, written = ({Path(path).resolve() for path in paths} for paths in (inputs, outputs))
    if read & written or len(written) < len(outputs):
        raise InputError(f"{', '.join(map(str, outputs))}: read or written twice: name another file to write to")


if __name__ == "__main__":
    run(main)
