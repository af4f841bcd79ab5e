"""What people see: an answer that is typed, taken back and begun again, and a trace.

live = Live(tok, show_discarded=True)             # gets the events of generate.stream
trace(sampler, tok, prompt_ids, **options)        # prints one line per decode step
"""

import os
import shutil
import sys
import unicodedata
from collections import deque

import torch

from backtrack.generate import Done, Generation, Reset, Token

DIM, STRUCK, PLAIN = "\x1b[2m", "\x1b[2;9m", "\x1b[0m"
CONTROL = [*range(32), *range(127, 160)]
# What a model says must not move the cursor or change the terminal: tabs and escapes become spaces.
HARMLESS = {code: " " for code in CONTROL if code != ord("\n")}


def escapes_allowed() -> bool:
    """Whether the terminal may be sent escapes (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def can_erase() -> bool:
    return sys.stdout.isatty() and escapes_allowed()


def harmless(text: str) -> str:
    """What a model said, for print(): on a terminal without what moves the cursor."""
    return text.translate(HARMLESS) if sys.stdout.isatty() else text


def width(character: str) -> int:
    """Columns that it takes on a terminal."""
    if character == "\u00ad":  # a soft hyphen: the one format character that terminals show
        return 1
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0  # it stands on the character before it, or is not seen
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def height(line: str, columns: int) -> int:
    """How many terminal lines it takes."""
    lines, column = 1, 0
    for character in line:
        if column + width(character) > columns:
            lines, column = lines + 1, 0
        column += width(character)
    return lines


def edit_lines() -> None:
    """Give input() arrow keys, a history and lines of any length."""
    try:
        import readline
    except ImportError:  # Windows edits lines itself; other Pythons may be built without it
        return
    if not escapes_allowed():
        readline.parse_and_bind("set enable-bracketed-paste off")
        readline.parse_and_bind("set enable-meta-key off")


class Live:
    """One streamed answer on a terminal. A character is written when its last byte has come."""

    def __init__(self, tok, show_discarded: bool):
        self.tok, self.show_discarded = tok, show_discarded
        self.ids: list[int] = []
        self.shown = ""

    def token(self, id: int) -> None:
        self.ids.append(id)
        self.show(self.tok.decode(self.ids).rstrip("\ufffd"))

    def show(self, text: str) -> None:
        if text.startswith(self.shown):
            write(text[len(self.shown) :].translate(HARMLESS))
            self.shown = text

    def reset(self, discarded: list[int]) -> None:
        """Erase what is on the screen; with show_discarded, write it again, struck through."""
        screen = shutil.get_terminal_size()
        lines = sum(height(line, screen.columns) for line in self.shown.split("\n"))
        up = min(lines, screen.lines) - 1  # what has scrolled away cannot be erased
        write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")
        if self.show_discarded:
            write(f"{STRUCK}{self.tok.decode(discarded).translate(HARMLESS)}{PLAIN} ")
        write(f"{DIM}[RESET]{PLAIN}\n")
        self.ids, self.shown = [], ""

    def done(self) -> None:
        """An answer may end within a character: show that as a pipe does, as U+FFFD."""
        self.show(self.tok.decode(self.ids))
        write("\n")


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def trace(sampler, tok, prompt: list[int], *, prefill: list[int], **options) -> Generation:
    """Sample one answer and print each step: entries in the cache, p([RESET]), the token picked.

    sampler: stream() with its first argument, a model, filled in.
    p([RESET]) is the model's own, before --reset-bias and before [RESET] is masked.
    """
    seen: deque = deque()  # what the steps saw whose tokens are still to come

    def watch(logits: torch.Tensor, cache) -> None:
        p_reset = logits[0].softmax(dim=-1)[tok.reset_id]
        seen.append((cache.lengths[0].item(), p_reset.item()))

    def line(what: str) -> int:
        length, p_reset = seen.popleft()
        print(f"{length:>6}  {p_reset:>10.4f}  {what}")
        return length

    forced, resets = len(prefill), 0
    print(f"{'cache':>6}  {'p([RESET])':>10}  token")
    for event in sampler([prompt], prefill=[prefill], watch=watch, **options):
        if isinstance(event, Token) and forced:
            forced -= 1
            print(f"{'':>20}{tok.decode([event.id])!r}   (forced)")
        elif isinstance(event, Token):
            line(repr(tok.decode([event.id])))
        elif isinstance(event, Reset):
            length = line(f"[RESET]  {len(event.discarded)} tokens taken back")
            if options["on_reset"] == "truncate":
                back = len(prompt) + resets
                print(f"{back:>6}  ← the cache is cut back: {length - back} entries forgotten")
            resets += 1
        elif isinstance(event, Done):
            if event.generation.finish_reason == "stop":
                line("(stop)")
            return event.generation
