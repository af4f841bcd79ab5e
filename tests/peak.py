"""python -m tests.peak N WORDS: what `torchrun --nproc-per-node N train.py WORDS` takes of memory on its first rank, in
bytes beyond what Python and PyTorch take. N = 0: without torchrun. Linux; it wants MALLOC_MMAP_THRESHOLD_=65536, with
which freed memory is given back at once."""

import os
import re
import sys
from pathlib import Path

import torch

import train
from tests.ranks import Ranks


def bytes_of(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def watch(rank: int) -> None:
    before, fit = bytes_of("VmRSS"), train.fit

    def watched(*args):
        fit(*args)
        if rank == 0:
            print(f"peak {bytes_of('VmHWM') - before}", file=sys.__stderr__)

    train.fit = watched


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, words = int(sys.argv[1]), sys.argv[2:]
    if number == 0:
        sys.argv = ["train.py", *words]
        watch(0)
        train.main()
        os._exit(0)
    ranks = Ranks(number, train.main, words, watch)
    print(ranks.codes(), ranks.said())
