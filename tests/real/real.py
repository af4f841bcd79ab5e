"""What the tests of real models share: where the model is, real texts, chats."""

import csv
import gzip
import json
import os
import random
from pathlib import Path

import pytest
from vocabularies import NASTY, fuzz_texts

HERE = Path(__file__).resolve().parents[2]
DATA = HERE.parent / "shared" / "data"
# Ours equal transformers' bit for bit where it was tried. Another CPU may sum in another order.
CLOSE = 1e-4


def model_in(variable: str, default: str, command: str):
    """(directory, marks): the environment names the directory; without a model there tests are skipped."""
    directory = Path(os.environ.get(variable, HERE / default))
    reason = f"no model in {directory}: run `{command}`, or name its directory in the environment variable {variable}"
    there = (directory / "model.safetensors").is_file()
    return directory, [pytest.mark.real, pytest.mark.skipif(not there, reason=reason)]


def strings(value):
    """Every string in what JSON holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for element in value:
            yield from strings(element)


def real_texts():
    """What people and models wrote, from whatever files ../shared/data has."""
    for path in sorted(DATA.rglob("*")):
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    yield from row
        elif path.suffix == ".json":
            yield from strings(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix in (".jsonl", ".gz"):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                for line in file:
                    yield from strings(json.loads(line))


def some_texts():
    """2,000 of them, half of them real if ../shared/data is there."""
    texts = sorted({text for text in real_texts() if len(text) > 20})
    texts = random.Random(0).sample(texts, min(1000, len(texts))) + NASTY
    return texts + list(fuzz_texts(5000 - len(texts)))


def conversations():
    """20 of them: ten with a system turn and ten without, of 1 to 6 messages."""
    rng = random.Random(0)
    contents = [
        "Hi",
        "What is 12 times  34?",
        "  white space around it \n",
        "\n\nTwo lines first,\nthen 7.",
        "",
        "Ça va ? 東京 🐑 !\x04!",
        "def f(x):\n    return x  # 1",
        "I'm sure you'll say it's 2024.",
    ]
    for number in range(20):
        roles = ["user", "assistant"] * 3
        chat = [{"role": r, "content": rng.choice(contents)} for r in roles[: 1 + number % 6]]
        system = [{"role": "system", "content": rng.choice(["Be brief.", "", " Rhyme.\n"])}]
        yield system + chat if number % 2 else chat
