"""What people see: an answer that is typed, taken back and begun again, and a trace.

live = Live(tok, show_discarded=True)             # fed with the events of generate.stream
trace(model, tok, prompt_ids, **options)          # one line per decode step, to read along
"""

import os
import shutil
import sys
import unicodedata
from collections import deque

import torch

from backtrack.generate import Done, Generation, Reset, Token, stream

DIM, STRUCK, PLAIN = "\x1b[2m", "\x1b[2;9m", "\x1b[0m"
CONTROL = [*range(32), *range(127, 160)]
# What a model says must not move the cursor or change the terminal: tabs and escapes become spaces.
HARMLESS = {code: " " for code in CONTROL if code != ord("\n")}


def can_erase() -> bool:
    """Whether stdout is a terminal that may be sent escapes (https://no-color.org)."""
    return sys.stdout.isatty() and escapes_allowed()


def escapes_allowed() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: str) -> str:
    """What a model said, for print(): on a terminal without what moves the cursor."""
    return text.translate(HARMLESS) if sys.stdout.isatty() else text


def height(line: str, columns: int) -> int:
    """How many rows of a terminal it takes. East Asian characters and emoji are two columns wide."""
    rows, column = 1, 0
    for character in line:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        width = 0 if unicodedata.combining(character) else width  # an accent stands on another
        if column + width > columns:
            rows, column = rows + 1, 0
        column += width
    return rows


def edit_lines() -> bool:
    """Give input() arrow keys, a history and lines of any length; whether that worked."""
    try:
        import readline
    except ImportError:  # Windows, which edits lines itself; or a Python built without it
        return os.name == "nt"
    if not escapes_allowed():
        readline.parse_and_bind("set enable-bracketed-paste off")
        readline.parse_and_bind("set enable-meta-key off")
    return sys.stdout.isatty()  # else input() reads the line as the terminal hands it over


class Live:
    """One streamed answer on a terminal. Text whose bytes are not complete yet is held back."""

    def __init__(self, tok, show_discarded: bool):
        self.tok, self.show_discarded = tok, show_discarded
        self.ids: list[int] = []
        self.shown = ""

    def token(self, id: int) -> None:
        self.ids.append(id)
        text = self.tok.decode(self.ids).rstrip("\ufffd")  # half a character: wait for the rest
        if text.startswith(self.shown):
            write(text[len(self.shown) :].translate(HARMLESS))
            self.shown = text

    def reset(self, discarded: list[int]) -> None:
        """Erase what is on the screen; with show_discarded, write it again, struck through."""
        screen = shutil.get_terminal_size()
        lines = 0
        for line in self.shown.split("\n"):
            lines += height(line, screen.columns)
        up = min(lines, screen.lines) - 1  # what has scrolled away cannot be erased
        write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")
        if self.show_discarded:
            text = self.tok.decode(discarded).translate(HARMLESS)
            write(f"{STRUCK}{text}{PLAIN} ")
        write(f"{DIM}[RESET]{PLAIN}\n")
        self.ids, self.shown = [], ""


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def trace(model, tok, prompt: list[int], *, prefill: list[int], **options) -> Generation:
    """Sample one answer and print each step: entries in the cache, p([RESET]), the token picked.

    p([RESET]) is the model's own, before --reset-bias and before [RESET] is masked.
    """
    seen: deque = deque()  # what the steps saw whose tokens are still to come

    def watch(logits: torch.Tensor, cache) -> None:
        p_reset = logits[0].softmax(dim=-1)[tok.reset_id]
        seen.append((cache.lengths[0].item(), p_reset.item()))

    forced, resets = len(prefill), 0
    events = stream(model, [prompt], prefill=[prefill], watch=watch, **options)
    print(f"{'cache':>6}  {'p([RESET])':>10}  token")
    for event in events:
        if isinstance(event, Token) and forced:
            forced -= 1
            print(f"{'':>6}  {'':>10}  {piece(tok, event.id)}   (forced)")
        elif isinstance(event, Token):
            print(step_line(*seen.popleft()) + piece(tok, event.id))
        elif isinstance(event, Reset):
            length, p_reset = seen.popleft()
            print(step_line(length, p_reset) + f"[RESET]  {len(event.discarded)} tokens taken back")
            if options["on_reset"] == "truncate":
                back = len(prompt) + resets
                print(f"{back:>6}  ← the cache is cut back: {length - back} entries forgotten")
            resets += 1
        elif isinstance(event, Done):
            if event.generation.finish_reason == "stop":
                print(step_line(*seen.popleft()) + "(stop)")
            return event.generation


def step_line(length: int, p_reset: float) -> str:
    return f"{length:>6}  {p_reset:>10.4f}  "


def piece(tok, id: int) -> str:
    return repr(tok.decode([id]))
