"""The tables of the paper's experiments, from the numbers that `make eval attack` and `make real` left in results/.

    python -m backtrack.report.tables --results results        # writes results/tables.md, and real-tables.md
    python -m backtrack.report.tables --results results --of real

Rates are pooled over worlds ("seeds") and have 95% intervals over prompts and worlds; differences between two models
are means over worlds, with Student's interval. The README's tables are copied from here.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from backtrack.attacks.table import ATTACKERS
from backtrack.evaluate.__main__ import CURVES, pool
from backtrack.evaluate.statistics import mean_interval, wilson_of_worlds
from backtrack.evaluate.triggers import SAID
from model import InputError
from model.errors import run
from model.files import write_text

# Names in the files -> words, in the order of the tables.
MODELS = {
    "sft-baseline": "baseline",
    "sft-baseline-long": "baseline, equal tokens",
    "dpo-baseline": "baseline + DPO",
    "sft-in-place": "recovery in place",
    "filter-refuses": "filter that refuses",
    "filter": "filter that asks again",
    "sft": "backtracking",
    "dpo": "backtracking + DPO",
}
FOUR = ("sft-baseline", "dpo-baseline", "sft", "dpo")
OTHER_MODELS = {
    "sft-restart-unsafe": "restart view on unsafe rows",
    "sft-restart-all": "restart view on all rows",
    "sft-prefix-early": "prefixes from the first half",
    "sft-prefix-late": "prefixes from the second half",
    "sft-weight-1": "[RESET] after every prefix, weighed as one token",
    "sft-drawn": "[RESET] after one drawn prefix",
    "dpo-paper": "DPO, the paper's pairs alone",
    "dpo-from-baseline": "DPO with backtracking, from the baseline",
}
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
RATES = {
    "unsafe": "unsafe answers",
    "helpful": "helpful answers to harmless questions",
    "refused": "harmless questions refused",
    "reset": "harmless answers taken back, or stopped by the filter",
}
LOST = {
    "lost_to_reset": "taken back, or stopped by the filter",
    "lost_to_refusal": "refused from the start",
    "lost_to_mistake": "wrong",
}
# The refusal judge says complied or refused, and no more. (rate, of harmless questions, in words)
COMPLIED = (
    ("unsafe", False, "answers that comply with a question that should be refused"),
    ("reset", False, "… and answers to it that were taken back"),
    ("helpful", True, "answers that comply with a harmless question"),
    ("reset", True, "harmless answers taken back"),
)
COLUMNS = (
    ("unsafe overall", "unsafe"),
    ("prefill-unseen", "unsafe"),
    ("benign overall", "helpful"),
    ("benign overall", "reset"),
)
COLUMN_WORDS = ("asked: unsafe, %", "forced, unseen: unsafe, %", "helpful, %", "false resets, %")

# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def load(path: Path, models=()) -> dict:
    """A result of evaluate, pooled if it is not, with all of these models. Raises InputError if it is none."""
    try:
        result = json.loads(path.read_bytes())
        if not all("by_seed" in r for r in result["records"]):
            result["records"] = pool(result["records"])
        found = {r["checkpoint"] for r in result["records"] if r["by_seed"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        found = set()
    if not found or not found >= set(models):
        what = f"a result of {', '.join(models)}" if models else "a result"
        raise InputError(f"{path}: not there, or not {what}; `make eval` and `make attack` write them")
    if not all("attack" in r or "prompts" in r["by_seed"][0] for r in result["records"]):
        raise InputError(f"{path}: of an earlier version, without each world's prompts; `make eval` writes it anew")
    return result


def load_filter(directory: Path, name: str) -> list[dict]:
    """The records of a filter's result, as if it were a model; none, if it is not there."""
    path = directory / f"toy-{name}.json"
    records = load(path)["records"] if path.is_file() else []
    return [r | {"checkpoint": "filter" if r["max_resets"] else "filter-refuses", "max_resets": 1} for r in records]


def pick(records: list[dict], **wanted) -> dict:
    """The one record that has these values."""
    for r in records:
        if all(r[key] == value for key, value in wanted.items()):
            return r
    raise InputError(f"no record of {wanted} in the results; `make eval` and `make attack` write them")


def counts(record: dict, rate: str) -> list[tuple[float, float]]:
    """(how many, of how many prompts) in each world. Of a judge that cannot say unsafe or helpful, complied."""
    worlds = record["by_seed"]
    if "attack" in record:  # there worlds are rates, of as many prompts each
        return [(share * record["n"] / len(worlds), record["n"] / len(worlds)) for share in worlds]
    rate = rate if record.get(rate) is not None else "complied"
    return [(world[rate] * world["prompts"], world["prompts"]) for world in worlds]


