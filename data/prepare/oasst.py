"""OpenAssistant: a tree of messages a line. The harmless half of the training mix.

    https://huggingface.co/datasets/OpenAssistant/oasst2, *_ready.trees.jsonl.gz, as in the paper; or oasst1
    -> {"prompt": […], "chosen": […], "rejected": […]}

Every user message that best-ranked replies lead to gives a row: chosen is its best reply, rejected
its worst. If nobody ranked the replies, the first is chosen and none rejected.

These files do not say what is training and what validation: hold some out with `--valid`. For
questions that no row has, let `data.prepare prompts` read the same file with `--exclude OUT`.
"""

from collections.abc import Iterator

from data.prepare import Outcome, json_objects, message
from model import InputError

NOT_READY = "tree is not ready for export"


def oasst_rows(path: str, lang: str) -> Iterator[Outcome]:
    """The outcome of every prompter message."""
    for where, tree in json_objects(path):
        prompters = count_prompters(where, tree)
        for outcome in best_paths(tree, lang):
            prompters -= 1
            yield outcome
        yield from ["not on a path of best replies" if is_ready(tree) else NOT_READY] * prompters


def is_ready(tree: dict) -> bool:
    return tree.get("tree_state", "ready_for_export") == "ready_for_export"


def count_prompters(where: str, tree: dict) -> int:
    """How many prompter messages the tree holds. Checks the form of all its messages."""
    count, todo = 0, [tree.get("prompt")]
    while todo:
        node = todo.pop()
        try:
            role, text, rank = node["role"], node["text"], node.get("rank")
            is_message = role in ("prompter", "assistant") and isinstance(text, str) and isinstance(rank, int | None)
            todo += replies_of(node)
        except (TypeError, KeyError, AttributeError):
            is_message = False
        if not is_message:
            raise InputError(f"{where}: no OpenAssistant tree: take *_ready.trees.jsonl.gz")
        count += role == "prompter"
    return count


def replies_of(node: dict) -> list[dict]:
    return node.get("replies") or []  # null as well as none


def best_paths(tree: dict, lang: str) -> Iterator[Outcome]:
    """The outcome of every prompter message that only best replies lead to, depth first."""
    todo = [(tree["prompt"], [])] if is_ready(tree) else []  # a message, and the conversation before it
    while todo:
        node, before = todo.pop()
        if node["role"] != "prompter":  # an assistant that answers itself
            continue
        reason, replies = oasst_reason(node, lang), usable_replies(node, lang)
        if reason or not replies:
            yield reason or "no usable reply"
            continue
        prompt = [*before, message("user", node["text"])]
        chosen = [message("assistant", replies[0]["text"])]
        rejected = [message("assistant", replies[-1]["text"])]
        yield {"prompt": prompt, "chosen": chosen} | ({"rejected": rejected} if rejected != chosen else {})
        todo += [(child, prompt + chosen) for child in reversed(replies_of(replies[0]))]


def usable_replies(node: dict, lang: str) -> list[dict]:
    """The ranked replies, best first. If none is ranked, the first reply alone."""
    usable = [reply for reply in replies_of(node) if reply["role"] == "assistant" and not oasst_reason(reply, lang)]
    ranked = [reply for reply in usable if reply.get("rank") is not None]
    return sorted(ranked, key=lambda reply: reply["rank"]) or usable[:1]


def oasst_reason(node: dict, lang: str) -> str | None:
    """Why this message cannot be used, or None."""
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result", True) is not True:  # null: nobody has reviewed it
        return "did not pass review"
    if lang not in ("all", node.get("lang")):
        return f"language is not {lang}"
    return None if node["text"].strip() else "empty"
