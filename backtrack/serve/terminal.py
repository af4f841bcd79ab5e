"""What people see: an answer that is typed, taken back and begun again, and a trace.

type_out(stream(model, …), tok, show_discarded=True)    # one answer
trace(sampler, tok, prompt_ids, **options)              # one line per decode step
"""

import os
import shutil
import sys
import time
import unicodedata
from collections import deque
from itertools import islice

import torch

from backtrack.generate import Generation, Reset, Token

DIM, STRUCK, PLAIN = "\x1b[2m", "\x1b[2;9m", "\x1b[0m"
# What a model says must not move the cursor or change the terminal: tabs and escapes become spaces.
HARMLESS = {code: " " for code in (*range(32), *range(127, 160)) if code != ord("\n")}


def escapes_allowed() -> bool:
    """May the terminal be sent escapes? See https://no-color.org."""
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


def type_out(events, tok, show_discarded: bool, pause_s: float = 0.0) -> list[int]:
    """Show one answer as it comes, and wait after each token; returns its surviving ids.

    A character is written when its last byte has come. On a reset the text is erased; with
    show_discarded it is written again, struck through.
    """
    ids, shown = [], ""
    for event in events:
        if isinstance(event, Reset):
            erase(shown)
            if show_discarded:
                write(f"{STRUCK}{tok.decode(event.discarded).translate(HARMLESS)}{PLAIN} ")
            write(f"{DIM}[RESET]{PLAIN}\n")
            ids, shown = [], ""
            continue
        ids += [event.id] if isinstance(event, Token) else []
        text = tok.decode(ids)
        if isinstance(event, Token):  # the answer may end within a character: then U+FFFD is shown
            text = text.rstrip("\ufffd")
            time.sleep(pause_s)
        if text.startswith(shown):
            write(text[len(shown) :].translate(HARMLESS))
            shown = text
    write("\n")
    return ids


def erase(text: str) -> None:
    screen = shutil.get_terminal_size()
    lines = sum(height(line, screen.columns) for line in text.split("\n"))
    up = min(lines, screen.lines) - 1  # what has scrolled away cannot be erased
    write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")


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

    print(f"{'cache':>6}  {'p([RESET])':>10}  token")
    for id in prefill:
        print(f"{'':>20}{tok.decode([id])!r}   (forced)")
    events, resets = sampler([prompt], prefill=[prefill], watch=watch, **options), 0
    for event in islice(events, len(prefill), None):
        if isinstance(event, Token):
            line(repr(tok.decode([event.id])))
        elif isinstance(event, Reset):
            length = line(f"[RESET]  {len(event.discarded)} tokens taken back")
            if options["on_reset"] == "truncate":
                back = len(prompt) + resets
                print(f"{back:>6}  ← the cache is cut back: {length - back} entries forgotten")
            resets += 1
        elif event.generation.finish_reason == "stop":
            line("(stop)")
    return event.generation
