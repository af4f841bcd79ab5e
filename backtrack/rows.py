"""Reading data files: lines of JSON, checked, as token ids.

    for where, value in json_lines("any.jsonl.gz"): …             # ("file:line", value)
    rows = load_rows(["hh.jsonl"], tok, max_length=1024)          # preference rows -> Row

A row is a line in TRL's conversational preference format (.jsonl or .jsonl.gz), plus "unsafe":

    {"prompt": [{"role": "user", "content": "…"}],
     "chosen": [{"role": "assistant", "content": "…"}],
     "rejected": [{"role": "assistant", "content": "…"}], "unsafe": true}

`rejected` and `unsafe` may be absent (plain SFT data), and {"text": "…"} is plain text to go on
remembering. Whatever is wrong with a line is an InputError that names the file and the line.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backtrack.run.say import say
from model.errors import InputError, refuse_pointer


@dataclass
class Row:
    """One line of a data file in token ids."""

    prompt: list[int]  # x, up to and including the header that opens the assistant's turn
    chosen: list[int]  # y+, without eos
    rejected: list[int] | None  # y−, without eos
    unsafe: bool  # y− is unsafe, not merely worse
    plain_text: bool = False  # then the prompt is what begins a text, alone


def load_rows(paths: list[str], tok, max_length: int, on_long: str = "skip") -> list[Row]:
    """All rows of all files as ids.

    A row whose prompt leaves no room for a prefix token, [RESET] and an answer token under
    max_length is left out, and told of; on_long="error" makes that an InputError, as it is if
    nothing else is left. So is a chat that the template does not know. All rows are read before.
    """
    rows, long, refused = [], [], []
    spelled = Spelled(tok)
    for path in paths:
        for where, raw in read_rows(path):
            try:
                row = encode_row(raw, tok)
            except InputError as error:  # a chat that the template does not know
                refused.append((where, str(error)))
                continue
            spelled.look(raw, where)
            if len(row.prompt) + 3 > max_length:
                long.append(f"{where} ({len(row.prompt)} tokens)")
            else:
                rows.append(row)
    spelled.report()
    if refused:
        (where, error), *more = refused
        too = f" (so are {several([place for place, _ in more])})" if more else ""
        raise InputError(f"{where}: {error}{too}")
    if long:
        told = f"no room for an answer after the prompt under --max-length {max_length}:"
        told += f" {several(long)}"
        if on_long == "error" or not rows:
            raise InputError(f"{told}; raise it, drop them, or --on-long skip")
        say(f"{len(long)} of {len(long) + len(rows)} rows are skipped, {told}")
    return rows


def evenly(items: list, limit: int | None) -> list:
    """At most `limit` of them, spread evenly over their length; all of them for None."""
    n = min(limit or len(items), len(items))
    return [items[i * len(items) // n] for i in range(n)]


def cut(row: Row, length: int) -> Row:
    """A row whose prompt and answers take at most `length` tokens."""
    room = length - len(row.prompt)
    return replace(row, chosen=row.chosen[:room], rejected=row.rejected and row.rejected[:room])


def several(names: list[str], most: int = 5) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Spelled:
    """Rows whose text spells special tokens. They come out as plain characters, which is seldom
    meant: mostly a chat template has been applied already."""

    # Those of other models too: a text made for one of them is no better.
    FAMILIES = (r"<\|[a-z][a-z0-9_]*\|>", r"</?(?:start|end)_of_turn>", r"\[/?INST\]", r"<</?SYS>>")

    def __init__(self, tok):
        names = sorted(map(re.escape, tok.special_tokens), reverse=True)  # the longest first
        self.pattern = re.compile("|".join([*names, *self.FAMILIES]))
        self.where: list[str] = []

    def look(self, row: dict, where: str) -> None:
        texts = [row["text"]] if "prompt" not in row else []
        for key in ("prompt", "chosen", "rejected"):
            texts += [message["content"] for message in row.get(key) or []]
        found = next(filter(None, map(self.pattern.search, texts)), None)
        if found:
            self.where.append(f"{where} ({found[0]})")

    def report(self) -> None:
        if self.where:
            say(
                f"note: {len(self.where)} rows spell special tokens, which are trained on as plain"
                f" characters; is a chat template applied already? {several(self.where)}"
            )


def describe(rows: list[Row], args) -> None:
    """Say what the rows are, and what of them does not fit."""
    pairs = [row for row in rows if row.rejected is not None]
    unsafe = sum(row.unsafe for row in rows)
    if rows:
        say(f"{', '.join(args.data)}: {len(rows)} rows, {unsafe} with an unsafe rejected answer")
    if args.command == "dpo" and len(pairs) < len(rows):
        say(f"{len(rows) - len(pairs)} rows without a rejected answer are left out")
    long = sum(longest_sequence(row, args) > args.max_length for row in rows)
    if long:
        say(f"{long} of {len(rows)} rows are longer than --max-length {args.max_length}: cut there")


def longest_sequence(row: Row, args) -> int:
    """Of those that examples.py makes of a row, after the longest prefix; 0 if it makes none."""
    x, chosen, rejected = len(row.prompt), len(row.chosen), len(row.rejected or [])
    if args.command == "dpo" and row.rejected is None:
        return 0
    if args.command == "dpo" and args.method == "baseline":
        return x + max(chosen, rejected) + 1
    reset = args.method == "backtrack"
    if args.command == "dpo" or (row.unsafe and args.method != "baseline"):  # holds both answers
        return x + rejected + reset + chosen + 1
    reset = reset and args.restart == "all" and not row.plain_text
    return x + reset + chosen + 1


def read_stream(paths: list[str], tok) -> list[int]:
    """Plain text for pretraining, as one stream of ids: <bos> text <end> <bos> text <end> …"""
    stream = []
    spelled = Spelled(tok)
    for path in paths:
        for where, row in read_rows(path):
            if "text" not in row:
                raise InputError(
                    f'{where}: `base` trains on plain text, one {{"text": "…"}} per line'
                )
            spelled.look({"text": row["text"]}, where)
            stream += [tok.text_start_id, *tok.encode(row["text"]), tok.text_end_id]
    spelled.report()
    return stream


def encode_row(row: dict, tok) -> Row:
    """A checked row -> token ids. Answers are stripped, as the chat templates strip them."""
    if "prompt" not in row:
        return Row(
            [tok.text_start_id], tok.encode(row["text"]), None, unsafe=False, plain_text=True
        )
    rejected = row.get("rejected")
    return Row(
        prompt=tok.render(row["prompt"], add_generation_prompt=True),
        chosen=tok.encode(row["chosen"][0]["content"].strip()),
        rejected=None if rejected is None else tok.encode(rejected[0]["content"].strip()),
        unsafe=bool(row.get("unsafe", False)),
    )


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", checked row). Raises InputError for a line that is no row."""
    empty = True
    for where, row in json_lines(path):
        empty = False
        row = as_conversation(row, where)
        check_row(row, where)
        yield where, row
    if empty:
        raise InputError(f"{path}: holds no rows")


