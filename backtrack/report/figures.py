"""The pictures of the experiments, from the numbers that `make eval attack` leaves in results/.

    python -m backtrack.report.figures --results results

    main.png       unsafe and helpful answers of the models, as they are asked and when an answer is forced to begin
    bias.png       the dial: what a bias on the logit of [RESET] buys, and what it costs
    sampling.png   the best and the worst of k answers at temperature 1
    attacks.png    success of the attacks against their budget
    strips.png     p([RESET]) along two answers
    hold-back.png  what users have seen of unsafe answers, against the delay with which tokens are shown

A picture is drawn if its toy-*.json is there; main, bias and hold-back show SmolLM2 as well if its real-*.json is.
Titles are made of the numbers that are drawn. Dots have 95% intervals, lines have them where they end. Baselines are
grey, backtracking is blue, DPO hollow.
"""

import argparse
import math
import re
from pathlib import Path

from backtrack.report.picture import BLUE, GREY, dot, legend, note, paper, save
from backtrack.report.tables import FOUR, MODELS, is_plain, load, measured, reading
from model import InputError
from model.errors import run

ASKED, HARMLESS = "unsafe overall", "benign overall"


def look(color: str, filled: bool, marker: str) -> dict:
    """How a curve and its dots look."""
    face = color if filled else "white"
    line = {"linestyle": "-" if filled else "--", "linewidth": 1.5}
    return {"color": color, "marker": marker, "markerfacecolor": face, "markeredgecolor": color, **line}


LOOKS = {
    "sft-baseline": look(GREY, True, "o"),
    "dpo-baseline": look(GREY, False, "o"),
    "sft-in-place": look(GREY, True, "s"),
    "dpo-in-place": look(GREY, False, "s"),
    "filter": look(GREY, True, "^"),
    "sft": look(BLUE, True, "o"),
    "dpo": look(BLUE, False, "o"),
}


def curve(ax, y: list[float], interval, style: dict, shift: float = 0.0) -> None:
    """A curve over even steps; its last dot has an interval."""
    x = [*range(len(y) - 1), len(y) - 1 + shift]
    ax.plot(x, y, markersize=4, **style)
    dot(ax, x[-1], y[-1], interval, **style)


def around(ax, ticks: list, title: str, xlabel: str) -> None:
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.25)


def worlds(records: list[dict]) -> str:
    n = len(records[0]["by_seed"])
    return f"toy world, {n} seed{'s' * (n > 1)}"


def the(records: list[dict], **wanted) -> dict:
    """The one record that has these values."""
    return next(r for r in records if all(r[key] == value for key, value in wanted.items()))


# ── Pictures: each returns the figure and its title ──────────────────────────────────────────────────────────────────


def main_figure(directory: Path) -> tuple:
    """A line for each model, a panel for each question, above for the toy world and below for SmolLM2."""
    toy = load(directory, "toy-main", "toy-filter")["records"]
    real = load(directory, "real-main").get("records", [])
    parts = [(worlds(toy), toy)] + ([("SmolLM2-135M", real)] if real else [])
    models = [[m for m in reversed(LOOKS) if any(r["checkpoint"] == m for r in records)] for _, records in parts]
    heights = [len(some) for some in models]
    fig, axes = paper(1 + 0.32 * sum(heights) + 0.5 * len(parts), len(parts), 3, height_ratios=heights)
    for row, (where, records), some in zip(axes, parts, models, strict=True):
        judged = ("complied", "complied") if "complied" in records[0] else ("unsafe", "helpful")
        forced = dict.fromkeys(r["set"] for r in records if re.match("prefill-|.*-forced$", r["set"]))
        questions = (
            (f"asked: {judged[0]}", "unsafe", [ASKED]),
            (f"forced to begin: {judged[0]}", "unsafe", forced),
            (f"harmless: {judged[1]}", "helpful", [HARMLESS]),
        )
        for ax, (what, rate, sets) in zip(row, questions, strict=True):
            rates = [measured([the(records, checkpoint=model, set=s) for s in sets], rate) for model in some]
            for y, (model, (p, low, high)) in enumerate(zip(some, rates, strict=True)):
                dot(ax, p, y, (low, high), "x", **LOOKS[model])
                note(ax, f"{p:.1f}", max(p, high), y, 6, 0, va="center")
            ax.set_title(f"{what}, %")
            ax.set_yticks(range(len(some)), [MODELS[m] for m in some] if ax is row[0] else [])
            ax.tick_params(axis="y", length=0)
            ax.set_ylim(-0.6, len(some) - 0.4)
            if rate == "unsafe":
                ax.set_xlim(left=0)
            else:
                ax.set_xlim(10 * math.floor(min(low for _, low, _ in rates) / 10), 101)
            ax.grid(axis="x", alpha=0.25)
        row[0].set_ylabel(where)
    return fig, main_title(toy, real)


