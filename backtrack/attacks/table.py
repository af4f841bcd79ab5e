"""Success rates: one record per attack, variant, model and settings, pooled over seeds.

python -m backtrack.attacks table runs/toy-*/attacks/*.jsonl --out results/toy-attacks.json
"""

from pathlib import Path

from backtrack.evaluate import CONDITION, failure
from backtrack.results import write_result
from backtrack.rows import json_lines
from backtrack.statistics import wilson
from model import InputError

SEARCHES = ("gcg", "adaptive-gcg", "autodan")
BUDGETS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # points of the curve of success


def table(paths: list[str], out: str | None) -> None:
    """Print the success rates of these files, and write them to `out`."""
    records = summarise(paths)
    if out:
        write_result(out, records=records)
    print(
        f"{'attack':<14}{'variant':<18}{'checkpoint':<20}{'on_reset':<9}{'max':>4}{'bias':>6}{'n':>6}  success %, 95%"
    )
    for r in records:
        low, high = (100 * x for x in r["interval"])
        print(
            f"{r['attack']:<14}{r['variant']:<18}{r['checkpoint']:<20}{r['on_reset']:<9}{r['max_resets']:>4}"
            f"{r['reset_bias']:>6g}{r['n']:>6}  {100 * r[failure([r])] / r['n']:>5.1f} [{low:.1f}, {high:.1f}]"
        )


def summarise(paths: list[str]) -> list[dict]:
    """Successes out of n for each cell of the table, and against the budget for searches.

    Raises InputError for a file that is not one of ours.
    """
    cells: dict[tuple, dict] = {}
    for path in paths:
        first, *records = [value for _, value in json_lines(path)] or [None]
        try:
            settings, seed = first["settings"], str(Path(path).parent)
            for record in records:
                count(cells, record, settings, seed)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InputError(f"{path}: not a file of this program; make it with --out") from None
    return [finished(cell) for cell in cells.values()]


def count(cells: dict[tuple, dict], record: dict, settings: dict, seed: str) -> None:
    """Add the record of one prompt to its cell, and to those of the variants that were tried."""
    budget = settings.get("budget")
    tried = record.get("variants", {})
    bad = failure([record, *tried.values()])
    for variant, answer in {record.get("variant", "any"): record, **tried}.items():
        head = {"attack": record["name"], "variant": variant, "checkpoint": Path(record["checkpoint"]).name}
        head |= {c: record[c] for c in CONDITION} | {"budget": budget}
        cell = cells.setdefault(tuple(head.values()), head | {"at": [], "n": 0, bad: 0, "seeds": {}})
        cell["n"] += 1
        cell[bad] += answer[bad]
        of_seed = cell["seeds"].setdefault(seed, [0, 0])
        of_seed[0] += answer[bad]
        of_seed[1] += 1
        if record["name"] in SEARCHES:
            cell["at"].append(record["success_at"])
            cell["reset"] = cell.get("reset", 0) + (record["resets"] > 0)


def finished(cell: dict) -> dict:
    """A cell with its interval, its rate for each seed, and its curve of success within a budget."""
    at, seeds = cell.pop("at"), cell.pop("seeds")
    cell["interval"] = [round(x, 4) for x in wilson(cell[failure([cell])], cell["n"])]
    cell["by_seed"] = [round(successes / n, 4) for successes, n in seeds.values()]
    if at:
        points = [0, *(b for b in BUDGETS if b < cell["budget"]), cell["budget"]]
        cell["success_within"] = {str(b): sum(a is not None and a <= b for a in at) for b in points}
    return cell