def json_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields ("file:line", value) of every line that is not blank, from .jsonl or .jsonl.gz."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    refuse_other_formats(path)
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


def check_row(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: expected a JSON object with 'prompt' and 'chosen', or with 'text'"
        )
    if "text" in row and "prompt" not in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise InputError(f"{where}: 'text' must be a string that is not empty")
        return
    for key in ("prompt", "chosen", "rejected"):
        if key == "rejected" and row.get(key) is None:
            continue
        if key not in row:
            raise InputError(f"{where}: {key!r} is missing")
        check_messages(row[key], key, where)
    if not isinstance(row.get("unsafe"), (bool, type(None))):
        raise InputError(f"{where}: 'unsafe' must be true or false")
    if row.get("unsafe") and row.get("rejected") is None:
        raise InputError(f"{where}: 'unsafe' says that 'rejected' is unsafe, but there is none")


def check_messages(messages: object, key: str, where: str) -> None:
    roles = ("system", "user", "assistant") if key == "prompt" else ("assistant",)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: {key!r} must be a list of messages that is not empty")
    for m in messages:
        is_message = isinstance(m, dict) and isinstance(m.get("content"), str)
        if not is_message or m.get("role") not in roles:
            raise InputError(
                f"{where}: {key!r} must hold {{'role': {'|'.join(roles)}, 'content': string}}"
            )
    if key == "prompt" and messages[-1]["role"] != "user":
        raise InputError(f"{where}: 'prompt' must end with a user message")
    if key != "prompt" and (len(messages) != 1 or not messages[0]["content"].strip()):
        raise InputError(f"{where}: {key!r} must be one assistant message that is not empty")


