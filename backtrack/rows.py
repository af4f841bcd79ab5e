"""Reading data files: lines of JSON, checked, as token ids.

    for where, value in json_lines("any.jsonl.gz"): …             # ("file:line", value)
    rows = load_rows(["hh.jsonl"], tok, max_length=1024)          # preference rows -> Row

A row is a line in TRL's conversational preference format (.jsonl, .jsonl.gz or a pipe), plus
"unsafe":

    {"prompt": [{"role": "user", "content": "…"}],
     "chosen": [{"role": "assistant", "content": "…"}],
     "rejected": [{"role": "assistant", "content": "…"}], "unsafe": true}

`rejected` and `unsafe` may be absent (plain SFT data), and {"text": "…"} is plain text to go on
remembering. Whatever is wrong with a line is an InputError that names the file and the line.

TRL's other forms (https://huggingface.co/docs/trl/dataset_formats) are read too: the prompt inside
`chosen` and `rejected`, or there as well as before them; texts instead of messages; contents that
are lists of text parts, as OpenAI writes them.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backtrack.run.say import say
from model.errors import InputError

ANSWERS = ("chosen", "rejected")
HELDOUT = 64  # held-out rows that are measured: often, so few
# Text that spells special tokens, of other models too. It is trained on as plain characters, which
# is seldom meant: mostly a chat template has been applied already.
MARKERS = (r"<\|[a-z][a-z0-9_]*\|>", r"</?(?:start|end)_of_turn>", r"\[/?INST\]", r"<</?SYS>>")


@dataclass
class Row:
    """One line of a data file in token ids."""

    prompt: list[int]  # x, up to and including the header that opens the assistant's turn
    chosen: list[int]  # y+, without eos
    rejected: list[int] | None  # y−, without eos
    unsafe: bool  # y− is unsafe, not merely worse
    plain_text: bool = False  # then the prompt is what begins a text, alone


def load_rows(paths: list[str], tok, max_length: int) -> list[Row]:
    """All rows of all files as ids. Says on stderr which rows it leaves out, and why.

    Left out are rows whose prompt leaves no room under max_length for a token of the prefix,
    [RESET] and a token of the answer; and unsafe rows whose answers are equal, which would teach to
    take a safe answer back. Raises InputError if no row is left, or if a line is wrong.
    """
    rows, long, equal, spelling = [], [], [], []
    spells_special = special_text(tok)
    for path in paths:
        for where, raw in read_rows(path):
            try:
                row = encode_row(raw, tok)
            except InputError as error:  # a chat that the template does not know
                raise InputError(f"{where}: {error}") from None
            if found := spells_special.search(json.dumps(raw, ensure_ascii=False)):
                spelling.append(f"{where} ({found[0]})")
            if len(row.prompt) + 3 > max_length:
                long.append(f"{where} ({len(row.prompt)} tokens)")
            elif row.unsafe and row.chosen == row.rejected:
                equal.append(where)
            else:
                rows.append(row)
    if spelling:
        say(
            f"note: {len(spelling)} rows spell special tokens, which are trained on as plain"
            f" characters; is a chat template applied already? {several(spelling)}"
        )
    no_room = f"no room for an answer after the prompt under --max-length {max_length}"
    for what, where in ((no_room, long), ("unsafe, but both answers are the same", equal)):
        if where:
            say(f"{len(where)} rows are left out, {what}: {several(where)}")
    if (long or equal) and not rows:
        raise InputError(f"{paths[0]}: no row is left; raise --max-length, or mend the rows")
    return rows


def special_text(tok) -> re.Pattern:
    names = sorted(map(re.escape, tok.special_tokens), reverse=True)  # the longest first
    return re.compile("|".join([*names, *MARKERS]))


def describe(rows: list[Row], paths: list[str], max_length: int) -> None:
    """Say how many rows there are, how many are unsafe, and how many may have to be cut."""
    if not rows:
        return
    unsafe = sum(row.unsafe for row in rows)
    say(f"{', '.join(paths)}: {len(rows)} rows, {unsafe} with an unsafe rejected answer")
    lengths = [len(r.prompt) + len(r.chosen) + len(r.rejected or []) + 2 for r in rows]
    long = sum(length > max_length for length in lengths)
    if long:
        say(f"{long} rows have more than --max-length {max_length} tokens with both answers: cut")


def few_of(rows: Sequence) -> Sequence:
    """At most HELDOUT of them, from all over."""
    return rows[:: math.ceil(len(rows) / HELDOUT) or 1]


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


def encode_row(row: dict, tok) -> Row:
    """A checked row -> token ids. Answers are stripped, as the chat templates strip them."""
    if "prompt" not in row:
        text = tok.encode(row["text"])
        return Row([tok.text_start_id], text, None, unsafe=False, plain_text=True)
    rejected = row.get("rejected")
    return Row(
        prompt=tok.render(row["prompt"], add_generation_prompt=True),
        chosen=tok.encode(row["chosen"][0]["content"].strip()),
        rejected=None if rejected is None else tok.encode(rejected[0]["content"].strip()),
        unsafe=bool(row.get("unsafe", False)),
    )


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


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
    """Yields ("file:line", value) of each line that is not blank: of .jsonl, .jsonl.gz, a pipe."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name the files in it, {path}/*.jsonl")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            refuse_format(file.peek(256), path)
            lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:  # covers invalid UTF-8
                    raise InputError(f"{path}:{number}: not a line of JSON ({error})") from None
                yield f"{path}:{number}", value
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); download it again") from None


