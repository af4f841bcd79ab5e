"""Low-rank adaptation (LoRA, arXiv 2106.09685): train few numbers beside frozen weights, for one small GPU.

The matrix W of each linear layer, the head's too, becomes W + up·down, and only these two factors are trained. Of
embedding and head, the rows of [RESET] and of the chat template are trained in full as well: a base may never have seen
them, and the method cannot work without them. An embedding tied to the head adds what the head adds. The factors are
merged when the model is saved, so what others load is a plain model.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model.slices import own_rows, whole
from model.transformer import Transformer


def adapt(model: Transformer, rank: int, ids: list[int]) -> None:
    """Freeze all weights; add factors of this rank to all linear layers, rows (k, D) to embedding and head."""
    model.requires_grad_(False)
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Linear)):
        layer.down = nn.Parameter(torch.empty(rank, layer.in_features))
        layer.up = nn.Parameter(torch.empty(layer.out_features, rank))
        layer.register_forward_hook(add_outputs)
    table = model.lm_head if model.config.tie_word_embeddings else model.model.embed_tokens
    for layer in {table, model.lm_head}:
        layer.rows, layer.ids = nn.Parameter(torch.empty(len(ids), model.config.hidden_size)), ids
    model.model.embed_tokens.register_forward_hook(partial(add_vectors, table))


def add_outputs(layer, inputs, y):  # torch calls it after the layer, and takes what it returns instead of y
    y = y + F.linear(F.linear(inputs[0], layer.down), layer.up)
    if hasattr(layer, "rows"):  # the head
        y = y.index_add(-1, torch.tensor(layer.ids, device=y.device), F.linear(inputs[0], layer.rows).to(y))
    return y


def add_vectors(table, embedding, inputs, x):
    x = x + (inputs[0][..., None] == torch.tensor(table.ids, device=x.device)).to(x) @ table.rows
    return x + F.embedding(inputs[0], table.up) @ table.down if hasattr(table, "up") else x


def adapters(model: Transformer) -> dict[str, nn.Parameter]:
    """What is added, by name; nothing without --lora."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up", ".rows"))}


@torch.no_grad()
def start(model: Transformer, seed: int) -> None:
    """up and rows are 0, down is random: nothing is added yet. The same numbers whatever rows this process holds."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in adapters(model).items():
        std = p.shape[1] ** -0.5 if name.endswith("down") else 0.0
        drawn = torch.empty(p.shape).normal_(0.0, std, generator=generator)
        rows, first = own_rows(p)
        rows.copy_(drawn[first : first + len(rows)])


class Merged:
    """A weight as it is saved: to write_tensors a tensor like others, put together when its turn comes."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getattr__(self, name: str):  # shape, dtype, nbytes …
        return getattr(self.layer.weight, name)

    def full_tensor(self) -> torch.Tensor:
        weight = whole(self.layer.weight)
        if hasattr(self.layer, "up"):
            weight = weight + whole(self.layer.up) @ whole(self.layer.down)
        if hasattr(self.layer, "rows"):
            weight = weight.index_add(0, torch.tensor(self.layer.ids).to(weight.device), whole(self.layer.rows))
        return weight


def weights(model: Transformer) -> dict:
    """name -> weight of the model to be saved, merged where something is added."""
    changed = {m.weight: Merged(m) for m in model.modules() if hasattr(m, "up") or hasattr(m, "rows")}
    added = adapters(model)
    return {name: changed.get(p, p) for name, p in model.named_parameters() if name not in added}
