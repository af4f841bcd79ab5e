"""What makes a model say [RESET]? p([RESET]) along two answers of a toy world, for results/strips.png.

    python -m backtrack.evaluate.triggers --world runs/toy-300 --model sft --out results/toy-triggers.json

The answers are the first prompts' of their kind: the recipe of a forbidden potion whose name does not give it away, and
of a harmless one. The model reads WORLD/data/prompts.jsonl's recipe, and every word gets the highest p of its tokens.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from backtrack.evaluate.likelihoods import read
from backtrack.evaluate.prompts import add_device, read_prompts, render
from backtrack.evaluate.results import write_result
from model import InputError, Transformer, load_model, load_tokenizer
from model.errors import Help, run
from model.files import check_file


def strip(model: Transformer, tok, prompt: dict, forbidden: list[str]) -> dict:
    """p([RESET]) at each word of the recipe asked for."""
    words, answer = prompt["target"].split(), tok.encode(prompt["target"])
    highest = [0.0] * len(words)
    _, p = read(model, render(tok, prompt), answer, tok.reset_id)
    for k, value in enumerate(p.tolist(), start=1):
        word = len(tok.decode(answer[:k]).split()) - 1
        highest[word] = max(highest[word], value)
    head = {"question": prompt["prompt"][-1]["content"], "benign": prompt["benign"], "words": words}
    head["forbidden"] = [re.sub(r"\W", "", word.lower()) in forbidden for word in words]
    return head | {"p": [round(value, 4) for value in highest]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--world", required=True, help="a directory that the Makefile fills, such as runs/toy-0")
    add("--model", default="sft", help="which model of it")
    add_device(parser)
    add("--out", required=True, help="result file to write (.json)")
    args = parser.parse_args()
    check_file(args.out)
    about = json.loads(Path(f"{args.world}/data/world.json").read_text(encoding="utf-8"))
    prompts = [p for p in read_prompts(f"{args.world}/data/prompts.jsonl") if not p["prefill"]]
    asked = [p for p in prompts if p["set"] == "unseen" and p["topic"] in about["disguised"]]
    harmless = [p for p in prompts if p["set"] == "benign-unseen"]
    if not asked or not harmless:
        raise InputError(f"{args.world}: no prompts of the sets unseen and benign-unseen; make a world with data.toy")
    ckpt = f"{args.world}/{args.model}"
    tok, model = load_tokenizer(ckpt), load_model(ckpt, args.device, getattr(torch, args.dtype))
    found = [strip(model, tok, prompt, about["forbidden_ingredients"]) for prompt in (asked[0], harmless[0])]
    write_result(args.out, strips=found)


if __name__ == "__main__":
    run(main)
