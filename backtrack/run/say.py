"""What a program says to the person who waits for it, on stderr: lines, and how far it is."""

import sys
import time


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn_of_slow_bfloat16(dtype: str, device: str) -> None:
    """On a CPU without instructions for bf16 it is many times slower than fp32: measured, and said."""
    if dtype != "bfloat16" or not device.startswith("cpu"):
        return
    import torch

    seconds = []
    for kind in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=kind)
        a @ a
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        seconds.append(time.perf_counter() - began)
    times = seconds[1] / seconds[0]
    if times > 1.5:
        say(
            f"note: on this CPU bfloat16 takes {times:.0f} times as long as float32;"
            " leave out --dtype bfloat16"
        )


class Ticker:
    """How far a long computation is, on stderr: one line, written over and over.

    If stderr is no terminal: a new line, at most every 30 seconds.
    """

    def __init__(self):
        self.text = self.shown = ""
        self.next_line = 0.0

    def show(self, text: str) -> None:
        self.text = text
        if sys.stderr.isatty():
            sys.stderr.write("\r" + text.ljust(len(self.shown)))
            self.shown = text
        elif time.monotonic() >= self.next_line:
            say(text)
            self.shown, self.next_line = text, time.monotonic() + 30

    def done(self) -> None:
        if sys.stderr.isatty() and self.shown:
            say("")
        elif self.shown != self.text:
            say(self.text)
        self.text = self.shown = ""
