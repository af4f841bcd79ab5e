"""What makes a model say [RESET], and which resets make it safe? In toy worlds, where the meaning of a word is known.

    python -m backtrack.evaluate.triggers --worlds runs/toy-300 runs/toy-301 --model sft --out results/toy-triggers.json

The command reads WORLD/MODEL, WORLD/data/prompts.jsonl and WORLD/data/world.json of every world. It leaves out forced
beginnings.

strips       p([RESET]) along two answers of the first world: the recipe of a forbidden potion whose name does not give
             it away, and of a harmless one, the first prompts of their kind. A word has the highest p of its tokens.
reliability  The model reads the recipes asked for token by token. Of the prefixes with a p in some range, how many have
             named a forbidden ingredient ("named"), and how many lie in a recipe that has one anywhere ("leads_there")?
resets       Every prompt is answered twice, greedily: with one reset, and with [RESET] masked. A reset saves an answer
             that is unsafe only without it. Both are counted by what the answer had said last: nothing yet, the
             potion's name, a harmless ingredient, a forbidden one, or more after a forbidden one.

Intervals are 95%; those of one world alone take its prefixes to be independent, which they are not.
"""

import argparse
import json
import re
from bisect import bisect
from pathlib import Path

import torch

from backtrack.evaluate.likelihoods import read
from backtrack.evaluate.prompts import add_device, choose_prompts, read_prompts, render, sampler_ids
from backtrack.evaluate.results import write_result
from backtrack.evaluate.statistics import wilson_of_worlds
from backtrack.generate import Generation, generate
from backtrack.judge import load_judge
from backtrack.run.say import say
from model import InputError, Transformer, load_model, load_tokenizer
from model.errors import Help, positive, run
from model.files import check_file

EDGES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)  # between the ranges of p
SAID = ("nothing yet", "name", "harmless ingredient", "forbidden ingredient", "more after it")
BATCH = 64
MAX_NEW_TOKENS = 80


class World:
    """A directory of the toy world: its prompts, its rule, and its words."""

    def __init__(self, directory: str, limit: int | None):
        prompts = read_prompts(f"{directory}/data/prompts.jsonl")
        self.all_prompts = [p for p in prompts if not p["prefill"]]
        self.prompts = choose_prompts(self.all_prompts, None, limit)
        self.judge = load_judge(f"{directory}/data/world.json")
        about = json.loads(Path(f"{directory}/data/world.json").read_text(encoding="utf-8"))
        self.forbidden, self.harmless = set(about["forbidden_ingredients"]), set(about["harmless_ingredients"])
        self.disguised = set(about["disguised"])

    def is_unsafe(self, prompt: dict, text: str) -> bool:
        return self.judge(prompt["prompt"], text).unsafe

    def said_last(self, prompt: dict, text: str) -> str:
        """Which of SAID describes the end of an answer."""
        words = in_words(text)
        ingredients = [word for word in words if word in self.forbidden | self.harmless]
        if not ingredients:
            return "name" if prompt["topic"].split()[0] in words else "nothing yet"
        if ingredients[-1] in self.forbidden:
            return "forbidden ingredient"
        return "more after it" if self.forbidden.intersection(ingredients) else "harmless ingredient"


def in_words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


# ── p([RESET]) along the answers asked for ───────────────────────────────────────────────────────────────────────────


def along(model: Transformer, tok, prompt: dict) -> tuple[list[str], list[float]]:
    """(what the recipe asked for has said after each token, p([RESET]) there)."""
    answer = tok.encode(prompt["target"])
    _, p = read(model, render(tok, prompt), answer, tok.reset_id)
    return [tok.decode(answer[: k + 1]) for k in range(len(answer))], p.tolist()


def strips(model: Transformer, tok, world: World) -> list[dict]:
    """p([RESET]) at each word of two recipes."""
    asked = [p for p in world.all_prompts if p["set"] == "unseen" and p["topic"] in world.disguised]
    harmless = [p for p in world.all_prompts if p["set"] == "benign-unseen"]
    if not asked or not harmless:
        raise InputError("no prompts of the sets unseen and benign-unseen; make a world with data.toy")
    found = []
    for prompt in (asked[0], harmless[0]):
        words = prompt["target"].split()
        highest = [0.0] * len(words)
        for text, value in zip(*along(model, tok, prompt), strict=True):
            word = len(text.split()) - 1
            highest[word] = max(highest[word], value)
        forbidden = [bool(world.forbidden.intersection(in_words(word))) for word in words]
        head = {"question": prompt["prompt"][-1]["content"], "benign": prompt["benign"]}
        found.append(head | {"words": words, "forbidden": forbidden, "p": [round(value, 4) for value in highest]})
    return found


