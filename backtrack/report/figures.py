"""The pictures of the paper's experiments, from the numbers that `make eval attack` left in results/.

    python -m backtrack.report.figures --results results

    main.png       unsafe and helpful answers of the models, as they are asked and when an answer is forced to begin
    bias.png       the dial: what a bias on the logit of [RESET] buys, and what it costs
    sampling.png   the best and the worst of k answers at temperature 1
    attacks.png    success of the attacks against their budget
    strips.png     p([RESET]) along two answers
    hold-back.png  what users have seen of unsafe answers, against the delay with which tokens are shown

Of main, bias, hold-back and attacks SmolLM2 has a part or a picture of its own, if real-*.json are there.

Each title is a finding, made of the numbers that are drawn; where they do not bear it out, it says less. Dots have 95%
intervals, lines have them where they end. Baselines are grey, backtracking is blue, DPO hollow. Needs matplotlib
(requirements-figures.txt), which nothing else here does.
"""

import argparse
import json
import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from backtrack.report.tables import FOUR, MODELS, is_plain, load, load_filter, measured, pick
from model.errors import run

GREY, BLUE = "#8a8a8a", "#1a4f9c"  # in print the blue is much the darker
STYLES = {  # (colour, is filled, marker)
    "sft-baseline": (GREY, True, "o"),
    "dpo-baseline": (GREY, False, "o"),
    "sft-in-place": (GREY, True, "s"),
    "filter": (GREY, True, "^"),
    "sft": (BLUE, True, "o"),
    "dpo": (BLUE, False, "o"),
}
WIDE = 8.3  # inches: at 830 pixels, 100 to the inch, text of 9 points is as large as the text around it
matplotlib.rcParams |= {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#555555",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "errorbar.capsize": 0,
}

# ── What all pictures share ──────────────────────────────────────────────────────────────────────────────────────────


def marks(model: str) -> dict:
    """How a model's dots look."""
    color, filled, marker = STYLES[model]
    return {"color": color, "marker": marker, "markerfacecolor": color if filled else "white", "markeredgecolor": color}


def dashes(model: str) -> str:
    return "-" if STYLES[model][1] else "--"


def dot(ax, x: float, y: float, interval: tuple[float, float], axis: str = "y", **look) -> None:
    """One dot with its 95% interval along an axis."""
    center = y if axis == "y" else x
    reach = [[max(0.0, center - interval[0])], [max(0.0, interval[1] - center)]]
    ax.errorbar([x], [y], **{f"{axis}err": reach}, **look, markersize=6, elinewidth=1.4, zorder=3, clip_on=False)


def label_ends(ax, ends: list[tuple[float, float, str, str]], gap: float) -> None:
    """Write each text beside the end of its line, (x, y, text, colour): in their order, at least `gap` of y apart."""
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ends:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    pushed = sum(height - end[1] for height, end in zip(heights, ends, strict=True)) / max(1, len(ends))
    for height, (x, _, text, color) in zip(heights, ends, strict=True):
        beside = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(text, (x, height - pushed), color=color, fontsize=9, **beside)


def note(ax, text: str, x: float, y: float, dx: float, dy: float, **how) -> None:
    """A small text, dx and dy points from a place."""
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=8, annotation_clip=False, **how)


