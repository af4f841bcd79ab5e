"""backtrack/evaluate/shift_level.py: the logit of [RESET] moves by what was asked for, and nothing else does."""

import json
import shutil
from functools import partial

import pytest
import torch
from command import command as run_command
from samples import row_of, write
from test_evaluate import furnish

from backtrack.evaluate import shift_level as level
from backtrack.rows import load_rows
from model import load_model, load_tokenizer

command = partial(run_command, level.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    furnish(root)
    rows = [(f"Q{i}?", f"I cannot help with {i}.", f"Of course. Stir it {i} times.") for i in range(4)]
    write(root / "rows.jsonl", *(row_of(*texts, unsafe=i % 2 == 0) for i, texts in enumerate(rows)))
    return root


def test_the_level_moves(place, tmp_path):
    """At every place by about as much; every other token is as likely, against each other, as it was."""
    words = ("--ckpt", place / "one", "--rows", place / "rows.jsonl", "--out", tmp_path / "out", "--device", "cpu")
    _, said = command(*words, "--add", -2, "--max-length", 60)
    before, after, tok = load_model(place / "one"), load_model(tmp_path / "out"), load_tokenizer(place / "one")
    changes = []
    for row in load_rows([str(place / "rows.jsonl")], tok, 60):
        for answer in (row.chosen, row.rejected):
            with torch.no_grad():
                tokens = torch.tensor([row.prompt + answer])
                change = (after(tokens) - before(tokens))[0, len(row.prompt) :]
            changes.append(change[:, tok.reset_id].clone())
            change[:, tok.reset_id] = 0.0
            assert not change.any()
    changes = torch.cat(changes)
    assert changes.mean().item() == pytest.approx(-2, abs=0.2)
    assert f"changed by {changes.mean():+.2f} ±" in said
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        changed = (old != new).nonzero()[:, 0].unique().tolist()
        assert changed in ([], [tok.reset_id] if name in ("lm_head.weight", "model.embed_tokens.weight") else []), name
    assert load_tokenizer(tmp_path / "out").reset_id == tok.reset_id


def test_a_model_that_knows_no_reset(place, tmp_path):
    base = shutil.copytree(place / "one", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["reset_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    words = ("--ckpt", base, "--rows", place / "rows.jsonl", "--add", -1, "--out", tmp_path / "out")
    _, said = command(*words, code=2)
    assert said.splitlines()[-1].startswith(f"error: {base}: has not been trained to backtrack")
    assert not (tmp_path / "out").exists()
