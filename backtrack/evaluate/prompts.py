"""Prompt files: what evaluate, collect, hold_back and the attacks ask a model.

    prompts = choose_prompts(read_prompts("prompts.jsonl"), sets=["advbench"], limit=40)
    prompts = chosen(args)                            # the same, from the flags that add_prompts() adds

JSON lines: {"prompt": [messages] or a text, "set": NAME, "benign": bool}, optionally with "prefill", text forced at the
start of the answer. data.prepare makes them from published files.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from backtrack.rows import as_messages, check_messages, evenly, json_lines
from model.errors import InputError, device, positive


class Prompt(dict):
    """A line of a prompt file; `where` is its "file:line"."""

    where = "a prompt"


def read_prompts(path: str) -> list[Prompt]:
    """Read and check a prompt file. Raises InputError with the file and the line."""
    prompts = []
    for where, row in json_lines(path):
        row = row if isinstance(row, dict) else {}
        row["prompt"] = as_messages(row.get("prompt"), "user")
        check_messages(row["prompt"], "prompt", where)
        for key, kind in (("set", str), ("benign", bool), ("prefill", str)):
            if not isinstance(row.get(key, kind()), kind):
                raise InputError(f"{where}: {key!r} must be a {kind.__name__}")
        prompt = Prompt({"set": Path(path).stem, "benign": False, "prefill": "", **row})
        prompt.where = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def choose_prompts(prompts: list[dict], sets: list[str] | None, limit: int | None) -> list[dict]:
    """The prompts of the sets named (of all, if none is), at most `limit` of each, spread evenly over its length."""
    names = list(dict.fromkeys(p["set"] for p in prompts))
    for name in sets or []:
        if name not in names:
            raise InputError(f"--sets {name}: no such set among the prompts; they have {', '.join(names)}")
    chosen = []
    for name in names if sets is None else sets:
        members = [p for p in prompts if p["set"] == name]
        chosen += evenly(members, limit)
    return chosen


def render(tok, prompt: dict) -> list[int]:
    """The prompt's ids. Raises InputError with the file and the line for a chat that the template does not know."""
    try:
        return tok.render(prompt["prompt"])
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from None


def sampler_ids(tok) -> dict:
    """The options of the sampler that come from the tokenizer."""
    return {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}


def prompts_digest(prompts: list[dict]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def add_prompts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    add = parser.add_argument
    add("--prompts", nargs="+", required=required, help="prompt files (JSON lines; data.prepare prompts makes them)")
    add("--sets", nargs="+", help="only these sets of the prompts")
    add("--limit", type=positive, help="at most so many prompts of each set, evenly spread")


def chosen(args) -> list[Prompt]:
    """The prompts that --prompts, --sets and --limit name."""
    return choose_prompts([p for path in args.prompts for p in read_prompts(path)], args.sets, args.limit)


def add_device(parser: argparse.ArgumentParser) -> None:
    on, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    parser.add_argument("--device", type=device, default=on, help="PyTorch device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help="of weights and computation")
