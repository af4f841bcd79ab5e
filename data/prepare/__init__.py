"""A file for each source of training rows and prompts (see __main__.py), and here what they share: reading."""

import gzip
import unicodedata
import zlib
from collections.abc import Iterator

from backtrack.rows import json_lines, refuse_other_formats
from model import InputError

Outcome = dict | str  # of one example of the source: a row to write, or why there is none


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text.strip()}


def json_objects(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of every line."""
    for where, item in json_lines(path):
        if not isinstance(item, dict):
            raise InputError(f"{where}: not a JSON object")
        yield where, item


def read_text(path: str, lists: bool = True) -> str:
    """The whole of a text file, plain or .gz. lists: may it be one JSON list?"""
    refuse_other_formats(path, lists)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, or not UTF-8 text ({error}); get the file again") from None


def question(row: dict) -> str:
    """The first user message; of plain text, all of it."""
    return next((turn["content"] for turn in row.get("prompt", []) if turn["role"] == "user"), row.get("text", ""))


def words_of(text: str) -> str:
    """What two texts are compared by: without case, punctuation and white space.

    Letters, digits and marks are kept, since most vowels of Hindi and Thai are marks, and symbols beyond ASCII, among
    them all emoji. What only joins characters or chooses their form (Cf, variation selectors) is dropped.
    """
    kept = []
    for c in unicodedata.normalize("NFKC", text.casefold()):
        kind = unicodedata.category(c)
        if kind != "Cf" and not "\ufe00" <= c <= "\ufe0f":
            kept.append(c if kind[0] in "LMN" or (kind[0] == "S" and c > "\x7f") else " ")
    return " ".join("".join(kept).split()) or text.strip()
