"""Several trainings, the same prompts: rates with intervals over both, and which method fails on which prompts.

    python -m backtrack.evaluate --ckpt runs/gemma3/seed-0/sft runs/gemma3/seed-0/sft-in-place … --out seed-0/main.json
    python -m backtrack.evaluate.over_seeds --in seed-*/main.json --against dpo-in-place:dpo --out main.json

Each --in is an --out of backtrack.evaluate, for one training seed; the answers beside it are read. The models are told
apart by the names of their directories, which all seeds must have. Besides the sets there are "asked", "begun" (answers
forced to begin, sets NAME-forced) and "harmless": all prompts of a kind, where it has several sets. The sets begun-N
are not pooled: they ask the same questions for every N, and fifty questions are not a hundred and fifty.

A prompt is as hard for every training, and a training is as good for every prompt: so both are drawn anew, with
replacement, 10,000 times, and the middle 95% of the means are the interval (a bootstrap of crossed effects, Owen 2007,
arXiv 0712.1111). Three trainings say little about others: where they differ much, such an interval holds the truth in
three of four cases rather than in 95 of 100, and with two in one of two; so "by_seed" has each one's rate. Near 0 and
100% there is little to draw, so a rate's interval is never narrower than Wilson's for that rate of the prompts. Two
models are compared on the same draws, and by McNemar's test within each seed; so that a few prompts on one side and
none on the other prove nothing, one prompt on either side is added before the draws (the idea is Agresti and Min's,
2005). Of several answers to a prompt the rates are means, and "worst of 8" says that at least one of eight failed.
"""

import argparse
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from backtrack.evaluate.answers import CONDITION, answers_file
from backtrack.evaluate.results import write_result
from backtrack.evaluate.statistics import mcnemar, wilson
from backtrack.rows import json_lines
from model.errors import Help, InputError, run
from model.files import check_file

DRAWS = 10_000
COMPARED = ("unsafe", "complied")
LONG = "begun long ago"
Outcomes = dict[tuple, dict[int, list[float]]]  # (model, condition …, set, rate) -> prompt -> the mean of its answers


def outcomes(path: str, kinds: dict[str, str]) -> Outcomes:
    """What became of the answers of one seed. Raises InputError if they are not there, or not judged."""
    found: dict = defaultdict(lambda: defaultdict(list))
    pooled = [kind for kind, sets in Counter(kinds.values()).items() if sets > 1 and kind != LONG]
    for where, record in list(json_lines(answers_file(path)))[1:]:
        if "judge" not in record:
            raise InputError(f"{where}: an answer without a verdict; run evaluate again with --judge")
        head = Path(record["checkpoint"]).name, *(record[name] for name in CONDITION)
        rates = {name: record[name] for name in ("unsafe", "complied", "refused") if name in record}
        kind = kinds[record["set"]]
        for name in [record["set"]] + ([kind] if kind in pooled else []):
            for rate, value in (rates | {"reset": record["resets"] > 0}).items():
                found[*head, name, rate][record["prompt"]].append(float(value))
    rates = {}
    for key, of in found.items():
        rates[key] = {i: sum(values) / len(values) for i, values in of.items()}
        samples = min(len(values) for values in of.values())
        if samples > 1:
            rates[*key[:-1], f"{key[-1]}, worst of {samples}"] = {i: max(values) for i, values in of.items()}
    return rates


def kinds_of(path: str) -> dict[str, str]:
    """Set -> its kind."""
    found = {}
    for record in json.loads(Path(path).read_text(encoding="utf-8"))["records"]:
        name = record["set"]
        begun = "begun" if name.endswith("-forced") else LONG if name.startswith("begun-") else "asked"
        found[name] = "harmless" if record["benign"] else begun
    return found


def same_settings(paths: list[str]) -> None:
    """Raises InputError where two seeds were asked other prompts, or in another way."""
    all_settings = []
    for path in paths:
        (_, head), *_ = json_lines(answers_file(path))
        all_settings.append({name: value for name, value in head["settings"].items() if name != "weights"})
    for path, settings in zip(paths, all_settings, strict=True):
        for name, value in settings.items():
            if value != all_settings[0].get(name):
                raise InputError(f"{path}: {name} differs from that of {paths[0]}; evaluate all seeds alike")


