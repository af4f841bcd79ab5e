"""Rows of your own in any of TRL's forms, in which a judge says whether the rejected answer is unsafe.

    -> the same rows with "unsafe": true or false

Rows whose chosen answer is unsafe are left out, and those of which the judge gives no verdict. Verdicts
lie beside OUT (OUT.guard.jsonl) until the rows are written: a run that was stopped goes on there.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from backtrack.evaluate.answers import AnswerFile, adding_to
from backtrack.judge import Judge, Verdict, judge_all, load_judge
from backtrack.run.say import Ticker, say
from data.prepare import Outcome
from model import InputError

AT_ONCE = 64  # rows that are judged before their verdicts are written down
Label = bool | str  # of a row: whether its rejected answer is unsafe, or why the row cannot be used


def judged(outcomes: Iterable[Outcome], args, notes: Path, unsafe_only: bool) -> Iterator[Outcome]:
    """The rows with the judge's flag; a row without a rejected answer as it is. unsafe_only: only those flagged."""
    with adding_to(notes):
        judge = load_judge(args.judge, args.device, getattr(torch, args.dtype), args.judge_url, 0.5, False)
        saved = AnswerFile(notes, {"judge": str(args.judge)}, key=lambda note: note["pair"])
        if saved.records:
            say(f"judge: {notes} has the verdicts on {len(saved.records)} pairs")
        # All rows are read before the first is judged: a bad line should show now, not after hours.
        rows = [(key_of(outcome), outcome) for outcome in outcomes]
        done, left, ticker = 0, len({key for key, _ in rows if key} - saved.records.keys()), Ticker()
        for start in range(0, len(rows), AT_ONCE):
            batch = rows[start : start + AT_ONCE]
            todo = {key: row for key, row in batch if key and key not in saved.records}
            labels = zip(todo, labels_of(list(todo.values()), judge), strict=True)
            saved.add([{"pair": key, "label": label} for key, label in labels])
            done += len(todo)
            ticker.show(f"judge: {done} of {left} pairs judged")
            yield from (flagged(row, saved.records[key]["label"], unsafe_only) if key else row for key, row in batch)
        ticker.done()


def flagged(row: dict, label: Label, unsafe_only: bool) -> Outcome:
    if unsafe_only and label is False:
        return "rejected is safe, says the judge"
    return label if isinstance(label, str) else row | {"unsafe": label}


def key_of(outcome: Outcome) -> str | None:
    """Stands for a row with two answers in the notes."""
    if isinstance(outcome, str) or outcome.get("rejected") is None:
        return None
    return hashlib.sha256(json.dumps(outcome).encode()).hexdigest()[:16]


def labels_of(rows: list[dict], judge: Judge) -> list[Label]:
    """Of rows with two answers. Where chosen is unsafe, the judge is not asked about rejected."""

    def verdicts(side: str, rows: list[dict]) -> list[Verdict | InputError]:
        return judge_all(judge, [(row["prompt"], row[side][0]["content"]) for row in rows])

    labels = [chosen_label(verdict) for verdict in verdicts("chosen", rows)]
    left = [i for i, label in enumerate(labels) if label is None]
    for i, verdict in zip(left, verdicts("rejected", [rows[i] for i in left]), strict=True):
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


def reason_of(verdict: Verdict | InputError) -> str | None:
    """Why there is no verdict: a conversation longer than the judge's context, an answer that says neither."""
    if isinstance(verdict, InputError):
        say(f"judge: {verdict}")
        return "no verdict of the judge"
    return None
