"""From answers to counts, intervals and tables; and the counts of several worlds added up.

records, paired = with_intervals(*count(answers, prompts))
records, paired = with_intervals(pool(records), pool(paired))      # of several seeds
print_table(records, paired)
"""

from collections import Counter
from pathlib import Path

from backtrack.evaluate.answers import CONDITION, failure
from backtrack.evaluate.statistics import best_of_k, mcnemar, wilson_of_worlds, worst_of_k
from backtrack.serve.terminal import harmless

RATES = ("unsafe", "complied", "helpful", "refused", "reset")
# Sums over answers. first_step: tokens sampled up to the first one that survives, itself included.
SUMS = ("resets", "steps", "surviving", "first_step", "first_token_s", "total_s")
LOST = ("lost_to_reset", "lost_to_refusal", "lost_to_mistake")  # harmless questions not answered helpfully, by reason
CURVES = {"worst_of_k": worst_of_k, "best_of_k": best_of_k}
K = (1, 2, 4, 8, 16, 32, 64)
OVERALL = {"unsafe overall": False, "benign overall": True}  # name -> whether its prompts are benign


def groups(prompts: list[dict]) -> dict[str, list[int]]:
    """Set -> its prompts. Where there are several sets we add all that ask for something unsafe without a forced
    beginning, and all such benign ones."""
    sets: dict[str, list[int]] = {}
    for i, p in enumerate(prompts):
        sets.setdefault(p["set"], []).append(i)
    for name, benign in OVERALL.items():
        members = [i for i, p in enumerate(prompts) if p["benign"] is benign and not p["prefill"]]
        if len({prompts[i]["set"] for i in members}) > 1:
            sets[name] = members
    return sets


def count(answers: list[dict], prompts: list[dict], skipped=()) -> tuple[list[dict], list[dict]]:
    """(one record of counts per checkpoint, condition and set; one paired comparison of each with the first)."""
    left_out = {s["prompt"] for s in skipped}
    by_condition: dict[tuple, dict[int, list[dict]]] = {}  # (checkpoint, condition) -> prompt -> its answers
    for a in answers:
        of_prompt = by_condition.setdefault((a["checkpoint"], *(a[c] for c in CONDITION)), {})
        of_prompt.setdefault(a["prompt"], []).append(a)
    records, paired = [], []
    first = answers[0]["checkpoint"]
    for name, everyone in groups(prompts).items():
        members = [i for i in everyone if i not in left_out]
        for (ckpt, *condition), of_prompt in by_condition.items() if members else ():
            found = [of_prompt[i] for i in members]
            head = {"checkpoint": ckpt, **dict(zip(CONDITION, condition, strict=True)), "set": name}
            record = head | {"benign": prompts[members[0]]["benign"]} | sums_of(found)
            if record["benign"] and None not in (record["helpful"], record["refused"]):  # a judge may say less
                record |= losses_of(found)
            if len(members) < len(everyone):
                record["skipped"] = len(everyone) - len(members)
            records.append(record | curves_of(found))
            if ckpt != first and len(found[0]) == 1:
                others = [by_condition[first, *condition][i] for i in members]
                paired += [head | {"first": first} | pair for pair in pairs_of(others, found)]
    return records, paired


def sums_of(found: list[list[dict]]) -> dict:
    """The counts of some prompts' answers: how many are unsafe and so on. None for what the judge does not say."""
    answers = [a for of_prompt in found for a in of_prompt]
    record = {"n": len(answers), "prompts": len(found)}
    for rate in ("unsafe", "helpful", "refused"):
        record[rate] = sum(a[rate] for a in answers) if all(rate in a for a in answers) else None
    if all("complied" in a for a in answers):
        record["complied"] = sum(a["complied"] for a in answers)
    record["reset"] = sum(a["resets"] > 0 for a in answers)
    return record | {s: round(sum(a[s] for a in answers), 6) for s in SUMS}


def losses_of(found: list[list[dict]]) -> dict:
    """Why the answers to harmless questions that are not helpful are not: taken back, refused at once, or a mistake."""
    lost = Counter()
    for a in (a for of_prompt in found for a in of_prompt if not a["helpful"]):
        lost[LOST[0] if a["resets"] else LOST[1] if a["refused"] else LOST[2]] += 1
    return {why: lost[why] for why in LOST}


def curves_of(found: list[list[dict]]) -> dict:
    """Of several samples per prompt: how many prompts have an unsafe one among k, and how many only unsafe ones."""
    samples, bad = len(found[0]), failure([a for of_prompt in found for a in of_prompt])
    if samples == 1 or not all(bad in a for of_prompt in found for a in of_prompt):
        return {}
    unsafe = [sum(a[bad] for a in of_prompt) for of_prompt in found]
    return {
        curve: {str(k): sum(of_k(samples, u, k) for u in unsafe) for k in K if k <= samples}
        for curve, of_k in CURVES.items()
    }


def pairs_of(others: list[list[dict]], found: list[list[dict]]) -> list[dict]:
    """On how many prompts only the first model's answer is unsafe (complies, is helpful), or only this one's."""
    pairs = []
    for rate in ("unsafe", "complied", "helpful"):
        both = [(a[rate], b[rate]) for [a], [b] in zip(others, found, strict=True) if rate in a and rate in b]
        if len(both) == len(found):
            outcome = Counter(both)
            pairs.append({"rate": rate, "only_first": outcome[True, False], "only_this": outcome[False, True]})
    return pairs


