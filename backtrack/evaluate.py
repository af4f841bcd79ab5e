"""How often is an answer unsafe, helpful, refused, reset? Any checkpoints side by side, with intervals.

    python -m backtrack.evaluate --ckpt runs/toy-0/sft runs/toy-0/sft-baseline \
        --prompts runs/toy-0/data/prompts.jsonl --judge runs/toy-0/data/world.json --out runs/toy-0/eval.json
    python -m backtrack.evaluate --merge runs/toy-*/eval.json         # the same table, pooled over seeds

Every prompt is answered once by every checkpoint in both `on_reset` modes; the judge sees surviving text only. A prompt
file is JSON lines: {"prompt": [messages], "set": NAME, "benign": bool}, optionally with "prefill", text forced at the
start of the answer. The judge here is the toy world's exact rule; it knows nothing of real conversations.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch

from backtrack.examples import json_lines
from backtrack.generate import generate
from backtrack.judge import toy_judge
from model import InputError, load_model, load_tokenizer
from model.checkpoint import write_text
from model.errors import device, run

RATES = ("unsafe", "helpful", "refused", "reset")


def wilson(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% score interval for a rate of count / n; unlike p ± 2·se it is right near 0 and 1 (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def read_prompts(path: str) -> list[dict]:
    """Read and check a prompt file. Raises InputError with the file and the line."""
    prompts = []
    for where, row in json_lines(path):
        messages = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: 'prompt' must be a list of messages that is not empty")
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise InputError(f"{where}: every message of 'prompt' needs a 'content' that is a string")
        for key, kind in (("set", str), ("benign", bool), ("prefill", str)):
            if not isinstance(row.get(key, kind()), kind):
                raise InputError(f"{where}: {key!r} must be a {kind.__name__}")
        prompts.append({"set": Path(path).stem, "benign": False, "prefill": "", **row})
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def answer_all(model, tok, prompts: list[dict], on_reset: str, args) -> list:
    """One Generation per prompt, in order, args.batch_size at a time."""
    encoded = [(tok.render(p["prompt"]), tok.encode(p["prefill"])) for p in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i][0]))  # little padding, rows end together
    generations, began = [None] * len(prompts), time.time()
    for start in range(0, len(prompts), args.batch_size):
        batch = by_length[start : start + args.batch_size]
        done = generate(
            model,
            [encoded[i][0] for i in batch],
            prefill=[encoded[i][1] for i in batch],
            reset_id=tok.reset_id,
            stop_ids=tok.stop_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            reset_bias=args.reset_bias,
            max_resets=args.max_resets,
            on_reset=on_reset,
            seed=args.seed + start,
        )
        for i, generation in zip(batch, done, strict=True):
            generations[i] = generation
        count = min(start + args.batch_size, len(prompts))
        left = (time.time() - began) / count * (len(prompts) - count)
        sys.stderr.write(f"\r  {on_reset}: {count}/{len(prompts)} prompts, {left:.0f} s left ")
    print(file=sys.stderr)
    return generations


def evaluate(ckpt: str, prompts: list[dict], judge, args) -> list[dict]:
    """One record per (set, on_reset): counts out of n of each rate."""
    tok = load_tokenizer(ckpt)
    model = load_model(ckpt, args.device, getattr(torch, args.dtype))
    records = []
    for on_reset in args.on_reset:
        generations = answer_all(model, tok, prompts, on_reset, args)
        counts: dict[str, dict] = {}
        for p, g in zip(prompts, generations, strict=True):
            verdict = judge(p["prompt"], tok.decode(g.tokens))
            c = counts.setdefault(p["set"], {"benign": p["benign"], "n": 0, **dict.fromkeys(RATES, 0), "steps": 0})
            c["n"] += 1
            c["steps"] += g.steps
            c["reset"] += g.resets > 0
            for rate in ("unsafe", "helpful", "refused"):
                c[rate] += getattr(verdict, rate)
        records += [{"checkpoint": ckpt, "on_reset": on_reset, "set": name, **c} for name, c in counts.items()]
    return records


def pool(records: list[dict]) -> list[dict]:
    """Add up the records of equal checkpoint name, mode and set: what is left to tell apart are world seeds."""
    pooled: dict[tuple, dict] = {}
    for r in records:
        name = Path(r["checkpoint"]).name
        total = pooled.setdefault(
            (name, r["on_reset"], r["set"]),
            {"checkpoint": name, "on_reset": r["on_reset"], "set": r["set"], "benign": r["benign"]}
            | dict.fromkeys(("n", "steps", *RATES), 0)
            | {"by_seed": []},
        )
        for key in ("n", "steps", *RATES):
            total[key] += r[key]
        total["by_seed"].append({rate: round(r[rate] / r["n"], 4) for rate in RATES})
    return list(pooled.values())


def print_table(records: list[dict]) -> None:
    """Rates in percent with Wilson 95% intervals, one line per set, checkpoint and mode."""
    width = max(len(name) for name in ("checkpoint", *(r["checkpoint"] for r in records)))
    sets = list(dict.fromkeys(r["set"] for r in records))
    print(f"{'set':<20}{'n':>5}  {'checkpoint':<{width}}  {'on_reset':<9}" + "".join(f"{r + ' %':>20}" for r in RATES))
    for name in sets:
        for r in (r for r in records if r["set"] == name):
            cells = ""
            for rate in RATES:
                low, high = wilson(r[rate], r["n"])
                cells += f"{100 * r[rate] / r['n']:>7.1f} [{100 * low:>4.1f},{100 * high:>5.1f}]"
            print(f"{name:<20}{r['n']:>5}  {r['checkpoint']:<{width}}  {r['on_reset']:<9}{cells}")


def with_intervals(records: list[dict]) -> list[dict]:
    return [r | {f"{rate}_interval": [round(x, 4) for x in wilson(r[rate], r["n"])] for rate in RATES} for r in records]


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", nargs="+", help="model directories to compare")
    what.add_argument("--merge", nargs="+", help="earlier --out files to pool, one per seed")
    parser.add_argument("--prompts", nargs="+", help="prompt files (JSON lines)")
    parser.add_argument("--judge", help="world.json of the toy world the prompts come from")
    parser.add_argument("--on-reset", nargs="+", choices=("truncate", "keep"), default=("truncate", "keep"))
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--reset-bias", type=float, default=0.0)
    parser.add_argument("--max-resets", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="at a temperature, samples depend on it and --batch-size")
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.ckpt and not (args.prompts and args.judge):
        parser.error("--ckpt needs --prompts and --judge")
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    if args.merge:
        records = []
        for path in args.merge:
            try:
                found = json.loads(Path(path).read_bytes())["records"]
                pool(found)  # fails on records that are not ours
                records += found
            except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
                raise InputError(f"{path}: not a result of this program; make it with --out") from None
        if not records:
            raise InputError(f"{args.merge[0]}: holds no results")
        records = pool(records)
    else:
        prompts = [p for path in args.prompts for p in read_prompts(path)]
        judge = toy_judge(args.judge)
        records = []
        for ckpt in args.ckpt:
            print(f"{ckpt}: {len(prompts)} prompts", file=sys.stderr)
            records += evaluate(ckpt, prompts, judge, args)
    records = with_intervals(records)
    if args.out:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        result = {"command": " ".join(["python -m backtrack.evaluate", *sys.argv[1:]]), "machine": machine}
        write_text(json.dumps(result | {"records": records}, indent=1) + "\n", args.out)
    print_table(records)


if __name__ == "__main__":
    run(main)
