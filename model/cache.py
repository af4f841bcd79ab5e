"""KVCache: the keys and values of everything read so far, one length per row.

The cache is static (allocated once) and a row is nothing but its length: what lies at and beyond `lengths[b]` is
neither seen (the attention mask stops there) nor kept (the next write lands on it). Taking words back is therefore
one assignment to `lengths`, whatever was discarded, and each row of a batch may do it on its own.

Local (sliding-window) layers keep all positions as well and put the window into the mask: a ring buffer would have
overwritten what a rewind needs.
"""

import torch

from model.config import ModelConfig


class KVCache:
    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: masked positions get weight 0, and 0 * NaN would be NaN.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # (B,) valid entries per row
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.capacity = capacity
        # Attention looks at entries [0, visible). A host-side bound on lengths may be set here to spare it the empty
        # tail; it is a plain int, so setting it never waits for the device.
        self.visible = capacity

    def truncate(self, lengths: torch.Tensor) -> None:
        """Keep the first `lengths[b]` entries of row b. (B,) int64."""
        self.lengths = lengths

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store k, v (B, K, T, head_dim) at positions (B, T); returns all visible keys and values (B, K, S, head_dim).

        Does not move `lengths`: how far a row has come, and how far back it goes, is its owner's decision.
        """
        # By index, not scatter_: torch.compile writes these in place, for scatter_ it copies the whole cache twice.
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2)  # (B, T, K, head_dim)
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2)
        return self.k[layer][:, :, : self.visible], self.v[layer][:, :, : self.visible]

    def keep_rows(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was; the others are dropped. rows[i] >= i, so nothing is copied twice.

        A row that stays where it is costs nothing: finished rows are filled from the end of the batch.
        """
        moves = [(i, r) for i, r in enumerate(rows) if i != r]
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                for i, r in moves:
                    tensor[i].copy_(tensor[r])
                tensors[layer] = tensor[: len(rows)]
        self.rows = self.rows[: len(rows)]
        self.lengths = self.lengths[torch.tensor(rows, device=self.lengths.device)]
