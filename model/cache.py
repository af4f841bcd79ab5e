"""KVCache: the keys and values of everything read so far, one length per row.

The cache is static (allocated once) and a row is nothing but its length: `lengths[b]` counts its
valid entries. What lies beyond is neither seen (the attention mask stops there) nor kept
(the next write lands on it). Taking words back is therefore one assignment to `lengths`, whatever
was discarded, and each row of a batch may do it on its own.

Local (sliding-window) layers keep all positions as well and put the window into the mask: a ring
buffer would have overwritten what a rewind needs.

Shapes: B rows, K key/value heads, T new entries, S visible ones, hd head_dim.
"""

import torch

from model.config import ModelConfig


class KVCache:
    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        device="cpu",
        dtype=torch.float32,
    ):
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: masked positions get weight 0, and 0 * NaN would be NaN.
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)  # (B,)
        self.rows = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        self.capacity = capacity
        # Attention looks at entries [0, visible). Whoever knows how far the rows can have come may
        # lower it, to spare attention the empty tail. A plain int: setting it waits for no device.
        self.visible = capacity

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store k, v (B, K, T, hd) at positions (B, T).

        Returns all visible keys and values, (B, K, S, hd) each. All layers write at the same
        positions; when the last has written, `grow` makes the new entries count.
        """
        # By index, not scatter_: torch.compile writes these in place, for scatter_ it copies the
        # whole cache twice.
        self.k[layer][self.rows, :, positions] = k.transpose(1, 2)  # (B, T, K, hd)
        self.v[layer][self.rows, :, positions] = v.transpose(1, 2)
        return self.k[layer][:, :, : self.visible], self.v[layer][:, :, : self.visible]

    def grow(self, entries: int) -> None:
        """Every row has that many valid entries more. Transformer calls this after each read."""
        self.lengths = self.lengths + entries

    def truncate(self, lengths: torch.Tensor) -> None:
        """Keep the first `lengths[b]` entries of row b; forget the rest. (B,) int64.

        A row never gets longer this way: beyond its length lie entries of a text that was taken
        back. (An error would have to wait for the device, at every step.)
        """
        self.lengths = torch.minimum(lengths, self.lengths)

    def keep_rows(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was; the others are dropped. Needs rows[i] >= i.

        A row that stays where it is costs nothing: holes are filled from the end of the batch.
        """
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                for i, row in enumerate(rows):
                    if i != row:
                        tensor[i].copy_(tensor[row])
                tensors[layer] = tensor[: len(rows)]
        self.rows = self.rows[: len(rows)]
        self.lengths = self.lengths[torch.tensor(rows, device=self.lengths.device)]
