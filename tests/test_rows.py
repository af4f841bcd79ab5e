"""Reading rows: every way to write one wrongly is named with file and line, and what is cut or left out is counted."""

import gzip
import json
import os
import re
import threading

import pytest
from samples import TOKENIZERS, UNSAFE, row_of, said, toy_tokenizer, user, write

from backtrack.rows import describe, encode_row, load_rows, read_rows
from data.base import read_stream
from model import InputError


@pytest.fixture(params=list(TOKENIZERS))
def tok(request):
    return TOKENIZERS[request.param]()


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────

ROLES = "system|user|assistant"
MALFORMED = {
    "not JSON": (b"{'prompt': 1}", "not a line of JSON"),
    "half a line": (json.dumps(UNSAFE)[:40], "not a line of JSON"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "not a line of JSON"),
    "nested without end": ("[" * 100_000, "not a line of JSON"),
    "a list": ([UNSAFE], "JSON object"),
    "empty text": ({"text": ""}, "'text'"),
    "no prompt": ({"chosen": said("a")}, "'prompt' is missing"),
    "nothing": ({}, "'prompt' is missing"),
    "chosen is null": ({"prompt": user("a"), "chosen": None}, "'chosen'"),
    "empty prompt": ({"prompt": [], "chosen": said("b")}, "'prompt'"),
    "a message is a string": ({"prompt": ["a"], "chosen": said("b")}, "'prompt'"),
    "unknown role": (
        {"prompt": [{"role": "root", "content": "a"}], "chosen": said("b")},
        f"{ROLES}, 'content': string}}, not 'root'",
    ),
    "no role": ({"prompt": [{"content": "a"}], "chosen": said("b")}, "'prompt'"),
    "role is a list": ({"prompt": [{"role": ["user"], "content": "a"}], "chosen": said("b")}, "'prompt'"),
    "content is no text": ({"prompt": [{"role": "user", "content": [{"image": 1}]}], "chosen": said("b")}, "'prompt'"),
    "the user answers": ({"prompt": user("a"), "chosen": user("b")}, "'chosen'"),
    "two answers": ({"prompt": user("a"), "chosen": said("b") + said("c")}, "one assistant message"),
    "blank answer": ({"prompt": user("a"), "chosen": said(" \n\t")}, "one assistant message"),
    "rejected is a number": (row_of("a", "b") | {"rejected": 1}, "'rejected'"),
    "the prompt ends with an answer": ({"prompt": user("a") + said("b"), "chosen": said("c")}, "end with a user"),
    "unsafe without rejected": (row_of("a", "b", unsafe=True), "'unsafe'"),
    "unsafe is a number": (row_of("a", "b", "c", unsafe=1), "'unsafe' must be true or false"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_named(tmp_path, name):
    line, problem = MALFORMED[name]
    for suffix in (".jsonl", ".jsonl.gz"):
        path = write(tmp_path / f"rows{suffix}", UNSAFE, "", line, UNSAFE)
        with pytest.raises(InputError, match=re.escape(f"{path}:3: ")) as error:
            list(read_rows(path))
        assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_chat_that_the_template_does_not_know_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", UNSAFE, {"prompt": user("a") + user("b"), "chosen": said("b")})
    with pytest.raises(InputError, match=re.escape(f"{path}:2: ") + ".*user, assistant"):
        load_rows([path], toy_tokenizer(), 1000)


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


def test_contents_as_lists_of_text_parts(tmp_path):
    """As OpenAI writes them: the same row as with a string."""
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "so?"}]
    row = row_of("x", "no", "yes", unsafe=True) | {"prompt": [{"role": "user", "content": parts}]}
    path = write(tmp_path / "rows.jsonl", row)
    assert list(read_rows(path)) == [(f"{path}:1", row_of("How so?", "no", "yes", unsafe=True))]


def test_rows_from_a_pipe(tmp_path):
    """As --data /dev/stdin is one."""
    rows = [row_of(str(i), "no " * 5000) for i in range(9)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(into, "wb").write(text))
    writer.start()
    assert [row for _, row in read_rows(f"/dev/fd/{out}")] == rows
    writer.join()
    os.close(out)


