"""DPO's reference: log π_ref of every sequence of a run, taken once before the first step.

A second model in memory would say the same in every step. The numbers are kept in OUT.reference/,
a line for each step, under a hash of all that they depend on: a run that goes on after a kill, or is
tried again with another β, does not compute them anew, and one with other weights or data never
finds them.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from backtrack.run import parallel
from backtrack.run.metrics import keep_head
from backtrack.run.progress import Run, digest
from backtrack.run.say import say
from backtrack.trees import Tree, make_batch
from model import Transformer
from model.checkpoint import weights_digest

# What the numbers depend on, of the run's settings.
NAMES = ["init", "data", "heldout", "steps", "batch_size", "grad_accum", "max_length", "seed"]
NAMES += ["dtype", "method", "restart"]


def settings(init: str, heldout: list) -> dict:
    """What a run of DPO must not change when it goes on, besides its arguments and its data."""
    return {"init": weights_digest(init), "heldout": digest(heldout)}


def logprobs(
    run: Run, model: Transformer, groups: Iterable[list[Tree]], count: int, taken: Callable
) -> list[list[float]]:
    """For each of `count` groups of trees, log π_ref of every sequence in it, by the model as it is.

    taken(model, batch) -> (N,): train.py's logprobs.
    """
    file = kept_in(run)
    found = parallel.from_first(lambda: recover(file))[:count]
    if len(found) == count:
        say(f"reference log-probs: read from {file}")
        return found
    if found:
        say(f"reference log-probs: those of {len(found)} steps are there already")
    for number, trees in enumerate(groups):
        if number < len(found):
            continue
        values = compute(run, model, trees, taken)
        found.append(values)
        if number or values:  # nothing at all: --steps 0
            append(file, {"step": number, "values": values})
        if len(found) % 50 == 0:
            say(f"reference log-probs: {len(found)} of {count} steps")
    return found


def compute(run: Run, model: Transformer, trees: list[Tree], taken: Callable) -> list[float]:
    for few in parallel.micro_batches(trees, run.options.batch_size):
        batch = make_batch(few, run.machine.device)
        with torch.no_grad(), run.machine.autocast():
            sums = batch.by_sequence(taken(model, batch))  # (S,)
        parts = sums.split([len(tree.names) for tree in few])
        for tree, part in zip(few, parts, strict=True):
            tree.reference = part.tolist()
    # A tree has its numbers on the process that computed it; on the others it has None.
    by_rank = parallel.exchange([tree.reference for tree in trees])
    values: list[float] = []
    for answers in zip(*by_rank, strict=True):
        values += next(filter(None, answers))
    return values


def give(trees: list[Tree], values: list[float]) -> list[Tree]:
    """Hand each tree its sequences' share of `values`."""
    first = 0
    for tree in trees:
        tree.reference = values[first : first + len(tree.names)]
        first += len(tree.names)
    return trees


# ── On disk ───────────────────────────────────────────────────────────────────────────────────────


def kept_in(run: Run) -> Path:
    key = [run.settings[name] for name in NAMES]
    key += [run.machine.device, torch.__version__]
    out = Path(run.options.out).resolve()
    return out.with_name(f"{out.name}.reference") / f"{digest(key)}.jsonl"


def recover(file: Path) -> list[list[float]]:
    """The lists that are there, in the order of steps; what a kill left behind them is dropped."""
    if not file.is_file():
        return []
    records = keep_head(
        file, lambda number, record: "values" in record and record["step"] == number
    )
    return [record["values"] for record in records]


def append(file: Path, record: dict) -> None:
    if parallel.rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as f:
            f.write(json.dumps(record) + "\n")
