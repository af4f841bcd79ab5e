"""Rows to start from, for tokens that the base never saw: [RESET] and unused template tokens.

    start_new_tokens(model, tok, batches)      # before the first step of supervised fine-tuning

Two things decide whether [RESET] is learned from few rows. Its rows must not lie where untrained rows lie:
they have one direction in common, far from all others, and the token is confused with every other spare one.
And it must not start too unlikely: Adam moves a row by about a learning rate per step, so from a log-probability
of −20, where the mean of the trained rows puts it, training ends before it is ever said (level.py).
"""

import dataclasses
import math

import torch

from backtrack.run import parallel
from backtrack.run.say import say
from backtrack.trees import Batch
from model import Transformer
from model.transformer import softcap

START = 0.01  # p([RESET]) before the first step
RIDGE = 0.01  # of the mean square of a hidden state's coordinate
AWAY = (
    10.0  # [RESET] lies elsewhere than spare rows if it is so many times as far from their middle
)
SPREAD = 3.0  # a row is untrained if it lies at most so many times as far away as spare rows do


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
    [RESET] is one of them, or else it was trained for something that nobody tells (Gemma-3's
    <unused0>): its row is set in any case.
    """
    used = {tok.bos_id, *tok.stop_ids, *tok.template_ids}
    spare = [t for t in tok.special_ids if t not in used and t < len(table)]
    place, near = table[tok.reset_id], 0.0
    if spare:
        middle = table[spare].median(dim=0).values
        spread = (table[spare] - middle).float().norm(dim=1).median()
        if (place - middle).float().norm() > AWAY * spread:
            place = middle
        near = SPREAD * (table[spare] - place).float().norm(dim=1).median()
    is_trained = (table - place).float().norm(dim=1) > near  # (V,)
    fresh = [t for t in tok.template_ids if t == tok.reset_id or not is_trained[t]]
    rows = table[is_trained] if is_trained.any() else table
    mean, std = rows.float().mean(dim=0), rows.float().std(dim=0)
    generator = torch.Generator().manual_seed(0)
    for t in fresh:  # a little apart, so that they can be told from each other
        noise = torch.randn(std.shape, generator=generator).to(std)
        table[t] = (mean + 0.1 * std * noise).to(table.dtype)
    return fresh


@torch.no_grad()
def set_level(model: Transformer, reset_id: int, batches: list[Batch]) -> None:
    """Change the output row of [RESET] so that p([RESET]) is START wherever the batches predict."""
    hidden, others, before = read_states(model, reset_id, batches)
    wanted = others + math.log(START / (1.0 - START))  # (M,)
    after = move_row(model, reset_id, hidden, wanted)
    after = after - torch.logaddexp(after, others)
    before = before - torch.logaddexp(before, others)
    say(
        f"log p([RESET]) starts at {after.mean():.1f} ± {after.std():.1f}; its row had {before.mean():.1f}"
    )


@torch.no_grad()
def add_to_level(model: Transformer, reset_id: int, batches: list[Batch], nats: float) -> None:
    """Change the output row of [RESET] so that its logit is `nats` more wherever the batches predict."""
    hidden, _, before = read_states(model, reset_id, batches)
    change = move_row(model, reset_id, hidden, before + nats) - before
    say(
        f"the logit of [RESET] has changed by {change.mean():+.2f} ± {change.std():.2f} at {len(change):,} places"
    )


def read_states(
    model: Transformer, reset_id: int, batches: list[Batch]
) -> tuple[torch.Tensor, ...]:
    """At the M places where the batches predict: hidden states (M, D), the log-sum-exp of all other tokens' logits (M,)
    and the logit of [RESET] (M,)."""
    hidden, others, reset = [], [], []

    def read(states: torch.Tensor) -> None:  # (places, D)
        logits = model.logits(states)  # (places, V)
        reset.append(logits[:, reset_id].clone())
        logits[:, reset_id] = -math.inf
        hidden.append(states.float())
        others.append(logits.logsumexp(dim=-1))

    for batch in batches:  # all of them on every rank, so that all find the same row
        where = {"positions": batch.positions, "visible": batch.visible, "at": batch.predicting}
        model(batch.tokens, **where, read=read)
    return torch.cat(hidden), torch.cat(others), torch.cat(reset)


def move_row(
    model: Transformer, reset_id: int, h: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Set the output row of [RESET] so that its logits at hidden states h (M, D) come near to those wanted (M,).

    Returns what they then are, (M,).
    """
    cap = model.config.final_logit_softcapping
    if cap is not None:  # the logit before the cap
        wanted = cap * torch.atanh((wanted / cap).clamp(-0.99, 0.99))
    with parallel.as_a_whole(model.lm_head.weight) as table:
        w = table[reset_id].to(h)
        gram = h.T @ h  # (D, D)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(w), device=h.device)
        w = w + torch.linalg.solve(gram + ridge, h.T @ (wanted - h @ w))  # (D,)
        table[reset_id] = w.to(table)
    logit = h @ w  # (M,)
    return logit if cap is None else softcap(logit, cap)
