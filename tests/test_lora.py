"""LoRA: it begins as the model it is added to, what is saved is what was trained, and full width is full training."""

from functools import partial

import pytest
import torch
from models import FAMILIES, LLAMA, OTHERS, network_of
from ranks import trained_on
from safetensors.torch import load_file
from samples import row_of, toy_tokenizer, write
from training import contents, interrupted, metrics, steps_of, trained

from backtrack.run import lora
from model import load_model, save_model
from model.checkpoint import write_model

MODELS = {"llama": LLAMA, "llama-untied": LLAMA | {"tie_word_embeddings": False}, "gemma": FAMILIES["gemma"]}
MODELS |= {"qwen2": OTHERS["qwen2"], "gemma3": OTHERS["gemma3"]}  # with biases, and with norms of queries and keys


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rows = (row_of(f"Hi {i}", f"no word{i}", f"yes other{i}", unsafe=i % 2 == 0) for i in range(8))
    write(root / "rows.jsonl", *rows)
    for name, fields in MODELS.items():
        save_model(network_of(fields, scale=0.1), root / name, tokenizer=toy_tokenizer())
    return root


def words(world, command, out, *more, model="llama"):
    arguments = [command, "--init", world / model, "--data", world / "rows.jsonl", "--out", out, "--device", "cpu"]
    return [*arguments, "--max-length", 64, "--batch-size", 4, "--lr", 1e-2, "--log-every", 1, "--steps", 4, *more]


@pytest.mark.parametrize("model", MODELS)
def test_merged_is_what_was_trained(world, tmp_path, model):
    """Untrained it changes nothing; with any factors and rows, the saved model has the logits of the one in parts."""
    ids = [3, 7]
    adapted = load_model(world / model, prepare=partial(lora.adapt, rank=3, ids=ids))
    lora.start(adapted, seed=0)
    tokens = torch.tensor([[5, 3, 9, 7, 7, 1]])
    plain = load_model(world / model)
    torch.testing.assert_close(adapted(tokens), plain(tokens), rtol=0, atol=0)
    with torch.no_grad():
        for p in lora.adapters(adapted).values():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    write_model(adapted, tmp_path, weights=lora.weights(adapted))
    merged = load_model(tmp_path)
    assert not torch.allclose(adapted(tokens), plain(tokens), atol=0.1)
    torch.testing.assert_close(adapted(tokens), merged(tokens), rtol=1e-4, atol=1e-4)
    changed = (merged.model.embed_tokens.weight != plain.model.embed_tokens.weight).any(dim=1)
    assert changed.all() if "untied" not in model else changed.nonzero()[:, 0].tolist() == ids
    assert (merged.lm_head.weight != plain.lm_head.weight).any(dim=1).all()


@pytest.mark.parametrize(
    "command, model", [("dpo", "gemma"), pytest.param("sft", "llama-untied", marks=pytest.mark.slow)]
)
def test_it_goes_on_and_runs_on_two_ranks(world, tmp_path, command, model):
    arguments = partial(words, world, command, model=model)
    more = ("--lora", 4, "--save-every", 2)
    trained(*arguments(tmp_path / "one", *more))
    interrupted(arguments(tmp_path / "resumed", *more), at=4)
    assert (tmp_path / "resumed/optimizer.state").exists()
    assert set(load_file(tmp_path / "resumed/model.safetensors")) == set(load_file(world / model / "model.safetensors"))
    trained(*arguments(tmp_path / "resumed", *more, "--resume"))
    assert contents(tmp_path / "resumed")["model.safetensors"] == contents(tmp_path / "one")["model.safetensors"]
    assert steps_of(tmp_path / "resumed") == steps_of(tmp_path / "one")
    trained_on(2, *arguments(tmp_path / "two", *more))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in ours.items():
        assert (weight - theirs[name]).norm() <= 1e-5 * weight.norm(), name
    start = load_file(world / model / "model.safetensors")
    assert all(not torch.equal(weight, start[name]) for name, weight in ours.items() if "_proj" in name)
    assert all(torch.equal(weight, start[name]) for name, weight in ours.items() if "norm" in name)


def test_full_width_reaches_full_training(world, tmp_path):
    """Its loss within 5% after 60 steps, [RESET] learned; rank 1 falls behind. From a base that has been trained."""
    corpus = write(tmp_path / "corpus.jsonl", *({"text": f"Hi {i} no word{i} yes other{i}"} for i in range(20)))
    base = ["base", "--config", world / "llama/config.json", "--tokenizer", world / "llama", "--device", "cpu"]
    base += ["--data", corpus, "--out", tmp_path / "base", "--max-length", 32, "--lr", 1e-2]
    trained(*base, "--steps", 60, "--batch-size", 8)
    last = {}
    for name, more in {"full": [], "wide": ["--lora", LLAMA["hidden_size"]], "narrow": ["--lora", 1]}.items():
        trained(*words(world, "sft", tmp_path / name, "--init", tmp_path / "base", "--steps", 60, *more))
        first, *_, last[name] = metrics(tmp_path / name)
        assert first["loss"] > 10 * last["full"]["loss"]
    assert last["wide"]["loss"] == pytest.approx(last["full"]["loss"], rel=0.05)
    assert last["narrow"]["loss"] > 2 * last["full"]["loss"]
    assert last["wide"]["reset_after_unsafe"] > 0.9 > first["reset_after_unsafe"]
