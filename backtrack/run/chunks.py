"""Logits a chunk at a time: with a vocabulary of 128,000 they take more memory than all the rest.

The plain form is `read(hidden, predicted_by, target)`; this gives the same values.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from model.transformer import LOGITS


def in_chunks(
    read: Callable, hidden: torch.Tensor, predicted_by: torch.Tensor, target: torch.Tensor, V: int
) -> torch.Tensor:
    """read(hidden, predicted_by, target), for as many of the hidden states (M, D) at once as may be.

    read takes hidden states (m, D) and the n targets that they predict, and returns (n,) values.
    """
    size = max(1, LOGITS // V)
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
