"""A note where bfloat16 is slow: with a clock in place of the CPU's."""

import time
from itertools import accumulate

import pytest

from backtrack.run.say import warn_of_slow_bfloat16


@pytest.mark.parametrize("seconds, note", [((1, 9), "takes 9 times as long"), ((1, 1.2), None), ((4, 1), None)])
def test_slow_bfloat16_is_told(monkeypatch, capsys, seconds, note):
    """Two looks at the clock for fp32, two for bf16."""
    looks = accumulate((0, seconds[0], 0, seconds[1]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks))
    warn_of_slow_bfloat16("bfloat16", "cpu")
    said = capsys.readouterr().err
    assert (note in said and "leave out --dtype bfloat16" in said) if note else said == ""
    warn_of_slow_bfloat16("float32", "cpu")
    warn_of_slow_bfloat16("bfloat16", "cuda")
    assert capsys.readouterr().err == ""
