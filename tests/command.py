"""What the tests of programs and of saving share: command lines within this process, and every line of a save."""

import contextlib
import io
import sys

import pytest

from model import checkpoint, files
from model.errors import run


def command(main, *words, code=0):
    """`python -m backtrack.NAME words`, whose main() is given; what it printed, and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [main.__module__.split(".")[:2][-1], *map(str, words)])
        try:
            run(main)
            status = 0
        except SystemExit as end:
            status = end.code
    assert status == code, err.getvalue()
    assert "Traceback" not in err.getvalue()
    if code == 2:
        *before, last = err.getvalue().splitlines()
        assert "error: " in last and not any("error: " in line for line in before)
    return out.getvalue(), err.getvalue()


def at_every_line(save, do):
    """Run save(), calling do() before each line that it runs through in checkpoint.py and files.py."""

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in (checkpoint.__file__, files.__file__):
            return None
        if event == "line":
            do()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        save()
    finally:
        sys.settrace(before)