def matrix(seeds: list[Outcomes], key: tuple) -> np.ndarray:
    """(seeds, prompts), fp64. Raises InputError if a seed lacks the model or a prompt."""
    prompts = sorted(seeds[0][key])
    for number, seed in enumerate(seeds):
        if sorted(seed.get(key, ())) != prompts:
            raise InputError(f"--in number {number + 1} has not the same answers of {key[0]} ({key[-2]}) as the first")
    return np.array([[seed[key][i] for i in prompts] for seed in seeds])


@cache
def draws(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How often each training (DRAWS, S) and each prompt (DRAWS, P) is drawn, as shares of 1."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, [1 / n] * n, size=DRAWS) / n for n in shape)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95%, of the mean of values (seeds, prompts)."""
    of_seeds, of_prompts = draws(values.shape)
    means = np.einsum("ds,sp,dp->d", of_seeds, values, of_prompts)
    return tuple(np.quantile(means, (0.025, 0.975)))


def rate_record(head: dict, values: np.ndarray) -> dict:
    mean, prompts = float(values.mean()), values.shape[1]
    low, high = zip(interval(values), wilson(mean * prompts, prompts), strict=True)
    by_seed = [round(float(one), 4) for one in values.mean(axis=1)]
    counts = {"seeds": len(values), "prompts": prompts, "mean": round(mean, 4)}
    return head | counts | {"interval": [round(float(min(low)), 4), round(float(max(high)), 4)], "by_seed": by_seed}


def difference_record(head: dict, first: np.ndarray, other: np.ndarray) -> dict:
    """other − first. McNemar's needs one answer to a prompt: with several there is none."""
    difference = other - first
    one = np.ones((len(difference), 1))
    low, high = interval(np.hstack([difference, one, -one]))
    record = head | {"difference": round(float(difference.mean()), 4), "interval": [round(low, 4), round(high, 4)]}
    if np.isin(np.concatenate([first, other]), (0, 1)).all():
        only = [(int((f > o).sum()), int((o > f).sum())) for f, o in zip(first, other, strict=True)]
        record |= {"only_first_only_other": only, "mcnemar": [float(f"{mcnemar(*pair):.3g}") for pair in only]}
    return record


def over_seeds(paths: list[str], against: list[str]) -> tuple[list[dict], list[dict]]:
    same_settings(paths)
    kinds = kinds_of(paths[0])
    seeds = [outcomes(path, kinds) for path in paths]
    names = ("model", *CONDITION, "set", "rate")
    rates = []
    for key in seeds[0]:
        head = dict(zip(names, key, strict=True))
        rates.append(rate_record(head | {"kind": kinds.get(head["set"], "all")}, matrix(seeds, key)))
    differences = []
    for pair in against:
        first, _, other = pair.partition(":")
        keys = [key for key in seeds[0] if key[0] == first and (other, *key[1:]) in seeds[0]]
        if not keys:
            raise InputError(f"--against {pair}: no such models; there are {', '.join({key[0] for key in seeds[0]})}")
        for key in (key for key in keys if key[-1] in COMPARED):
            head = {"first": first, "other": other} | dict(zip(names[1:], key[1:], strict=True))
            differences.append(difference_record(head, matrix(seeds, key), matrix(seeds, (other, *key[1:]))))
    return rates, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--in", dest="inputs", nargs="+", required=True, metavar="FILE", help="one result of evaluate for each seed")
    add("--against", nargs="*", default=[], metavar="A:B", help="models to compare: how much more often B fails than A")
    add("--out", required=True, help="result to write (.json)")
    args = parser.parse_args()
    check_file(args.out)
    rates, differences = over_seeds(args.inputs, args.against)
    write_result(args.out, rates=rates, differences=differences)
    for r in rates:
        if r["rate"] in ("unsafe", "complied", "reset"):
            low, high = r["interval"]
            print(
                f"{r['set']:<32}{r['model']:<16}{r['reset_bias']:>5g}  {r['rate']:<9}"
                f"{100 * r['mean']:6.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            )


if __name__ == "__main__":
    run(main)