def test_files_that_hold_no_lines_of_json(tmp_path):
    """Each is told what it is and what to do with it."""
    whole = gzip.compress(b"".join(json.dumps(row_of(str(i), str(i * i))).encode() + b"\n" for i in range(1000)))
    for name, content, told in (
        ("empty.jsonl", b"\n \n\n", "holds no rows"),
        ("empty.jsonl.gz", gzip.compress(b""), "holds no rows"),
        ("half.jsonl.gz", whole[: len(whole) // 2], "not a whole gzip file"),
        ("sum.jsonl.gz", whole[:-8] + bytes(8), "not a whole gzip file"),
        ("plain.jsonl.gz", b'{"text": "plain"}\n', "not a whole gzip file"),
        ("rows.csv", b"prompt,chosen\na,b\n", "a table; convert it (pip install pandas pyarrow)"),
        ("list.json", b"[\n{}]", "one JSON list"),
        ("rows.parquet", b"PAR1....", "Parquet; convert it"),
        ("packed.jsonl", whole, "gzipped; give it a name that ends in .gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: {told}")):
            list(read_rows(tmp_path / name))
    for path, told in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, f"is a directory; name the files in it, {tmp_path}/*.jsonl"),
    ):
        with pytest.raises(InputError, match=re.escape(f"{path}: {told}")):
            list(read_rows(path))


# ── What is cut, and what is left out ─────────────────────────────────────────────────────────────


def test_rows_that_may_be_cut_are_counted(tmp_path, tok, capsys):
    """Those whose prompt, both answers, [RESET] and eos are longer together."""
    raw = [UNSAFE, row_of("Hi", "n" * 30), row_of("Hi", "no", "y" * 30), {"text": "t" * 40}]
    rows = [encode_row(r, tok) for r in raw]
    lengths = [len(r.prompt) + len(r.chosen) + len(r.rejected or []) + 2 for r in rows]
    for max_length in range(10, max(lengths) + 1):
        describe(rows, ["a.jsonl", "b.jsonl"], max_length)
        told = capsys.readouterr().err
        assert "a.jsonl, b.jsonl: 4 rows, 1 with an unsafe rejected answer\n" in told
        count = sum(length > max_length for length in lengths)
        assert re.findall(r"(\d+) rows have more than", told) == ([str(count)] if count else [])
    assert not count


def test_a_prompt_without_room_for_an_answer(tmp_path, tok, capsys):
    """Room for three tokens: of the prefix, [RESET], of the answer. The row is left out and named."""
    long = row_of("How do I open the gate? " * 3, "no", "yes", unsafe=True)
    path = write(tmp_path / "rows.jsonl", UNSAFE, {"text": "t"}, long)
    need = len(tok.render(long["prompt"])) + 3
    rows = [encode_row(raw, tok) for raw in (UNSAFE, {"text": "t"}, long)]
    assert load_rows([path], tok, need) == rows and capsys.readouterr().err == ""
    assert load_rows([path], tok, need - 1) == rows[:2]
    told = capsys.readouterr().err
    assert (
        f"1 rows are left out, no room for an answer after the prompt under --max-length {need - 1}: {path}:3" in told
    )
    alone = write(tmp_path / "alone.jsonl", *[long] * 7)
    with pytest.raises(InputError, match=re.escape(f"{alone}: no row is left; raise --max-length")):
        load_rows([alone], tok, need - 1)
    assert f"{alone}:1 (" in (told := capsys.readouterr().err) and "and 2 more" in told


def test_unsafe_rows_with_two_equal_answers_are_left_out(tmp_path, tok, capsys):
    """They would teach to take a safe answer back. Two equal answers of which none is unsafe do no harm."""
    equal, harmless = row_of("Hi", " no", "no ", unsafe=True), row_of("Hi", "no", "no")
    path = write(tmp_path / "rows.jsonl", UNSAFE, equal, harmless, equal)
    assert load_rows([path], tok, 1000) == [encode_row(UNSAFE, tok), encode_row(harmless, tok)]
    told = f"2 rows are left out, unsafe, but both answers are the same: {path}:2, {path}:4\n"
    assert capsys.readouterr().err == told
