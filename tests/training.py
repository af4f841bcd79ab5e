"""What the tests of train.py share: a tiny model's config, and the command line run within this process."""

import contextlib
import io
import json
import re
import sys

import pytest
import torch

import train
from model.errors import run

TINY = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def trained(*words, code=0):
    """`python train.py words` within this process; returns what it says on stderr."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        try:
            run(lambda: train.train(train.parse_args()))
            status = 0
        except SystemExit as end:
            status = end.code
    return checked(status, said.getvalue(), code)


def checked(status, said, code):
    assert status == code, said
    assert "Traceback" not in said
    if code == 2:
        *before, last = said.splitlines()
        assert re.match(r"(train\.py( \w+)?: )?error: ", last) and not any("error: " in line for line in before)
    return said


def arguments(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return train.parse_args()


def interrupted(words, at):
    """Ctrl-C in step `at`, counted from 1."""
    with pytest.MonkeyPatch.context() as patch:
        rate = train.learning_rate

        def learning_rate(step, *more):
            if step + 1 == at:
                raise KeyboardInterrupt
            return rate(step, *more)

        patch.setattr(train, "learning_rate", learning_rate)
        return trained(*words, code=130)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in metrics(out)]


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def close(a, b, atol=1e-5, rtol=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol)
