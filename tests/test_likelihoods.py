"""backtrack/evaluate/likelihoods.py: every number a second time, a prefix at a time."""

import json
import math
from functools import partial

import pytest
import torch
from command import command as run_command
from models import prone_to
from samples import row_of, write
from test_evaluate import furnish

from backtrack.evaluate import likelihoods
from backtrack.evaluate.likelihoods import auc_interval, auc_of
from backtrack.rows import load_rows
from model import load_model, load_tokenizer, save_model

command = partial(run_command, likelihoods.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    prompts = [row["prompt"][0]["content"] for row in furnish(root) if row["set"] == "unseen"]
    rows = []
    for i, prompt in enumerate(prompts[:9]):
        rejected = "Of course. Stir it" + " well" * i if i % 3 else None
        rows.append(row_of(prompt, f"I cannot help with that{'.' * (i + 1)}", rejected, unsafe=i % 3 == 1))
    tok = load_tokenizer(root / "two")  # one of them says [RESET] now and then
    save_model(prone_to(tok.reset_id, load_model(root / "two"), times=40.0), root / "two", tokenizer=tok)
    write(root / "rows.jsonl", *rows, {"text": "Some plain text."})
    return root


def test_every_number_by_hand(place, tmp_path):
    out = tmp_path / "out.json"
    flags = ("--device", "cpu", "--dtype", "float32", "--max-length", 32)
    printed, _ = command("--ckpt", place / "one", place / "two", "--rows", place / "rows.jsonl", "--out", out, *flags)
    records = json.loads(out.read_text())["records"]
    assert [(r["checkpoint"], r["rows"], r["n"]) for r in records] == [
        (str(place / name), kind, 3) for name in ("one", "two") for kind in ("unsafe", "worse", "plain")
    ]
    cut = 0
    for r in records:
        model, tok = load_model(r["checkpoint"]), load_tokenizer(r["checkpoint"])
        rows = [row for row in load_rows([str(place / "rows.jsonl")], tok, 32) if not row.plain_text]
        rows = {"unsafe": rows[1::3], "worse": rows[2::3], "plain": rows[0::3]}[r["rows"]]
        for name in ("chosen", "rejected") if r["rows"] != "plain" else ("chosen",):
            p, resets, logprobs = [], 0, []
            for row in rows:
                answer = getattr(row, name)[: 32 - len(row.prompt)]
                cut += len(answer) < len(getattr(row, name))
                after = []
                for k in range(len(answer) + 1):
                    with torch.no_grad():
                        logits = model(torch.tensor([row.prompt + answer[:k]]))[0, -1]
                    after.append(logits.log_softmax(dim=-1))
                p.append(sum(a[tok.reset_id].exp().item() for a in after[1:]) / len(answer))
                resets += any(a[tok.reset_id] > math.log(0.5) for a in after[1:])
                logprobs.append(sum(a[t].item() for a, t in zip(after, answer, strict=False)) / len(answer))
            assert r[f"p_{name}"] == pytest.approx(sum(p) / len(p), rel=1e-4)
            assert r[f"reset_{name}"] == resets
            if name == "chosen":
                assert r["logprob"] == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-5)
        assert ("auc" in r) == ("p_rejected" in r) == (r["rows"] != "plain")
    assert cut and 0 < sum(r["reset_chosen"] for r in records) < 18
    assert len(printed.splitlines()) == len(records)
    command("--ckpt", place / "one", "--rows", place / "rows.jsonl", "--out", out, "--limit", 2, *flags[:2])
    assert [r["n"] for r in json.loads(out.read_text())["records"]] == [2, 2, 2]


def test_auc():
    low, high = [0.1, 0.2, 0.3], [0.25, 0.4, 0.5]
    assert auc_of(chosen=low, rejected=high) == pytest.approx(8 / 9, abs=1e-4)
    assert auc_of(chosen=high, rejected=low) == pytest.approx(1 / 9, abs=1e-4)
    assert auc_interval(chosen=[0.0] * 20, rejected=[1.0] * 20) == (1.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 200, generator=generator) + torch.tensor([[0.0], [1.0]])
    lower, upper = auc_interval(chosen.tolist(), rejected.tolist())
    assert lower < auc_of(chosen.tolist(), rejected.tolist()) < upper
    # Hanley and McNeil (1982): the standard error of an AUC near 0.76 from 200 and 200 is about 0.024.
    assert 0.07 < upper - lower < 0.12
