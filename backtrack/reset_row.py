"""The row that [RESET] starts from, and those of template tokens that the base never saw.

    start_new_tokens(model, tok, batches)              # before the first step of SFT
    add_to_level(model, tok.reset_id, batches, nats)   # afterwards: evaluate/shift_level.py

Two things decide whether [RESET] is learned from few rows. Its row must not lie where untrained
rows lie: they share one direction, far from all others, and [RESET] would be confused with every
other spare token. And [RESET] must not start too unlikely: Adam moves a row by about a learning
rate per step, so from a log-probability of −20, where the mean of the trained rows puts it,
training would end before it is ever said.

So the rows are set to the mean of the trained ones, and then [RESET]'s output row is changed as
little as possible until p([RESET]) is 1% wherever the first step predicts. With hidden states
h (M, D), row w (D,) and wanted logits (M,) that is least squares with a ridge:

    min over w'  Σ (h·w' − wanted)²  +  ridge · |w' − w|²

Where the head is tied, the same row is read at the input too, after a reset.
"""

import dataclasses
import math

import torch

from backtrack.run.say import say
from backtrack.trees import Batch
from model import Transformer
from model.slices import as_a_whole
from model.transformer import LOGITS, softcap

START = 0.01  # p([RESET]) before the first step
RIDGE = 0.01  # of the mean square of a hidden state's coordinate


def start_new_tokens(
    model: Transformer, tok, batches: list[Batch], untrained: list[int] | None = None
) -> None:
    """Give [RESET], and every template token that the base never saw, rows at trained scale.

    batches: answers, at whose tokens p([RESET]) is to start at 1%. untrained: the ids of the
    template tokens to start anew besides [RESET], for who knows better than `find_untrained`.
    """
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    tables = {"embedding": embedding}
    if output is not embedding:
        tables["output"] = output
    for name, table in tables.items():
        with as_a_whole(table) as rows:
            fresh, left, measured = set_untrained_rows(rows, tok, untrained)
        say(
            f"untrained {name} rows of special tokens, set to the mean of the trained rows: {fresh}"
            f"; left as they are: {left} ({measured})"
        )
    if batches:
        set_level(model, tok.reset_id, batches)
        # From now on it means something. (Without, as in a baseline, a later SFT begins here again:
        # it would never find a token that training has made as unlikely as any other spare one.)
        model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)


@torch.no_grad()
def set_untrained_rows(
    table: torch.Tensor, tok, untrained: list[int] | None = None
) -> tuple[list[int], list[int], str]:
    """Set the rows of [RESET] and of untrained template tokens in table (V, D).

    Returns the ids of those, the ids of the other template tokens, and the distances that decided.
    """
    distance, near, measured = find_untrained(table, tok)
    if untrained is None:
        # What stands around every plain text has been trained, wherever it lies.
        named = {tok.text_start_id, tok.text_end_id}
        untrained = [t for t in tok.template_ids if distance[t] <= near and t not in named]
    fresh = sorted({tok.reset_id, *untrained})
    is_trained = distance > near
    is_trained[fresh] = False
    rows = table[is_trained] if is_trained.any() else table
    mean, std = rows.float().mean(dim=0), rows.float().std(dim=0)
    generator = torch.Generator().manual_seed(0)
    for t in fresh:  # a little apart, so that they can be told from each other
        noise = torch.randn(std.shape, generator=generator).to(std)
        table[t] = (mean + 0.1 * std * noise).to(table.dtype)
    return fresh, [t for t in tok.template_ids if t not in fresh], measured


