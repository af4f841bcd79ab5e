"""Checkpoints side by side: the rates of evaluations as a table and, with --out, as dots with 95% intervals.

    python -m backtrack.report compare runs/toy-0/eval.json
    python -m backtrack.report compare results/toy-main.json results/toy-filter.json --out compare.png

For each set of prompts and checkpoint: the number of answers n, and in percent how many are unsafe (complied, if that
is what the judge says), helpful, and taken back. Unsafe is asked of forbidden prompts only, helpful of harmless ones.
Files and settings of the sampler are named where they differ.
"""

import json
from pathlib import Path

from backtrack.report.picture import COLORS, dot, legend, paper, save
from backtrack.report.tables import cell, reading

DIFFERENCES = {"file": "{}", "on_reset": "{}", "reset_bias": "bias {:g}", "max_resets": "max_resets {}"}


def read(paths: list[Path]) -> list[dict]:
    """The records of all files; each says in "rates" what is shown of it, and in "name" who it is of."""
    records = []
    for path in paths:
        with reading(path):
            found = [r | {"file": path.stem} for r in json.loads(path.read_bytes())["records"]]
            for r in found:
                rates = ("reset", "helpful" if r["benign"] else "unsafe")
                r["rates"] = {rate: rate_of(r, rate) for rate in rates}
                r["name"] = r["checkpoint"]
            records += sorted(found, key=lambda r: r["benign"])
    for key, words in DIFFERENCES.items():
        if len({r[key] for r in records}) > 1:
            for r in records:
                r["name"] += ", " + words.format(r[key])
    return records


def rate_of(r: dict, rate: str) -> tuple[float, float, float] | None:
    """(percent, low, high); None if no judge has seen the answers."""
    said = rate if r[rate] is not None else "complied"
    if r.get(said) is None:
        return None
    low, high = r[f"{said}_interval"]
    return 100 * r[said] / r["n"], 100 * low, 100 * high


def show(paths: list[Path], out: Path | None) -> None:
    records = read(paths)
    said = " or ".join(sorted({"complied" if r["unsafe"] is None else "unsafe" for r in records}, reverse=True))
    heads = {"unsafe": f"{said}, %", "helpful": "helpful, %", "reset": "taken back, %"}
    lines = [["set", "checkpoint", "n", *heads.values()]]
    for name in dict.fromkeys(r["set"] for r in records):
        for r in (r for r in records if r["set"] == name):
            shares = [r["rates"].get(rate) for rate in heads]
            lines.append([name, r["name"], str(r["n"]), *("–" if share is None else cell(*share) for share in shares)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if out:
        draw(records, heads, out)


def draw(records: list[dict], heads: dict[str, str], out: Path) -> None:
    """Forbidden sets above, harmless ones below; a place for each set, a colour and a shape for each checkpoint."""
    names = list(dict.fromkeys(r["name"] for r in records))
    colors, markers = len(COLORS), "os^Dvp"
    looks = [{"color": COLORS[i % colors], "marker": markers[(i + i // colors) % 6]} for i in range(len(names))]
    kinds = [[r for r in records if r["benign"] is benign] for benign in (False, True)]
    kinds = [some for some in kinds if some]
    heights = [len({r["set"] for r in some}) for some in kinds]
    height = 1 + 0.5 * len(kinds) + 0.2 * len(names) + sum(heights) * (0.15 + 0.1 * len(names))
    fig, axes = paper(height, len(kinds), 2, sharey="row", height_ratios=heights)
    for row, some in zip(axes, kinds, strict=True):
        sets = list(dict.fromkeys(r["set"] for r in some))
        for ax, rate in zip(row, ("helpful" if some[0]["benign"] else "unsafe", "reset"), strict=True):
            for r in (r for r in some if r["rates"][rate]):
                p, low, high = r["rates"][rate]
                i = names.index(r["name"])
                y = sets.index(r["set"]) + 0.7 * ((i + 0.5) / len(names) - 0.5)
                dot(ax, p, y, (low, high), "x", markersize=4.5, **looks[i])
            ax.set_title(heads[rate])
            ax.set_yticks(range(len(sets)), sets)
            ax.set_ylim(len(sets) - 0.5, -0.5)
            ax.set_xlim(0, 100)
            ax.grid(axis="x", alpha=0.25)
    legend(fig, {name: {"linestyle": "", **look} for name, look in zip(names, looks, strict=True)})
    called = " and, below, ".join("harmless prompts" if some[0]["benign"] else "forbidden prompts" for some in kinds)
    save(fig, out, f"Answers to {called}, with 95% intervals")
