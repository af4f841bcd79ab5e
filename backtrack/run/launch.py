"""The processes that torchrun starts begin together and end together.

    with together():       # in main(), around everything
        …

If one process failed alone, the others would wait for it: half an hour, with gloo. So the first to
fail says why, in one line, and all end with its exit code. The others notice because their
connections to it close (an error of gloo or NCCL) or because torchrun sends them SIGTERM. Such an
error is an echo, not the cause. They look the cause up in the store, a small server of torchrun's
that outlives the processes:

    "exit code"       of the process that knows the cause; missing if that was killed
    "speakers"        how many processes wanted to print an error: only the first one does
    "rank 0 spoke"    others may speak now: what is wrong for all, rank 0 says
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from model.errors import InputError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun started, while this block runs; rank 0 alone is heard.

    If a rank ends early, all end with its exit code: with bad input 2, and one line says why.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    signal.signal(signal.SIGTERM, terminated)  # torchrun sends it when a rank was killed
    store, number, count = next(rendezvous("env://"))
    if torch.cuda.is_available():  # "cuda" is this rank's own from here on
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if number > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        with hearing(store):
            dist.init_process_group(backend, store=store, rank=number, world_size=count)
        yield
        dist.barrier()
        dist.destroy_process_group()
        exit_at_once(0)
    except BaseException as error:
        end_together(store, number, error)


@contextlib.contextmanager
def hearing(store) -> Iterator[None]:
    """End on SIGTERM while the ranks have not met: torchrun sends it when one of them was killed.

    Until then this process waits in C++, where Python's handlers do not run; but Python writes the
    number of the signal to a pipe at once, and a thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    own = store.clone()  # a connection of its own: on the other one somebody is waiting

    def listen() -> None:
        said = None
        while said not in (signal.SIGTERM, 0):
            [said] = os.read(reading, 1)
        if said == signal.SIGTERM:
            if own.add("speakers", 1) == 1:
                line = "error: a rank was killed before all had met; start them again"
                print(line, file=sys.__stderr__, flush=True)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writing)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, bytes([0]))


def end_together(store, number: int, error: BaseException) -> NoReturn:
    """End this rank; the first to fail says why. The others notice when its connections close."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_echo = isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError | Terminated) or "gloo" in str(error)
    )
    if is_echo:
        code, line = 1, "a rank was killed or is out of reach; --resume goes on from the last save"
        if within(2, lambda: store.check(["exit code"])):  # the cause is known
            code, line = int(store.get("exit code")), ""
    else:
        code, line = cause_of(error, number)
        store.set("exit code", str(code))
        if number > 0:  # what is wrong for all, rank 0 has found as well
            within(1, lambda: store.check(["rank 0 spoke"]))
            line = f"rank {number}: {line}"
    if code and store.add("speakers", 1) == 1 and line:
        print(f"error: {line}", file=sys.__stderr__)
    if number == 0:
        store.set("rank 0 spoke", "")
    exit_at_once(code)
    raise SystemExit(code)


def cause_of(error: BaseException, number: int) -> tuple[int, str]:
    """(exit code, what there is to say)"""
    if isinstance(error, SystemExit):  # argparse has said it, on rank 0
        return error.code or 0, f"exit code {error.code}" if number > 0 else ""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, InputError | OSError | MemoryError | torch.OutOfMemoryError):
        return 2, str(error)
    traceback.print_exception(error, file=sys.__stderr__)
    return 1, f"{type(error).__name__}, see above"


class Terminated(RuntimeError):
    """SIGTERM."""


def terminated(*_) -> None:
    raise Terminated


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


def check_device(name: str) -> None:
    """Raises InputError where the ranks of this node cannot have a device each."""
    device = torch.device(name)
    if not dist.is_initialized() or device.type == "cpu":
        return
    here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None:
        raise InputError(f"--device {device}: torchrun gives each rank its own; say --device cuda")
    if here > devices:
        raise InputError(f"{here} ranks but {devices} CUDA devices; --nproc-per-node {devices}")
