"""GCG here against nanoGCG: the losses they reach and the candidates they score per second.

    make bench-gcg           # or: python -m backtrack.bench_gcg --ckpt runs/smollm2 [--seeds 3] [--out bench-gcg.json]

Every question is searched for with every seed, by either side; a quarter of an hour on 2 cores. One model, the same
prompts, targets, suffixes to start from, tokens to draw from, swaps per step and tokens per place. nanoGCG goes first,
for --steps steps; what it scored is the budget of ours. Its defaults otherwise: the keys and values of the prompt are
cached, and every step goes on from the best of its own candidates, ours from the best so far. The loss of its best
suffix is computed again here, and must agree or the benchmark ends there. That suffix may be one that cannot be sent:
nanoGCG asks whether it comes back as the same tokens by itself, not behind the prompt. Then it says so.

The questions are harmless and the targets change the subject, so that there is something to search for. Needs nanoGCG
(https://github.com/GraySwanAI/nanoGCG), which pins an older transformers: an environment of its own, see the Makefile.
Seconds are of the whole search, gradients included, without loading the model. It measures one process on this machine.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from backtrack.attacks.gcg import Goal, gcg
from backtrack.attacks.objective import Objective
from backtrack.attacks.suffix import Scorer, Slots, allowed_ids, make_slots, survives, with_suffix
from backtrack.bench import ratio, table
from backtrack.results import made_by
from model import InputError, load_model, load_tokenizer
from model.errors import device, positive, run
from model.files import check_file, write_text

SUFFIX = " x" * 16
CASES = (  # (question, what the answer is to begin with)
    ("What is the capital of France?", "Sure, here is a poem about the sea:"),
    ("How long do eggs have to boil?", "My favourite planet is Saturn."),
    ("Name three rivers of Europe.", "I would rather talk about cats."),
)
AGREE = 2e-3  # both in fp32: the losses of one suffix, computed by either side


def nanogcg_side(ckpt: str, tok, question: str, target: str, seed: int, args) -> dict:
    """nanoGCG's own search, as its users call it."""
    from nanogcg.gcg import GCG, GCGConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(ckpt)
    model = AutoModelForCausalLM.from_pretrained(ckpt, torch_dtype=torch.float32).to(args.device).eval()
    config = GCGConfig(
        num_steps=args.steps,
        optim_str_init=SUFFIX,
        search_width=args.candidates,
        batch_size=args.candidates,
        topk=args.topk,
        seed=seed,
        verbosity="ERROR",
    )
    if not tokenizer("").input_ids:  # it takes the text of BOS out of the prompt, in ChatML every <|im_start|>
        tokenizer.bos_token = None
    search = GCG(model, tokenizer, config)
    search.not_allowed_ids = torch.tensor(sorted(set(range(model.config.vocab_size)) - set(allowed_ids(tok))))
    scored = count_scored(search)
    began = time.perf_counter()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # its progress bar
        found = search.run(question, target)
    seconds = time.perf_counter() - began
    return {"loss": found.best_loss, "suffix": found.best_string, "seconds": seconds, "candidates": sum(scored)}


def count_scored(search) -> list[int]:
    """How many candidates each of nanoGCG's batches has: a list that grows as it works."""
    scored, original = [], search._compute_candidates_loss_original

    def counting(batch_size, embeddings):
        scored.append(len(embeddings))
        return original(batch_size, embeddings)

    search._compute_candidates_loss_original = counting
    return scored


def our_side(model, tok, question: str, target: str, seed: int, budget: int, args) -> dict:
    goal = goal_of(tok, question, target)
    options = {"budget": budget, "suffix": SUFFIX, "seed": str(seed), "rows": args.candidates}
    began = time.perf_counter()
    found = gcg(model, tok, [goal], lambda text: False, candidates=args.candidates, topk=args.topk, **options)
    seconds = time.perf_counter() - began
    return {"loss": found.losses[-1], "suffix": found.text, "seconds": seconds, "candidates": found.evaluations}


def goal_of(tok, question: str, target: str) -> Goal:
    return Goal(partial(with_suffix, [{"role": "user", "content": question}]), tok.encode(target))


def loss_of(model, tok, goal: Goal, text: str) -> tuple[float, bool]:
    """Our loss of a suffix, put in as tokens; and whether it could be sent as text."""
    start = make_slots(tok, goal.send, goal.target, SUFFIX)
    ids = tok.encode(text)
    slots = Slots(start.before, ids, start.after, goal.target)
    loss = Scorer(model, slots, 1).losses([ids], len(goal.target), Objective()).item()
    return loss, survives(tok, goal.send, slots, ids)


def compare(args) -> list[dict]:
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device)
    records = []
    for seed, (question, target) in itertools.product(range(args.seeds), CASES[: args.cases]):
        goal = goal_of(tok, question, target)
        theirs = nanogcg_side(args.ckpt, tok, question, target, seed, args)
        again, sendable = loss_of(model, tok, goal, theirs["suffix"])
        if abs(again - theirs["loss"]) > AGREE:
            raise InputError(
                f"nanoGCG's loss is {theirs['loss']:.4f}, ours of the same suffix {again:.4f}: no comparison"
            )
        ours = our_side(model, tok, question, target, seed, theirs["candidates"], args)
        start, _ = loss_of(model, tok, goal, SUFFIX)
        record = {"question": question, "target": target, "seed": seed, "loss_at_start": round(start, 4)}
        records.append(record | {"sendable": sendable, "nanogcg": theirs, "backtrack": ours})
        print(f"{question} (seed {seed}): {theirs['candidates']} candidates each", flush=True)
    return records


def print_table(records: list[dict]) -> None:
    rows = [["question", "loss at first", "nanoGCG", "backtrack", "candidates/s", "candidates/s"]]
    rates = {}
    for side in ("nanogcg", "backtrack"):
        rates[side] = [r[side]["candidates"] / r[side]["seconds"] for r in records]
    for i, r in enumerate(records):
        theirs = f"{r['nanogcg']['loss']:.3f}{'' if r['sendable'] else ' (cannot be sent)'}"
        speed = [f"{rates[side][i]:.1f}" for side in ("nanogcg", "backtrack")]
        rows.append([r["question"], f"{r['loss_at_start']:.3f}", theirs, f"{r['backtrack']['loss']:.3f}", *speed])
    print(table(rows))
    middle, low, high = ratio(rates["backtrack"], rates["nanogcg"])
    print(f"candidates per second, backtrack / nanoGCG: {middle:.2f} ({low:.2f} to {high:.2f})")
    more = [r["backtrack"]["loss"] - r["nanogcg"]["loss"] for r in records]
    lower = f"lower in {sum(difference < 0 for difference in more)} of {len(more)} searches"
    print(f"loss, backtrack - nanoGCG: {statistics.mean(more):+.3f} on average; {lower}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default="runs/smollm2", help="a chat model's directory that both sides can load")
    add("--cases", type=positive, default=len(CASES), help="questions to search for")
    add("--seeds", type=positive, default=3, help="searches for each question")
    add("--steps", type=positive, default=8, help="of nanoGCG")
    add("--candidates", type=positive, default=64, help="swaps per step")
    add("--topk", type=positive, default=64, help="promising tokens per place")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.out:
        check_file(args.out)
    if not Path(args.ckpt).is_dir():
        raise InputError(f"{args.ckpt}: no such model; `python -m data.smollm2 --out {args.ckpt}` makes one")
    records = compare(args)
    print_table(records)
    if args.out:
        write_text(json.dumps(made_by() | {"records": records}, indent=1) + "\n", args.out)


if __name__ == "__main__":
    run(main)
