"""backtrack/evaluate/shift_level.py: the logit of [RESET] moves by what was asked for, and nothing else does."""

import json
import shutil
from functools import partial

import pytest
import torch

from backtrack.evaluate import shift_level as level
from backtrack.rows import load_rows
from model import load_model, load_tokenizer
from tests.command import command as run_command
from tests.test_evaluate import furnish

command = partial(run_command, level.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    rows = []
    for i, row in enumerate(furnish(root)[:8]):
        answers = {"chosen": f"I cannot help with that, nor with {i}.", "rejected": f"Of course. Stir it {i} times."}
        row = {"prompt": row["prompt"], "unsafe": i % 2 == 0}
        for name, text in answers.items():
            row[name] = [{"role": "assistant", "content": text}]
        rows.append(row)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def moved(place, tmp_path, *flags):
    out = tmp_path / "out"
    words = ("--ckpt", place / "one", "--rows", place / "rows.jsonl", "--out", out, "--device", "cpu", *flags)
    _, said = command(*words)
    return load_model(place / "one"), load_model(out), said


@pytest.mark.parametrize("nats", [-2.0, 0.5])
def test_the_level_moves(place, tmp_path, nats):
    before, after, said = moved(place, tmp_path, "--add", nats, "--max-length", 60)
    tok = load_tokenizer(place / "one")
    changes = []
    for row in load_rows([str(place / "rows.jsonl")], tok, 60):
        for answer in (row.chosen, row.rejected):
            for k in range(1, len(answer) + 1):
                context = torch.tensor([row.prompt + answer[:k]])
                with torch.no_grad():
                    change = after(context)[0, -1] - before(context)[0, -1]
                changes.append(change[tok.reset_id].item())
                change[tok.reset_id] = 0.0
                assert not change.any()  # every other token is as likely, against each other, as it was
    changes = torch.tensor(changes)
    assert changes.mean().item() == pytest.approx(nats, abs=0.1 * abs(nats))
    assert f"changed by {changes.mean():+.2f} ±" in said


def test_one_row_of_the_weights_changes(place, tmp_path):
    before, after, _ = moved(place, tmp_path, "--add", -1)
    reset = load_tokenizer(place / "one").reset_id
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        rows = (old != new).any(dim=-1) if old.dim() == 2 else old != new
        expected = [reset] if name in ("lm_head.weight", "model.embed_tokens.weight") else []
        assert rows.nonzero()[:, 0].tolist() in ([], expected), name
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert load_tokenizer(tmp_path / "out").reset_id == reset


def test_a_model_that_knows_no_reset(place, tmp_path):
    base = shutil.copytree(place / "one", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["reset_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    words = ("--ckpt", base, "--rows", place / "rows.jsonl", "--add", -1, "--out", tmp_path / "out")
    _, said = command(*words, code=2)
    assert said.splitlines()[-1].startswith(f"error: {base}: has not been trained to backtrack")
    assert not (tmp_path / "out").exists()
