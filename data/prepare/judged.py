"""Rows of your own in any of TRL's forms, in which a judge says whether the rejected answer is unsafe.

    -> the same rows with "unsafe": true or false

Rows whose chosen answer is unsafe are left out, and those of which the judge gives no verdict. Verdicts
lie beside OUT (OUT.guard.jsonl) until the rows are written: a run that was stopped goes on there.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from backtrack.judge import Judge, Verdict, judge_all, load_judge
from backtrack.judge.fitted import files_of
from backtrack.rows import json_line, json_lines
from backtrack.run.say import Ticker, say
from data.prepare import Outcome
from model import InputError
from model.checkpoint import weights_digest
from model.files import locked, write_text

AT_ONCE = 64  # rows that are judged before their verdicts are written down
Label = bool | str  # of a row: whether its rejected answer is unsafe, or why the row cannot be used


def judged(outcomes: Iterable[Outcome], args, notes: Path) -> Iterator[tuple[Outcome, Label | None]]:
    """Every row with its label, None where it has no rejected answer."""
    with locked(notes):
        judge = load_judge(args.judge, args.device, getattr(torch, args.dtype), args.judge_url, 0.5, False)
        labels = read_notes(notes, judge_digest(args.judge))
        # All rows are read before the first is judged: a bad line should show now, not after hours.
        rows = [(key_of(outcome), outcome) for outcome in outcomes]
        left = len({key for key, _ in rows if key} - labels.keys())
        done, began, ticker = 0, time.monotonic(), Ticker()
        with open(notes, "a", encoding="utf-8") as file:
            for start in range(0, len(rows), AT_ONCE):
                batch = rows[start : start + AT_ONCE]
                todo = {key: row for key, row in batch if key and key not in labels}
                for key, label in zip(todo, labels_of(list(todo.values()), judge), strict=True):
                    labels[key] = label
                    file.write(json_line({"pair": key, "label": label}) + "\n")
                file.flush()
                done += len(todo)
                minutes = (time.monotonic() - began) / max(1, done) * (left - done) / 60
                ticker.show(f"judge: {done} of {left} pairs judged, {minutes:.0f} minutes left")
                yield from ((row, labels.get(key)) for key, row in batch)
        ticker.done()


def judge_digest(spec: str) -> str:
    """Stands for the judge in the notes: a guard's directory, a file, a refusal judge or module:function."""
    if Path(spec).is_dir():
        return weights_digest(spec)
    files = [path for path in (Path(spec), *files_of(spec)) if path.is_file()]
    return hashlib.sha256(b"".join([spec.encode(), *(path.read_bytes() for path in files)])).hexdigest()[:16]


def key_of(outcome: Outcome) -> str | None:
    """Stands for a row with two answers in the notes."""
    if isinstance(outcome, str) or outcome.get("rejected") is None:
        return None
    return hashlib.sha256(json.dumps(outcome).encode()).hexdigest()[:16]


def read_notes(notes: Path, judge_id: str) -> dict[str, Label]:
    """Pair -> label, from an earlier run. If that was killed in the middle of a line, the line is cut off."""
    if not notes.is_file():
        write_text(json_line({"judge": judge_id}) + "\n", notes)
    with open(notes, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    head, *lines = [line for _, line in json_lines(notes)] or [None]
    if head != {"judge": judge_id}:
        raise InputError(f"{notes}: holds verdicts of another judge; delete it or choose another --out")
    if lines:
        say(f"judge: {notes} has the verdicts on {len(lines)} pairs")
    return {line["pair"]: line["label"] for line in lines}


def labels_of(rows: list[dict], judge: Judge) -> list[Label]:
    """Of rows with two answers. Where chosen is unsafe, the judge is not asked about rejected."""
    verdicts = judge_all(judge, [(row["prompt"], row["chosen"][0]["content"]) for row in rows])
    labels = [chosen_label(verdict) for verdict in verdicts]
    left = [i for i, label in enumerate(labels) if label is None]
    verdicts = judge_all(judge, [(rows[i]["prompt"], rows[i]["rejected"][0]["content"]) for i in left])
    for i, verdict in zip(left, verdicts, strict=True):
        labels[i] = reason_of(verdict) or verdict.failed
    return labels


def chosen_label(verdict: Verdict | InputError) -> Label | None:
    """Of a row whose chosen answer has this verdict. None: it depends on the rejected one."""
    if reason := reason_of(verdict):
        return reason
    if verdict.unsafe:
        return "chosen is unsafe, says the judge"
    # A judge that only tells who complies has found that chosen does: the question may be answered.
    return False if verdict.failed else None


def with_flag(pairs: Iterable[tuple[Outcome, Label | None]]) -> Iterator[Outcome]:
    """Rows of one's own, whose "unsafe" is what the judge says. Rows without a rejected answer stay as they are."""
    for row, label in pairs:
        yield label if isinstance(label, str) else row if label is None else row | {"unsafe": label}


def reason_of(verdict: Verdict | InputError) -> str | None:
    """Why there is no verdict: a conversation longer than the judge's context, an answer that says neither."""
    if isinstance(verdict, InputError):
        say(f"judge: {verdict}")
        return "no verdict of the judge"
    return None