# ── Rows in other shapes, and files that are no lines of JSON ─────────────────────────────────────

ANSWERS = ("chosen", "rejected")
HINTS = {  # a key that tells what else a row without 'chosen' may be -> what to do with it
    "messages": "a chat in 'messages': put its last answer into 'chosen' and what is before it into 'prompt'",
    "conversations": "ShareGPT's 'conversations': write them as messages with 'role' and 'content'",
    "completion": "TRL's 'prompt' and 'completion': call the completion 'chosen', if it is a good one",
}


def as_conversation(row: object, where: str) -> object:
    """The row with messages in 'prompt', 'chosen' and 'rejected'. What is wrong besides, check_row finds."""
    if not isinstance(row, dict) or ("text" in row and "prompt" not in row):
        return row
    if "chosen" not in row:
        for key, hint in HINTS.items():
            if key in row:
                raise InputError(f"{where}: holds {hint}")
        if "prompt" not in row:
            keys = ", ".join(map(str, row)) or "nothing"
            raise InputError(
                f"{where}: 'prompt' is missing, and 'chosen', or 'text' in their place; it has {keys}"
            )
        return row
    row = dict(row)
    if "prompt" not in row and any(isinstance(row.get(key), str) for key in ANSWERS):
        hh = (
            ": `python -m data.prepare hh` reads Anthropic's"
            if "\n\nAssistant:" in str(row["chosen"])
            else ""
        )
        raise InputError(
            f"{where}: 'prompt' is missing, and in plain text nothing shows where it ends{hh or '; give it apart'}"
        )
    if isinstance(row.get("prompt"), str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    for key in ANSWERS:
        if isinstance(row.get(key), str):
            row[key] = [{"role": "assistant", "content": row[key]}]
    return _without_prompt_in_answers(row, where)


def _without_prompt_in_answers(row: dict, where: str) -> dict:
    """Chats in 'chosen' and 'rejected' are cut before the last message: what stands there is the prompt."""
    chats = {key: row[key] for key in ANSWERS if row.get(key) is not None}
    if not chats or not all(isinstance(chat, list) and len(chat) > 1 for chat in chats.values()):
        if "prompt" not in row:
            raise InputError(
                f"{where}: 'prompt' is missing, and 'chosen' and 'rejected' do not begin with it"
            )
        return row
    prompts = [chat[:-1] for chat in chats.values()]
    # A prompt given besides may be the whole of it, its last question, or its first.
    given = row.get("prompt", prompts[0])
    if given not in (prompts[0], prompts[0][-1:], prompts[0][:1]):
        return row
    if prompts[0] != prompts[-1]:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' differ before their last message; only that may differ"
        )
    return row | {"prompt": prompts[0]} | {key: chat[-1:] for key, chat in chats.items()}


def refuse_other_formats(path: str | Path, lists: bool = False) -> None:
    """Raises InputError for a file that is known not to be text, or is one list (unless `lists`); says what to do."""
    refuse_pointer(path)
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(256)
    to_json = f"pandas.read_parquet('{path}').to_json('{path.with_suffix('.jsonl')}', orient='records', lines=True)"
    ways_out = {
        b"PAR1": f'Parquet; convert it (pip install pandas pyarrow): python -c "import pandas; {to_json}"',
        b"\x28\xb5\x2f\xfd": f"compressed with zstd; unpack it: unzstd '{path}'",
        b"PK\x03\x04": f"a zip archive; unpack it: unzip '{path}'",
    }
    if path.suffix != ".gz":
        ways_out[b"\x1f\x8b"] = "gzipped; give it a name that ends in .gz"
    for magic, way_out in ways_out.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {way_out}")
    if not lists and re.match(rb"\s*\[\s*(\{|\n|$)", head):
        raise InputError(
            f"{path}: one JSON list, not a line for each row; convert it: jq -c '.[]' '{path}' > rows.jsonl"
        )


def json_line(value, encoding: str | None = "utf-8") -> str:
    """One line of JSON, readable where `encoding` can hold it, else with \\u escapes: nothing is lost.

    Half a surrogate pair, which JSON and command lines may bring along, has no UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
