"""Bad input ends in one clear line and exit code 2, never in a traceback.

Everything a user can get wrong (a file, a row, a tensor, a flag) raises InputError with a message that
names the culprit and the way out. A bug still raises whatever it raises, so that a debugger stops there.
"""

import argparse
import math
import os
import sys

import torch


class InputError(ValueError):
    """Something outside the program is wrong; the message names it and says what to do."""


def run(main) -> None:
    """Call main(); turn what a user can mend into one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`| head`): not an error; keep Python from flushing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]} Lower the batch size or the lengths.", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        inductor = sys.modules.get("torch._inductor.exc")  # loaded by --compile alone
        if inductor is None or not isinstance(error, inductor.InductorError):
            raise
        reason = str(error).strip().splitlines()[0]
        way_out = "it needs a working C++ compiler, or leave out --compile"
        print(f"error: torch.compile failed: {reason}; {way_out}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """For argparse: the docstring as it is written, and every default."""


def device(name: str) -> str:
    """The type of --device for argparse: a device that PyTorch knows and that is there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        raise argparse.ArgumentTypeError(f"{name!r}: {str(error).splitlines()[0]}") from None
    return name


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def not_negative(kind: type):
    """A finite number from 0 up, int or float, for argparse."""

    def number(text: str):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
        return value

    return number