def find_untrained(table: torch.Tensor, tok) -> tuple[torch.Tensor, float, str]:
    """How far each row of table (V, D) lies from where untrained rows do, (V,), and what is near.

    Spare tokens tell where: initialisation and the softmax left them all in one place, around which
    they scatter. [RESET] is one of them. In doubt a row counts as trained: a trained row that is
    overwritten is lost, and an untrained one learns all the same, if more slowly. So in a chat
    model, one that brings a template, only rows right among the spare ones are untrained: its
    markers may have been trained for few steps (SmolLM2's have moved by a tenth of the way, and
    spare rows by a thousandth). In a base it is those among the spare rows, however these scatter
    (Gemma-3's do by half the way to the trained rows).
    """
    named = {tok.text_start_id, tok.text_end_id, *tok.stop_ids, *tok.template_ids} - {tok.reset_id}
    spare = [t for t in tok.special_ids if t not in named and t < len(table)]
    middle = table[spare].float().median(dim=0).values
    distance = torch.cat([(rows - middle).norm(dim=1) for rows in table.split(2**14)])  # (V,)
    trained = distance.quantile(0.95).item()  # many rows may belong to no text: in the toy most do
    share, most = (0.75, 0.5) if tok.chat_template is None else (0.5, 0.05)
    scatter = distance[spare].quantile(share).item()
    near = min(2 * scatter, most * trained)
    measured = f"distance from the unused rows: theirs {scatter:.2g}, trained rows' {trained:.2g}"
    return distance, near, measured


@torch.no_grad()
def set_level(model: Transformer, reset_id: int, batches: list[Batch]) -> None:
    """Change the output row of [RESET] so that p([RESET]) is START wherever the batches predict."""
    hidden, others, before = read_states(model, reset_id, batches)
    wanted = others + math.log(START / (1.0 - START))  # (M,)
    after = move_row(model, reset_id, hidden, wanted)
    after = after - torch.logaddexp(after, others)
    before = before - torch.logaddexp(before, others)
    found = f"{after.mean():.1f} ± {after.std():.1f}"
    say(f"log p([RESET]) starts at {found} (1% is -4.6); before: {before.mean():.1f}")


@torch.no_grad()
def add_to_level(model: Transformer, reset_id: int, batches: list[Batch], nats: float) -> None:
    """Change the output row of [RESET]: its logit is `nats` more wherever the batches predict."""
    hidden, _, before = read_states(model, reset_id, batches)
    change = move_row(model, reset_id, hidden, before + nats) - before
    found = f"{change.mean():+.2f} ± {change.std():.2f}"
    say(f"the logit of [RESET] has changed by {found} at {len(change):,} places")


def read_states(
    model: Transformer, reset_id: int, batches: list[Batch]
) -> tuple[torch.Tensor, ...]:
    """What is there at the M places where the batches predict.

    Returns hidden states (M, D), the log-sum-exp of all other tokens' logits (M,), and the logit of
    [RESET] (M,).
    """
    hidden, others, reset = [], [], []

    def read(states: torch.Tensor) -> None:  # (places, D)
        for some in states.split(max(1, LOGITS // model.config.vocab_size)):
            logits = model.logits(some)  # (places, V)
            reset.append(logits[:, reset_id].clone())
            logits[:, reset_id] = -math.inf
            hidden.append(some.float())
            others.append(logits.logsumexp(dim=-1))

    for batch in batches:  # all of them on every rank, so that all find the same row
        where = {"positions": batch.positions, "visible": batch.visible, "at": batch.predicting}
        model(batch.tokens, **where, read=read)
    return torch.cat(hidden), torch.cat(others), torch.cat(reset)


def move_row(
    model: Transformer, reset_id: int, h: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Set the output row of [RESET] so that its logits at h (M, D) come near to those wanted (M,).

    Returns what they then are, (M,).
    """
    cap = model.config.final_logit_softcapping
    if cap is not None:  # the logit before the cap
        wanted = cap * torch.atanh((wanted / cap).clamp(-0.99, 0.99))
    with as_a_whole(model.lm_head.weight) as table:
        w = table[reset_id].to(h)
        gram = h.T @ h  # (D, D)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(w), device=h.device)
        w = w + torch.linalg.solve(gram + ridge, h.T @ (wanted - h @ w))  # (D,)
        table[reset_id] = w.to(table)
    logit = h @ w  # (M,)
    return logit if cap is None else softcap(logit, cap)
