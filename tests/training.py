"""What the tests of training share: sums over sequences written out, and the command line within this process.

Everything is held against backtrack/plain.py, one sequence at a time, and a Python loop over the targets.
"""

import contextlib
import dataclasses
import io
import json
import re
import sys
from functools import cache

import pytest
import torch
from models import LLAMA

import train
from backtrack import examples, plain
from backtrack.run import progress
from data import base, toy
from model.errors import run


@cache
def toy_files() -> dict[str, bytes]:
    """The toy world of seed 0."""
    return toy.build(0)


def toy_place(tmp_path_factory):
    """A new directory with the toy world's tokenizer, and the config.json of a tiny model."""
    root = tmp_path_factory.mktemp("world")
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(toy_files()["tokenizer/tokenizer.model"])
    (root / "config.json").write_text(json.dumps(LLAMA))
    return root


# ── The plain form ────────────────────────────────────────────────────────────────────────────────


def logprob(network, context: list[int], token: int) -> torch.Tensor:
    """log π(token | context), fp64."""
    return plain.logprobs(network, context, [token])[0].double()


def logprobs_of(network, tokens: list[int], start: int) -> torch.Tensor:
    """log π of tokens[start:], each given what stands before it, fp64."""
    return plain.logprobs(network, tokens[:start], tokens[start:]).double()


def plain_nll(network, views) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Over all targets of all views: Σ weight · −log π, Σ weight; and by name [Σ −log π, how many]."""
    total, weights, found = torch.zeros((), dtype=torch.float64), 0.0, {}
    for view in views:
        for value in logprobs_of(network, view.tokens, view.loss_from):
            total = total - view.weight * value
            weights += view.weight
            old, count = found.get(view.name, (0.0, 0))
            found[view.name] = (old - value.item(), count + 1)
    return total, weights, found


def plain_dpo(network, reference, pairs, beta: float, nll=0.0, weight=lambda kind: 1.0):
    """Σ weight · loss in float64, from the definition; [Σ loss, how many] by kind; and each pair's two log-ratios."""
    total, kinds, ratios = torch.zeros((), dtype=torch.float64), {}, []
    for p in pairs:
        sides = []
        for answer in (p.chosen, p.rejected):
            terms = logprobs_of(network, p.prompt + answer, len(p.prompt))
            with torch.no_grad():
                before = sum(logprobs_of(reference, p.prompt + answer, len(p.prompt)))
            sides.append((terms, sum(terms) - before))
        (chosen_terms, chosen), (_, rejected) = sides
        loss = torch.log1p(torch.exp(-beta * (chosen - rejected)))  # −log σ
        loss = loss - nll * sum(chosen_terms[p.nll_from :])
        total = total + weight(p.kind) * loss
        value, count = kinds.get(p.kind, (0.0, 0))
        kinds[p.kind] = (value + loss.item(), count + 1)
        ratios.append((chosen.item(), rejected.item()))
    return total, kinds, ratios


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    """All that is predicted from, each distinct one once: what a tree of these sequences has to compute."""
    return {tuple(tokens[:n]) for tokens in sequences for n in range(1, len(tokens))}


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def close(a, b, atol=1e-5, rtol=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol)


def sft_by_hand(args, rows, tok):
    """(epoch, row) -> its views, the prefix drawn as the settings say: with room for [RESET] and a token after it."""

    def views(epoch, index):
        row, k = rows[index], 0
        if row.unsafe:
            row = dataclasses.replace(row, rejected=row.rejected[: args.max_length - len(row.prompt) - 2])
            k = examples.draw_prefix(args.seed, epoch, index, len(row.rejected))
        names = ("method", "resets", "reset_weight", "restart")
        views = examples.sft_views(row, k, tok, **{name: getattr(args, name) for name in names})
        return [dataclasses.replace(view, tokens=view.tokens[: args.max_length]) for view in views]

    return views


# ── The command line ──────────────────────────────────────────────────────────────────────────────


def trained(*words, code=0):
    """`train.py words`, or `data.base words` without the first, within this process; what it says on stderr."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        program, argv = command_line(words)
        patch.setattr(sys, "argv", argv)
        try:
            run(program.main)
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return checked(status, said.getvalue(), code)


def command_line(words):
    if words[0] == "base":
        return base, ["base.py", *map(str, words[1:])]
    return train, ["train.py", *map(str, words)]


def checked(status, said, code):
    assert status == code, said
    assert "Traceback" not in said
    if code == 2:
        *before, last = said.splitlines()
        assert re.match(r"((train|base)\.py( \w+)?: )?error: ", last)
        assert not any("error: " in line for line in before)
    return said


def arguments(words):
    with pytest.MonkeyPatch.context() as patch:
        program, argv = command_line(words)
        patch.setattr(sys, "argv", argv)
        return program.parse_args()


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


def visited(args, count: int):
    """step -> the (epoch, row) pairs of its rows."""
    _, args.rows = progress.length_of(args, count) if "steps" in args else (None, 10**9)
    return train.rows_in_order(args, count, lambda epoch, index: (epoch, index))


def gradients_before_clipping(monkeypatch) -> list[list[torch.Tensor]]:
    """Fills while training: the gradients of every parameter, a list per step."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters])
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    return steps


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    """metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "tokens_per_s")
    return [{k: v for k, v in record.items() if k not in clock} for record in metrics(out)]


def contents(directory):
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
