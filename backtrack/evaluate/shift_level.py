"""Make [RESET] rarer or more frequent everywhere, after training, without the sampler's help.

    python -m backtrack.evaluate.shift_level --ckpt runs/real/sft-high \
        --rows dev-rows.jsonl --add -2 --out runs/real/sft

From few rows a model learns [RESET] only if each counts for much (`train.py sft --reset-weight`), and then it says the
token too readily. `--reset-bias` corrects that in our sampler; this command writes the same correction into the output
row of [RESET], for every server (King and Zeng 2001, "Logistic regression in rare events data"; arXiv 2007.07314).
Choose --add on development prompts: `backtrack.evaluate --reset-bias` shows what each value will do. The row changes as
little as it can: see `move_row` in backtrack/reset_row.py.
"""

import argparse
from functools import partial

import torch

from backtrack.examples import after_every_prefix, resets_after_safe
from backtrack.reset_row import add_to_level
from backtrack.rows import Row, cut, evenly, load_rows
from backtrack.run.say import say
from backtrack.trees import make_batch, view_tree
from model import InputError, load_model, load_tokenizer, save_model
from model.errors import Help, between, device, positive, run


def every_prefix(row: Row, tok) -> list:
    """Views of a row that together predict [RESET] after every token of both its answers."""
    rejected = row.rejected or []
    after_rejected = after_every_prefix("unsafe", row.prompt, rejected, [tok.reset_id], weight=0.0)
    return resets_after_safe(row, tok) + after_rejected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model, trained to backtrack")
    add("--rows", nargs="+", required=True, help="rows like those it was trained on (.jsonl)")
    add("--add", type=between(-100, 100, float), required=True, help="nats; below 0 makes resets rarer")
    add("--out", required=True, help="model directory to write")
    add("--limit", type=positive, default=128, help="at most so many rows, evenly spread")
    add("--max-length", type=positive, default=512, help="longest sequence in tokens; longer ones are cut")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="PyTorch device")
    args = parser.parse_args()
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device)
    if model.config.reset_token_id is None:
        raise InputError(f"{args.ckpt}: has not been trained to backtrack; name one that train.py sft has made")
    rows = [row for row in load_rows(args.rows, tok, args.max_length) if not row.plain_text]
    if not rows:
        raise InputError(f"{args.rows[0]}: no row has an answer; use those of the training")
    cut_row = partial(cut, length=args.max_length - 1)  # and [RESET]
    trees = [view_tree(every_prefix(cut_row(row), tok), args.max_length) for row in evenly(rows, args.limit)]
    add_to_level(model, tok.reset_id, [make_batch([tree], args.device) for tree in trees], args.add)
    save_model(model, args.out, tok)
    say(f"saved {args.out}")


if __name__ == "__main__":
    run(main)
