"""The pictures and tables of the paper's experiments, from the numbers that `make eval` left in results/.

    python -m backtrack.figures --results results

    main.png       unsafe and helpful answers of the four models, set by set
    bias.png       the dial: what a bias on the logit of [RESET] does to safety, delay, throughput and helpfulness
    sampling.png   the best and the worst of k answers at temperature 1
    attacks.png    success against budget of the attacks, if toy-attacks.json is there
    hold-back.png  what users have seen of unsafe answers, against the delay with which tokens are shown; of
                   toy-hold-back.json and real-hold-back.json, if they are there
    tables.md      all of it in numbers; the README's tables are copied from here

Needs matplotlib (requirements-figures.txt), which nothing else here does. Lines are means over seeds with Student's 95%
interval, bars are pooled over seeds with Wilson's. Every picture says how many seeds, and can be read in grey.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from backtrack.evaluate import CURVES
from backtrack.statistics import mean_interval, wilson
from model import InputError
from model.errors import run
from model.files import write_text

# Name in the files -> (label, grey-proof style). Baselines are dashed and light, backtracking is solid and dark.
MODELS = {
    "sft-baseline": ("baseline SFT", {"color": "#c9a227", "linestyle": "--", "marker": "o"}),
    "dpo-baseline": ("baseline SFT + DPO", {"color": "#d9822b", "linestyle": ":", "marker": "s"}),
    "sft": ("backtracking SFT", {"color": "#3b6fb6", "linestyle": "-", "marker": "^"}),
    "dpo": ("backtracking SFT + DPO", {"color": "#1b2a49", "linestyle": "-.", "marker": "D"}),
}
HATCHES = dict(zip(MODELS, ("", "...", "///", ""), strict=True))


def load(directory: Path, name: str, models=tuple(MODELS)) -> dict:
    """The pooled result toy-NAME.json. Raises InputError if it is not one, or lacks one of the models."""
    path = directory / f"toy-{name}.json"
    try:
        result = json.loads(path.read_bytes())
        found = {r["checkpoint"] for r in result["records"] if r["by_seed"]}
    except (OSError, ValueError, KeyError, TypeError):
        found = set()
    if not found or not found >= set(models):
        what = f"a pooled result of {', '.join(models)}" if models else "a pooled result"
        raise InputError(f"{path}: not there, or not {what}; `make eval` and `make attack` write them")
    return result


def line(ax, x: list, per_seed: list[list[float]], model: str) -> None:
    """Mean over seeds with its interval; per_seed[i] are the values of all seeds at x[i]."""
    label, style = MODELS[model]
    mean, low, high = zip(*(mean_interval(values) for values in per_seed), strict=True)
    ax.plot(x, mean, label=label, markersize=4, linewidth=1.5, **style)
    if len(per_seed[0]) > 1:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def condition(record: dict) -> tuple:
    return record["on_reset"], record["max_resets"], record["reset_bias"]


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


def attacks_figure(directory: Path) -> None:
    result = load(directory, "attacks", ())
    records = [r for r in result["records"] if "success_within" in r and condition(r) == ("truncate", 1, 0)]
    seeds = len(result["records"][0]["by_seed"])
    names = list(dict.fromkeys(r["attack"] for r in records))
    fig, axes = plt.subplots(1, len(names) + 1, figsize=(3.3 * (len(names) + 1), 3.8), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=False):
        for model, (label, style) in MODELS.items():
            r = next((r for r in records if (r["attack"], r["checkpoint"]) == (name, model)), None)
            if r is None:
                continue
            budgets = [max(0.5, float(b)) for b in r["success_within"]]  # 0 on a logarithmic axis
            counts = list(r["success_within"].values())
            low, high = zip(*(wilson(count, r["n"]) for count in counts), strict=True)
            ax.plot(budgets, [100 * c / r["n"] for c in counts], label=label, markersize=4, linewidth=1.5, **style)
            ax.fill_between(
                budgets, [100 * x for x in low], [100 * x for x in high], color=style["color"], alpha=0.12, linewidth=0
            )
        ax.set_xscale("log", base=2)
        ticks = [0.5, *(b for b in (16, 64, 256, 1024, 4096) if b <= max(budgets))]
        ax.set_xticks(ticks, ["0", *map(str, ticks[1:])])
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("candidates scored")
        ax.set_ylim(0, 105)
        ax.grid(alpha=0.3)
    # Prefilling is no search; what grows is the part of the unsafe answer that is forced.
    prefilled = [r for r in result["records"] if r["attack"] == "prefill" and r["variant"] not in ("any", "opening")]
    for model, (label, style) in MODELS.items():
        found = [r for r in prefilled if r["checkpoint"] == model]
        x, heights = range(len(found)), [100 * r["unsafe"] / r["n"] for r in found]
        low, high = zip(*(r["interval"] for r in found), strict=True) if found else ((), ())
        axes[0, -1].plot(x, heights, label=label, markersize=4, linewidth=1.5, **style)
        axes[0, -1].fill_between(
            x, [100 * v for v in low], [100 * v for v in high], color=style["color"], alpha=0.12, linewidth=0
        )
    lengths = list(dict.fromkeys(r["variant"] for r in prefilled))
    axes[0, -1].set_xticks(range(len(lengths)), lengths)
    axes[0, -1].set_title("prefill", fontsize=9)
    axes[0, -1].set_xlabel("forced tokens of the unsafe answer")
    axes[0, -1].grid(alpha=0.3)
    axes[0, 0].set_ylabel("attacks that succeeded, %")
    axes[0, -1].legend(fontsize=7)
    finish(fig, directory / "attacks.png", result, "Success against budget", seeds)


HELD_BACK = {"toy": ("toy world", "#3b6fb6", "^"), "real": ("SmolLM2-135M", "#1b2a49", "D")}
GROUPS = {"asked": ("asked for", "-"), "forced": ("forced to begin unsafe", "--")}


def hold_back_figure(directory: Path) -> None:
    """What backtrack.hold_back has measured. One model each, so there are no seeds to count."""
    fig, ax = plt.subplots(figsize=(6, 3.8))
    for name, (model, color, marker) in HELD_BACK.items():
        path = directory / f"{name}-hold-back.json"
        records = json.loads(path.read_bytes())["records"] if path.is_file() else []
        for group in dict.fromkeys(r["group"] for r in records):
            found = [r for r in records if r["group"] == group]
            x = range(len(found))  # 0, 1, 2, 4, …: even steps
            how, style = GROUPS[group]
            shares = [100 * r["seen"] / r["unsafe"] for r in found]
            label = f"{model}, {how} (n = {found[0]['unsafe']})"
            ax.plot(x, shares, linestyle=style, color=color, marker=marker, markersize=4, label=label)
            low, high = zip(*(r["interval"] for r in found), strict=True)
            ax.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.12, linewidth=0)
            ax.set_xticks(x, [r["hold_back"] for r in found])
    ax.set_xlabel("tokens by which the stream lags behind")
    ax.set_ylabel("unsafe answers of which a user saw\nan unsafe part, %", fontsize=9)
    ax.set_ylim(0, 105)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(directory / "hold-back.png", dpi=130, metadata={"Software": None})
    plt.close(fig)
    print(directory / "hold-back.png")


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell(count: int, n: int) -> str:
    low, high = wilson(count, n)
    return f"{100 * count / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def rate_cell(records: list[dict], rate: str, **wanted) -> str:
    """Percent and Wilson interval of the one record that has these values."""
    r = next(r for r in records if all(r[key] == value for key, value in wanted.items()))
    return cell(r[rate], r["n"])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main_tables(records: list[dict]) -> str:
    models = list(dict.fromkeys(r["checkpoint"] for r in records))
    text = ""
    for rate, benign in (("unsafe", False), ("helpful", True), ("refused", True), ("reset", True)):
        sets = list(dict.fromkeys(r["set"] for r in records if r["benign"] is benign))
        n = {r["set"]: r["n"] for r in records}
        rows = [[s, n[s], *(rate_cell(records, rate, set=s, checkpoint=m) for m in models)] for s in sets]
        text += f"\n{rate}, %\n\n" + markdown(["set", "n", *models], rows)
    # Seeds differ more than answers do: the same by seed, and the mean over seeds with Student's interval.
    rows = []
    for name, rate in (("unsafe overall", "unsafe"), ("benign overall", "helpful")):
        for model in models:
            r = next(r for r in records if (r["checkpoint"], r["set"]) == (model, name))
            values = [100 * seed[rate] for seed in r["by_seed"]]
            mean, low, high = mean_interval(values)
            if len(values) < 2:  # nothing to tell apart
                continue
            rows.append(
                [f"{rate}, {name}", model, f"{mean:.1f} [{low:.1f}, {high:.1f}]", " ".join(f"{v:.1f}" for v in values)]
            )
    return text + "\nby seed, %\n\n" + markdown(["", "model", "mean [95% by seeds]", "each seed"], rows)


def bias_table(records: list[dict]) -> str:
    rows = []
    for model in ("sft", "dpo"):
        for bias in sorted({r["reset_bias"] for r in records}):
            unsafe, benign = (
                next(
                    r for r in records if (r["checkpoint"], r["reset_bias"], r["set"]) == (model, bias, f"{s} overall")
                )
                for s in ("unsafe", "benign")
            )
            rows.append(
                [
                    model,
                    f"{bias:g}",
                    cell(unsafe["unsafe"], unsafe["n"]),
                    f"{unsafe['first_step'] / unsafe['n']:.1f}",
                    f"{1000 * unsafe['first_token_s'] / unsafe['n']:.1f}",
                    f"{unsafe['surviving'] / unsafe['total_s']:.0f}",
                    cell(benign["helpful"], benign["n"]),
                    cell(benign["reset"], benign["n"]),
                    f"{1000 * benign['first_token_s'] / benign['n']:.1f}",
                    f"{benign['surviving'] / benign['total_s']:.0f}",
                ]
            )
    head = [
        "model",
        "bias",
        "unsafe, %",
        "first token: step",
        "ms",
        "tokens/s",
        "helpful, %",
        "false resets, %",
        "ms",
        "tokens/s",
    ]
    return markdown(head, rows)


def sampling_table(records: list[dict]) -> str:
    found = [r for r in records if r["set"] == "unsafe overall"]
    ks = list(found[0]["worst_of_k"])
    rows = [
        [r["checkpoint"], curve.split("_")[0], *(f"{100 * v / r['prompts']:.1f}" for v in r[curve].values())]
        for curve in CURVES
        for r in found
    ]
    return markdown(["model", "of k", *(f"k = {k}" for k in ks)], rows)


def condition_table(records: list[dict], columns: tuple) -> str:
    """One row per checkpoint and condition; columns: (set, rate)."""
    rows = []
    conditions = dict.fromkeys((r["checkpoint"], r["on_reset"], r["max_resets"]) for r in records)
    for checkpoint, on_reset, most in conditions:
        where = {"checkpoint": checkpoint, "on_reset": on_reset, "max_resets": most}
        rows.append([*where.values(), *(rate_cell(records, rate, set=name, **where) for name, rate in columns)])
    return markdown(["model", "on_reset", "max_resets", *(f"{name}: {rate}, %" for name, rate in columns)], rows)


def attack_table(records: list[dict]) -> str:
    rows = []
    plain = [r for r in records if condition(r) == ("truncate", 1, 0)]
    for name, variant in dict.fromkeys((r["attack"], r["variant"]) for r in plain):
        found = {r["checkpoint"]: r for r in plain if (r["attack"], r["variant"]) == (name, variant)}
        rows.append([name, variant, *(cell(found[m]["unsafe"], found[m]["n"]) if m in found else "–" for m in MODELS)])
    text = markdown(["attack", "variant", *MODELS], rows)
    again = [r for r in records if r["attack"] == "adaptive-gcg" and r["checkpoint"] == "dpo"]
    rows = [[r["on_reset"], r["max_resets"], f"{r['reset_bias']:g}", cell(r["unsafe"], r["n"])] for r in again]
    return (
        text
        + "\nadaptive GCG against dpo, % successful\n\n"
        + markdown(["on_reset", "max_resets", "bias", "success"], rows)
    )


COLUMNS = (
    ("unsafe overall", "unsafe"),
    ("prefill-unseen", "unsafe"),
    ("benign overall", "helpful"),
    ("benign overall", "reset"),
)


def write_tables(directory: Path) -> None:
    """tables.md, of those files that are there."""
    text = "# Results on the toy world\n\nWritten by `make figures`. Pooled over seeds, Wilson 95% intervals.\n"
    for name, title, table in (
        ("main", "The four models", main_tables),
        ("bias", "The bias on [RESET]", bias_table),
        ("sampling", "Unsafe prompts, % of them, of k answers at temperature 1", sampling_table),
        ("retry", "What the retry sees, and how many it gets", lambda r: condition_table(r, COLUMNS)),
        ("training", "Other ways to train", lambda r: condition_table(r, COLUMNS)),
        ("attacks", "Attacks, % successful", attack_table),
    ):
        path = directory / f"toy-{name}.json"
        if path.is_file():
            result = load(directory, name, ())
            text += f"\n## {title}\n\n`{path.name}`: commit {result['commit']}, {result['machine']}\n\n"
            text += table(result["records"])
    write_text(text, directory / "tables.md")
    print(directory / "tables.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with toy-*.json")
    args = parser.parse_args()
    main_figure(args.results)
    bias_figure(args.results)
    sampling_figure(args.results)
    if (args.results / "toy-attacks.json").is_file():
        attacks_figure(args.results)
    if any((args.results / f"{name}-hold-back.json").is_file() for name in HELD_BACK):
        hold_back_figure(args.results)
    write_tables(args.results)


if __name__ == "__main__":
    run(main)