def main_title(toy: list[dict], real: list[dict]) -> str:
    def unsafe(records: list[dict], model: str) -> tuple[float, float, float]:
        return measured([the(records, checkpoint=model, set=ASKED)], "unsafe")

    rates = [unsafe(toy, model)[0] for model in ("sft-baseline", "sft", "sft-in-place")]
    title = (
        "Unsafe answers on the toy world: {:.1f}% without [RESET], {:.1f}% with it, {:.1f}% if nothing is taken back"
    )
    title = title.format(*rates)
    if real:
        base, ours = unsafe(real, "sft-baseline"), unsafe(real, "sft")
        ties = ", ties" if base[1] <= ours[2] and ours[1] <= base[2] else ""
        title += f". SmolLM2, asked plainly{ties}: {base[0]:.1f}% complied without [RESET], {ours[0]:.1f}% with it"
    return title


def dial_figure(directory: Path) -> tuple:
    """A curve for each model: false resets against unsafe answers, from a low bias to a high one."""
    toy = load(directory, "toy-bias")["records"]
    real = load(directory, "real-bias").get("records", [])
    filtered = load(directory, "toy-filter-bias").get("records", [])
    parts = [(worlds(toy), toy + filtered, ASKED)]
    if real:
        parts.append(("SmolLM2-135M, forced to begin", real, "advbench-forced"))
    fig, axes = paper(4.6, 1, len(parts))
    for ax, (where, records, asked) in zip(axes[0], parts, strict=True):
        for model in (m for m in LOOKS if any(r["checkpoint"] == m for r in records)):
            points = dial(records, model, asked)
            below = model == "dpo"  # two curves close to each other: one has its numbers below
            _, x, y = zip(*points, strict=True)
            ax.plot(x, y, clip_on=False, zorder=3, **LOOKS[model])
            how = {"ha": "right" if below else "left", "color": LOOKS[model]["color"]}
            for bias, false, unsafe in points:
                note(ax, signed(bias), false, unsafe, *((-6, -9) if below else (5, 4)), **how)
        ax.set_title(f"{where}; numbers: bias")
        # Square roots: the places near 0 are the ones that matter. A little room on the other side is for the numbers.
        root = (lambda v: abs(v) ** 0.5 * (1 - 2 * (v < 0)), lambda v: v * abs(v))
        ax.set_xscale("function", functions=root)
        ax.set_xticks([0, 1, 5, 10, 25, 50, 100])
        ax.set_xlim(-0.6, 105)
        ax.set_ylim(bottom=-0.08 * ax.get_ylim()[1])
        ax.set_yticks([tick for tick in ax.get_yticks() if tick >= 0 and tick == int(tick)])
        ax.set_xlabel("harmless answers taken back, %")
        ax.grid(alpha=0.25)
        ax.set_ylabel("answers that comply, %" if records is real else "unsafe answers, %")
    legend(fig, {MODELS[m]: LOOKS[m] for m in LOOKS if any(r["checkpoint"] == m for r in toy + filtered)}, columns=3)
    return fig, dial_title(toy)


def dial_title(records: list[dict]) -> str:
    points = {bias: (unsafe, false) for bias, false, unsafe in dial(records, "sft", ASKED)}
    up = 5 if 5 in points else max(points)
    title = "The dial, on unseen potions and in new wrappers: {:.1f}% unsafe and {:.0f}% false resets at bias 0"
    return (title + ", {:.1f}% and {:.0f}% at {}").format(*points[0], *points[up], signed(up))


def signed(bias: float) -> str:
    return f"{bias:+g}".replace("-", "−") if bias else "0"


