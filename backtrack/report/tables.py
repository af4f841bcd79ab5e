"""Tables of the experiments, from the numbers that `make eval attack`, `make tuning` and `make real` leave in results/.

    python -m backtrack.report.tables --results results        # tables.md, tuning.md and real-tables.md

A table is written for every file that is there. A rate is pooled over worlds ("seeds"); its 95% interval is over
prompts and worlds. A difference between two models is a mean over worlds, with Student's interval. The READMEs copy
their tables from here. SECTIONS, at the end, says which file becomes which table.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from backtrack.attacks.table import ATTACKERS
from backtrack.evaluate.counts import CURVES, pool
from backtrack.evaluate.statistics import mean_interval, wilson_of_worlds
from model import InputError
from model.errors import run
from model.files import write_text

# Names in the files -> words, in the order of the tables.
MODELS = {
    "sft-baseline": "baseline",
    "sft-baseline-long": "baseline, equal tokens",
    "dpo-baseline": "baseline + DPO",
    "sft-in-place": "recovery in place",
    "dpo-in-place": "recovery in place + DPO",
    "sft-in-place-every": "recovery in place, taught after every prefix",
    "filter-refuses": "filter that refuses",
    "filter": "filter that asks again",
    "sft": "backtracking",
    "dpo": "backtracking + DPO",
    "sft-restart-unsafe": "restart view on unsafe rows",
    "sft-restart-all": "restart view on all rows",
    "sft-prefix-early": "prefixes from the first half",
    "sft-prefix-late": "prefixes from the second half",
    "sft-weight-1": "[RESET] after every prefix, weighed as one token",
    "sft-drawn": "[RESET] after one drawn prefix",
    "dpo-paper": "DPO, the paper's pairs alone",
    "dpo-from-baseline": "DPO with backtracking, from the baseline",
}
FOUR = ("sft-baseline", "dpo-baseline", "sft", "dpo")
SETS = {
    "seen": "seen in training, new phrasing",
    "unseen": "unseen potions",
    "unseen-ingredients": "unseen, unseen ingredients",
    "wrapper": "new jailbreak wrappers",
    "advbench": "AdvBench",
    "simple_safety_tests": "SimpleSafetyTests",
    "malicious_instructions": "MaliciousInstructions",
    "strongreject": "StrongREJECT",
    "unsafe overall": "**these**",
    "prefill-seen": "answer forced to begin, seen",
    "prefill-unseen": "answer forced to begin, unseen",
    "advbench-forced": "AdvBench, answer forced to begin",
    "simple_safety_tests-forced": "SimpleSafetyTests, answer forced to begin",
    "malicious_instructions-forced": "MaliciousInstructions, answer forced to begin",
    "strongreject-forced": "StrongREJECT, answer forced to begin",
    "benign-seen": "seen in training, new phrasing",
    "benign-unseen": "unseen potions",
    "benign-wrapper": "new wrappers",
    "alpaca_eval": "AlpacaEval",
    "oasst": "OpenAssistant",
    "benign overall": "**these**",
}
# (rate, of harmless questions, in words)
RATES = (
    ("unsafe", False, "unsafe answers"),
    ("helpful", True, "helpful answers to harmless questions"),
    ("refused", True, "harmless questions refused"),
    ("reset", True, "harmless answers taken back, or stopped by the filter"),
)
COMPLIED = (  # the refusal judge says complied or refused, and no more
    ("unsafe", False, "answers that comply with a question that should be refused"),
    ("reset", False, "… and answers to it that were taken back"),
    ("helpful", True, "answers that comply with a harmless question"),
    ("reset", True, "harmless answers taken back"),
)
LOST = {
    "lost_to_reset": "taken back, or stopped by the filter",
    "lost_to_refusal": "refused from the start",
    "lost_to_mistake": "wrong",
}
COLUMNS = {  # (set, rate) -> the head of its column
    ("unsafe overall", "unsafe"): "asked: unsafe, %",
    ("prefill-unseen", "unsafe"): "forced, unseen: unsafe, %",
    ("benign overall", "helpful"): "helpful, %",
    ("benign overall", "reset"): "false resets, %",
}

# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong with the content of this file ends in one line that names it."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, ZeroDivisionError) as error:
        what = f"not a result of this version ({type(error).__name__}: {error})"
        raise InputError(
            f"{path}: {what}; write it anew: `make eval attack`, `make real` or backtrack.evaluate"
        ) from None


def load(directory: Path, *names: str) -> dict:
    """The first of these results, its records pooled, with the records of the others; {} if it is not there.

    A filter's records get the name of a model: it stands beside the models.
    """
    results = []
    for path in (directory / f"{name}.json" for name in names):
        if path.is_file():
            with reading(path):
                result = json.loads(path.read_bytes())
                records = result.setdefault("records", [])
                if any("set" in r and "by_seed" not in r for r in records):
                    result["records"] = pool(records)
                if "filter" in path.name:
                    for r in result["records"]:
                        r |= {"checkpoint": "filter" if r["max_resets"] else "filter-refuses", "max_resets": 1}
            results.append(result)
        elif not results:
            return {}
    return results[0] | {"records": [r for result in results for r in result["records"]]}


def measured(records: list[dict], rate: str) -> tuple[float, float, float]:
    """(percent, low, high) of some sets together. A judge that cannot say unsafe or helpful says complied."""
    counts = []  # of each set, of each world: (how many, of how many prompts)
    for r in records:
        worlds = r["by_seed"]
        if "attack" in r:  # there a world is a rate, of as many prompts as every other
            n = r["n"] / len(worlds)
            counts.append([(share * n, n) for share in worlds])
        else:
            said = rate if r.get(rate) is not None else "complied"
            counts.append([(world[said] * world["prompts"], world["prompts"]) for world in worlds])
    together = [tuple(map(sum, zip(*some, strict=True))) for some in zip(*counts, strict=True)]
    low, high = wilson_of_worlds(together)
    return 100 * sum(count for count, _ in together) / sum(n for _, n in together), 100 * low, 100 * high


def grouped(records: list[dict], *names: str, by: str) -> dict[tuple, dict]:
    """{the values of these fields: {the value of `by`: the record}}, in the order of the records."""
    found: dict[tuple, dict] = {}
    for r in records:
        found.setdefault(tuple(r[name] for name in names), {})[r[by]] = r
    return found


def in_order(records: list[dict]) -> list[str]:
    """The sets of these records, in the order of SETS."""
    return [name for name in SETS if any(r["set"] == name for r in records)]


def is_plain(record: dict) -> bool:
    """As the sampler comes: one reset, cut back, no bias."""
    return (record["on_reset"], record["max_resets"], record["reset_bias"]) == ("truncate", 1, 0)


# ── Cells and lines ──────────────────────────────────────────────────────────────────────────────────────────────────


def cell(p: float, low: float, high: float, digits: int = 1) -> str:
    return f"{p:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def percent(record: dict, rate: str) -> str:
    return cell(*measured([record], rate))


def share(count: int, n: int, interval: list[float]) -> str:
    return cell(*(100 * value for value in (count / n, *interval)))


def markdown(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def word(model: str) -> str:
    return MODELS.get(model, model)


SPEED = ["first token: step", "ms", "tokens/s"]


def speed(r: dict) -> list[str]:
    """Until the first token that survives: sampled tokens, milliseconds; and surviving tokens per second."""
    step, ms = r["first_step"] / r["n"], 1000 * r["first_token_s"] / r["n"]
    return [f"{step:.1f}", f"{ms:.1f}", f"{r['surviving'] / r['total_s']:.0f}"]


# ── Tables: each of a result ─────────────────────────────────────────────────────────────────────────────────────────


def main_tables(result: dict) -> str:
    """Every set and model; why harmless questions got no helpful answer; differences between models."""
    records = result["records"]
    models = [m for m in MODELS if any(r["checkpoint"] == m for r in records)]
    of = {(r["set"], r["checkpoint"]): r for r in records}
    sets = [[name] for name in in_order(records)]
    forced = [name for [name] in sets if name.endswith("-forced")]
    text = ""
    for rate, harmless, what in COMPLIED if "complied" in records[0] else RATES:
        rows = []
        for some in [*sets, forced] if len(forced) > 1 else sets:
            first = [of[name, models[0]] for name in some]
            if first[0]["benign"] is harmless:
                called = "**forced, all**" if some is forced else SETS[some[0]]
                cells = [cell(*measured([of[name, model] for name in some], rate)) for model in models]
                rows.append([called, sum(r["n"] for r in first), *cells])
        text += f"\n{what}, %\n\n" + markdown(["", "n", *map(word, models)], rows)
    rows = []
    for [name], (why, words) in ((s, w) for s in sets for w in LOST.items()):
        found = [of[name, model] for model in models]
        if why in found[0]:
            rows.append([SETS[name], words, *(f"{100 * r[why] / r['n']:.1f}" for r in found)])
    if rows:
        text += "\nwhy harmless questions got no helpful answer, %\n\n" + markdown(["", "", *map(word, models)], rows)
    pairs = [(model, models[0]) for model in models[1:]] + [("dpo", "dpo-baseline"), ("dpo", "sft")]
    return text + differences(records, [pair for pair in pairs if set(pair) <= set(models)])


def differences(records: list[dict], pairs: list[tuple[str, str]]) -> str:
    """The first model of each pair minus the second, in points, world by world; both as the sampler comes."""
    of = {(r["set"], r["checkpoint"]): r["by_seed"] for r in records if is_plain(r)}
    if len(next(iter(of.values()))) < 2:
        return ""
    rows = []
    for (rate, harmless, what), (model, other) in ((rate, pair) for rate in RATES[:2] for pair in pairs):
        name = "benign overall" if harmless else "unsafe overall"
        worlds = zip(of[name, model], of[name, other], strict=True)
        points = [100 * (ours[rate] - theirs[rate]) for ours, theirs in worlds]
        mean, low, high = mean_interval(points)
        within = "yes" if low >= -1 and high <= 1 else "no" if low > 1 or high < -1 else "cannot be told"
        each = " ".join(f"{point:+.1f}" for point in points)
        rows.append([what, word(model), word(other), f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", within, each])
    head = ["%", "", "minus", "points", "within ±1", "each world"]
    return "\nworld by world\n\n" + markdown(head, rows)


def dial_table(result: dict) -> str:
    rows = []
    for (model, bias), of in grouped(result["records"], "checkpoint", "reset_bias", by="set").items():
        asked, harmless = of["unsafe overall"], of["benign overall"]
        row = [word(model), f"{bias:g}", percent(asked, "unsafe"), *speed(asked)]
        rows.append([*row, percent(harmless, "helpful"), percent(harmless, "reset"), *speed(harmless)])
    return markdown(["", "bias", "unsafe, %", *SPEED, "helpful, %", "false resets, %", *SPEED], rows)


def real_dial_table(result: dict) -> str:
    """What is taken back in each set; of what should be, what complies."""
    rows, head = [], []
    for (model, bias), of in grouped(result["records"], "checkpoint", "reset_bias", by="set").items():
        row, head = [word(model), f"{bias:g}"], ["", "bias"]
        for name in in_order(result["records"]):
            row.append(percent(of[name], "reset"))
            head.append(f"{SETS[name]}, n {of[name]['n']}: taken back, %")
            if not of[name]["benign"]:
                row.append(percent(of[name], "unsafe"))
                head.append("complied, %")
        rows.append(row)
    return markdown(head, rows)


def real_speed_table(result: dict) -> str:
    rows = []
    for name in in_order(result["records"]):
        for r in (r for r in result["records"] if r["set"] == name):
            row = [SETS[name], word(r["checkpoint"]), f"{r['reset_bias']:g}", r["n"]]
            rows.append([*row, percent(r, "reset"), *speed(r)])
    return markdown(["", "", "bias", "n", "taken back, %", *SPEED], rows)


def sampling_table(result: dict) -> str:
    found = [r for r in result["records"] if r["set"] == "unsafe overall"]
    rows = []
    for curve, r in ((curve, r) for curve in CURVES for r in found):
        shares = [f"{100 * value / r['prompts']:.1f}" for value in r[curve].values()]
        rows.append([word(r["checkpoint"]), curve.split("_")[0], *shares])
    return markdown(["", "of k", *(f"k = {k}" for k in found[0]["worst_of_k"])], rows)


def condition_table(result: dict) -> str:
    """One row of the table for each checkpoint and condition."""
    rows = []
    for head, of in grouped(result["records"], "checkpoint", "on_reset", "max_resets", by="set").items():
        rows.append([word(head[0]), *head[1:], *(percent(of[name], rate) for name, rate in COLUMNS)])
    return markdown(["", "on_reset", "max_resets", *COLUMNS.values()], rows)


def training_tables(result: dict) -> str:
    """All, and each but the baseline minus the first."""
    first, *others = dict.fromkeys(r["checkpoint"] for r in result["records"])
    pairs = [(model, first) for model in others if model != "sft-baseline"]
    return condition_table(result) + differences(result["records"], pairs)


def tuning_tables(result: dict) -> str:
    """SFT and DPO: the settings of the Makefile, and every other that results/tuning.mk names."""
    of = {(r["set"], r["checkpoint"]): r for r in result["records"]}
    checkpoints = sorted({r["checkpoint"] for r in result["records"]})
    text = ""
    for step in ("sft", "dpo"):
        rows = []
        for side, chosen in (("baseline", f"{step}-baseline"), ("ours", step)):
            tried = f"tried-{side}-{step}-"
            for name in [chosen, *(c for c in checkpoints if c.startswith(tried))]:
                setting = "as in the Makefile" if name == chosen else f"`{name.removeprefix(tried)}`"
                rows.append([word(chosen), setting, *(percent(of[some, name], rate) for some, rate in COLUMNS)])
        text += f"\n{step.upper()}\n\n" + markdown(["", "setting", *COLUMNS.values()], rows)
    return text


def attack_table(result: dict) -> str:
    """Attacks on models as they come; who sets the sampler; what the defender can change; what each attacker knows."""
    records = result["records"]

    def rows_of(some: list[dict], *names: str) -> list[list]:
        found = grouped(some, *names, by="checkpoint").items()
        return [[*head, *(attack_cell(of[m]) if m in of else "–" for m in FOUR)] for head, of in found]

    decoding = [r | {"bias": f"{r['reset_bias']:g}"} for r in records if r["attack"] == "decoding"]
    plain = [r for r in records if is_plain(r) and r["attack"] != "decoding"]
    text = markdown(["attack", "variant", *map(word, FOUR)], rows_of(plain, "attack", "variant"))
    if decoding:
        text += "\nWho sets the sampler, % unsafe\n\n"
        text += markdown(
            ["", "max_resets", "bias", *map(word, FOUR)], rows_of(decoding, "variant", "max_resets", "bias")
        )
    again = [r for r in records if (r["attack"], r["checkpoint"], r["variant"]) == ("adaptive-gcg", "dpo", "any")]
    settings = [[r["on_reset"], r["max_resets"], f"{r['reset_bias']:g}", percent(r, "unsafe")] for r in again]
    if settings:
        text += "\nadaptive GCG against backtracking + DPO, % successful\n\n"
        text += markdown(["on_reset", "max_resets", "bias", "success"], settings)
    names = dict.fromkeys(r["attack"] for r in records)
    return text + "\n" + "".join(f"- **{name}** {ATTACKERS[name]}.\n" for name in names)


def attack_cell(record: dict) -> str:
    """How often it succeeds, and how often with an answer to what was asked for."""
    on_topic = f"; {100 * record['on_topic'] / record['n']:.1f} on topic" if "on_topic" in record else ""
    return percent(record, "unsafe") + on_topic


def paired_table(result: dict) -> str:
    """Each model against the baseline on the same prompts: how many only one of them complied with, McNemar's p."""
    rows = []
    for name in in_order(result["paired"]):
        for r in result["paired"]:
            if (r["set"], r["rate"]) == (name, "complied"):
                cells = [r["only_first"], r["only_this"], f"{r['p']:.2g}"]
                rows.append([SETS[name], word(Path(r["checkpoint"]).name), *cells])
    return markdown(["complied", "", "the baseline only", "this model only", "p"], rows)


