"""From rows of text to token ids and losses: what the paper trains on, view by view.

A row is a line of JSON in TRL's conversational preference format (.jsonl or .jsonl.gz):

    {"prompt": [{"role": "user", "content": "…"}], "chosen": [{"role": "assistant", "content": "…"}],
     "rejected": [{"role": "assistant", "content": "…"}], "unsafe": true}

`rejected` and `unsafe` may be absent (plain SFT data), and {"text": "…"} is plain text to go on remembering. With
x the prompt, y+ chosen and y− rejected, supervised backtracking shows the model (arXiv 2409.14586, section 3):

    answer     x ⊕ y+ ⊕ eos                               loss on y+ eos              every row
    backtrack  x ⊕ prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos       loss on [RESET] y+ eos      unsafe rows, k ~ U{1..|y−|}
    restart    x ⊕ [RESET] ⊕ y+ ⊕ eos                     loss on y+ eos              optional; ours, not the paper's

Preference pairs for DPO, chosen over rejected, both given x (section 3.2):

    elicit      prefix_k(y−) ⊕ [RESET] ⊕ y+ ⊕ eos  ≻  y− ⊕ eos                         unsafe rows
    discourage  y+ ⊕ eos  ≻  prefix_k(y+) ⊕ [RESET] ⊕ y− ⊕ eos                         every row with a rejected answer
    restart     y+ ⊕ eos  ≻  y− ⊕ eos, both given x ⊕ [RESET]                          optional; ours
    baseline    y+ ⊕ eos  ≻  y− ⊕ eos                                                  without backtracking

In supervised training no loss ever falls on the prefix: the model must learn to leave it, not to say it. In a pair of
DPO a prefix that both sides share cancels. The restart view is what the model will see after a truncating reset; it
puts no loss on [RESET], which would teach to reset out of nothing.

Everything here is lists of ids: prefixes are cut and views joined in token space, never by re-encoding text.
"""

import gzip
import json
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError


@dataclass
class Row:
    """One line of a data file in token ids."""

    prompt: list[int]  # x, up to and including the header that opens the assistant's turn; BOS alone for plain text
    chosen: list[int]  # y+, without eos
    rejected: list[int] | None  # y−
    unsafe: bool  # y− is unsafe, not merely worse
    plain_text: bool = False


@dataclass
class Pair:
    """One preference: x ⊕ chosen over x ⊕ rejected."""

    kind: str
    prompt: list[int]  # x
    chosen: list[int]
    rejected: list[int]
    nll_from: int  # chosen[nll_from:] is what an NLL term may fall on: never an unsafe prefix


@dataclass
class Example:
    """One sequence to train on. Loss falls on tokens[loss_from:] — in every view the tail, never a prefix."""

    view: str
    tokens: list[int]
    loss_from: int


def json_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields ("file:line", value) of every line that is not blank, from .jsonl or .jsonl.gz.

    Raises InputError with the file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:  # covers invalid UTF-8
                    raise InputError(f"{path}:{number}: not a line of JSON ({error})") from None
                yield f"{path}:{number}", value
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); download it again") from None


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", checked row) as json_lines does. Raises InputError also for a row that is none."""
    empty = True
    for where, row in json_lines(path):
        empty = False
        yield where, _check(row, where)
    if empty:
        raise InputError(f"{path}: holds no rows")


