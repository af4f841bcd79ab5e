"""One training run on many devices: each process, a rank, holds a slice of every weight and takes a
share of the rows.

    torchrun --nproc-per-node 4 train.py sft …    # starts the same program four times, as rank 0 … 3

PyTorch's fully_shard (FSDP2) does the work. Of each weight, its gradient and its moments every rank
keeps some rows. A block's weights are gathered just before it computes, forward and backward, and
dropped behind it; its gradients are summed over the ranks, and each keeps those of its own rows:

    rank 0   rows 0 … 9     gather ─ block ─ drop   …   gather ─ block backward ─ sum, keep 0 … 9
    rank 1   rows 10 … 19   gather ─ block ─ drop   …   gather ─ block backward ─ sum, keep 10 … 19

So all ranks must compute equally often, and one without rows computes on an empty one. Without
torchrun there is one rank, no process group, and every function here hands back what it was given.
How the processes find each other, and end together, is in launch.py.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from backtrack.run.options import Machine
from backtrack.trees import NO_ROW, Tree
from model import Transformer
from model.errors import InputError
from model.slices import whole


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ── The model in slices ───────────────────────────────────────────────────────────────────────────


def shard(model: Transformer, machine: Machine) -> None:
    """Share the rows of every weight out. The model is still on the meta device: see load_model.

    With --dtype bfloat16 a block's weights are gathered in bf16, which halves what is sent; slices,
    moments and sums stay fp32. So do embedding and head, and what is added up along the blocks.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    kind = torch.device(machine.device).type
    options = {"mesh": init_device_mesh(kind, (size(),)), "reshard_after_forward": True}
    if machine.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if machine.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(model, **options)  # what is left: embedding, last norm, head
    for part in (*model.model.layers, model):
        # Summed, not averaged: the loss is divided by the weight of the whole step already.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def lend(tensors: Iterable[torch.Tensor]) -> None:
    """Take part while rank 0 writes them, one after another: see write_tensors in model/files.py."""
    for tensor in tensors:
        whole(tensor)


# ── Rows and numbers ──────────────────────────────────────────────────────────────────────────────


def micro_batches(trees: list[Tree], size: int) -> list[list[Tree]]:
    """Cut a step into micro-batches of `size` trees, sorted by length: so padding is small.

    Of several processes each gets the micro-batches of its share, equally many.
    """
    mine, rounds = share_out(trees, size)
    mine = sorted(mine, key=len)
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    return batches + [[NO_ROW]] * (rounds - len(batches))


def share_out(trees: Sequence, per_batch: int) -> tuple[list, int]:
    """(the trees of this rank, how many micro-batches of at most `per_batch` each rank computes).

    As equal as may be in tokens: the longest first, each to the rank that has least. No more rows
    to a rank than fit into as few micro-batches as possible, since all ranks wait for the longest.
    """
    rounds = math.ceil(len(trees) / (per_batch * size()))
    shares: list[list] = [[] for _ in range(size())]
    tokens = [0] * size()
    for tree in sorted(trees, key=len, reverse=True):
        free = [r for r in range(size()) if len(shares[r]) < rounds * per_batch]
        least = min(free, key=lambda r: tokens[r])
        shares[least].append(tree)
        tokens[least] += len(tree)
    return shares[rank()], rounds


def exchange(value) -> list:
    """The value of every rank, by rank. Values are what JSON can hold; no pickle is sent."""
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(lengths, torch.tensor([len(text)]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)  # all_gather wants equal lengths
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths, strict=True)]


def from_first(make: Callable):
    """make() is called by rank 0 alone; every rank returns its result, which JSON can hold."""
    return exchange(make() if rank() == 0 else None)[0]


def add_up(sums: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """name -> (sum, count) of all ranks together, added in the order of ranks: always the same."""
    total: dict = {}
    for more in exchange(sums):
        for name, (value, count) in more.items():
            old_value, old_count = total.get(name, (0.0, 0))
            total[name] = (old_value + value, old_count + count)
    return total


def agree(what: dict) -> None:
    """Raises InputError if ranks differ in data or settings: they would wait for each other."""
    first, *others = exchange(what)
    for number, theirs in enumerate(others, start=1):
        for name, value in theirs.items():
            if value != first.get(name):
                raise InputError(
                    f"rank {number} has {name} = {value}, rank 0 has {first.get(name)};"
                    " start every node with the same arguments and files"
                )
