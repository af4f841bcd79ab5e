"""Rows to start from, for tokens that the base never saw: [RESET] and unused template tokens.

    start_new_tokens(model, tok, batches)      # before the first step of supervised fine-tuning

Two things decide whether [RESET] is learned from few rows. Its rows must not lie where untrained rows lie:
they have one direction in common, far from all others, and the token is confused with every other spare one.
And it must not start too unlikely: Adam moves a row by about a learning rate per step, so from a log-probability
of −20, where the mean of the trained rows puts it, training ends before it is ever said (level.py).
"""

import dataclasses

import torch

from backtrack import parallel
from backtrack.examples import Batch
from backtrack.level import set_level
from backtrack.terminal import say
from model import Transformer

SPREAD = 3.0  # a row is untrained if it lies so many times as near to [RESET]'s as spare rows do


def start_new_tokens(model: Transformer, tok, batches: list[Batch]) -> None:
    """Give [RESET], and every template token that the base never saw, rows at trained scale.

    A trained row is never overwritten. batches: answers, at whose tokens p([RESET]) is to start at 1%.
    """
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    tables = {"embedding": embedding}
    if output is not embedding:
        tables["output"] = output
    for name, table in tables.items():
        with parallel.as_a_whole(table) as rows:
            fresh = set_untrained_rows(rows, tok)
        say(
            f"untrained {name} rows of special tokens, set to the mean of the trained rows: {fresh}"
        )
    if batches:
        set_level(model, tok.reset_id, batches)
    # From now on it means something.
    model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)


@torch.no_grad()
def set_untrained_rows(table: torch.Tensor, tok) -> list[int]:
    """Set the rows of untrained template tokens in table (V, D); returns which they were.

    Where spare tokens lie, untrained ones do: initialisation and the softmax left them all there.
    """
    used = {tok.bos_id, *tok.stop_ids, *tok.template_ids}
    spare = [t for t in tok.special_ids if t not in used and t < len(table)]
    distance = (table - table[tok.reset_id]).float().norm(dim=1)  # (V,)
    near = SPREAD * distance[spare].median() if spare else 0.0
    is_trained = distance > near
    fresh = [t for t in tok.template_ids if not is_trained[t]]
    rows = table[is_trained] if is_trained.any() else table
    mean, std = rows.float().mean(dim=0), rows.float().std(dim=0)
    generator = torch.Generator().manual_seed(0)
    for t in fresh:  # a little apart, so that they can be told from each other
        noise = torch.randn(std.shape, generator=generator).to(std)
        table[t] = (mean + 0.1 * std * noise).to(table.dtype)
    return fresh
