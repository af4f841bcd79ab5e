"""What a program says to the person who waits for it, on stderr: lines, and how far it is."""

import sys
import time


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
