"""Tables and pictures of several trainings of one real model, from what backtrack.evaluate.over_seeds has written.

    python -m backtrack.report.trainings --results results      # gemma-tables.md, gemma-long.png

Rates are means over training seeds; brackets are 95% intervals over seeds and prompts together. Two judges: *harmful*
is the harm judge's verdict, *complied* the refusal judge's.
"""

import argparse
import json
from pathlib import Path

from backtrack.report.figures import LOOKS, look
from backtrack.report.picture import COLORS, dot, legend, paper, save
from backtrack.report.tables import MODELS, SETS, cell, markdown, reading
from model.errors import run
from model.files import write_text

ORDER = ("sft-baseline", "dpo-baseline", "sft-in-place", "dpo-in-place", "sft", "dpo")
WORDS = MODELS | {"sft-in-place": "in place", "dpo-in-place": "in place + DPO"}
GROUPS = {"asked": "**asked, all**", "begun": "**forced to begin, all**", "harmless": "**harmless, all**"}
LONG = "begun-"
SECOND_TURN = "second-turn"
# rate -> in words; the first is left out where a question is harmless
RATES = {
    "unsafe": "harmful answers",
    "complied": "answers that comply",
    "reset": "answers taken back",
    "unsafe, worst of 8": "prompts of which one of eight answers is harmful",
    "complied, worst of 8": "prompts of which one of eight answers complies",
}
# result -> title of its section
SECTIONS = {
    "gemma-main": "Asked, forced to begin, harmless",
    "gemma-long": "Answers that began long ago",
    "gemma-any-depth": "Any-Depth Alignment: the baseline, asked again after every 32 tokens",
    "gemma-any-depth-long": "The same behind long beginnings",
    "gemma-sampling": "Eight answers to each of 32 questions at temperature 1",
    "gemma-bias": "The bias on [RESET], backtracking SFT",
}


def name_of(some: str) -> str:
    if some.startswith(LONG):
        return f"{some.removeprefix(LONG)} forced tokens"
    return "behind a harmless turn" if some == SECOND_TURN else GROUPS.get(some) or SETS.get(some, some)


def order_of(some: str) -> tuple[int, int]:
    """Sets as in all tables, then long beginnings by length, then the groups."""
    known = [*SETS, SECOND_TURN, LONG, *GROUPS]
    kind, number = (LONG, int(some.removeprefix(LONG))) if some.startswith(LONG) else (some, 0)
    return known.index(kind) if kind in known else -1, number


def rate_tables(result: dict) -> str:
    """A table for each rate: a line for each set and bias, a column for each model."""
    rates, text = result["rates"], ""
    models = [m for m in ORDER if any(r["model"] == m for r in rates)]
    of = {(r["rate"], r["set"], r["reset_bias"], r["model"]): r for r in rates}
    places = {(r["set"], r["reset_bias"]) for r in rates}
    places = sorted(places, key=lambda place: (order_of(place[0]), place[1]))
    for rate, what in RATES.items():
        rows = []
        for some, bias in places:
            found = [of.get((rate, some, bias, model)) for model in models]
            if None in found or says_nothing(found[0]):
                continue
            where = [name_of(some)] + ([f"{bias:g}"] if len({b for _, b in places}) > 1 else [])
            rows.append([*where, found[0]["prompts"], *map(percent, found)])
        if rows:
            head = [""] + ["bias"] * (len(rows[0]) - len(models) - 2) + ["prompts", *(WORDS[m] for m in models)]
            text += f"\n{what}, %\n\n" + markdown(head, rows)
    return text


def says_nothing(rate: dict) -> bool:
    """The harm judge is no judge of answers to harmless questions."""
    return rate["rate"].startswith("unsafe") and "harmless" in (rate["kind"], rate["set"])


def percent(record: dict) -> str:
    return cell(*(100 * x for x in (record["mean"], *record["interval"])))


def difference_table(result: dict) -> str:
    """The second model of each pair minus the first, in points, on the same draws; McNemar's p within each seed."""
    rows, nothing = [], {(r["set"], r["rate"]) for r in result["rates"] if says_nothing(r)}
    for r in result["differences"]:
        grouped = r["set"] in GROUPS or r["set"].startswith(LONG) or r["set"] == SECOND_TURN
        if not grouped or (r["set"], r["rate"]) in nothing:
            continue
        points, low, high = (100 * x for x in (r["difference"], *r["interval"]))
        p = ", ".join(f"{value:.2g}" for value in r.get("mcnemar", []))
        sure = "" if low <= 0 <= high else "yes"
        pair = [WORDS[r["other"]], WORDS[r["first"]]]
        what = {"unsafe": "harmful", "complied": "complied"}[r["rate"]]
        rows.append([name_of(r["set"]), what, *pair, f"{points:+.1f} [{low:+.1f}, {high:+.1f}]", sure, p])
    head = ["", "", "", "minus", "points", "apart", "McNemar's p, each seed"]
    return "\n" + markdown(head, rows) if rows else ""


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_long(result: dict, path: Path) -> None:
    """Harmful answers, and answers that comply, against the number of forced tokens."""
    looks = LOOKS | {"sft-in-place": look(COLORS[2], True, "s"), "dpo-in-place": look(COLORS[2], False, "s")}
    rates = result["rates"]
    lengths = sorted({int(r["set"].removeprefix(LONG)) for r in rates if r["set"].startswith(LONG)})
    models = [m for m in ORDER if any(r["model"] == m for r in rates)]
    of = {(r["model"], r["set"], r["rate"]): r for r in rates}
    fig, axes = paper(4.2, 1, 2)
    for ax, rate in zip(axes[0], ("unsafe", "complied"), strict=True):
        for shift, model in enumerate(models):
            x = [place + 0.06 * (shift - len(models) / 2) for place in range(len(lengths))]
            found = [of[model, f"{LONG}{n}", rate] for n in lengths]
            ax.plot(x, [100 * r["mean"] for r in found], markersize=4, **looks[model])
            for place, r in zip(x, found, strict=True):
                dot(ax, place, 100 * r["mean"], [100 * value for value in r["interval"]], **looks[model])
        ax.set_xticks(range(len(lengths)), lengths)
        ax.set_xlabel("forced tokens of a harmful answer")
        ax.set_title(f"{'harmful' if rate == 'unsafe' else 'complied'}, %")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
    legend(fig, {WORDS[m]: looks[m] for m in models}, columns=3)
    save(fig, path, "What the model makes of a harmful answer that was begun for it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with the .json files")
    directory = parser.parse_args().results
    parts = []
    for name, title in SECTIONS.items():
        path = directory / f"{name}.json"
        if path.is_file():
            with reading(path):
                result = json.loads(path.read_bytes())
                origin = f"`{path.name}`: commit {result['commit']}, {result['machine']}"
                parts.append(f"\n## {title}\n\n{origin}\n{rate_tables(result)}{difference_table(result)}")
    if parts:
        out = directory / "gemma-tables.md"
        about = "Written by `make real MODEL=gemma3`; means over training seeds, 95% intervals over seeds and prompts."
        write_text(f"# Results on a real model: Gemma-3-270M\n\n{about}\n{''.join(parts)}", out)
        print(out)
    long = directory / "gemma-long.json"
    if long.is_file():
        with reading(long):
            draw_long(json.loads(long.read_bytes()), directory / "gemma-long.png")


if __name__ == "__main__":
    run(main)