def _check(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with 'prompt' and 'chosen', or with 'text'")
    if "text" in row and "prompt" not in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise InputError(f"{where}: 'text' must be a string that is not empty")
        return row
    for key in ("prompt", "chosen", "rejected"):
        messages = row.get(key)
        if key == "rejected" and messages is None:
            continue
        if key not in row:
            raise InputError(f"{where}: {key!r} is missing")
        roles = ("assistant",) if key != "prompt" else ("system", "user", "assistant")
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: {key!r} must be a list of messages that is not empty")
        for m in messages:
            if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
                raise InputError(f"{where}: {key!r} must hold {{'role': {'|'.join(roles)}, 'content': string}}")
        if key != "prompt" and (len(messages) != 1 or not messages[0]["content"].strip()):
            raise InputError(f"{where}: {key!r} must be one assistant message that is not empty")
    if row["prompt"][-1]["role"] != "user":
        raise InputError(f"{where}: 'prompt' must end with a user message")
    if not isinstance(row.get("unsafe"), (bool, type(None))):
        raise InputError(f"{where}: 'unsafe' must be true or false")
    if row.get("unsafe") and row.get("rejected") is None:
        raise InputError(f"{where}: 'unsafe' says that 'rejected' is unsafe, but there is none")
    return row


def load_rows(paths: list[str], tok, max_length: int) -> tuple[list[Row], int]:
    """All rows of all files as ids, and how many of them have a view longer than max_length (it will be cut there).

    Raises InputError for a row whose prompt leaves no room for a prefix token, [RESET] and an answer token.
    """
    rows, long = [], 0
    for path in paths:
        for where, raw in read_rows(path):
            try:
                row = encode_row(raw, tok)
            except InputError as error:  # a chat that the template does not know, such as a system turn in Gemma's
                raise InputError(f"{where}: {error}") from None
            if len(row.prompt) + 3 > max_length:
                raise InputError(
                    f"{where}: the prompt is {len(row.prompt)} tokens long and leaves no room for an answer under"
                    f" --max-length {max_length}; raise it or drop the row"
                )
            unsafe = len(row.rejected) + 1 if row.unsafe else 0
            long += len(row.prompt) + unsafe + len(row.chosen) + 1 > max_length
            rows.append(row)
    return rows, long


def encode_row(row: dict, tok) -> Row:
    """A checked row -> token ids. Answers are stripped, as the chat templates strip them."""
    if "prompt" not in row:
        return Row([tok.bos_id], tok.encode(row["text"]), None, False, plain_text=True)
    rejected = row.get("rejected")
    return Row(
        prompt=tok.render(row["prompt"], add_generation_prompt=True),
        chosen=tok.encode(row["chosen"][0]["content"].strip()),
        rejected=None if rejected is None else tok.encode(rejected[0]["content"].strip()),
        unsafe=bool(row.get("unsafe", False)),
    )


def draw_prefix(seed: int, epoch: int, index: int, longest: int, part: tuple[float, float] = (0.0, 1.0)) -> int:
    """k ~ U{1..longest}, a function of (seed, epoch, row) alone: redrawn each epoch, the same after a resume.

    The paper draws from the whole answer; part = (0.5, 1.0) from its second half, (1.0, 1.0) is always all of it.
    """
    low, high = (math.ceil(fraction * longest) for fraction in part)
    return random.Random(f"{seed}/{epoch}/{index}").randint(max(1, min(low + 1, high)), max(1, high))


def sft_views(row: Row, k: int, tok, *, backtrack: bool, restart: str) -> list[Example]:
    """The views of one row; k is the length of the unsafe prefix. restart: "none", "unsafe" or "all" rows."""
    if row.plain_text:
        return [Example("text", row.prompt + row.chosen + [tok.stop_ids[0]], loss_from=1)]
    x, reset = row.prompt, [tok.reset_id]
    target = row.chosen + tok.turn_end[:1]  # y+ ⊕ eos
    views = [Example("answer", x + target, loss_from=len(x))]
    if backtrack and row.unsafe:
        prefix = row.rejected[:k]
        views.append(Example("backtrack", x + prefix + reset + target, loss_from=len(x) + len(prefix)))
    if backtrack and (restart == "all" or (restart == "unsafe" and row.unsafe)):
        views.append(Example("restart", x + reset + target, loss_from=len(x) + 1))
    return views


def dpo_pairs(row: Row, k_rejected: int, k_chosen: int, tok, *, backtrack: bool, restart: str) -> list[Pair]:
    """The pairs of one row; the k are the lengths of the prefixes of y− and y+. restart: as in sft_views."""
    if row.rejected is None:
        return []
    x, reset, eos = row.prompt, [tok.reset_id], tok.turn_end[:1]
    good, bad = row.chosen + eos, row.rejected + eos
    if not backtrack:
        return [Pair("baseline", x, good, bad, nll_from=0)]
    pairs = [Pair("discourage", x, good, row.chosen[:k_chosen] + reset + bad, nll_from=0)]
    if row.unsafe:
        prefix = row.rejected[:k_rejected]
        pairs.append(Pair("elicit", x, prefix + reset + good, bad, nll_from=len(prefix)))
    if restart == "all" or (restart == "unsafe" and row.unsafe):
        pairs.append(Pair("restart", x + reset, good, bad, nll_from=0))
    return pairs