def measured(records: list[dict], rate: str) -> tuple[float, float, float]:
    """(percent, low, high) of some sets together."""
    of_sets = zip(*(counts(r, rate) for r in records), strict=True)  # world by world
    worlds = [tuple(map(sum, zip(*some, strict=True))) for some in of_sets]
    low, high = wilson_of_worlds(worlds)
    p = sum(count for count, _ in worlds) / sum(n for _, n in worlds)
    return 100 * p, 100 * low, 100 * high


def cell(p: float, low: float, high: float) -> str:
    return f"{p:.1f} [{low:.1f}, {high:.1f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def word(model: str) -> str:
    return (MODELS | OTHER_MODELS).get(model, model)


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def main_tables(records: list[dict]) -> str:
    names = [m for m in MODELS if any(r["checkpoint"] == m for r in records)]
    sets = [[s] for s in in_order({r["set"] for r in records})]
    forced = [s for [s] in sets if s.endswith("-forced")]
    if len(forced) > 1:
        sets.append(forced)
    text = ""
    of_rates = [(rate, rate != "unsafe", what) for rate, what in RATES.items()]
    for rate, harmless, what in COMPLIED if "complied" in records[0] else of_rates:
        rows = []
        for some in sets:
            found = {m: [pick(records, set=name, checkpoint=m) for name in some] for m in names}
            first = found[names[0]]
            if first[0]["benign"] is harmless:
                cells = [cell(*measured(rs, rate)) for rs in found.values()]
                called = SETS.get(some[0], some[0]) if some is not forced else "**forced, all**"
                rows.append([called, sum(r["n"] for r in first), *cells])
        text += f"\n{what}, %\n\n" + markdown(["", "n", *map(word, names)], rows)
    pairs = [(name, names[0]) for name in names[1:]] + [("dpo", "dpo-baseline"), ("dpo", "sft")]
    return text + lost_table(records, names) + differences(records, [p for p in pairs if set(p) <= set(names)])


def lost_table(records: list[dict], names: list[str]) -> str:
    """Of harmless questions, those that were not answered helpfully, by what happened instead."""
    rows = []
    for name in in_order({r["set"] for r in records if "lost_to_reset" in r}):
        found = [pick(records, set=name, checkpoint=model) for model in names]
        for why, words in LOST.items():
            shares = [f"{100 * r[why] / r['n']:.1f}" for r in found]
            rows.append([SETS[name], words, *shares])
    if not rows:
        return ""
    return "\nwhy harmless questions got no helpful answer, %\n\n" + markdown(["", "", *map(word, names)], rows)


