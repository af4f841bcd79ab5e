"""`torchrun train.py …`, or `-m data.base …`, without the seconds that it takes to start: N forks of this process, with
the variables that torchrun sets and a store in the parent, as torchrun's agent has one."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.tensor import DTensor  # noqa: F401 (loaded once, before the forks)

import train
from backtrack.evaluate import __main__ as evaluate
from data import base
from model.errors import run


class Ranks:
    """N processes that run main() under `python NAME words`, and what they said."""

    def __init__(self, n: int, main, words, before=lambda rank: None):
        self.file = Path(tempfile.mkstemp()[1])
        self.pids = []
        self.port, tell = os.pipe()
        if words[0] == "base":
            main, words = base.main, words[1:]
        for rank in range(n):
            pid = os.fork()
            if pid == 0:
                self.child(rank, n, main, words, before)
            self.pids.append(pid)
        # Only now: a fork would share this store's sockets, and then and again one would wait for ever.
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(tell, b"%5d" % self.store.port * n)

    def child(self, rank, n, main, words, before):
        code = 70
        try:
            torch.set_num_threads(1)
            out = open(self.file, "a", buffering=1)  # noqa: SIM115 (open until the process ends)
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = out
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": os.read(self.port, 5).decode().strip()}
            os.environ |= {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0"}
            sys.argv = [Path(main.__code__.co_filename).name, *map(str, words)]
            before(rank)
            run(main, ranks=main in (train.main, base.main, evaluate.main))
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def codes(self, seconds=300) -> list[int]:
        """The exit codes, by rank. Who has not ended by then is stuck, and ended."""
        codes: dict[int, int] = {}
        end = time.monotonic() + seconds
        while len(codes) < len(self.pids):
            for rank in set(range(len(self.pids))) - set(codes):
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(self.pids[rank], signal.SIGKILL)
            time.sleep(0.01)
        return [codes[rank] for rank in range(len(self.pids))]

    def said(self) -> str:
        return self.file.read_text()


def trained_on(n: int, *words, code=0, before=lambda rank: None, main=train.main) -> str:
    """`torchrun --nproc-per-node n train.py words`; every process must end with this code. Returns what was said."""
    ranks = Ranks(n, main, words, before)
    codes, said = ranks.codes(), ranks.said()
    ranks.file.unlink()
    assert codes == [code] * n, f"{codes}\n{said}"
    assert "Traceback" not in said, said
    if code == 2:
        assert said.count("error: ") == 1, said
    return said
