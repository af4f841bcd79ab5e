"""A control without training, Any-Depth Alignment (arXiv 2510.18081): the model is asked again in mid-answer.

This is the paper's ADA-RK, which lets the model speak; its ADA-LP reads hidden states with a probe and is not here.

    python -m backtrack.evaluate --ckpt runs/sft-baseline --any-depth 32 --judge runs/refusal-judge …

A model that was begun for it hardly turns round by itself, but the place where an answer starts is where it has learned
to refuse. So the end of the user's turn and the assistant's header are put in again after every N tokens of an answer,
and the model says a few tokens from there:

    x ⊕ prefix_d(y) ⊕ header ⊕ …        d = 0 (behind a forced beginning), N, 2N, … below |y|

If it refuses, as the judge of the answers says, the answer is thrown away and the refusal stands in its place: this
counts as a reset. Else the answer goes on as if nothing had been asked. Decoding is greedy, so that to ask when the
answer is finished gives what to ask on the way would. `steps` counts all that was sampled to there, probes included.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from backtrack.generate import Done, Generation, generate
from backtrack.judge import Judge, judge_all
from model import InputError, Transformer

PROBE = 24  # tokens that show whether it refuses


def around(model: Transformer, judge: Judge, tok, batch_size: int, every: int) -> Callable:
    """stream() of this model, asked again after every so many tokens. It yields finished answers only."""

    def stream(prompts: list[list[int]], *, prefill, sample_ids, **options) -> Iterator[Done]:
        if options.pop("temperature", 0):
            raise InputError("--any-depth is greedy; leave --temperature at 0")
        ask = partial(generate, model, **options | {"max_resets": 0})
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            found = asked_again(ask, judge, tok, prompts[some], prefill[some], every)
            yield from (Done(row, g) for row, g in enumerate(found, start))

    return stream


def asked_again(ask, judge: Judge, tok, prompts, prefill, every: int) -> list[Generation]:
    """ask: generate() with all options but the prompts."""
    answers, header, refused = ask(prompts, prefill=prefill), header_of(tok), set()
    longest, spent = max(len(answer.tokens) for answer in answers), [0] * len(prompts)  # tokens of probes
    for depth in range(0, longest, every):
        at = {i: len(prefill[i]) + depth for i in range(len(prompts)) if i not in refused}
        here = [i for i in at if 0 < at[i] < len(answers[i].tokens)]  # at 0 it has just been asked
        probes = {i: prompts[i] + answers[i].tokens[: at[i]] + header for i in here}
        said = ask(list(probes.values()), max_new_tokens=PROBE)
        for i, probe in zip(here, said, strict=True):
            spent[i] += probe.steps
        asked = [[{"role": "user", "content": tok.decode(prompts[i])}] for i in here]
        verdicts = judge_all(judge, [(q, tok.decode(g.tokens)) for q, g in zip(asked, said, strict=True)])
        refusing = [i for i, verdict in zip(here, verdicts, strict=True) if getattr(verdict, "refused", False)]
        whole = ask([probes[i] for i in refusing])
        for i, refusal in zip(refusing, whole, strict=True):
            answers[i] = replace(refusal, discarded=[answers[i].tokens[: at[i]]], resets=1, steps=depth + refusal.steps)
        refused |= set(refusing)
    return [replace(answer, steps=answer.steps + probes) for answer, probes in zip(answers, spent, strict=True)]


def header_of(tok) -> list[int]:
    """What ends the user's turn and begins the assistant's: the same behind every message."""
    one, other = (tok.render([{"role": "user", "content": text}]) for text in ("a", "0"))
    count = 0
    while one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]