def differences(records: list[dict], pairs: list[tuple[str, str]]) -> str:
    """The first model of each pair minus the second, in points, world by world; both as they come."""
    plain = [r for r in records if is_plain(r)]
    if len(plain[0]["by_seed"]) < 2:
        return ""
    rows = []
    for name, rate in (("unsafe overall", "unsafe"), ("benign overall", "helpful")):
        for model, other in pairs:
            ours, theirs = (pick(plain, set=name, checkpoint=m)["by_seed"] for m in (model, other))
            points = [100 * (one[rate] - two[rate]) for one, two in zip(ours, theirs, strict=True)]
            mean, low, high = mean_interval(points)
            within = "yes" if low >= -1 and high <= 1 else "no" if low > 1 or high < -1 else "cannot be told"
            each = " ".join(f"{point:+.1f}" for point in points)
            rows.append([RATES[rate], word(model), word(other), f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", within, each])
    head = ["%", "", "minus", "points", "within ±1", "each world"]
    return "\nworld by world\n\n" + markdown(head, rows)


def in_order(sets: set[str]) -> list[str]:
    """Of the sets named in SETS those that are here."""
    return [name for name in SETS if name in sets]


def dial_table(records: list[dict]) -> str:
    rows = []
    for model, bias in dict.fromkeys((r["checkpoint"], r["reset_bias"]) for r in records):
        asked, harmless = (
            pick(records, checkpoint=model, reset_bias=bias, set=f"{kind} overall") for kind in ("unsafe", "benign")
        )
        row = [word(model), f"{bias:g}", cell(*measured([asked], "unsafe")), *speed(asked)]
        row += [cell(*measured([harmless], "helpful")), cell(*measured([harmless], "reset")), *speed(harmless)]
        rows.append(row)
    times = ["first token: step", "ms", "tokens/s"]
    return markdown(["", "bias", "unsafe, %", *times, "helpful, %", "false resets, %", *times], rows)


def speed(r: dict) -> list[str]:
    """Until the first token that survives: sampled tokens, milliseconds; and surviving tokens per second."""
    step, ms = r["first_step"] / r["n"], 1000 * r["first_token_s"] / r["n"]
    return [f"{step:.1f}", f"{ms:.1f}", f"{r['surviving'] / r['total_s']:.0f}"]


def sampling_table(records: list[dict]) -> str:
    found = [r for r in records if r["set"] == "unsafe overall"]
    rows = []
    for curve in CURVES:
        for r in found:
            shares = [f"{100 * value / r['prompts']:.1f}" for value in r[curve].values()]
            rows.append([word(r["checkpoint"]), curve.split("_")[0], *shares])
    return markdown(["", "of k", *(f"k = {k}" for k in found[0]["worst_of_k"])], rows)


def condition_table(records: list[dict]) -> str:
    """One row per checkpoint and condition."""
    rows = []
    for checkpoint, on_reset, most in dict.fromkeys((r["checkpoint"], r["on_reset"], r["max_resets"]) for r in records):
        where = {"checkpoint": checkpoint, "on_reset": on_reset, "max_resets": most}
        cells = [cell(*measured([pick(records, set=name, **where)], rate)) for name, rate in COLUMNS]
        rows.append([word(checkpoint), on_reset, most, *cells])
    return markdown(["", "on_reset", "max_resets", *COLUMN_WORDS], rows)


def training_tables(records: list[dict]) -> str:
    """All, and each but the baseline beside the SFT of the main experiment."""
    others = [m for m in dict.fromkeys(r["checkpoint"] for r in records) if m not in ("sft", "sft-baseline")]
    return condition_table(records) + differences(records, [(model, "sft") for model in others])


def resets_tables(records: list[dict]) -> str:
    """[RESET] after one drawn prefix and after every one, each weighed as one token."""
    return condition_table(records) + differences(records, [("sft-weight-1", "sft-drawn")])


def is_plain(record: dict) -> bool:
    """As the sampler comes: one reset, cut back, no bias."""
    return (record["on_reset"], record["max_resets"], record["reset_bias"]) == ("truncate", 1, 0)


def attack_table(records: list[dict]) -> str:
    """Attacks on models as they come; what who sets the sampler gains; what the defender can change; who is who."""
    rows = []
    plain = [r for r in records if is_plain(r) and r["attack"] != "decoding"]
    for name, variant in dict.fromkeys((r["attack"], r["variant"]) for r in plain):
        found = {r["checkpoint"]: r for r in plain if (r["attack"], r["variant"]) == (name, variant)}
        cells = [attack_cell(found[m]) if m in found else "–" for m in FOUR]
        rows.append([name, variant, *cells])
    text = markdown(["attack", "variant", *map(word, FOUR)], rows)
    decoding = [r for r in records if r["attack"] == "decoding"]
    if decoding:
        text += "\nWho sets the sampler, % unsafe\n\n" + sampler_table(decoding)
    again = [r for r in records if (r["attack"], r["checkpoint"], r["variant"]) == ("adaptive-gcg", "dpo", "any")]
    settings = [[r["on_reset"], r["max_resets"], f"{r['reset_bias']:g}", cell(*measured([r], "unsafe"))] for r in again]
    if settings:
        text += "\nadaptive GCG against backtracking + DPO, % successful\n\n"
        text += markdown(["on_reset", "max_resets", "bias", "success"], settings)
    text += "\n"
    names = dict.fromkeys(r["attack"] for r in records)
    return text + "".join(f"- **{name}** {ATTACKERS[name]}.\n" for name in names)


def attack_cell(record: dict) -> str:
    """How often it succeeds, and how often with an answer to what was asked for."""
    text = cell(*measured([record], "unsafe"))
    if "on_topic" in record:
        text += f"; {100 * record['on_topic'] / record['n']:.1f} on topic"
    return text


def sampler_table(records: list[dict]) -> str:
    """A line for each way to sample: greedy or not, resets allowed or not, the bias on [RESET]."""
    rows = []
    for how in dict.fromkeys((r["variant"], r["max_resets"], r["reset_bias"]) for r in records):
        found = {r["checkpoint"]: r for r in records if (r["variant"], r["max_resets"], r["reset_bias"]) == how}
        cells = [cell(*measured([found[m]], "unsafe")) if m in found else "–" for m in FOUR]
        rows.append([how[0], how[1], f"{how[2]:g}", *cells])
    return markdown(["", "max_resets", "bias", *map(word, FOUR)], rows)


def trigger_tables(result: dict) -> str:
    rows = []
    for r in result["reliability"]:
        shares = []
        for name in ("named", "leads_there"):
            low, high = r[f"{name}_interval"]
            shares.append(cell(100 * r[name] / r["places"], 100 * low, 100 * high))
        rows.append([f"{r['low']:g} to {r['high']:g}", r["places"], *shares])
    head = ["p([RESET])", "places", "a forbidden ingredient is named, %", "… or will be, %"]
    text = markdown(head, rows) + "\nresets that saved an answer, of all resets, by what the answer had said last\n\n"
    rows = []
    for r in result["resets"]:
        cells = [f"{r['saved'][name]} of {r['resets'][name]}" for name in SAID]
        harmless = "harmless: " if r["benign"] else ""
        rows.append([harmless + SETS[r["set"]], r["answers"], r["unsafe_masked"], r["unsafe"], *cells])
    return text + markdown(["", "answers", "unsafe, [RESET] masked", "unsafe", *SAID], rows)


def real_dial_table(records: list[dict]) -> str:
    """A row for each model and bias; what is taken back in each set, and where it should be, what complies."""
    sets = in_order({r["set"] for r in records})
    rows, head = [], []
    for model, bias in dict.fromkeys((r["checkpoint"], r["reset_bias"]) for r in records):
        cells, head = [], ["", "bias"]
        for name in sets:
            r = pick(records, checkpoint=model, reset_bias=bias, set=name)
            cells.append(cell(*measured([r], "reset")))
            head.append(f"{SETS[name]}, n {r['n']}: taken back, %")
            if not r["benign"]:
                cells.append(cell(*measured([r], "unsafe")))
                head.append("complied, %")
        rows.append([word(model), f"{bias:g}", *cells])
    return markdown(head, rows)


def real_speed_table(records: list[dict]) -> str:
    """A row for each set, model and bias: what a user waits for."""
    rows = []
    for name in in_order({r["set"] for r in records}):
        for r in records:
            if r["set"] == name:
                share = cell(*measured([r], "reset"))
                rows.append([SETS[name], word(r["checkpoint"]), f"{r['reset_bias']:g}", r["n"], share, *speed(r)])
    return markdown(["", "", "bias", "n", "taken back, %", "first token: step", "ms", "tokens/s"], rows)


def paired_table(result: dict) -> str:
    """Each model against the baseline on the same prompts: how many only one of them complied with, McNemar's p."""
    rows = []
    for name in in_order({r["set"] for r in result["paired"]}):
        for r in result["paired"]:
            if (r["set"], r["rate"]) == (name, "complied"):
                cells = [r["only_first"], r["only_this"], f"{r['p']:.2g}"]
                rows.append([SETS[name], word(Path(r["checkpoint"]).name), *cells])
    return markdown(["complied", "", "the baseline only", "this model only", "p"], rows)


def likelihood_table(records: list[dict]) -> str:
    """What each model thinks of held-out rows: their chosen answer, and [RESET] along either answer."""
    rows = []
    for r in records:
        cells = [word(Path(r["checkpoint"]).name), r["rows"], r["n"], f"{r['logprob']:.3f}"]
        for name in ("rejected", "chosen"):
            known = f"p_{name}" in r
            cells.append(f"{r[f'p_{name}']:.3f}" if known else "–")
        for name in ("rejected", "chosen"):
            low, high = r.get(f"reset_{name}_interval", (0, 0))
            share = (100 * r[f"reset_{name}"] / r["n"], 100 * low, 100 * high) if f"p_{name}" in r else ()
            cells.append(cell(*share) if share else "–")
        auc = (r["auc"], *r["auc_interval"]) if "auc" in r else ()
        rows.append([*cells, "{:.3f} [{:.3f}, {:.3f}]".format(*auc) if auc else "–"])
    resets = [f"reset in {name}, %" for name in ("rejected", "chosen")]
    p = [f"p([RESET]), {name}" for name in ("rejected", "chosen")]
    return markdown(["", "rows", "n", "log-prob per token, chosen", *p, *resets, "AUC"], rows)


def tuning_tables(records: list[dict]) -> str:
    """SFT and DPO: the settings of the Makefile, and every other that results/tuning.mk names."""
    checkpoints = sorted({r["checkpoint"] for r in records})
    text = ""
    for step in ("sft", "dpo"):
        rows = []
        for side, chosen in (("baseline", f"{step}-baseline"), ("ours", step)):
            tried = f"tried-{side}-{step}-"
            for name in [chosen, *(c for c in checkpoints if c.startswith(tried))]:
                setting = "as in the Makefile" if name == chosen else f"`{name.removeprefix(tried)}`"
                cells = [cell(*measured([pick(records, set=some, checkpoint=name)], rate)) for some, rate in COLUMNS]
                rows.append([word(chosen), setting, *cells])
        text += f"\n{step.upper()}\n\n" + markdown(["", "setting", *COLUMN_WORDS], rows)
    return text


def toy_tables(directory: Path) -> None:
    """tables.md and tuning.md, of those files that are there."""
    of_k = "Prompts, %, of whose k answers at temperature 1 one is unsafe (worst), or all are (best)"
    text = "# Results on the toy world\n\nWritten by `make figures`; 95% intervals over prompts and worlds.\n"
    for name, title, table in (
        ("main", "The models", lambda result: main_tables(result["records"] + load_filter(directory, "filter"))),
        ("bias", "The bias on [RESET]", of_records(dial_table)),
        ("filter-bias", "The bias on the filter's score", lambda _: dial_table(load_filter(directory, "filter-bias"))),
        ("sampling", of_k, of_records(sampling_table)),
        ("retry", "What the retry sees, and how many it gets", of_records(condition_table)),
        ("training", "Other ways to train", of_records(training_tables)),
        ("resets", "One drawn prefix or every prefix, on development seeds", of_records(resets_tables)),
        ("attacks", "Attacks, % successful", of_records(attack_table)),
    ):
        text += section(directory / f"toy-{name}.json", title, load, table)
    text += section(directory / "toy-triggers.json", "What makes it say [RESET]", read, trigger_tables)
    write_text(text, directory / "tables.md")
    print(directory / "tables.md")
    tuning = section(
        directory / "toy-tuning.json", "What was tried on development seeds", load, of_records(tuning_tables)
    )
    if tuning:
        about = "Written by `make tuning figures`; results/tuning.mk has the flags of each line.\n"
        write_text(f"# Tuning on the toy world\n\n{about}{tuning}", directory / "tuning.md")
        print(directory / "tuning.md")


def real_tables(directory: Path) -> None:
    """real-tables.md, of those files that are there."""
    of_k = "Prompts, %, of whose k answers at temperature 1 one complies (worst), or all do (best)"
    text = "# Results on a real model: SmolLM2-135M-Instruct\n\n"
    text += "Written by `make real`; 95% intervals over prompts. A judge says complied or refused.\n"
    for name, title, reader, table in (
        ("main", "The models", load, of_records(main_tables)),
        ("main", "The models, prompt by prompt", read, paired_table),
        ("resets", "What is taken back, on more prompts", load, of_records(real_dial_table)),
        ("sampling", of_k, load, of_records(sampling_table)),
        ("bias", "The bias on [RESET]", load, of_records(real_dial_table)),
        ("speed", "One prompt at a time", load, of_records(real_speed_table)),
        ("attacks", "Attacks, % successful", load, of_records(attack_table)),
        ("likelihoods", "Held-out rows", read, of_records(likelihood_table)),
        ("hh", "Held-out rows of HH-RLHF, of a model trained on it", read, of_records(likelihood_table)),
    ):
        text += section(directory / f"real-{name}.json", title, reader, table)
    write_text(text, directory / "real-tables.md")
    print(directory / "real-tables.md")


def section(path: Path, title: str, reader: Callable[[Path], dict], table: Callable[[dict], str]) -> str:
    """A heading and a table of this file; nothing, if it is not there."""
    if not path.is_file():
        return ""
    result = reader(path)
    about = f"`{path.name}`: commit {result['commit']}, {result['machine']}"
    return f"\n## {title}\n\n{about}\n\n{table(result)}"


def of_records(table: Callable[[list[dict]], str]) -> Callable[[dict], str]:
    return lambda result: table(result["records"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=Path("results"), help="directory with toy-*.json and real-*.json")
    add("--of", choices=("toy", "real"), help="these only; else of both")
    args = parser.parse_args()
    if args.of != "real":
        toy_tables(args.results)
    if args.of == "real" or any(args.results.glob("real-*.json")):
        real_tables(args.results)


if __name__ == "__main__":
    run(main)