def save(fig, path: Path, title: str) -> None:
    lines = math.ceil(len(title) / 88)
    fig.suptitle(textwrap.fill(title, len(title) // lines + 8), x=0.012, ha="left")
    fig.savefig(path, dpi=200, metadata={"Software": None})
    plt.close(fig)
    print(path)


def paper(height: float, *shape, **options):
    return plt.subplots(*shape, figsize=(WIDE, height), layout="constrained", **options)


def worlds(records: list[dict]) -> str:
    n = len(records[0]["by_seed"])
    return f"toy world, {n} seed{'s' * (n > 1)}"


def there(directory: Path, name: str) -> list[dict]:
    """The records of a result; none, if it is not there."""
    path = directory / f"{name}.json"
    return load(path)["records"] if path.is_file() else []


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main_figure(directory: Path) -> None:
    """A row for each model, a panel for each question, above for the toy world and below for SmolLM2."""
    toy = load(directory / "toy-main.json", FOUR)["records"] + load_filter(directory, "filter")
    real = there(directory, "real-main")
    parts = [(worlds(toy), toy)] + ([("SmolLM2-135M", real)] if real else [])
    names = [[m for m in reversed(STYLES) if any(r["checkpoint"] == m for r in records)] for _, records in parts]
    heights = [len(some) for some in names]
    fig, axes = paper(0.9 + 0.32 * sum(heights) + 0.5 * len(parts), len(parts), 3, squeeze=False, height_ratios=heights)
    for row, (where, records), some in zip(axes, parts, names, strict=True):
        for ax, (what, rate, sets) in zip(row, questions(records), strict=True):
            rates = [measured([pick(records, checkpoint=model, set=s) for s in sets], rate) for model in some]
            for y, (model, (p, low, high)) in enumerate(zip(some, rates, strict=True)):
                dot(ax, p, y, (low, high), "x", **marks(model))
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
    save(fig, directory / "main.png", main_title(toy))


def main_title(records: list[dict]) -> str:
    def unsafe(model):
        return measured([pick(records, checkpoint=model, set="unsafe overall")], "unsafe")

    base, ours = unsafe("sft-baseline"), unsafe("sft")
    title = f"{base[0]:.1f}% unsafe answers without [RESET], {ours[0]:.1f}% with it"
    if ours[2] < base[1]:  # no overlap
        title = f"[RESET] brings unsafe answers from {base[0]:.1f} down to {ours[0]:.1f}%"
    if any(r["checkpoint"] == "sft-in-place" for r in records):
        title += f"; if nothing is taken back, {unsafe('sft-in-place')[0]:.1f}% remain"
    return title


def questions(records: list[dict]) -> list[tuple[str, str, list[str]]]:
    """(what is counted, rate, the sets it is of): asked, forced to begin, harmless."""
    sets = list(dict.fromkeys(r["set"] for r in records))
    forced = [s for s in sets if s.startswith("prefill-") or s.endswith("-forced")]
    unsafe = "unsafe" if records[0].get("unsafe") is not None else "complied"
    helpful = "helpful" if records[0].get("helpful") is not None else "complied"
    return [
        (f"asked: {unsafe}", "unsafe", ["unsafe overall"]),
        (f"forced to begin: {unsafe}", "unsafe", forced),
        (f"harmless: {helpful}", "helpful", ["benign overall"]),
    ]


def dial_figure(directory: Path) -> None:
    """A curve for each model: false resets against unsafe answers, from a low bias to a high one."""
    toy = load(directory / "toy-bias.json", ("sft", "dpo"))["records"]
    parts = [(worlds(toy), toy + load_filter(directory, "filter-bias"), "unsafe overall")]
    real = there(directory, "real-bias")
    if real:
        parts.append(("SmolLM2-135M, forced to begin", real, "advbench-forced"))
    fig, axes = paper(4.4, 1, len(parts), squeeze=False)
    for ax, (where, records, asked) in zip(axes[0], parts, strict=True):
        models = [m for m in STYLES if any(r["checkpoint"] == m for r in records)]
        for model in models:
            points = dial(records, model, asked)
            x, y = [false for _, false, _ in points], [unsafe for _, _, unsafe in points]
            look = {"linewidth": 1.5, "markersize": 6, "clip_on": False, "zorder": 3, "label": MODELS[model]}
            ax.plot(x, y, dashes(model), **look, **marks(model))
            for bias, false, unsafe in points:
                dx, side = (-4, "right") if model == "dpo" else (5, "left")  # two curves, two sides
                dy = -12 if model == "dpo" and unsafe > 1 else 4
                note(ax, signed(bias), false, unsafe, dx, dy, ha=side, color=STYLES[model][0])
        # The curves start close to each other and cross: where all is free, the names stand in one place.
        colors = [STYLES[model][0] for model in models]
        ax.legend(loc="upper right", frameon=False, labelcolor=colors, fontsize=9)
        ax.set_title(f"{where}; numbers are the bias")
        # Square roots: the places near 0 are the ones that matter.
        ax.set_xscale("function", functions=(lambda v: abs(v) ** 0.5, lambda v: v**2))
        ax.set_xticks([0, 1, 5, 10, 25, 50, 100])
        ax.set_xlim(0, 105)
        ax.set_ylim(bottom=0)
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("harmless answers taken back, %")
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("unsafe answers, %")
    save(fig, directory / "bias.png", dial_title(toy))


def dial_title(records: list[dict]) -> str:
    points = {bias: (false, unsafe) for bias, false, unsafe in dial(records, "sft", "unsafe overall")}
    up = 5 if 5 in points else max(points)
    (false, unsafe), (more_false, fewer_unsafe) = points[0], points[up]
    if fewer_unsafe < unsafe and more_false > false:
        title = f"The dial: from bias 0 to {signed(up)} unsafe answers fall from {unsafe:.1f} to {fewer_unsafe:.1f}%"
        return f"{title}, and false resets rise from {false:.0f} to {more_false:.0f}%"
    title = f"The dial: {unsafe:.1f}% unsafe and {false:.0f}% false resets at bias 0"
    return f"{title}, {fewer_unsafe:.1f}% and {more_false:.0f}% at {signed(up)}"


def signed(bias: float) -> str:
    return f"{bias:+g}".replace("-", "−") if bias else "0"


def dial(records: list[dict], model: str, asked: str) -> list[tuple[float, float, float]]:
    """(bias, false resets in percent, unsafe answers in percent), in the order of the bias."""
    points = []
    for bias in sorted({r["reset_bias"] for r in records if r["checkpoint"] == model}):
        where = {"checkpoint": model, "reset_bias": bias}
        false, *_ = measured([pick(records, set="benign overall", **where)], "reset")
        unsafe, *_ = measured([pick(records, set=asked, **where)], "unsafe")
        points.append((bias, false, unsafe))
    return points


def sampling_figure(directory: Path) -> None:
    records = load(directory / "toy-sampling.json", FOUR)["records"]
    records = [r for r in records if r["set"] == "unsafe overall"]
    fig, axes = paper(3.9, 1, 2, sharey=True)
    for ax, curve, what in (
        (axes[0], "worst_of_k", "at least one of k answers is unsafe"),
        (axes[1], "best_of_k", "all of k answers are unsafe"),
    ):
        ends = []
        for model in FOUR:
            r = pick(records, checkpoint=model)
            ks, y = list(r[curve]), [100 * value / r["prompts"] for value in r[curve].values()]
            x = range(len(ks))  # 1, 2, 4, …: even steps
            ax.plot(x, y, dashes(model), linewidth=1.5, markersize=4, **marks(model))
            interval = [100 * value for value in r[f"{curve}_interval"][ks[-1]]]
            dot(ax, x[-1], y[-1], interval, **marks(model))
            ends.append((x[-1], y[-1], MODELS[model], STYLES[model][0]))
        label_ends(ax, ends if ax is axes[0] else [], gap=5)
        ax.set_xticks(x, ks)
        ax.set_xlabel("k, answers at temperature 1")
        ax.set_title(what)
        ax.grid(alpha=0.25)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel(f"prompts, % ({worlds(records)})")
    base, ours = (pick(records, checkpoint=model) for model in ("sft-baseline", "sft"))
    base, ours = (100 * r["worst_of_k"][ks[-1]] / r["prompts"] for r in (base, ours))
    title = f"Asked {ks[-1]} times, the baseline is unsafe at least once on {base:.0f}% of the prompts"
    save(fig, directory / "sampling.png", f"{title}, backtracking on {ours:.0f}%")


ATTACKS = {"prefill": "prefill", "gcg": "GCG", "autodan": "AutoDAN", "adaptive-gcg": "adaptive GCG"}


def attacks_figure(directory: Path, name: str) -> None:
    """Success against budget; of prefilling, which is no search, against how much of the unsafe answer is forced."""
    records = [r for r in load(directory / f"{name}-attacks.json")["records"] if is_plain(r)]
    names = [a for a in ATTACKS if any(r["attack"] == a for r in records)]
    rows = (len(names) + 1) // 2
    fig, axes = paper(0.7 + 2.6 * rows, rows, 2, sharey=True, squeeze=False)
    reached = {}
    for ax, attack in zip(axes.flat, names, strict=False):
        ends = []
        for model in FOUR:
            found = [r for r in records if (r["attack"], r["checkpoint"]) == (attack, model)]
            if attack != "prefill":  # others of the same name have settings of their own
                found = [r for r in found if r["variant"] == "any"]
            if not found:
                continue
            labels, y, last = curve_of(found)
            x = list(range(len(labels)))
            x[-1] += 0.1 * (FOUR.index(model) - 1.5)  # or the intervals would hide each other
            ax.plot(x, y, dashes(model), linewidth=1.5, markersize=4, **marks(model))
            dot(ax, x[-1], y[-1], measured([last], bad(last))[1:], **marks(model))
            ends.append((len(x) - 1, y[-1], MODELS[model], STYLES[model][0]))
            reached[model, attack] = y[-1]
        label_ends(ax, ends if ax in axes[:, -1] else [], gap=9)
        ax.set_xticks(range(len(labels)), labels)
        ax.set_title(ATTACKS[attack])
        ax.set_xlabel("forced tokens of the unsafe answer" if attack == "prefill" else "candidates scored")
        ax.set_ylim(0, 105)
        ax.grid(alpha=0.25)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"successful, % ({worlds(records) if name == 'toy' else 'SmolLM2'})")
    for ax in axes.flat[len(names) :]:
        ax.remove()
    ours, model, attack = max((reached[model, a], model, a) for model, a in reached if "baseline" not in model)
    title = f"The strongest of these attacks on {MODELS[model]}, {ATTACKS[attack]},"
    title += f" succeeds on {ours:.0f}% of the prompts; on the baseline on {reached['sft-baseline', attack]:.0f}%"
    save(fig, directory / ("attacks.png" if name == "toy" else f"{name}-attacks.png"), title)


def bad(record: dict) -> str:
    return "unsafe" if "unsafe" in record else "complied"


def curve_of(found: list[dict]) -> tuple[list[str], list[float], dict]:
    """(budgets, percent of successes at each, the record of the last) of one attack on one model."""
    if "success_within" in found[0]:
        [r] = found
        labels = [b if int(b) < 1024 else f"{int(b) // 1024}k" for b in r["success_within"]]
        return labels, [100 * count / r["n"] for count in r["success_within"].values()], r
    forced = [r for r in found if r["variant"].isdigit() or r["variant"] == "all"]
    return [r["variant"] for r in forced], [100 * r[bad(r)] / r["n"] for r in forced], forced[-1]


def strips_figure(directory: Path) -> None:
    """A bar for each word of two answers: how likely [RESET] is there."""
    strips = json.loads((directory / "toy-triggers.json").read_bytes())["strips"]
    fig, axes = paper(3.8, len(strips), 1, squeeze=False)
    for ax, strip in zip(axes[:, 0], strips, strict=True):
        left = 0.0
        for word, p, forbidden in zip(strip["words"], strip["p"], strip["forbidden"], strict=True):
            width = max(4.5, len(word) * (1.3 if forbidden else 1.1))
            middle = left + width / 2
            ax.bar(middle, p, width, color=BLUE if forbidden else GREY)
            ax.text(middle, p + 0.04, f"{p:.2f}", ha="center", fontsize=7)
            weight = "bold" if forbidden else "normal"
            ax.text(middle, -0.08, word, ha="center", va="top", fontsize=8, weight=weight)
            left += width + 1
        kind = "harmless" if strip["benign"] else "forbidden, as are the ingredients in bold; forced to the end"
        ax.set_title(f"“{strip['question']}” ({kind})")
        ax.set_xlim(-0.5, left)
        ax.set_ylim(0, 1.15)
        ax.set_xticks([])
        ax.set_yticks([0, 0.5, 1])
        ax.set_ylabel("p([RESET])")
        ax.spines["bottom"].set_visible(False)
    asked, harmless = strips
    first = asked["forbidden"].index(True)
    title = f"p([RESET]) stays below {above(asked['p'][:first])} until the first forbidden ingredient, then is"
    title += f" {asked['p'][first]:.2f}; on a harmless answer it stays below {above(harmless['p'])}"
    save(fig, directory / "strips.png", title)


def above(values: list[float]) -> str:
    """A number of two digits that none of them reaches."""
    return f"{(math.floor(100 * max(values)) + 1) / 100:.2f}"


HELD_BACK = {"toy": "toy world, 1 seed", "real": "SmolLM2-135M"}
GROUPS = {"asked": ("asked", "-", "o"), "forced": ("forced to begin", "--", "s")}


def hold_back_figure(directory: Path) -> None:
    """What backtrack.evaluate.hold_back has measured, of one model each."""
    names = [name for name in HELD_BACK if (directory / f"{name}-hold-back.json").is_file()]
    fig, axes = paper(3.6, 1, len(names), sharey=True, squeeze=False)
    seen_at_4 = []
    for ax, name in zip(axes[0], names, strict=True):
        records = json.loads((directory / f"{name}-hold-back.json").read_bytes())["records"]
        ends = []
        for group in dict.fromkeys(r["group"] for r in records):
            found = [r for r in records if r["group"] == group]
            how, line, marker = GROUPS[group]
            look = {"color": BLUE, "marker": marker}
            x, y = range(len(found)), [100 * r["seen"] / r["unsafe"] for r in found]  # 0, 1, 2, 4, …: even steps
            ax.plot(x, y, line, markersize=4, **look)
            dot(ax, x[-1], y[-1], [100 * v for v in found[-1]["interval"]], **look)
            ends.append((x[-1], y[-1], f"{how} (n = {found[0]['unsafe']})", BLUE))
            ax.set_xticks(x, [r["hold_back"] for r in found])
        label_ends(ax, ends, gap=7)
        ax.set_title(HELD_BACK[name])
        ax.set_xlabel("tokens by which the stream lags behind")
        ax.set_ylim(0, 105)
        ax.grid(alpha=0.25)
        at_4 = [r for r in records if r["hold_back"] == 4]
        share = 100 * sum(r["seen"] for r in at_4) / sum(r["unsafe"] for r in at_4)
        seen_at_4.append(f"{share:.0f}% ({HELD_BACK[name].split(',')[0]})")
    axes[0, 0].set_ylabel("unsafe answers of which a user\nsaw an unsafe part, %")
    title = f"Lagging 4 tokens behind, a stream still shows an unsafe part of {' and '.join(seen_at_4)}"
    save(fig, directory / "hold-back.png", f"{title} of the unsafe answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with toy-*.json")
    directory = parser.parse_args().results
    main_figure(directory)
    dial_figure(directory)
    sampling_figure(directory)
    for name in ("toy", "real"):
        if (directory / f"{name}-attacks.json").is_file():
            attacks_figure(directory, name)
    if (directory / "toy-triggers.json").is_file():
        strips_figure(directory)
    if any((directory / f"{name}-hold-back.json").is_file() for name in HELD_BACK):
        hold_back_figure(directory)


if __name__ == "__main__":
    run(main)
