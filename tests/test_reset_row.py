"""backtrack/reset_row.py through `train.py sft --steps 0`, which writes out what supervised training starts from."""

import json
import math

import pytest
import torch
from models import GEMMA, LLAMA, network_of
from safetensors.torch import load_file, save_file
from samples import row_of, toy_tokenizer, write
from training import arguments, logprob, sft_by_hand, trained, visited

from backtrack.rows import load_rows
from model import load_model, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNTIED = LLAMA | {"tie_word_embeddings": False}
TOK = toy_tokenizer()
FRESH = sorted({*TOK.template_ids} - {TOK.bos_id})  # what a base has never seen
SPARE = sorted(TOK.special_ids.difference(TOK.template_ids, TOK.stop_ids, [TOK.bos_id]))  # and nobody ever will


def saved(directory, config, untrained):
    """A checkpoint without a reset_token_id, as published ones are: the rows of `untrained` lie together, far off."""
    network, generator = network_of(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in {network.model.embed_tokens.weight, network.lm_head.weight}:
            w.normal_(0.3, 0.5, generator=generator)
            w[untrained] = -0.1 + 1e-3 * torch.randn(len(untrained), w.shape[1], generator=generator)
    save_model(network, directory)
    TOK.save(directory)
    return directory


def words(init, out, *more):
    return ["sft", "--init", init, "--out", out, "--device", "cpu", "--max-length", 192, "--steps", 0, *more]


def started(init, out, *more):
    """What is said; the weights before and after."""
    said = trained(*words(init, out, *more))
    return said, load_file(init / "model.safetensors"), load_file(out / "model.safetensors")


def rows_of(root):
    """Flags of training on rows of which the last alone is unsafe, and the first step does not visit it: so no context
    holds [RESET], and nothing else moves."""
    rows = [row_of(f"Hi {i}", f"no word{i} other{7 * i}. " * (1 + i % 3)) for i in range(12)]
    write(root / "rows.jsonl", *rows, row_of("Hi", "no", "yes", unsafe=True))
    return "--data", root / "rows.jsonl", "--batch-size", 4, "--resets", "drawn"


def changed_rows(before, after, name):
    return {i for i, same in enumerate((before[name] == after[name]).all(dim=1).tolist()) if not same}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_were_never_trained_are_set_to_the_mean(tmp_path, tied):
    """As in a Llama-3 base: the rows of template tokens lie where spare ones do. Once [RESET] is known all stay."""
    assert FRESH and SPARE
    init = saved(tmp_path / "init", LLAMA | {"tie_word_embeddings": tied}, FRESH + SPARE)
    said, before, after = started(init, tmp_path / "out")
    assert str(FRESH) in said
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    ordinary = [i for i in range(1024) if i not in FRESH + SPARE]
    for name in names:
        assert changed_rows(before, after, name) == {*FRESH}
        mean, std = before[name][ordinary].mean(dim=0), before[name][ordinary].std(dim=0)
        assert ((after[name][FRESH] - mean).abs() < 0.6 * std).all()
        assert len({tuple(row.tolist()) for row in after[name][FRESH]}) == len(FRESH)  # and are told apart
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - {*names})
    more = rows_of(tmp_path)
    started(init, tmp_path / "taught", *more)
    assert json.loads((tmp_path / "taught/config.json").read_text())["reset_token_id"] == TOK.reset_id
    said, before, after = started(tmp_path / "taught", tmp_path / "again", *more)
    assert "untrained" not in said and all(torch.equal(before[name], after[name]) for name in before)


def test_reset_starts_anew_behind_a_plain_sft(tmp_path):
    """The first leaves [RESET] as unlikely as any spare token: the second, with backtracking, would hardly find it."""
    init = saved(tmp_path / "init", LLAMA, FRESH + SPARE)
    started(init, tmp_path / "plain", "--method", "baseline")
    assert "reset_token_id" not in json.loads((tmp_path / "plain/config.json").read_text())
    said, before, after = started(tmp_path / "plain", tmp_path / "out", *rows_of(tmp_path))
    assert changed_rows(before, after, EMBEDDING) == {TOK.reset_id} and "log p([RESET]) starts at -4." in said


def test_a_trained_row_is_never_overwritten(tmp_path):
    """As in a chat model of 135M: spare rows within 0.01 of each other, trained markers near, text ten times as far."""
    marker = min({*FRESH} - {TOK.reset_id})
    init = saved(tmp_path / "init", LLAMA, FRESH + SPARE)
    tensors = load_file(init / "model.safetensors")
    for i in {*FRESH} - {TOK.reset_id}:
        tensors[EMBEDDING][i] += 0.07 * torch.randn(32, generator=torch.Generator().manual_seed(i))
    save_file(tensors, init / "model.safetensors", metadata={"format": "pt"})
    near, far = ((tensors[EMBEDDING] - tensors[EMBEDDING][TOK.reset_id]).norm(dim=1)[i] for i in (marker, 99))
    assert 0.2 < near < 0.6 < 2 < far
    _, before, after = started(init, tmp_path / "out")
    assert changed_rows(before, after, EMBEDDING) == {TOK.reset_id}


def test_a_reset_that_was_trained_for_something_else_says_nothing_of_the_others(tmp_path):
    """As in Gemma-3, whose <unused0> lies as far from the spare rows as <bos> does: it alone starts anew."""
    init = saved(tmp_path / "init", LLAMA, SPARE)
    _, before, after = started(init, tmp_path / "out")
    assert changed_rows(before, after, EMBEDDING) == {TOK.reset_id}


@pytest.mark.parametrize("config", [LLAMA, UNTIED, GEMMA], ids=["llama", "llama untied", "gemma"])
def test_reset_starts_at_one_in_a_hundred(tmp_path, config):
    """At every token of the first step's answers; to get there, its output row moves and no other."""
    init = saved(tmp_path / "init", config, FRESH + SPARE)
    _, _, before = started(init, tmp_path / "plain")
    more = rows_of(tmp_path)
    said, _, after = started(init, tmp_path / "out", *more)
    moved = EMBEDDING if config["tie_word_embeddings"] else HEAD
    assert changed_rows(before, after, moved) == {TOK.reset_id}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - {moved})

    args, rows = arguments(words(init, "x", *more)), load_rows([str(tmp_path / "rows.jsonl")], TOK, 192)
    network, found = load_model(tmp_path / "out"), []
    for visit in visited(args, 13)(0):
        assert visit != (0, 12)
        (view,) = sft_by_hand(args, rows, TOK)(*visit)
        with torch.no_grad():
            found += [
                logprob(network, view.tokens[:t], TOK.reset_id).item() for t in range(view.loss_from, len(view.tokens))
            ]
    assert sum(found) / len(found) == pytest.approx(math.log(0.01), abs=0.1)
    assert f"log p([RESET]) starts at {sum(found) / len(found):.1f} ± " in said
    assert max(abs(value - math.log(0.01)) for value in found) < 1.0  # everywhere, not on average alone
