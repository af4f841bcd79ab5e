"""Prompt files: what models are asked by evaluate, collect, hold_back and the attacks.

    prompts = choose_prompts(read_prompts("prompts.jsonl"), sets=["advbench"], limit=40)

JSON lines: {"prompt": [messages], "set": NAME, "benign": bool}, optionally with "prefill", text forced at the start of
the answer. data.prepare makes them from published files.
"""

import hashlib
import json
from pathlib import Path

from backtrack.rows import check_messages, evenly, json_lines
from model.errors import InputError


class Prompt(dict):
    """A line of a prompt file, and where it stands."""

    where = "a prompt"


def read_prompts(path: str) -> list[Prompt]:
    """Read and check a prompt file. Raises InputError with the file and the line."""
    prompts = []
    for where, row in json_lines(path):
        check_messages(row.get("prompt") if isinstance(row, dict) else None, "prompt", where)
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
    """Its ids. A chat that the template does not know is an InputError with the file and the line."""
    try:
        return tok.render(prompt["prompt"])
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from None


def prompts_digest(prompts: list[dict]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
