"""Anthropic's HH-RLHF: two whole conversations a line, which differ in the last answer.

    https://huggingface.co/datasets/Anthropic/hh-rlhf
    -> {"prompt": […], "chosen": […], "rejected": […], "unsafe": true}

"unsafe" is what the data set says: people found the rejected answer more harmful *than the chosen
one*. Many are harmless all the same, and some chosen ones are not: `--guard` keeps only pairs of
which Llama Guard finds one answer safe and the other unsafe. `--helpful` is for the helpful-* files,
whose rejected answers are less helpful, not unsafe: no flag.
"""

import re
from collections.abc import Iterator

from backtrack.run.say import say
from data.prepare import Outcome, json_objects, message
from model import InputError

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
LABEL = re.compile(r"(?:^|\s)(?:Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rows(path: str, unsafe: bool) -> Iterator[Outcome]:
    """The outcome of every pair."""
    if unsafe and "helpful-" in path:
        say(f"note: {path}: without --helpful its rejected answers are marked unsafe")
    for where, pair in json_objects(path):
        chosen, rejected = pair.get("chosen"), pair.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise InputError(f'{where}: no HH-RLHF pair, which has texts "chosen" and "rejected"')
        chosen, rejected = split_turns(chosen), split_turns(rejected)
        if reason := hh_reason(chosen, rejected):
            yield reason
        else:
            row = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
            yield row | ({"unsafe": True} if unsafe else {})


def split_turns(transcript: str) -> list[dict]:
    """\\n\\nHuman: Hi\\n\\nAssistant: Hello -> two messages; none if no human speaks first."""
    before, *parts = SPEAKER.split(transcript)
    speakers, texts = parts[::2], parts[1::2]
    if before.strip() or speakers[:1] != ["Human"]:
        return []
    return [message(ROLES[who], text) for who, text in zip(speakers, texts, strict=True)]


def hh_reason(chosen: list[dict], rejected: list[dict]) -> str | None:
    """Why this pair cannot be used, or None. The first reason that holds counts."""
    for turns in (chosen, rejected):
        # So chat templates want them. Joining two turns of one speaker would be guessing.
        if not turns or [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            return "speakers do not alternate from Human to Assistant"
        if not all(turn["content"] for turn in turns):
            return "empty turn"
    if chosen[:-1] != rejected[:-1]:
        return "chosen and rejected have different prompts"
    if chosen == rejected:
        return "chosen and rejected are the same"
    # Such an answer goes on with the human's next turn. A model should not learn that.
    if any(LABEL.search(answer["content"]) for answer in (chosen[-1], rejected[-1])):
        return "speaker label inside an answer"
    return None