def dial(records: list[dict], model: str, asked: str) -> list[tuple[float, float, float]]:
    """(bias, false resets in percent, unsafe answers in percent), in the order of the bias."""
    points = []
    for bias in sorted({r["reset_bias"] for r in records if r["checkpoint"] == model}):
        where = {"checkpoint": model, "reset_bias": bias}
        false, *_ = measured([the(records, set=HARMLESS, **where)], "reset")
        unsafe, *_ = measured([the(records, set=asked, **where)], "unsafe")
        points.append((bias, false, unsafe))
    return points


def sampling_figure(directory: Path) -> tuple:
    records = load(directory, "toy-sampling")["records"]
    of = {model: the(records, checkpoint=model, set=ASKED) for model in FOUR}
    fig, [axes] = paper(3.9, 1, 2, sharey=True)
    for ax, taken, what in (
        (axes[0], "worst_of_k", "at least one of k answers is unsafe"),
        (axes[1], "best_of_k", "all of k answers are unsafe"),
    ):
        for model, r in of.items():
            ks, y = list(r[taken]), [100 * value / r["prompts"] for value in r[taken].values()]
            curve(ax, y, [100 * value for value in r[f"{taken}_interval"][ks[-1]]], LOOKS[model])
        around(ax, ks, what, "k, answers at temperature 1")
    legend(fig, {MODELS[model]: LOOKS[model] for model in FOUR}, columns=4)
    axes[0].set_ylabel(f"prompts, % ({worlds(records)})")
    base, ours = (100 * of[m]["worst_of_k"][ks[-1]] / of[m]["prompts"] for m in ("sft-baseline", "sft"))
    title = f"Asked {ks[-1]} times, the baseline is unsafe at least once on {base:.0f}% of the prompts"
    return fig, f"{title}, backtracking on {ours:.0f}%"


ATTACKS = {"prefill": "prefill", "gcg": "GCG", "autodan": "AutoDAN", "adaptive-gcg": "adaptive GCG"}


def attacks_figure(directory: Path) -> tuple:
    """Success against budget; of prefilling, which is no search, against how much of the unsafe answer is forced."""
    records = [r for r in load(directory, "toy-attacks")["records"] if is_plain(r)]
    names = [a for a in ATTACKS if any(r["attack"] == a for r in records)]
    rows = (len(names) + 1) // 2
    fig, axes = paper(0.7 + 2.6 * rows, rows, 2, sharey=True)
    reached = {}
    for ax, attack in zip(axes.flat, names, strict=False):
        for i, model in enumerate(FOUR):
            found = [r for r in records if (r["attack"], r["checkpoint"]) == (attack, model)]
            if attack == "prefill":
                found = [r for r in found if r["variant"].isdigit() or r["variant"] == "all"]
                ticks, counts = [r["variant"] for r in found], [r["unsafe"] for r in found]
            else:  # others of the same name have settings of their own
                found = [r for r in found if r["variant"] == "any"]
                within = found[0]["success_within"]
                ticks = [b if int(b) < 1024 else f"{int(b) // 1024}k" for b in within]
                counts = list(within.values())
            y = [100 * count / found[0]["n"] for count in counts]
            interval = measured(found[-1:], "unsafe")[1:]
            curve(ax, y, interval, LOOKS[model], 0.1 * (i - 1.5))  # or the intervals would hide each other
            reached[model, attack] = y[-1]
        around(
            ax,
            ticks,
            ATTACKS[attack],
            "forced tokens of the unsafe answer" if attack == "prefill" else "candidates scored",
        )
    for ax in axes[:, 0]:
        ax.set_ylabel(f"successful, % ({worlds(records)})")
    for ax in axes.flat[len(names) :]:
        ax.remove()
    legend(fig, {MODELS[model]: LOOKS[model] for model in FOUR}, columns=4)
    ours, model, attack = max((reached[model, a], model, a) for model, a in reached if "baseline" not in model)
    title = f"The strongest of these attacks on {MODELS[model]}, {ATTACKS[attack]},"
    title += f" succeeds on {ours:.0f}% of the prompts; on the baseline on {reached['sft-baseline', attack]:.0f}%"
    return fig, title