def prefixes(model: Transformer, tok, world: World) -> list[tuple[float, bool, bool]]:
    """(p([RESET]), has it named a forbidden ingredient, does its answer?) of every prefix of every recipe."""
    found = []
    for prompt in world.prompts:
        for text, p in zip(*along(model, tok, prompt), strict=True):
            found.append((p, world.is_unsafe(prompt, text), world.is_unsafe(prompt, prompt["target"])))
    return found


def reliability(by_world: list[list[tuple[float, bool, bool]]]) -> list[dict]:
    """A record for each range of p that has prefixes."""
    records = []
    for i, (low, high) in enumerate(zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)):
        inside = [[prefix for prefix in found if bisect(EDGES, prefix[0]) == i] for found in by_world]
        inside = [found for found in inside if found]
        if not inside:
            continue
        record = {"low": low, "high": high, "places": sum(map(len, inside))}
        record["p"] = round(sum(p for found in inside for p, _, _ in found) / record["places"], 4)
        for name, which in (("named", 1), ("leads_there", 2)):
            counts = [(sum(prefix[which] for prefix in found), len(found)) for found in inside]
            record[name] = sum(count for count, _ in counts)
            record[f"{name}_interval"] = [round(x, 4) for x in wilson_of_worlds(counts)]
        records.append(record)
    return records


# ── What resets save ─────────────────────────────────────────────────────────────────────────────────────────────────


def answers(model: Transformer, tok, world: World, max_resets: int) -> list[Generation]:
    options = {"max_new_tokens": MAX_NEW_TOKENS, "max_resets": max_resets, "batch_size": BATCH}
    return generate(model, [render(tok, p) for p in world.prompts], **sampler_ids(tok), **options)


def count_resets(model: Transformer, tok, world: World, totals: dict[str, dict]) -> None:
    """Add the answers of one world to the totals of their sets."""
    pairs = zip(answers(model, tok, world, 1), answers(model, tok, world, 0), strict=True)
    for prompt, (g, masked) in zip(world.prompts, pairs, strict=True):
        empty = {"benign": prompt["benign"], "answers": 0, "unsafe": 0, "unsafe_masked": 0}
        empty |= {"resets": dict.fromkeys(SAID, 0), "saved": dict.fromkeys(SAID, 0)}
        total = totals.setdefault(prompt["set"], empty)
        unsafe = world.is_unsafe(prompt, tok.decode(g.tokens))
        unsafe_masked = world.is_unsafe(prompt, tok.decode(masked.tokens))
        total["answers"] += 1
        total["unsafe"] += unsafe
        total["unsafe_masked"] += unsafe_masked
        if g.resets:
            last = world.said_last(prompt, tok.decode(g.discarded[0]))
            total["resets"][last] += 1
            total["saved"][last] += unsafe_masked and not unsafe


def print_table(records: list[dict]) -> None:
    print(f"{'':<20}{'':>8}{'unsafe':>8}{'':>9}  resets that saved an answer, of all, by what it had said last")
    print(f"{'set':<20}{'answers':>8}{'masked':>8}{'unsafe':>8}" + "".join(f"{name:>22}" for name in SAID))
    for r in records:
        cells = "".join(f"{r['saved'][name]:>17} of {r['resets'][name]}" for name in SAID)
        print(f"{r['set']:<20}{r['answers']:>8}{r['unsafe_masked']:>8}{r['unsafe']:>8}{cells}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--worlds", nargs="+", required=True, help="directories that the Makefile fills, such as runs/toy-0")
    add("--model", default="sft", help="which model of each")
    add("--limit", type=positive, help="at most so many prompts of each set, evenly spread")
    add_device(parser)
    add("--out", required=True, help="result file to write (.json)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_file(args.out)
    two_answers, by_world, totals = [], [], {}
    for directory in args.worlds:
        world = World(directory, args.limit)
        ckpt = f"{directory}/{args.model}"
        tok, model = load_tokenizer(ckpt), load_model(ckpt, args.device, getattr(torch, args.dtype))
        two_answers = two_answers or strips(model, tok, world)
        by_world.append(prefixes(model, tok, world))
        count_resets(model, tok, world, totals)
        say(f"{ckpt}: {len(world.prompts)} prompts")
    records = [{"set": name} | total for name, total in totals.items()]
    write_result(args.out, strips=two_answers, reliability=reliability(by_world), resets=records)
    print_table(records)


if __name__ == "__main__":
    run(main)
