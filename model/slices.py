"""Weights of which this process holds some rows (DTensors), and ordinary ones, treated alike.

With one process every function here hands back what it was given (backtrack/run/parallel.py).
"""

import contextlib
import math
from collections.abc import Iterator

import torch


def own_rows(p: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of a weight that lie in this process, and the number of the first.

    All of them, from 0, unless it is a DTensor: of those each process holds a slice, cut as
    torch.chunk cuts.
    """
    if not hasattr(p, "to_local"):
        return p, 0
    rows, ranks = p.to_local(), p.device_mesh.size()
    first = p.device_mesh.get_local_rank() * math.ceil(len(p) / ranks)
    return rows, min(first, len(p))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor of which the ranks hold slices. Every rank must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def as_a_whole(table: torch.Tensor) -> Iterator[torch.Tensor]:
    """All of a weight (V, D) on every rank, to be read and changed: each then keeps its own rows."""
    with torch.no_grad():
        everything = whole(table)
        yield everything
        if everything is not table:
            rows, first = own_rows(table)
            rows.copy_(everything[first : first + len(rows)])
