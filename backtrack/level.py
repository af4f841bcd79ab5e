"""The level of [RESET]: how likely it is everywhere. Set before training, and where that overdid it, moved afterwards.

    python -m backtrack.level --ckpt runs/real/sft-high --rows dev-rows.jsonl --add -2 --out runs/real/sft

From few rows [RESET] is learned only if each counts for much (`train.py sft --reset-weight`), and then it is said too
readily. `--reset-bias` puts that right token by token, in a sampler that knows of it; this does the same once and for
all, in the output row of [RESET], for every server. It is the usual correction where one class was given more weight
than it has (King and Zeng 2001, "Logistic regression in rare events data"; arXiv 2007.07314). Choose --add on
development prompts: `backtrack.evaluate --reset-bias` shows what each value will do.

Both changes are the least ones, by least squares with a ridge. Hidden states h (M, D), row w (D,), wanted logits (M,):

    min over w'  Σ (h·w' − wanted)²  +  ridge · |w' − w|²

Where the head is tied, the row is read at the input too, after a reset.
"""

import argparse
import math
from functools import partial

import torch

from backtrack import parallel
from backtrack.examples import Batch, every_reset, make_batch, resets_after_safe, view_tree
from backtrack.rows import Row, cut, evenly, load_rows
from backtrack.terminal import say
from model import InputError, Transformer, load_model, load_tokenizer, save_model
from model.errors import Help, between, device, positive, run
from model.transformer import softcap

START = 0.01  # p([RESET]) before the first step
RIDGE = 0.01  # of the mean square of a hidden state's coordinate


@torch.no_grad()
def set_level(model: Transformer, reset_id: int, batches: list[Batch]) -> None:
    """Change the output row of [RESET] so that p([RESET]) is START wherever the batches predict."""
    hidden, others, before = read_states(model, reset_id, batches)
    wanted = others + math.log(START / (1.0 - START))  # (M,)
    after = move_row(model, reset_id, hidden, wanted)
    after = after - torch.logaddexp(after, others)
    before = before - torch.logaddexp(before, others)
    say(f"log p([RESET]) starts at {after.mean():.1f} ± {after.std():.1f}; its row had {before.mean():.1f}")


@torch.no_grad()
def add_to_level(model: Transformer, reset_id: int, batches: list[Batch], nats: float) -> None:
    """Change the output row of [RESET] so that its logit is `nats` more wherever the batches predict."""
    hidden, _, before = read_states(model, reset_id, batches)
    change = move_row(model, reset_id, hidden, before + nats) - before
    say(f"the logit of [RESET] has changed by {change.mean():+.2f} ± {change.std():.2f} at {len(change):,} places")


def read_states(model: Transformer, reset_id: int, batches: list[Batch]) -> tuple[torch.Tensor, ...]:
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
        where = {"positions": batch.positions, "visible": batch.visible, "at": batch.places}
        model(batch.tokens, **where, read=read)
    return torch.cat(hidden), torch.cat(others), torch.cat(reset)


def move_row(model: Transformer, reset_id: int, h: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
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


def places_of(row: Row, tok) -> list:
    """Views of a row that together predict after every token of both its answers."""
    views = resets_after_safe(row, tok)
    if row.rejected:
        views += every_reset("unsafe", row.prompt, row.rejected, [tok.reset_id], weight=0.0)
    return views


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model, trained to backtrack")
    add("--rows", nargs="+", required=True, help="rows like those it was trained on (.jsonl)")
    add("--add", type=between(-100, 100, float), required=True, help="nats; below 0 makes resets rarer")
    add("--out", required=True, help="model directory to write")
    add("--limit", type=positive, default=128, help="so many rows, evenly spread")
    add("--max-length", type=positive, default=512, help="longest sequence in tokens; longer ones are cut")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="of PyTorch")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device)
    if model.config.reset_token_id is None:
        raise InputError(f"{args.ckpt}: has not been trained to backtrack; name one that train.py sft has made")
    rows = [row for row in load_rows(args.rows, tok, args.max_length) if not row.plain_text]
    if not rows:
        raise InputError(f"{args.rows[0]}: no row has an answer; use those of the training")
    cut_row = partial(cut, length=args.max_length - 1)  # and [RESET]
    trees = [view_tree(places_of(cut_row(row), tok), args.max_length) for row in evenly(rows, args.limit)]
    add_to_level(model, tok.reset_id, [make_batch([tree], args.device) for tree in trees], args.add)
    save_model(model, args.out, tok)
    say(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
