"""The pictures of the paper's experiments, from the numbers that `make eval` left in results/.

    python -m backtrack.figures --results results

    main.png       unsafe and helpful answers of the four models, set by set
    bias.png       the dial: what a bias on the logit of [RESET] does to safety, delay, throughput and helpfulness
    sampling.png   the best and the worst of k answers at temperature 1
    attacks.png    success against budget of the attacks, if toy-attacks.json is there

Needs matplotlib (requirements-figures.txt), which nothing else here does. Lines are means over seeds with Student's 95%
interval, bars are pooled over seeds with Wilson's; every picture names its seeds' count and can be read in grey. It
computes nothing that is not in the files.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from backtrack.statistics import mean_interval
from model import InputError
from model.errors import run

# Name in the files -> (label, grey-proof style). Baselines are dashed and light, backtracking is solid and dark.
MODELS = {
    "sft-baseline": ("baseline SFT", {"color": "#c9a227", "linestyle": "--", "marker": "o"}),
    "dpo-baseline": ("baseline SFT + DPO", {"color": "#d9822b", "linestyle": ":", "marker": "s"}),
    "sft": ("backtracking SFT", {"color": "#3b6fb6", "linestyle": "-", "marker": "^"}),
    "dpo": ("backtracking SFT + DPO", {"color": "#1b2a49", "linestyle": "-.", "marker": "D"}),
}
HATCHES = dict(zip(MODELS, ("", "...", "///", ""), strict=True))


def load(directory: Path, name: str, models=tuple(MODELS)) -> dict:
    path = directory / f"toy-{name}.json"
    try:
        result = json.loads(path.read_bytes())
        found = {r["checkpoint"] for r in result["records"] if r["by_seed"]}
    except (OSError, ValueError, KeyError, TypeError):
        found = set()
    if not found >= set(models):
        raise InputError(f"{path}: not there, or not a pooled result of {', '.join(models)}; `make eval` writes it")
    return result


def line(ax, x: list, per_seed: list[list[float]], model: str) -> None:
    """Mean over seeds with its interval; per_seed[i] are the values of all seeds at x[i]."""
    label, style = MODELS[model]
    mean, low, high = zip(*(mean_interval(values) for values in per_seed), strict=True)
    ax.plot(x, mean, label=label, markersize=4, linewidth=1.5, **style)
    if len(per_seed[0]) > 1:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def finish(fig, path: Path, result: dict, title: str, count: int) -> None:
    fig.suptitle(f"{title} (toy world, {count} seed{'s' * (count > 1)})", fontsize=11)
    where = result["machine"]
    fig.text(0.995, 0.003, f"{where}; commit {result['commit']}", fontsize=5, ha="right", va="bottom", color="#666666")
    fig.tight_layout(rect=(0, 0.015, 1, 1))
    fig.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(fig)
    print(path)


def main_figure(directory: Path) -> None:
    result = load(directory, "main")
    records = result["records"]
    sets = list(dict.fromkeys(r["set"] for r in records))
    seeds = len(records[0]["by_seed"])
    unsafe = [s for s in sets if not next(r["benign"] for r in records if r["set"] == s)]
    benign = [s for s in sets if s not in unsafe]
    fig, axes = plt.subplots(2, 1, figsize=(8, 6.2))
    for ax, rate, names in ((axes[0], "unsafe", unsafe), (axes[1], "helpful", benign)):
        for m, model in enumerate(MODELS):
            found = [next(r for r in records if (r["checkpoint"], r["set"]) == (model, name)) for name in names]
            height = [100 * r[rate] / r["n"] for r in found]
            low = [h - 100 * r[f"{rate}_interval"][0] for h, r in zip(height, found, strict=True)]
            high = [100 * r[f"{rate}_interval"][1] - h for h, r in zip(height, found, strict=True)]
            label, style = MODELS[model]
            x = [i + 0.2 * (m - 1.5) for i in range(len(names))]
            low = [max(0.0, v) for v in low]
            ax.bar(
                x, height, 0.19, yerr=(low, high), label=label, color=style["color"], hatch=HATCHES[model],
                edgecolor="white", error_kw={"elinewidth": 0.8, "capsize": 2},
            )  # fmt: skip
        ax.set_xticks(range(len(names)), [name.replace("-", "-\n", 1) for name in names], fontsize=8)
        ax.set_ylabel(f"{rate} answers, %")
        ax.set_ylim(0, 105)
        ax.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    finish(fig, directory / "main.png", result, "Unsafe and helpful answers, greedy, 95% intervals", seeds)


def bias_figure(directory: Path) -> None:
    result = load(directory, "bias", ("sft", "dpo"))
    records = result["records"]
    seeds = len(records[0]["by_seed"])
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.2))
    panels = (
        ("unsafe overall", "unsafe answers, %", lambda s: 100 * s["unsafe"]),
        ("unsafe overall", "tokens until the first that survives", lambda s: s["first_step"]),
        ("unsafe overall", "surviving tokens per second", lambda s: s["surviving"] / s["total_s"]),
        ("benign overall", "helpful answers, %", lambda s: 100 * s["helpful"]),
        ("benign overall", "false resets, %", lambda s: 100 * s["reset"]),
        ("benign overall", "ms until the first token that survives", lambda s: 1000 * s["first_token_s"]),
    )
    for ax, (name, what, value) in zip(axes.flat, panels, strict=True):
        for model in ("sft", "dpo"):
            found = sorted(
                (r for r in records if (r["checkpoint"], r["set"]) == (model, name)), key=lambda r: r["reset_bias"]
            )
            line(ax, [r["reset_bias"] for r in found], [[value(s) for s in r["by_seed"]] for r in found], model)
        ax.set_title("forbidden prompts" if name.startswith("unsafe") else "harmless prompts", fontsize=9)
        ax.set_xlabel("bias on the logit of [RESET]", fontsize=8)
        ax.set_ylabel(what, fontsize=8)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    finish(fig, directory / "bias.png", result, "The dial between safety and efficiency", seeds)


def sampling_figure(directory: Path) -> None:
    result = load(directory, "sampling")
    records = [r for r in result["records"] if r["set"] == "unsafe overall"]
    seeds = len(records[0]["by_seed"])
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for ax, curve, title in (
        (axes[0], "worst_of_k", "at least one of k is unsafe"),
        (axes[1], "best_of_k", "all of k are unsafe"),
    ):
        for model in MODELS:
            r = next(r for r in records if r["checkpoint"] == model)
            ks = list(r[curve])
            per_seed = [[100 * seed[curve][k] for seed in r["by_seed"]] for k in ks]
            line(ax, [int(k) for k in ks], per_seed, model)
        ax.set_xscale("log", base=2)
        ax.set_xticks([int(k) for k in ks], ks)
        ax.set_xlabel("k, answers sampled at temperature 1")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("prompts, %")
    axes[1].legend(fontsize=8)
    finish(fig, directory / "sampling.png", result, "Asking again", seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with toy-*.json")
    args = parser.parse_args()
    main_figure(args.results)
    bias_figure(args.results)
    sampling_figure(args.results)


if __name__ == "__main__":
    run(main)
