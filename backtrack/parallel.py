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
"""

import atexit
import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from model import Transformer
from model.errors import InputError
from model.transformer import own_rows


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ── The model in slices ───────────────────────────────────────────────────────────────────────────


def shard(model: Transformer, args) -> None:
    """Share the rows of every weight out. The model is still on the meta device: see load_model.

    With --dtype bfloat16 a block's weights are gathered in bf16, which halves what is sent; slices,
    moments and sums stay fp32. So do embedding and head, and what is added up along the blocks.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    kind = torch.device(args.device).type
    options = {"mesh": init_device_mesh(kind, (size(),)), "reshard_after_forward": True}
    if args.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if args.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(model, **options)  # what is left: embedding, last norm, head
    for part in (*model.model.layers, model):
        # Summed, not averaged: the loss is divided by the weight of the whole step already.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor of which the ranks hold slices. Every rank must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def lend(tensors: Iterable[torch.Tensor]) -> None:
    """Take part while rank 0 writes them, one after another: see write_tensors in model/files.py."""
    for tensor in tensors:
        whole(tensor)


@contextlib.contextmanager
def as_a_whole(table: torch.Tensor) -> Iterator[torch.Tensor]:
    """All of a weight (V, D) on every rank, to be read and changed: each then keeps its own rows."""
    with torch.no_grad():
        everything = whole(table)
        yield everything
        if everything is not table:
            rows, first = own_rows(table)
            rows.copy_(everything[first : first + len(rows)])


# ── Rows and numbers ──────────────────────────────────────────────────────────────────────────────


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


# ── Beginning and ending together ─────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun started, while this block runs; rank 0 alone is heard.

    If a rank ends early, all end with its exit code: with bad input 2, and one line says why.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    store, number, count = next(rendezvous("env://"))
    if torch.cuda.is_available():  # "cuda" is this rank's own from here on
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if number > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGTERM, terminated)  # torchrun sends it when a rank was killed
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
        dist.barrier()
        dist.destroy_process_group()
        exit_at_once(0)
    except BaseException as error:
        end_together(store, number, error)


class Terminated(RuntimeError):
    """SIGTERM."""


def terminated(*_) -> None:
    raise Terminated


def check_device(args) -> None:
    """Raises InputError where the ranks of this node cannot have a device each."""
    device = torch.device(args.device)
    if not dist.is_initialized() or device.type == "cpu":
        return
    here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None:
        raise InputError(f"--device {device}: torchrun gives each rank its own; say --device cuda")
    if here > devices:
        raise InputError(f"{here} ranks but {devices} CUDA devices; --nproc-per-node {devices}")


def end_together(store, number: int, error: BaseException) -> NoReturn:
    """End this rank; the first to fail says why. The others notice when its connections close."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_echo = isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError | Terminated) or "gloo" in str(error)
    )
    if is_echo:
        code, line = 1, "a rank was killed or is out of reach; --resume goes on from the last save"
        if within(2, lambda: store.check(["code"])):  # it has said why
            code, line = int(store.get("code")), ""
    else:
        code, line = cause_of(error)
        store.set("code", str(code))
        if number > 0:  # what is wrong for all, rank 0 has found as well
            within(1, lambda: store.check(["rank 0 has told"]))
            line = f"rank {number}: {line}"
    if code and store.add("told", 1) == 1 and line:
        print(f"error: {line}", file=sys.__stderr__)
    if number == 0:
        store.set("rank 0 has told", "")
    exit_at_once(code)
    raise SystemExit(code)


def cause_of(error: BaseException) -> tuple[int, str]:
    """(exit code, what there is to say)"""
    if isinstance(error, SystemExit):  # argparse has said it, on rank 0
        return error.code or 0, f"exit code {error.code}" if rank() > 0 else ""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, InputError | OSError | MemoryError | torch.OutOfMemoryError):
        return 2, str(error)
    traceback.print_exception(error, file=sys.__stderr__)
    return 1, f"{type(error).__name__}, see above"


def exit_at_once(code: int) -> None:
    """When Python ends: without tidying up, in which threads of gloo now and then abort it."""

    def leave() -> None:
        sys.stdout.flush()
        os._exit(code)

    atexit.register(leave)  # the one registered last is the first to run


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Whether it comes true in that time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
