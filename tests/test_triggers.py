"""triggers.py: p([RESET]) along two recipes, a prefix at a time."""

import json

import pytest
import torch
from command import command
from models import LLAMA, network_of, prone_to

from backtrack.evaluate import triggers
from data import toy
from model import load_tokenizer, save_model


def test_strips(tmp_path):
    """Word by word: the highest p of the places at which it is being said."""
    toy.write(toy.build(0), tmp_path / "data")
    tok = load_tokenizer(tmp_path / "data/tokenizer")
    model = prone_to(tok.reset_id, network_of(LLAMA, tie_word_embeddings=False), times=9.0)
    save_model(model, tmp_path / "sft", tokenizer=tok)
    command(triggers.main, "--world", tmp_path, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "t.json")
    strips = json.loads((tmp_path / "t.json").read_text())["strips"]
    world = json.loads((tmp_path / "data/world.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "data/prompts.jsonl").read_text().splitlines()]
    for strip, name in zip(strips, ("unseen", "benign-unseen"), strict=True):
        row = next(r for r in rows if r["set"] == name and (r["benign"] or r["topic"] in world["disguised"]))
        assert (strip["question"], strip["benign"]) == (row["prompt"][0]["content"], row["benign"])
        assert strip["words"] == row["target"].split(" ")
        prompt, answer, along = tok.render(row["prompt"]), tok.encode(row["target"]), []
        for k in range(1, len(answer) + 1):
            with torch.no_grad():
                p = model(torch.tensor([prompt + answer[:k]]))[0, -1].softmax(-1)[tok.reset_id].item()
            along.append((len(tok.decode(answer[:k])), p))
        start = 0
        for word, p, forbidden in zip(strip["words"], strip["p"], strip["forbidden"], strict=True):
            end = start + len(word)
            assert p == pytest.approx(max(value for length, value in along if start < length <= end), abs=1e-4)
            assert forbidden == (word.strip(",.:") in world["forbidden_ingredients"])
            start = end + 1
        assert any(strip["forbidden"]) != row["benign"] and max(strip["p"]) > 0.01
