"""Ctrl-C and SIGTERM end a run between two steps, and what it has learned is saved; an epoch is an epoch."""

import os
import signal
from itertools import chain

import pytest
from models import LLAMA, network_of
from ranks import Ranks
from samples import row_of, toy_tokenizer, write
from training import arguments, contents, metrics, trained, visited

import train
from model import save_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write(root / "rows.jsonl", *(row_of(f"Hi {i}", f"no word{i}", f"yes {i}", unsafe=True) for i in range(10)))
    save_model(network_of(LLAMA, scale=0.1), root / "init", tokenizer=toy_tokenizer())
    return root


def words(world, out, *more):
    arguments = ["sft", "--init", world / "init", "--data", world / "rows.jsonl", "--out", out, "--device", "cpu"]
    return [*arguments, "--max-length", 64, "--batch-size", 2, "--lr", 1e-3, "--log-every", 1, *more]


def signalled(kind, at, rank=None):
    """The signal arrives in the middle of step `at`, on one rank or on the one process."""

    def before(number=None):
        rate = train.learning_rate

        def learning_rate(step, *more):
            if step + 1 == at and number == rank:
                os.kill(os.getpid(), kind)
            return rate(step, *more)

        train.learning_rate = learning_rate

    return before


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(world, tmp_path, monkeypatch, kind):
    """--save-every is never reached; the rest of the run ends with the bits of one that nobody stopped."""
    handlers = [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(train, "learning_rate", train.learning_rate)
    signalled(kind, at=3)()
    said = trained(*words(world, tmp_path / "out", "--steps", 5), code=130)
    assert "still holds step 3 of 5; --resume goes on from there" in said
    assert [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    trained(*words(world, tmp_path / "out", "--steps", 5, "--resume"))
    trained(*words(world, tmp_path / "whole", "--steps", 5))
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]
    said = trained(*words(world, tmp_path / "out", "--steps", 9, "--resume"), code=2)
    assert f"start a new run with --init {tmp_path / 'out'}" in said


def test_one_rank_is_told_and_all_stop(world, tmp_path):
    ranks = Ranks(2, train.main, words(world, tmp_path / "out", "--steps", 5), signalled(signal.SIGTERM, 2, rank=1))
    codes, said = ranks.codes(), ranks.said()
    ranks.file.unlink()
    assert codes == [130, 130] and "Traceback" not in said, said
    assert [r["step"] for r in metrics(tmp_path / "out")] == [1, 2]
    assert "holds step 2 of 5" in said


@pytest.mark.parametrize("epochs, per_step, sizes", [(1, 128, [10]), (1, 4, [4, 4, 2]), (2.5, 10, [10, 10, 5])])
def test_an_epoch_is_an_epoch(world, tmp_path, epochs, per_step, sizes):
    """No row comes twice before all have come once; the last step is smaller."""
    more = ("--epochs", epochs, "--batch-size", per_step)
    args = arguments(words(world, tmp_path / "out", *more))
    steps = [visited(args, 10)(step) for step in range(len(sizes))]
    assert [len(step) for step in steps] == sizes
    for epoch in range(int(epochs)):
        assert sorted(index for e, index in chain(*steps) if e == epoch) == list(range(10))
    trained(*words(world, tmp_path / "out", *more))
    assert metrics(tmp_path / "out")[-1]["step"] == len(sizes)