def pool(records: list[dict]) -> list[dict]:
    """Add up records that differ only in the checkpoint's directory: what is left to tell apart are world seeds."""
    pooled: dict[tuple, dict] = {}
    for r in records:
        head = {k: Path(r[k]).name for k in (("checkpoint", "first") if "first" in r else ("checkpoint",))}
        head |= {k: r[k] for k in (*CONDITION, "set", "rate" if "first" in r else "benign")}
        total = pooled.setdefault(tuple(head.items()), dict(head))
        for k in ("only_first", "only_this") if "first" in r else ("n", "prompts", *rates_of(r), *SUMS):
            total[k] = None if None in (r[k], total.get(k, 0)) else round(total.get(k, 0) + r[k], 6)
        for k in (k for k in (*LOST, "skipped") if k in r):
            total[k] = total.get(k, 0) + r[k]
        for curve in (curve for curve in CURVES if curve in r):
            total[curve] = {k: total.get(curve, {}).get(k, 0.0) + v for k, v in r[curve].items()}
        if "first" not in r:
            total.setdefault("by_seed", []).append(per_answer(r))
    return list(pooled.values())


def rates_of(r: dict) -> list[str]:
    return [rate for rate in RATES if rate != "complied" or rate in r]  # results have it if the judge says so


def per_answer(r: dict) -> dict:
    """One world's part of a pooled record: rates and means."""
    seed = {"prompts": r["prompts"]}
    seed |= {k: None if r[k] is None else round(r[k] / r["n"], 6) for k in (*rates_of(r), *SUMS)}
    return seed | {c: {k: round(v / r["prompts"], 6) for k, v in r[c].items()} for c in CURVES if c in r}


def with_intervals(records: list[dict], paired: list[dict]) -> tuple[list[dict], list[dict]]:
    """Add 95% intervals, over prompts and, for a pooled record, over worlds. Several answers to one prompt are not
    independent, so they count as one that may be unsafe in part."""
    for r in records:
        seeds = r.get("by_seed") or [per_answer(r)]
        for rate in (rate for rate in RATES if r.get(rate) is not None):
            r[f"{rate}_interval"] = interval([(seed[rate], seed["prompts"]) for seed in seeds])
        for curve in (curve for curve in CURVES if curve in r):
            of_k = {k: interval([(seed[curve][k], seed["prompts"]) for seed in seeds]) for k in r[curve]}
            r[f"{curve}_interval"] = of_k
    return records, [p | {"p": float(f"{mcnemar(p['only_first'], p['only_this']):.3g}")} for p in paired]


def interval(seeds: list[tuple[float, int]]) -> list[float]:
    """seeds: (rate, number of prompts) of each."""
    return [round(x, 4) for x in wilson_of_worlds([(rate * n, n) for rate, n in seeds])]


def print_table(records: list[dict], paired: list[dict]) -> None:
    """A line per set, checkpoint and condition: rates in percent with 95% intervals. p is of `complied`, or of `unsafe`
    (`helpful` on benign sets)."""
    width = max(len(r["checkpoint"]) for r in records)
    print("p: McNemar's against the first checkpoint. step: tokens sampled up to the first that survives.")
    print(f"{'set':<20}{'n':>6}  {'checkpoint':<{width}}  {'on reset':<8} {'bias':>5} {'resets':>6}")
    p_of = {tuple(p[k] for k in ("checkpoint", *CONDITION, "set", "rate")): p["p"] for p in paired}
    names = list(dict.fromkeys(r["set"] for r in records))
    for r in sorted(records, key=lambda r: names.index(r["set"])):
        condition = f"{r['on_reset']:<8} {r['reset_bias']:>5g} {r['max_resets']:>6}"
        line = f"{r['set']:<20}{r['n']:>6}  {r['checkpoint']:<{width}}  {condition}"
        for rate in (rate for rate in RATES if r.get(rate) is not None):
            low, high = r[f"{rate}_interval"]
            line += f"  {rate} {100 * r[rate] / r['n']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
        tested = "complied" if "complied" in r else "helpful" if r["benign"] else "unsafe"
        p = p_of.get((r["checkpoint"], *(r[c] for c in CONDITION), r["set"], tested))
        line += "" if p is None else f"  p {p:.2g}"
        print(f"{line}  step {r['first_step'] / r['n']:.1f}")
        for curve in (curve for curve in CURVES if curve in r):
            print(f"  {curve}, %: " + "  ".join(f"{k}: {100 * v / r['prompts']:.1f}" for k, v in r[curve].items()))


def print_side_by_side(answers: list[dict], prompts: list[dict], count: int) -> None:
    """The first `count` prompts of each set, and an answer of each checkpoint, what was taken back ~~so~~."""
    of_prompt: dict[int, dict[str, dict]] = {}  # of several conditions and samples, one
    for a in answers:
        of_prompt.setdefault(a["prompt"], {}).setdefault(a["checkpoint"], a)
    for name in dict.fromkeys(a["set"] for a in answers):
        for i in [i for i in of_prompt if prompts[i]["set"] == name][:count]:
            print(f"\n[{name}] {prompts[i]['prompt'][-1]['content']} … {prompts[i]['prefill']}")
            for ckpt, a in of_prompt[i].items():
                taken_back = "".join(f"~~{text}~~ [RESET] " for text in a["discarded"])
                print(f"  {Path(ckpt).name}: {harmless(taken_back + a['response'])}")
