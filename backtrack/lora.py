"""Low-rank adaptation (LoRA, arXiv 2106.09685): train little beside frozen weights, for one small GPU.

A matrix W of a block becomes W + up·down, and the two factors alone are trained. Of the tables the rows of a few ids
are, in full: of [RESET] and the chat template, which a base may never have seen. Without them the method cannot work.
What is saved is merged, weight by weight: a plain model. The factors lie in optimizer.state while the run goes on.
"""

import torch
import torch.nn.functional as F
from torch import nn

from backtrack.parallel import whole
from model import Transformer
from model.transformer import own_rows


def adapt(model: Transformer, rank: int, ids: list[int]) -> None:
    """Freeze all weights; add factors of this rank to the blocks' linear layers, rows (k, D) to the tables."""
    model.requires_grad_(False)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.down = nn.Parameter(torch.empty(rank, layer.in_features))
            layer.up = nn.Parameter(torch.empty(layer.out_features, rank))
            layer.register_forward_hook(low_rank)
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.rows = nn.Parameter(torch.empty(len(ids), model.config.hidden_size))
    head.rows = embedding.rows if model.config.tie_word_embeddings else nn.Parameter(torch.empty_like(embedding.rows))
    embedding.ids = head.ids = torch.tensor(ids, device="cpu")
    embedding.register_forward_hook(rows_in)
    head.register_forward_hook(rows_out)


def low_rank(layer, inputs, y):  # torch calls it after the layer, and takes what it returns instead of y
    return y + F.linear(F.linear(inputs[0], layer.down), layer.up)


def rows_in(embedding, inputs, x):
    is_id = inputs[0][..., None] == embedding.ids.to(x.device)  # (B, T, k)
    return x + is_id.to(x) @ embedding.rows


def rows_out(head, inputs, logits):
    return logits.index_add(-1, head.ids.to(logits.device), F.linear(inputs[0], head.rows).to(logits))


@torch.no_grad()
def start(model: Transformer, seed: int) -> None:
    """up and rows are 0, down is random: nothing is added yet. The same numbers whatever rows this process holds."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.tie_word_embeddings and hasattr(model.lm_head, "rows"):
        model.lm_head.rows = model.model.embed_tokens.rows
    for name, p in adapters(model).items():
        drawn = torch.zeros(p.shape)
        if name.endswith("down"):
            drawn.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
        rows, first = own_rows(p)
        rows.copy_(drawn[first : first + len(rows)])


def adapters(model: Transformer) -> dict[str, nn.Parameter]:
    """What LoRA has added, by name; nothing if it was not asked for."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up", ".rows"))}


class Merged:
    """A weight as it is saved: to write_tensors a tensor like others, put together when its turn comes."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getattr__(self, name: str):  # shape, dtype, nbytes …
        return getattr(self.layer.weight, name)

    @torch.no_grad()
    def full_tensor(self) -> torch.Tensor:
        weight = whole(self.layer.weight)
        if hasattr(self.layer, "up"):
            return weight + whole(self.layer.up) @ whole(self.layer.down)
        return weight.index_add(0, self.layer.ids.to(weight.device), whole(self.layer.rows))


def weights(model: Transformer) -> dict:
    """name -> weight of the model to be saved, merged where LoRA has added something."""
    found = {name: p for name, p in model.named_parameters() if name.endswith(".weight")}
    for name in adapters(model):
        layer = name.rsplit(".", 1)[0]
        found[f"{layer}.weight"] = Merged(model.get_submodule(layer))
    return found
