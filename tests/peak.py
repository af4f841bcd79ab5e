"""python -m tests.peak N base WORDS: what `torchrun --nproc-per-node N -m data.base WORDS` takes of memory on its first
rank, in bytes beyond what Python and PyTorch take. N = 0: without torchrun. Linux; it wants
MALLOC_MMAP_THRESHOLD_=65536, with which freed memory is given back at once."""

import os
import re
import sys
from pathlib import Path

import torch

from data import base
from tests.ranks import Ranks


def bytes_of(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def watch(rank: int) -> None:
    before, fit = bytes_of("VmRSS"), base.fit

    def watched(*args, **more):
        fit(*args, **more)
        if rank == 0:
            print(f"peak {bytes_of('VmHWM') - before}", file=sys.__stderr__)

    base.fit = watched


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, words = int(sys.argv[1]), sys.argv[2:]
    if number == 0:
        sys.argv = ["base.py", *words[1:]]
        watch(0)
        base.main()
        os._exit(0)
    ranks = Ranks(number, base.main, words, watch)
    print(ranks.codes(), ranks.said())
