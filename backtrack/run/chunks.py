"""Log-probs where logits are too many: with a vocabulary of 262,144 they take more memory and time
than all the rest.

The plain form is `logits.log_softmax(-1)[predicted_by, target]`; what is here gives its values.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from model.transformer import LOGITS, Transformer

NUMBERS = 2**20  # of fp32, 4 MiB: what stays in a processor's cache


def in_chunks(
    read: Callable,
    model: Transformer,
    hidden: torch.Tensor,
    predicted_by: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """read(hidden, predicted_by, target), for as many of the hidden states (M, D) at once as may be.

    read takes hidden states (m, D) and the n targets that they predict, and returns (n,) values.
    """
    size = max(1, LOGITS // model.config.vocab_size)
    # Measured on CPUs alone; and where logits are capped, fp32 comes first.
    if torch.is_autocast_enabled("cpu") and not model.config.final_logit_softcapping:
        size *= 2  # of 2 bytes each

        def read(hidden, predicted_by, target):
            return BF16Logprobs.apply(model.lm_head(hidden), predicted_by, target)

    if len(hidden) <= size:
        return read(hidden, predicted_by, target)
    values = torch.zeros(len(target), device=hidden.device)
    for first in range(0, len(hidden), size):
        here = (predicted_by // size == first // size).nonzero()[:, 0]  # the targets of this chunk
        some = hidden[first : first + size], predicted_by[here] - first, target[here]
        # The logits are not kept for the backward pass, but computed again.
        again = {"use_reentrant": False, "preserve_rng_state": False}
        values = values.index_add(0, here, checkpoint(read, *some, **again))
    return values


class BF16Logprobs(torch.autograd.Function):
    """logits.float().log_softmax(-1)[predicted_by, target], (N,) fp32, without logits in fp32.

    logits (M, V) in bf16. All sums are fp32, over a few rows at a time, which stay in the
    processor's cache. The gradient is written over the logits: nobody else may need them.
    """

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, predicted_by: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        totals = torch.empty(len(logits), device=logits.device)
        for few, scratch in a_few_rows(logits):
            scratch.copy_(logits[few])
            top = scratch.amax(dim=-1)
            totals[few] = top + scratch.sub_(top[:, None]).exp_().sum(dim=-1).log_()  # logsumexp
        ctx.save_for_backward(logits, totals, predicted_by, target)
        return logits[predicted_by, target].float() - totals[predicted_by]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        logits, totals, predicted_by, target = ctx.saved_tensors
        of_row = torch.zeros_like(totals).index_add_(0, predicted_by, grad)
        for few, scratch in a_few_rows(logits):
            # d log p(t) / d logits = onehot(t) - softmax(logits)
            scratch.copy_(logits[few]).sub_(totals[few, None]).exp_().mul_(-of_row[few, None])
            here = ((few.start <= predicted_by) & (predicted_by < few.stop)).nonzero()[:, 0]
            where = predicted_by[here] - few.start, target[here]
            scratch.index_put_(where, grad[here], accumulate=True)
            logits[few] = scratch
        return logits, None, None


def a_few_rows(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(some rows, fp32 memory for them, always the same) until all had their turn.

    Fresh memory for each would cost more than the arithmetic: the system clears it.
    """
    size = max(1, NUMBERS // logits.size(-1))
    memory = torch.empty(size, logits.size(-1), device=logits.device)
    for first in range(0, len(logits), size):
        few = slice(first, min(first + size, len(logits)))
        yield few, memory[: few.stop - few.start]
