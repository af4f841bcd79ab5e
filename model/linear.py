"""A matrix product that decodes fast in fp32 on a CPU; everywhere else it is torch's.

It stands apart from the model because it is about speed alone: y = x·Wᵀ + b, whichever branch is
taken (make bench).
"""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    """y = x·Wᵀ, plus a bias if asked for. x (…, in) -> (…, out)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias)
        # The most blocks that still hold 2^16 weights each.
        self.blocks = 1
        for blocks in (2, 4, 8, 16, 32):
            if n_out % blocks == 0 and n_in * n_out >= blocks * 2**16:
                self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few_rows = x.numel() <= 32 * x.shape[-1]
        slow = x.device.type == "cpu" and x.dtype == torch.float32  # bf16 is another library's
        if self.blocks == 1 or not few_rows or not slow:
            return F.linear(x, self.weight, self.bias)
        # The BLAS reads W with one thread when x has so few rows. Cut into blocks of outputs, as a
        # batch of products, W is read by all threads, up to twice as fast.
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        weight = self.weight.view(self.blocks, -1, x.shape[-1])  # (blocks, out / blocks, in)
        y = torch.bmm(rows.expand(self.blocks, -1, -1), weight.mT)  # (blocks, N, out / blocks)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
