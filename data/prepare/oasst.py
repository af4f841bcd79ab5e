"""OpenAssistant: a tree of messages a line. The harmless half of the training mix.

    https://huggingface.co/datasets/OpenAssistant/oasst2, *_ready.trees.jsonl.gz, as in the paper; or oasst1
    -> {"prompt": […], "chosen": […], "rejected": […]}

Every English user message that best-ranked replies lead to gives a row: chosen is its best reply, rejected
its worst. If nobody ranked the replies, the first is chosen and none rejected.

These files do not say what is training and what validation: hold some out with `--valid`. For
questions that no row has, let `data.prepare prompts` read the same file with `--exclude OUT`.
"""

from collections.abc import Iterator

from data.prepare import Outcome, json_objects, message
from model import InputError

NOT_READY = "tree is not ready for export"


def oasst_rows(path: str) -> Iterator[Outcome]:
    """The outcome of every prompter message."""
    for where, tree in json_objects(path):
        count = count_prompters(where, tree.get("prompt"))
        outcomes = list(best_paths(tree["prompt"], [])) if is_ready(tree) else []
        yield from outcomes
        yield from ["not on a path of best replies" if is_ready(tree) else NOT_READY] * (count - len(outcomes))


def is_ready(tree: dict) -> bool:
    return tree.get("tree_state", "ready_for_export") == "ready_for_export"


def count_prompters(where: str, node: dict) -> int:
    """How many prompter messages there are from here on. Raises InputError if one of all messages is none."""
    try:
        is_message = node["role"] in ("prompter", "assistant") and isinstance(node["text"], str)
        if is_message and isinstance(node.get("rank"), int | None):
            below = sum(count_prompters(where, reply) for reply in replies_of(node))
            return below + (node["role"] == "prompter")
    except (TypeError, KeyError, AttributeError):
        pass
    raise InputError(f"{where}: no OpenAssistant tree: take *_ready.trees.jsonl.gz")


def replies_of(node: dict) -> list[dict]:
    return node.get("replies") or []  # null as well as none


def best_paths(node: dict, before: list[dict]) -> Iterator[Outcome]:
    """The outcome of every prompter message that only best replies lead to, from `node` on, depth first.

    before  the conversation that leads here
    """
    if node["role"] != "prompter":  # an assistant that answers itself
        return
    reason, replies = oasst_reason(node), usable_replies(node)
    if reason or not replies:
        yield reason or "no usable reply"
        return
    prompt = [*before, message("user", node["text"])]
    chosen, rejected = ([message("assistant", replies[i]["text"])] for i in (0, -1))
    yield {"prompt": prompt, "chosen": chosen} | ({"rejected": rejected} if rejected != chosen else {})
    for child in replies_of(replies[0]):
        yield from best_paths(child, prompt + chosen)


def usable_replies(node: dict) -> list[dict]:
    """The ranked replies, best first. If none is ranked, the first reply alone."""
    usable = [reply for reply in replies_of(node) if reply["role"] == "assistant" and not oasst_reason(reply)]
    ranked = [reply for reply in usable if reply.get("rank") is not None]
    return sorted(ranked, key=lambda reply: reply["rank"]) or usable[:1]


def oasst_reason(node: dict) -> str | None:
    """Why this message cannot be used, or None."""
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result", True) is not True:  # null: nobody has reviewed it
        return "did not pass review"
    if node.get("lang") != "en":
        return "language is not en"
    return None if node["text"].strip() else "empty"