def json_line(value, encoding: str | None = "utf-8") -> str:
    """One line of JSON, readable where `encoding` can hold it, else with \\u escapes.

    Half a surrogate pair, which JSON and command lines may bring along, has no UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def refuse_other_formats(path: str | Path, lists: bool = False) -> None:
    """Raises InputError if a file does not hold lines of JSON; `lists`: one JSON list will do."""
    with open(path, "rb") as file:
        refuse_format(file.peek(256), Path(path), lists)


def refuse_format(head: bytes, path: Path, lists: bool = False) -> None:
    """Raises InputError if a file that begins like this holds no lines of JSON; says what to do."""
    jsonl = path.with_suffix(".jsonl")
    to_json = f"('{path}').to_json('{jsonl}', orient='records', lines=True)"
    convert = 'convert it (pip install pandas pyarrow): python -c "import pandas; pandas.read_'
    ways_out = {
        b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
        b"PAR1": f'Parquet; {convert}parquet{to_json}"',
        b"\x28\xb5\x2f\xfd": f"compressed with zstd; unpack it: unzstd '{path}'",
        b"PK\x03\x04": f"a zip archive; unpack it: unzip '{path}'",
    }
    if path.suffix != ".gz":
        ways_out[b"\x1f\x8b"] = "gzipped; give it a name that ends in .gz"
    for magic, way_out in ways_out.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {way_out}")
    if path.suffix in (".csv", ".tsv") and not lists:
        raise InputError(f'{path}: a table; {convert}csv{to_json}"')
    if not lists and re.match(rb"\s*\[\s*(\{|\n|$)", head[:256]):
        raise InputError(
            f"{path}: one JSON list, not a line for each row; convert it:"
            f" jq -c '.[]' '{path}' > {jsonl}"
        )


# ── Rows in TRL's other forms ─────────────────────────────────────────────────────────────────────

HINTS = {  # a key that tells what else a row without 'chosen' may be -> what to do with it
    "messages": "a chat in 'messages': put its last answer into 'chosen', the rest into 'prompt'",
    "conversations": "ShareGPT's 'conversations': write messages with 'role' and 'content'",
    "completion": "TRL's 'prompt' and 'completion': call a good completion 'chosen'",
}


def as_conversation(row: object, where: str) -> object:
    """The row with messages in 'prompt', 'chosen' and 'rejected'; check_row finds what is wrong.

    Raises InputError where one would have to guess: which of several turns is to be learned, or
    where a question ends and its answer begins.
    """
    if not isinstance(row, dict) or ("text" in row and "prompt" not in row):
        return row
    if "chosen" not in row:
        for key, hint in HINTS.items():
            if key in row:
                raise InputError(f"{where}: holds {hint}")
        if "prompt" not in row:
            keys = ", ".join(map(str, row)) or "nothing"
            raise InputError(
                f"{where}: 'prompt' is missing, and 'chosen', or 'text'; it has {keys}"
            )
        return row
    row = dict(row)
    if "prompt" not in row and any(isinstance(row.get(key), str) for key in ANSWERS):
        hh = "\n\nAssistant:" in str(row["chosen"])
        way_out = "`python -m data.prepare hh` reads Anthropic's" if hh else "give it apart"
        raise InputError(
            f"{where}: 'prompt' is missing, and a text does not show its end; {way_out}"
        )
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        if key in row:
            row[key] = as_messages(row[key], role)
    return prompt_apart(row, where)


def as_messages(value: object, role: str) -> object:
    """A text -> one message; contents in parts -> strings; the rest is for check_messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [joined_parts(message) for message in value] if isinstance(value, list) else value


def joined_parts(message: object) -> object:
    """A content that is a list of text parts -> one string; others are for check_messages."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or not texts or not all(isinstance(text, str) for text in texts):
        return message
    return message | {"content": "".join(texts)}


def prompt_apart(row: dict, where: str) -> dict:
    """Cut chats in 'chosen' and 'rejected' before the last message: the prompt is before it."""
    chats = {key: row[key] for key in ANSWERS if row.get(key) is not None}
    if not chats or not all(isinstance(chat, list) and len(chat) > 1 for chat in chats.values()):
        if "prompt" not in row:
            raise InputError(f"{where}: 'prompt' is missing, and the answers do not begin with it")
        return row
    prompts = [chat[:-1] for chat in chats.values()]
    # A prompt given besides may be the whole of it, its last question, or its first.
    given = row.get("prompt", prompts[0])
    if given not in (prompts[0], prompts[0][-1:], prompts[0][:1]):
        return row
    if prompts[0] != prompts[-1]:
        raise InputError(f"{where}: 'chosen' and 'rejected' may differ in their last message alone")
    return row | {"prompt": prompts[0]} | {key: chat[-1:] for key, chat in chats.items()}


def check_row(row: object, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with 'prompt' and 'chosen', or 'text'")
    if "text" in row and "prompt" not in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise InputError(f"{where}: 'text' must be a string that is not empty")
        return
    for key in ("prompt", *ANSWERS):
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
            role = f", not {m['role']!r}" if is_message and "role" in m else ""
            raise InputError(
                f"{where}: {key!r} must hold {{'role': {'|'.join(roles)}, 'content': string}}{role}"
            )
    if key == "prompt" and messages[-1]["role"] != "user":
        raise InputError(f"{where}: 'prompt' must end with a user message")
    if key != "prompt" and (len(messages) != 1 or not messages[0]["content"].strip()):
        raise InputError(f"{where}: {key!r} must be one assistant message that is not empty")
