"""How much of `evaluate` and `collect` is decoding?

    python -m backtrack.bench.commands --ckpt runs/smollm2 [--out commands.json]

Each command answers 512 questions, and `generate` in this process the same ones, with the model loaded already. The
share is the time of `generate` over that of the whole command, which starts Python, loads tokenizer and model, cuts the
prompts into tokens, judges, and writes every answer to disk. They take turns. Medians of the rounds with the range
behind; 8 minutes with SmolLM2 on two quiet cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from backtrack.bench.__main__ import timed
from backtrack.bench.limits import record, said
from backtrack.evaluate.prompts import sampler_ids
from backtrack.evaluate.results import write_result
from backtrack.generate import generate
from backtrack.judge import Verdict
from model import InputError, load_model, load_tokenizer
from model.errors import positive, run
from model.files import check_file

QUESTIONS, NEW_TOKENS, BATCH = 512, 48, 64
# What each is told besides, and how `generate` does the same.
COMMANDS = {
    "evaluate": ([], {}),
    "collect": (["--benign", "own"], {"max_resets": 0}),
}


def no_judge(prompt: list[dict], response: str) -> Verdict:
    """Judges cost what their makers made them cost; this one costs nothing."""
    return Verdict(unsafe=False)


def question(number: int) -> dict:
    return {"prompt": f"Tell me about the number {number}, and where one meets it.", "set": "numbers", "benign": True}


def whole_command(name: str, ckpt: str, prompts: Path) -> None:
    """Run it in a process of its own, with an --out that nobody has begun. Raises InputError with what it said."""
    flags, _ = COMMANDS[name]
    with tempfile.TemporaryDirectory() as directory:
        words = ["--ckpt", ckpt, "--prompts", prompts, "--judge", f"{__spec__.name}:no_judge", "--dtype", "bfloat16"]
        words += ["--max-new-tokens", NEW_TOKENS, "--batch-size", BATCH, "--out", f"{directory}/out.json"]
        command = [sys.executable, "-m", f"backtrack.{name}", *map(str, words), *flags]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if ended.returncode != 0:
        raise InputError(f"backtrack.{name}: {ended.stderr.strip().splitlines()[-1]}")


def compare(name: str, ckpt: str, model, tok, repeats: int) -> dict:
    """One record, as those of backtrack.bench.limits."""
    questions = [question(number) for number in range(QUESTIONS)]
    ids = [tok.render([{"role": "user", "content": q["prompt"]}]) for q in questions]
    _, as_it_does = COMMANDS[name]
    options = sampler_ids(tok) | {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH} | as_it_does
    speeds, shares = [], []
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(q) + "\n" for q in questions))
        for _ in range(repeats):
            answers, bare_s = timed(lambda: generate(model, ids, **options))
            _, command_s = timed(lambda: whole_command(name, ckpt, prompts))
            speeds.append(sum(g.steps for g in answers) / command_s)
            shares.append(bare_s / command_s)
    bare = sum(g.steps for g in answers) / bare_s
    return record(f"{name}, {QUESTIONS} questions, bfloat16", speeds, shares, "decoding", bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a model directory")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds")
    parser.add_argument("--out", help="write the results to this file as JSON")
    args = parser.parse_args()
    if args.out:
        check_file(args.out)
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, dtype=torch.bfloat16)
    found = [said(compare(name, args.ckpt, model, tok, args.repeats)) for name in COMMANDS]
    if args.out:
        write_result(args.out, limits=found)


if __name__ == "__main__":
    run(main)
