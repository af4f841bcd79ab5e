"""Reading rows: every way to write one wrongly is named with file and line, and what is cut is counted.

Lengths are counted a second time by writing out every sequence that a row can give.
"""

import argparse
import gzip
import json
import re

import pytest
from samples import TOKENIZERS, UNSAFE, row_of, said, toy_tokenizer, user, write

from backtrack.examples import dpo_pairs, sft_views
from backtrack.rows import describe, encode_row, load_rows, read_rows, read_stream
from model import InputError


@pytest.fixture(params=list(TOKENIZERS))
def tok(request):
    return TOKENIZERS[request.param]()


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────

MALFORMED = {
    "not JSON": (b"{'prompt': 1}", "not a line of JSON"),
    "half a line": (json.dumps(UNSAFE)[:40], "not a line of JSON"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "not a line of JSON"),
    "nested without end": ("[" * 100_000, "not a line of JSON"),
    "a list": ([UNSAFE], "JSON object"),
    "a string": ('"text"', "JSON object"),
    "null": ("null", "JSON object"),
    "empty text": ({"text": ""}, "'text'"),
    "text is a number": ({"text": 7}, "'text'"),
    "no prompt": ({"chosen": said("a")}, "'prompt' is missing"),
    "no chosen": ({"prompt": user("a")}, "'chosen' is missing"),
    "nothing": ({}, "'prompt' is missing"),
    "chosen is null": ({"prompt": user("a"), "chosen": None}, "'chosen'"),
    "prompt is a number": ({"prompt": 1, "chosen": said("b")}, "'prompt'"),
    "empty prompt": ({"prompt": [], "chosen": said("b")}, "'prompt'"),
    "a message is a string": ({"prompt": ["a"], "chosen": said("b")}, "'prompt'"),
    "unknown role": ({"prompt": [{"role": "root", "content": "a"}], "chosen": said("b")}, "'prompt'"),
    "no role": ({"prompt": [{"content": "a"}], "chosen": said("b")}, "'prompt'"),
    "role is a list": ({"prompt": [{"role": ["user"], "content": "a"}], "chosen": said("b")}, "'prompt'"),
    "content is a list": ({"prompt": [{"role": "user", "content": ["a"]}], "chosen": said("b")}, "'prompt'"),
    "the user answers": ({"prompt": user("a"), "chosen": user("b")}, "'chosen'"),
    "two answers": ({"prompt": user("a"), "chosen": said("b") + said("c")}, "one assistant message"),
    "empty answer": ({"prompt": user("a"), "chosen": said("")}, "one assistant message"),
    "blank answer": ({"prompt": user("a"), "chosen": said(" \n\t")}, "one assistant message"),
    "blank rejected": (row_of("a", "b", "  ", unsafe=True), "'rejected'"),
    "empty rejected": (row_of("a", "b") | {"rejected": []}, "'rejected'"),
    "rejected is a number": (row_of("a", "b") | {"rejected": 1}, "'rejected'"),
    "the prompt ends with an answer": ({"prompt": user("a") + said("b"), "chosen": said("c")}, "end with a user"),
    "unsafe without rejected": (row_of("a", "b", unsafe=True), "'unsafe'"),
    "unsafe, rejected is null": (row_of("a", "b", unsafe=True) | {"rejected": None}, "'unsafe'"),
    "unsafe is a string": (row_of("a", "b", "c", unsafe="yes"), "'unsafe' must be true or false"),
    "unsafe is a number": (row_of("a", "b", "c", unsafe=1), "'unsafe' must be true or false"),
    "unsafe is a list": (row_of("a", "b", "c", unsafe=[True]), "'unsafe' must be true or false"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_malformed_row_is_named(tmp_path, name, suffix):
    line, problem = MALFORMED[name]
    path = write(tmp_path / f"rows{suffix}", UNSAFE, "", line, UNSAFE)
    with pytest.raises(InputError, match=re.escape(f"{path}:3: ")) as error:
        list(read_rows(path))
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [([{"role": "system", "content": "S"}, *user("a")], "system"), (user("a") + user("b"), "user, assistant")],
)
def test_a_chat_that_the_template_does_not_know_is_named(tmp_path, prompt, problem):
    path = write(tmp_path / "rows.jsonl", UNSAFE, {"prompt": prompt, "chosen": said("b")})
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ")) as error:
        load_rows([path], toy_tokenizer(), 1000)
    assert problem in str(error.value)


def test_rows_that_are_well_formed(tmp_path):
    """Also what other tools write: null for absent, further keys, CRLF, a byte order mark, blank lines."""
    rows = [
        row_of("a", "b"),
        row_of("a", "b") | {"rejected": None, "unsafe": None},
        row_of("a", "b", unsafe=False),
        row_of("a", "b", "c"),
        row_of("", "b", "c", unsafe=True, score=0.5),
        {"text": "t", "id": 7},
        {"prompt": [{"role": "system", "content": "S"}, *user("a"), *said("b"), *user("c")], "chosen": said("d")},
    ]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([lines[0], b"", b" ", *lines[1:]]))
    numbers = [1, 4, 5, 6, 7, 8, 9]
    where = [f"{tmp_path / 'rows.jsonl'}:{n}" for n in numbers]
    assert list(read_rows(tmp_path / "rows.jsonl")) == list(zip(where, rows, strict=True))


def test_gz_equals_plain(tmp_path, tok):
    rows = [UNSAFE, {"text": "Größe 東京"}, row_of("a", "b", "c")]
    plain, packed = (write(tmp_path / name, *rows) for name in ("rows.jsonl", "rows.jsonl.gz"))
    assert load_rows([plain], tok, 1000) == load_rows([packed], tok, 1000)
    assert load_rows([plain, packed], tok, 1000) == 2 * load_rows([plain], tok, 1000)


