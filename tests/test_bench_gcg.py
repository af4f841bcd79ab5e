"""bench_gcg.py with somebody else in nanoGCG's place: equal budgets, and no comparison of losses that do not agree."""

import json
from functools import partial

import pytest
import torch
from command import command as run_command
from test_evaluate import furnish

from backtrack import bench_gcg
from model import load_model, load_tokenizer

command = partial(run_command, bench_gcg.main)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    furnish(root)
    return root / "one"


def loss_by_hand(ckpt, question, target, suffix):
    tok, model = load_tokenizer(ckpt), load_model(ckpt)
    prompt, y = tok.render([{"role": "user", "content": question + suffix}]), tok.encode(target)
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + y]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -log_p[range(len(y)), y].mean().item()


def test_both_get_the_same_budget_and_the_loss_is_computed_again(ckpt, tmp_path, monkeypatch):
    off = 0.0

    def other(name, tok, question, target, seed, args):
        loss = loss_by_hand(ckpt, question, target, " x y z") + off
        return {"loss": loss, "suffix": " x y z", "seconds": 2.0, "candidates": 37}

    monkeypatch.setattr(bench_gcg, "nanogcg_side", other)
    flags = ["--ckpt", ckpt, "--cases", 2, "--seeds", 2, "--candidates", 8, "--topk", 8, "--device", "cpu"]
    printed, _ = command(*flags, "--out", tmp_path / "b.json")
    records = json.loads((tmp_path / "b.json").read_text())["records"]
    assert [r["seed"] for r in records] == [0, 0, 1, 1]
    for r, (question, target) in zip(records, bench_gcg.CASES[:2] * 2, strict=True):
        assert r["backtrack"]["candidates"] == 37 and r["sendable"]
        ours = loss_by_hand(ckpt, question, target, r["backtrack"]["suffix"])
        assert r["backtrack"]["loss"] == pytest.approx(ours, abs=2e-3)
        assert r["backtrack"]["loss"] <= r["loss_at_start"]
        assert f"{r['nanogcg']['loss']:.3f}" in printed and f"{r['backtrack']['loss']:.3f}" in printed
    lower = sum(r["backtrack"]["loss"] < r["nanogcg"]["loss"] for r in records)
    assert f"lower in {lower} of 4 searches" in printed
    off = 0.01
    assert "no comparison" in command(*flags, code=2)[1]
    assert "data.smollm2" in command("--ckpt", tmp_path / "gone", code=2)[1]
