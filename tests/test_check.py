"""data/check.py: every kind of problem, how often and where; on sound rows it is silent."""

import json

from command import command
from samples import llama_tokenizer, row_of, said, user, write

from data import check


def test_every_problem_is_named_with_its_places(tmp_path):
    chat = [*user("Hi"), *said("Hello"), *user("How?")]
    other = {"prompt": [*chat[:2], *user("Why?")], "chosen": said("no"), "rejected": said("yes")}  # begins as chat does
    mine = write(
        tmp_path / "mine.jsonl",
        row_of("Hi there", "no", "yes", unsafe=True),
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": said("no")},
        "{",
        row_of("A", "no", unsafe=True),
        row_of("<|im_start|>user B", "no", "yes"),
        row_of("C", "no ", "no", unsafe=True),
        "[1",
        row_of("hi, THERE", "No.", "yes"),  # the first again
        {"chosen": chat + said("no"), "rejected": chat + said("yes")},
        {"text": "Once"},
    )
    more = write(tmp_path / "more.jsonl", row_of("Hi there!", "no", "yes"), row_of("D", "yes", "no"), other)
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": user("d."), "set": "x", "benign": True})
    printed, _ = command(check.main, mine, more, "--prompts", prompts, code=1)
    roles = "'prompt' must hold {'role': system|user|assistant, 'content': string}"
    assert sorted(printed.splitlines()) == sorted(
        [
            "9 rows, 8 with a rejected answer, 2 unsafe, 1 of plain text",
            f"refused by train.py: 2 × not a line of JSON: {mine}:3, {mine}:7",
            f"refused by train.py: 1 × {roles}, not 'tool': {mine}:2",
            f"refused by train.py: 1 × 'unsafe' says that 'rejected' is unsafe, but there is none: {mine}:4",
            f"odd: 1 × text spells special tokens: is a chat template applied already?: {mine}:5 (<|im_start|>)",
            f"odd: 1 × chosen and rejected are the same: {mine}:6",
            f"odd: 2 × the same row as before: {mine}:8 (as {mine}:1), {more}:1 (as {mine}:1)",
            f"odd: 1 × the first question is in {prompts}: {more}:2",
        ]
    )


def test_lengths_in_tokens(tmp_path):
    tok = llama_tokenizer()  # a byte is a token
    tok.save(tmp_path)
    rows = [row_of("x" * n, "y" * 3 * n, "z" * 2 * n) for n in range(1, 22)]
    path = write(tmp_path / "rows.jsonl", *rows)
    printed, _ = command(check.main, path, "--init", tmp_path)
    overhead = len(tok.render(user("")))
    table = [line.split() for line in printed.splitlines()[1:]]
    assert table[1] == ["prompt", *map(str, (11 + overhead, 20 + overhead, 21 + overhead)), f"{path}:21"]
    assert table[2] == ["chosen", "33", "60", "63", f"{path}:21"] and table[3][1:4] == ["22", "40", "42"]
    assert table[4] == ["whole", "row", *(str(6 * n + overhead + 2) for n in (11, 20, 21)), f"{path}:21"]
    assert len(table) == 5  # and nothing is odd


def test_files_that_are_none(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([row_of()]))
    for name, said_ in (("list.json", "jq -c"), ("nowhere", "nowhere")):
        assert said_ in command(check.main, tmp_path / name, code=2)[1]
    assert "no rows" in command(check.main, write(tmp_path / "empty"), code=2)[1]
