"""Rows to write to files, and two tokenizers small enough to check ids by hand; no fixtures, so any test may import.

A Llama-3 tokenizer without merges, whose ids are bytes, so that a sequence can be written down; and the toy's, whose
ids come from the sentencepiece library itself.
"""

import base64
import gzip
import json
import tempfile
from functools import cache
from pathlib import Path

import sentencepiece

from data import toy
from model import load_tokenizer

# Llama-3's special ids come after the ordinary ones, here the 256 bytes, at the published offsets.
BEGIN, END_OF_TEXT, HEADER, HEADER_END, EOT, RESET = 256, 257, 256 + 6, 256 + 7, 256 + 9, 256 + 255


@cache
def llama_tokenizer():
    lines = [base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256)]
    return _loaded(b"".join(lines))


@cache
def toy_tokenizer():
    return _loaded(_toy_model())


@cache
def toy_pieces():
    """The toy's vocabulary as the sentencepiece library reads it, without model/tokenizers/."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(_toy_model())
    return processor


TOKENIZERS = {"llama": llama_tokenizer, "gemma": toy_tokenizer}


@cache
def _toy_model() -> bytes:
    texts = ["the farmer counted the sheep before the rain began and wrote it down."]
    texts += ["nobody opens the gate.", *["".join(map(chr, range(32, 127)))] * 2]
    texts += [f"word{i} other{i * 7} thing{i * i}" for i in range(400)]
    return toy.train_tokenizer(texts)


def _loaded(model: bytes):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.model").write_bytes(model)
        return load_tokenizer(directory)


def user(text):
    return [{"role": "user", "content": text}]


def said(text):
    return [{"role": "assistant", "content": text}]


def row_of(prompt="Hi", chosen="no", rejected=None, **more):
    row = {"prompt": user(prompt), "chosen": said(chosen)}
    return row | ({} if rejected is None else {"rejected": said(rejected)}) | more


UNSAFE = row_of("Hi", "no", "yes", unsafe=True)


def write(path, *rows):
    """Rows of JSON; bytes and strings stand for themselves."""
    lines = []
    for row in rows:
        line = row if isinstance(row, bytes | str) else json.dumps(row)
        lines.append(line if isinstance(line, bytes) else line.encode())
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)
