"""Bad input ends in one clear line and exit code 2, never in a traceback.

Everything a user can get wrong (a file, a row, a tensor, a flag) raises InputError with a message that
names the culprit and the way out. A bug still raises whatever it raises, so that a debugger stops there.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch


class InputError(ValueError):
    """Something outside the program is wrong; the message names it and says what to do."""


def refuse_pointer(path: str | Path) -> None:
    """A clone without git-lfs leaves 130 bytes of text where a weight or a data file should be."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
            raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")


def read_json(path: str | Path) -> dict:
    """The JSON object in a file."""
    refuse_pointer(path)
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return value


def run(main, ranks: bool = False) -> None:
    """Call main(); turn an error that a user can mend into one line on stderr and exit code 2.

    ranks: whether the program can run in several processes (backtrack/run/parallel.py). Others refuse torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ and not ranks:
        if os.environ["RANK"] == "0":
            print("error: this program runs in one process; start it without torchrun", file=sys.stderr)
        sys.exit(2)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it: `>&-`
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (to the end)
    # Whatever the locale, printing never fails: what stdout cannot hold becomes a question mark.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`| head`): not an error; keep Python from flushing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        line = _what_to_mend(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _what_to_mend(error: Exception) -> str | None:
    """The line for an error that a user can mend; None for a bug."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without "[Errno 21]"
    if isinstance(error, (InputError, OSError)):
        return str(error)
    text = str(error).strip()
    # PyTorch's allocator on the CPU has no class of its own: it raises a RuntimeError.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        size = re.search(r"[Tt]ried to allocate [\d.]+ \w+", text)
        return f"out of memory{f' ({size[0].lower()})' if size else ''}; lower the batch size or the lengths"
    inductor = sys.modules.get("torch._inductor.exc")  # loaded by --compile alone
    if inductor is not None and isinstance(error, inductor.InductorError):
        why = text.splitlines()[0]
        return f"torch.compile failed: {why}; it needs a working C++ compiler, or leave out --compile"
    return None


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """For argparse: prints the docstring as it is written, and every default that tells something."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", []):  # 0 is worth printing
            return action.help
        return super()._get_help_string(action)


def device(name: str) -> str:
    """The type of --device for argparse: a device that PyTorch knows and that is there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        why = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r}: {why}; leave it out, or --device cpu") from None
    return name


# ── Numbers for argparse: each has a range in which it makes sense ────────────────────────────────────────────────────

MANY = 10**9  # more steps, rows or tokens than anybody has


def between(low: float, high: float, kind: type = int, above: bool = False, zero: bool = False):
    """For argparse: a number from `low` to `high`. above: `low` itself is excluded; zero: 0 is allowed too."""

    def number(text: str):
        value = kind(text)
        if not (low <= value <= high and not (above and value == low)) and not (zero and value == 0):
            begin = f"{'0 or ' if zero else ''}{'above' if above else 'from'} {low:,}"
            raise argparse.ArgumentTypeError(f"{text} is not {begin} to {high:,}")
        return value

    number.__name__ = kind.__name__  # argparse: invalid int value
    return number


TEMPERATURE = between(0.001, 1000, float, zero=True)  # 0 is greedy; logits are divided by the others
PROBABILITY = between(0, 1, float, above=True)
SEED = between(0, 2**32 - 1)
BIAS = between(-1000, 1000, float)  # of a logit: never and always
ABOVE_ZERO = between(0, MANY, float, above=True)  # of what would do nothing at 0, such as a learning rate
RESETS = between(0, 1000)  # each takes a place in the cache


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = int(text)
    if not 1 <= value <= MANY:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number{' that fits' if value > MANY else ''}")
    return value


def not_negative(kind: type):
    """A number from 0 up, int or float."""
    return between(0, MANY, kind)