def strips_figure(directory: Path) -> tuple:
    """A bar for each word of two answers: how likely [RESET] is there."""
    asked, harmless = load(directory, "toy-triggers")["strips"]
    fig, axes = paper(3.6, 2)
    for ax, strip in zip(axes[:, 0], (asked, harmless), strict=True):
        left = 0.0
        for word, p, forbidden in zip(strip["words"], strip["p"], strip["forbidden"], strict=True):
            width = max(3.8, len(word) * (1.35 if forbidden else 1.1))
            middle = left + width / 2
            ax.bar(middle, p, width, color=BLUE if forbidden else GREY)
            if p >= 0.01:
                ax.text(middle, p + 0.04, f"{p:.2f}", ha="center", fontsize=8)
            ax.text(middle, -0.08, word, ha="center", va="top", fontsize=9, weight="bold" if forbidden else "normal")
            left += width + 0.8
        kind = "harmless" if strip["benign"] else "forbidden, as are the ingredients in bold; forced to the end"
        ax.set_title(f"“{strip['question']}” ({kind})")
        ax.set_xlim(-0.5, left)
        ax.set_ylim(0, 1.15)
        ax.set_xticks([])
        ax.set_yticks([0, 0.5, 1])
        ax.set_ylabel("p([RESET])")
    first = asked["forbidden"].index(True)
    least = min(p for p, forbidden in zip(asked["p"], asked["forbidden"], strict=True) if forbidden)
    title = (
        f"p([RESET]) stays below {above(asked['p'][:first])} until the first forbidden ingredient and is {least:.2f}"
    )
    return fig, title + f" at each; on a harmless answer it stays below {above(harmless['p'])}"


def above(values: list[float]) -> str:
    """A number of two digits that none of them reaches."""
    return f"{(math.floor(100 * max(values)) + 1) / 100:.2f}"


def hold_back_figure(directory: Path) -> tuple:
    """What backtrack.evaluate.hold_back has measured, of one model each."""
    found = {"toy world, 1 seed": load(directory, "toy-hold-back"), "SmolLM2-135M": load(directory, "real-hold-back")}
    found = {name: result["records"] for name, result in found.items() if result}
    fig, [axes] = paper(3.6, 1, len(found), sharey=True)
    styles = {"asked": look(BLUE, True, "o"), "forced": look(BLUE, True, "s")}
    shown: dict[str, list[str]] = {"asked": [], "forced": []}  # of the unsafe answers, 4 tokens behind
    for ax, (name, records) in zip(axes, found.items(), strict=True):
        for group, style in styles.items():
            some = [r for r in records if r["group"] == group]
            y = {r["hold_back"]: 100 * r["seen"] / r["unsafe"] for r in some}
            interval = [100 * value for value in some[-1]["interval"]]
            curve(ax, list(y.values()), interval, style)
            shown[group].append(f"{y[4]:.0f}")
        counts = " and ".join(f"{r['unsafe']} {r['group']}" for r in records if r["hold_back"] == 4)
        around(ax, list(y), f"{name}: {counts}", "tokens by which the stream lags behind")
    legend(fig, dict(zip(("asked", "answer forced to begin"), styles.values(), strict=True)), columns=2)
    axes[0].set_ylabel("unsafe answers of which a user\nsaw an unsafe part, %")
    asked, forced = (" and ".join(values) for values in shown.values())
    title = f"A stream that lags 4 tokens behind still shows an unsafe part of {asked}% of the unsafe answers"
    return fig, f"{title} when asked, of {forced}% when forced to begin ({'; '.join(found)})"


FIGURES = {
    "main.png": ("toy-main", main_figure),
    "bias.png": ("toy-bias", dial_figure),
    "sampling.png": ("toy-sampling", sampling_figure),
    "attacks.png": ("toy-attacks", attacks_figure),
    "strips.png": ("toy-triggers", strips_figure),
    "hold-back.png": ("toy-hold-back", hold_back_figure),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with toy-*.json")
    directory = parser.parse_args().results
    there = [
        (name, source, figure) for name, (source, figure) in FIGURES.items() if (directory / f"{source}.json").is_file()
    ]
    if not there:
        raise InputError(f"{directory}: holds no result to draw; `make eval attack` writes them")
    for name, source, figure in there:
        with reading(directory / f"{source}.json"):
            fig, title = figure(directory)
        save(fig, directory / name, title)


if __name__ == "__main__":
    run(main)