def test_plain_text_as_one_stream(tmp_path, tok):
    """<bos> text <end> after <bos> text <end>, over all files; a row of preferences is none, and named."""
    texts = ["the gate", "Größe 東京", " as it is \n"]
    one = write(tmp_path / "one.jsonl", *({"text": text} for text in texts[:2]))
    two = write(tmp_path / "two.jsonl.gz", {"text": texts[2]})
    expected = [t for text in texts for t in (tok.bos_id, *tok.encode(text), tok.stop_ids[0])]
    assert read_stream([one, two], tok) == expected
    mixed = write(tmp_path / "mixed.jsonl", {"text": "t"}, UNSAFE)
    with pytest.raises(InputError, match=re.escape(f"{mixed}:2: ")):
        read_stream([one, mixed], tok)


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_rows(tmp_path, content):
    for name, data in (("rows.jsonl", content), ("rows.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: holds no rows")):
            list(read_rows(tmp_path / name))


def test_a_damaged_gzip(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(row_of(str(i), str(i * i))).encode() + b"\n" for i in range(1000)))
    flipped = whole[: len(whole) // 2] + b"\0\0\0\0" + whole[len(whole) // 2 + 4 :]
    wrong_sum = whole[:-8] + bytes(8)
    file = tmp_path / "rows.jsonl.gz"
    for data in (whole[: len(whole) // 2], whole[:-4], whole[:5], flipped, wrong_sum, b'{"text": "plain"}\n'):
        file.write_bytes(data)
        with pytest.raises(InputError, match=re.escape(str(file))):
            list(read_rows(file))
    file.write_bytes(whole)
    assert len(list(read_rows(file))) == 1000


def test_no_such_file(tmp_path):
    for path in (tmp_path, tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"):
        with pytest.raises(InputError, match=re.escape(f"{path}: no such file")):
            list(read_rows(path))


# ── Lengths ───────────────────────────────────────────────────────────────────────────────────────


def longest_sequence(row, tok, command, method, restart):
    """With the whole of an answer as the prefix, which is the longest there can be; 0 for a row without sequences."""
    if command == "sft":
        views = sft_views(row, len(row.rejected or []), tok, method=method, restart=restart)
        return max(len(v.tokens) for v in views)
    pairs = dpo_pairs(row, len(row.rejected or []), len(row.chosen), tok, method=method, restart=restart)
    return max((len(p.prompt) + len(a) for p in pairs for a in (p.chosen, p.rejected)), default=0)


@pytest.mark.parametrize(
    ("command", "method"),
    [("sft", "backtrack"), ("sft", "in-place"), ("sft", "baseline"), ("dpo", "backtrack"), ("dpo", "baseline")],
)
def test_rows_that_will_be_cut_are_counted(tmp_path, tok, capsys, command, method):
    raw = [UNSAFE, row_of("Hi", "n" * 30), row_of("Hi", "no", "y" * 30), row_of("Hi", "n" * 9, "y" * 20)]
    raw += [row_of("Hi", "no", "y" * 30, unsafe=True), {"text": "t" * 40}, {"text": "t"}]
    path = write(tmp_path / "rows.jsonl", *raw)
    rows = [encode_row(r, tok) for r in raw]
    shortest = max(len(r.prompt) for r in rows) + 3
    counts = set()
    for restart in ("none", "unsafe", "all"):
        longest = [longest_sequence(row, tok, command, method, restart) for row in rows]
        for max_length in range(shortest, max(longest) + 1):
            assert load_rows([path], tok, max_length) == rows  # cut later, in train.py
            args = {"data": [path], "command": command, "method": method, "restart": restart}
            describe(rows, argparse.Namespace(**args, max_length=max_length))
            said = capsys.readouterr().err
            assert f"{path}: 7 rows, 2 with an unsafe rejected answer" in said
            assert ("3 rows without a rejected answer" in said) == (command == "dpo")
            cut = re.findall(r"(\d+) of \d+ rows are longer than --max-length (\d+)", said)
            count = sum(n > max_length for n in longest)
            assert cut == ([(str(count), str(max_length))] if count else [])
            counts.add(count)
    assert len(counts) > 2


def test_a_prompt_without_room_for_an_answer(tmp_path, tok, capsys):
    """Room for three tokens: of the prefix, [RESET], of the answer. The row is left out and named, or an error."""
    long = row_of("How do I open the gate? " * 3, "no", "yes", unsafe=True)
    path = write(tmp_path / "rows.jsonl", UNSAFE, {"text": "t"}, long)
    need = len(tok.render(long["prompt"])) + 3
    rows = [encode_row(raw, tok) for raw in (UNSAFE, {"text": "t"}, long)]
    for on_long in ("skip", "error"):
        assert load_rows([path], tok, need, on_long) == rows
    assert capsys.readouterr().err == ""
    told = f"under --max-length {need - 1}: {path}:3 ({need - 3} tokens)"
    assert load_rows([path], tok, need - 1) == rows[:2]
    assert "1 of 3 rows are skipped" in (said := capsys.readouterr().err) and told in said
    with pytest.raises(InputError, match=re.escape(told)):
        load_rows([path], tok, need - 1, on_long="error")
    alone = write(tmp_path / "alone.jsonl", *[long] * 7)  # nothing else is left: an error in any case
    with pytest.raises(InputError, match=re.escape(f"{alone}:1 (") + ".* and 2 more"):
        load_rows([alone], tok, need - 1)