def likelihood_table(result: dict) -> str:
    """What each model thinks of held-out rows: their chosen answer, and [RESET] along either answer."""
    rows = []
    for r in result["records"]:
        p, resets = [], []
        for name in ("rejected", "chosen"):
            known = f"p_{name}" in r
            p.append(f"{r[f'p_{name}']:.3f}" if known else "–")
            resets.append(share(r[f"reset_{name}"], r["n"], r[f"reset_{name}_interval"]) if known else "–")
        auc = cell(r["auc"], *r["auc_interval"], digits=3) if "auc" in r else "–"
        rows.append([word(Path(r["checkpoint"]).name), r["rows"], r["n"], f"{r['logprob']:.3f}", *p, *resets, auc])
    head = ["", "rows", "n", "log-prob per token, chosen", "p([RESET]), rejected", "p([RESET]), chosen"]
    return markdown([*head, "reset in rejected, %", "reset in chosen, %", "AUC"], rows)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

OF_K = "Prompts, %, of whose k answers at temperature 1 one"
# What is written -> its title, what it says of itself, and of each section: results, title, table.
SECTIONS = {
    "tables.md": (
        "Results on the toy world",
        "Written by `make figures`; 95% intervals over prompts and worlds.",
        ("toy-main toy-filter", "The models", main_tables),
        ("toy-bias", "The bias on [RESET]", dial_table),
        ("toy-filter-bias", "The bias on the filter's score", dial_table),
        ("toy-sampling", f"{OF_K} is unsafe (worst), or all are (best)", sampling_table),
        ("toy-retry", "What the retry sees, and how many it gets", condition_table),
        ("toy-training", "Other ways to train", training_tables),
        ("toy-in-place", "The control in place, taught after one drawn prefix or every prefix", training_tables),
        ("toy-resets", "One drawn prefix or every prefix, on development seeds", training_tables),
        ("toy-attacks", "Attacks, % successful", attack_table),
    ),
    "tuning.md": (
        "Tuning on the toy world",
        "Written by `make tuning figures`; results/tuning.mk has the flags of each line.",
        ("toy-tuning", "What was tried on development seeds", tuning_tables),
    ),
    "real-tables.md": (
        "Results on a real model: SmolLM2-135M-Instruct",
        "Written by `make real MODEL=smollm2`; 95% intervals over prompts. A judge says complied or refused.",
        ("real-main", "The models", main_tables),
        ("real-main", "The models, prompt by prompt", paired_table),
        ("real-resets", "What is taken back, on more prompts", real_dial_table),
        ("real-sampling", f"{OF_K} complies (worst), or all do (best)", sampling_table),
        ("real-bias", "The bias on [RESET]", real_dial_table),
        ("real-speed", "One prompt at a time", real_speed_table),
        ("real-likelihoods", "Held-out rows", likelihood_table),
        ("real-hh", "Held-out rows of HH-RLHF, of a model trained on it", likelihood_table),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="directory with the .json files")
    directory = parser.parse_args().results
    for file, (title, about, *sections) in SECTIONS.items():
        parts = []
        for names, what, table in sections:
            path = directory / f"{names.split()[0]}.json"
            result = load(directory, *names.split())
            if result:
                with reading(path):
                    origin = f"`{path.name}`: commit {result['commit']}, {result['machine']}"
                    parts.append(f"\n## {what}\n\n{origin}\n\n{table(result)}")
        if parts:
            write_text(f"# {title}\n\n{about}\n{''.join(parts)}", directory / file)
            print(directory / file)


if __name__ == "__main__":
    run(main)
