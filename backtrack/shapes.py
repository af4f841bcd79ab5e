"""Preference rows in other shapes than ours, and files that are no lines of JSON.

    row = as_conversation(row, where)      # TRL's shapes -> {"prompt": […], "chosen": […], "rejected": […]}
    refuse_other_formats("rows.parquet")   # InputError that says how to convert it

Read as they are (https://huggingface.co/docs/trl/dataset_formats):

    the prompt is implicit     {"chosen": [user, assistant], "rejected": [user, assistant]}
    the prompt is there twice  {"prompt": "…", "chosen": [user, assistant], "rejected": [user, assistant]}
    texts, not messages        {"prompt": "…", "chosen": "…", "rejected": "…"}: a user's and an assistant's

What could only be guessed at is an InputError that names the shape: which of several turns to learn, or where a
question ends and its answer begins.
"""

import re
from pathlib import Path

from model.errors import InputError, refuse_pointer

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
            raise InputError(f"{where}: 'prompt' is missing, and 'chosen', or 'text' in their place; it has {keys}")
        return row
    row = dict(row)
    if "prompt" not in row and any(isinstance(row.get(key), str) for key in ANSWERS):
        hh = ": `python -m data.prepare hh` reads Anthropic's" if "\n\nAssistant:" in str(row["chosen"]) else ""
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
            raise InputError(f"{where}: 'prompt' is missing, and 'chosen' and 'rejected' do not begin with it")
        return row
    prompts = [chat[:-1] for chat in chats.values()]
    # A prompt given besides may be the whole of it, its last question, or its first.
    given = row.get("prompt", prompts[0])
    if given not in (prompts[0], prompts[0][-1:], prompts[0][:1]):
        return row
    if prompts[0] != prompts[-1]:
        raise InputError(f"{where}: 'chosen' and 'rejected' differ before their last message; only that may differ")
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
