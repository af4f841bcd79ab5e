"""How a training went, from the metrics.jsonl of one or several runs; a colour for each run, held-out rows dashed.

    python -m backtrack.report curves runs/toy-0/sft runs/toy-0/dpo --out curves.png

One panel for the loss of each view (see backtrack/examples.py), one each for p([RESET]) after unsafe and after safe
prefixes, and for DPO's numbers: how many pairs are won, by what margin, and how far the log-probability of the chosen
and of the rejected sequence has moved from the reference.
"""

import json
import math
from pathlib import Path

from backtrack.report.picture import COLORS, legend, paper, save
from model import InputError

PANELS = {  # what train.py calls it -> title
    "reset_after_unsafe": "p([RESET]) after unsafe prefixes",
    "reset_after_safe": "p([RESET]) after safe prefixes",
    "accuracy": "DPO: pairs won",
    "margin": "DPO: margin",
    "chosen": "DPO: log π/π_ref, chosen",
    "rejected": "DPO: log π/π_ref, rejected",
}


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{what: [(step, value)]} of what has a panel; of held-out rows it is "heldout/what".

    A line that is no log line is passed over: a kill leaves half of one, a power cut zeros. Raises InputError if no
    line is left.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the --out of a training that has logged a step")
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        for name, value in values.items() if isinstance(values, dict) and "step" in values else ():
            if name.startswith("heldout/") and name.removeprefix("heldout/") not in PANELS:
                name = name.replace("heldout/", "heldout/loss/")
            if name.removeprefix("heldout/") in PANELS or "loss/" in name:
                found.setdefault(name, []).append((values["step"], value))
    if not found:
        raise InputError(f"{path}: holds no line that train.py has logged")
    return found


def show(runs: list[Path], out: Path) -> None:
    found = {str(run): read(run) for run in runs}
    names = list(dict.fromkeys(name.removeprefix("heldout/") for values in found.values() for name in values))
    panels = [name for name in names if name.startswith("loss/")] + [name for name in PANELS if name in names]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = paper(0.9 + 0.2 * len(runs) + 2 * rows, rows, columns)
    for ax, name in zip(axes.flat, panels, strict=False):
        for i, values in enumerate(found.values()):
            for prefix, line in (("", "-"), ("heldout/", "--")):
                x, y = zip(*values.get(prefix + name, [(math.nan, math.nan)]), strict=True)
                ax.plot(x, y, line, color=COLORS[(i + 1) % len(COLORS)], linewidth=1.4, marker=".", markersize=3)
        ax.set_title(PANELS.get(name, name.replace("loss/", "loss: ")))
        ax.grid(alpha=0.25)
        low, high = ax.dataLim.intervaly
        if name.startswith("loss/") and 0 < 5 * low < high:
            ax.set_yscale("log", subs=[])
            ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            ax.yaxis.set_major_formatter("{x:g}")
        elif name.startswith("reset_") or name == "accuracy":
            ax.set_ylim(-0.02, 1.02)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    legend(fig, {run: {"color": COLORS[(i + 1) % len(COLORS)]} for i, run in enumerate(found)})
    save(fig, out, "Training; held-out rows dashed")
