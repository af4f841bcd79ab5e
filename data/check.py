"""Look through preference rows before a training run: all that is wrong with them, at once.

    python -m data.check mine.jsonl more.jsonl                            # what train.py would refuse, and what is odd
    python -m data.check mine.jsonl --init runs/base --prompts eval.jsonl # lengths in tokens; are prompts trained on?

train.py ends at the first bad line; this names every kind of problem, how often it occurs and where first. It exits
with 1 if train.py would refuse a line, else with 0.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator

from backtrack import rows as reader
from data.prepare import question, read_text, words_of
from data.prepare.prompts import questions_of
from model import InputError, load_tokenizer
from model.errors import Help, run

PARTS = ("prompt", "chosen", "rejected")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.check", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROWS", help="files of preference rows, plain or .gz")
    add("--init", metavar="MODEL", help="the model to train: its tokenizer counts tokens and renders chats")
    add("--prompts", nargs="+", default=[], metavar="FILE", help="evaluation prompts that should not be trained on")
    args = parser.parse_args()
    tok = load_tokenizer(args.init) if args.init else None
    refused: dict[str, list[str]] = defaultdict(list)  # what is wrong -> where
    rows = [(where, row) for path in args.rows for where, row in usable_rows(path, tok, refused)]
    if not rows and not refused:
        raise InputError(f"{', '.join(args.rows)}: no rows")
    odd = oddities(rows, args.prompts, tok)
    print(summary([row for _, row in rows]))
    if tok and rows:
        print(*lengths(rows, tok), sep="\n")
    for head, found in (("refused by train.py", refused), ("odd", odd)):
        for what, places in sorted(found.items(), key=lambda item: -len(item[1])):
            print(f"{head}: {len(places)} × {what}: {reader.several(places)}")
    if refused:
        sys.exit(1)


def usable_rows(path: str, tok, refused: dict) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of every line that can be trained on. Of the others it notes why and where."""
    for number, line in enumerate(read_text(path, lists=False).split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = reader.as_conversation(json.loads(line), where)
            reader.check_row(row, where)
            if tok:
                reader.encode_row(row, tok)
            yield where, row
        except (ValueError, RecursionError) as error:  # no JSON, or an InputError
            what = str(error).removeprefix(f"{where}: ") if isinstance(error, InputError) else "not a line of JSON"
            refused[what].append(where)


def oddities(rows: list[tuple[str, dict]], evaluation: list[str], tok) -> dict[str, list[str]]:
    """What train.py takes, and yet is seldom meant -> where. Texts are compared by words_of."""
    odd, first, evaluated = defaultdict(list), {}, questions_of(evaluation)
    markers = reader.special_text(tok) if tok else re.compile("|".join(reader.MARKERS))
    for where, row in rows:
        if found := markers.search(json.dumps(row, ensure_ascii=False)):
            odd["text spells special tokens: is a chat template applied already?"].append(f"{where} ({found[0]})")
        if row.get("rejected") and answer(row, "chosen") == answer(row, "rejected"):
            odd["chosen and rejected are the same"].append(where)
        texts = [row["text"]] if "prompt" not in row else [turn["content"] for turn in row["prompt"]]
        earlier = first.setdefault(
            tuple(map(words_of, [*texts, answer(row, "chosen"), answer(row, "rejected")])), where
        )
        if earlier != where:
            odd["the same row as before"].append(f"{where} (as {earlier})")
        if path := evaluated.get(words_of(question(row))):
            odd[f"the first question is in {path}"].append(where)
    return odd


def answer(row: dict, side: str) -> str:
    return row[side][0]["content"].strip() if row.get(side) else ""


def summary(rows: list[dict]) -> str:
    pairs = [row for row in rows if row.get("rejected") is not None]
    unsafe, texts = sum(bool(row.get("unsafe")) for row in pairs), sum("prompt" not in row for row in rows)
    return f"{len(rows)} rows, {len(pairs)} with a rejected answer, {unsafe} unsafe, {texts} of plain text"


def lengths(rows: list[tuple[str, dict]], tok) -> Iterator[str]:
    """Terminal lines: tokens of the parts of a row. A whole row, with [RESET] and an end, is what --max-length cuts."""
    encoded = [(where, reader.encode_row(row, tok)) for where, row in rows]
    parts = {name: [(len(getattr(row, name) or []), where) for where, row in encoded] for name in PARTS}
    whole = [sum(n for n, _ in of_row) + 2 for of_row in zip(*parts.values(), strict=True)]
    parts["whole row"] = [(n, where) for n, (where, _) in zip(whole, encoded, strict=True)]
    yield f"{'tokens':<10}{'median':>8}{'95%':>8}{'longest':>8}"
    for name, found in parts.items():
        counts = sorted(n for n, _ in found)
        median, high = statistics.median_low(counts), counts[int(0.95 * (len(counts) - 1))]
        yield f"{name:<10}{median:>8}{high:>8}{max(found)[0]:>8}  {max(found)[1]}"


if __name__ == "__main__":
    run(main)
