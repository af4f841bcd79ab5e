"""What the tests of the programs under backtrack/ share: their command lines, run within this process."""

import contextlib
import io
import sys

import pytest

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
