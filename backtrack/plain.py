"""Both losses of the paper for one row, one sequence at a time: read this first.

    python -m backtrack.plain CKPT ROWS      # say, runs/toy-0/base runs/toy-0/data/sft.jsonl

No batch, no tree, no mask. train.py computes the same terms for many rows at once, weighted and
averaged over targets, and its tests compare it with this file.

x is the prompt, y+ the safe answer, y− the unsafe one, prefix_k its first k tokens, ⊕ joins; all of
them are lists of token ids. eos ends an answer.
"""

import copy
import random
import sys

import torch
import torch.nn.functional as F

from backtrack.rows import Row, load_rows
from model import InputError, Transformer, load_model, load_tokenizer
from model.errors import run


def logprobs(model: Transformer, context: list[int], answer: list[int]) -> torch.Tensor:
    """log π of each token of the answer, given the context and the answer so far: (n,) fp32."""
    tokens = torch.tensor([context + answer], device=model.device)  # (1, T)
    logits = model(tokens)[0, :-1]  # (T − 1, V): those at t are the scores of the token at t + 1
    log_p = logits.log_softmax(dim=-1)
    of_next = log_p.gather(dim=-1, index=tokens[0, 1:, None])[:, 0]  # (T − 1,)
    return of_next[len(context) - 1 :]


def sft_losses(model: Transformer, row: Row, k: int, tok) -> dict[str, torch.Tensor]:
    """The terms of the supervised loss; k is drawn from 1 … |y−|."""
    x, answer = row.prompt, row.chosen + [tok.eos_id]
    # −log π(y+ | x)
    losses = {"answer": -logprobs(model, x, answer).sum()}
    if row.unsafe:
        # −log π([RESET] ⊕ y+ | x ⊕ prefix_k(y−)). The prefix is context: no loss falls on it.
        prefix = row.rejected[:k]
        losses["backtrack"] = -logprobs(model, x + prefix, [tok.reset_id] + answer).sum()
    return losses


def dpo_losses(model, reference, row: Row, k: int, j: int, tok, beta: float) -> dict:
    """The loss of each pair of a row: c is preferred to r. k cuts y−, j cuts y+."""
    good, bad = row.chosen + [tok.eos_id], row.rejected + [tok.eos_id]
    # To answer well is better than to take a good answer back for a bad one.
    pairs = {"discourage": (good, row.chosen[:j] + [tok.reset_id] + bad)}
    if row.unsafe:  # To take an unsafe answer back is better than to finish it.
        pairs["elicit"] = (row.rejected[:k] + [tok.reset_id] + good, bad)
    losses = {}
    for name, (chosen, rejected) in pairs.items():
        # −log σ( β [ (log π(c|x) − log π_ref(c|x)) − (log π(r|x) − log π_ref(r|x)) ] )
        ratio = {}
        for side, answer in (("c", chosen), ("r", rejected)):
            with torch.no_grad():
                log_p_reference = logprobs(reference, row.prompt, answer).sum()
            ratio[side] = logprobs(model, row.prompt, answer).sum() - log_p_reference
        losses[name] = -F.logsigmoid(beta * (ratio["c"] - ratio["r"]))
    return losses


def step(name: str, model: Transformer, losses_of) -> None:
    """Print the losses, go one step down their gradient, and print them again."""
    model.zero_grad()
    for when in ("before", "after"):
        losses = losses_of()
        loss = sum(losses.values())
        terms = " + ".join(f"{term} {value.item():.4f}" for term, value in losses.items())
        print(f"{name} {when:>6} the step: loss {loss.item():.4f} = {terms}")
        if when == "before":
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()  # large: losses are sums


def main() -> None:
    if len(sys.argv) != 3:
        raise InputError("usage: python -m backtrack.plain CKPT ROWS.jsonl")
    ckpt, path = sys.argv[1:]
    tok, model = load_tokenizer(ckpt), load_model(ckpt)
    row = next((row for row in load_rows([path], tok, max_length=1024) if row.unsafe), None)
    if row is None:
        raise InputError(f'{path}: no row says "unsafe": true')
    k, j = random.Random(0).randint(1, len(row.rejected)), len(row.chosen) // 2
    print(f"x             {tok.decode(row.prompt)!r}")
    print(f"y+            {tok.decode(row.chosen)!r}")
    print(f"y−            {tok.decode(row.rejected)!r}")
    print(f"prefix_k(y−)  {tok.decode(row.rejected[:k])!r}, k = {k} of {len(row.rejected)}")
    step("SFT", model, lambda: sft_losses(model, row, k, tok))
    reference = copy.deepcopy(model)  # DPO begins where SFT ends: every loss is ln 2 = 0.6931
    step("DPO", model, lambda: dpo_losses(model, reference, row, k, j, tok, beta=0.1))


if __name__ == "__main__":
    run(main)
