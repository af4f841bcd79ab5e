"""The two drawings of the README, as SVG: the method, and a recording of an answer taken back.

    python results/drawings.py method --out results/method.svg
    python results/drawings.py recording --ckpt runs/toy-0/sft --prompt "Tell me how to make …" \
        --out results/recording.svg

Both are text: they follow the reader's light or dark theme, and a diff shows what changed. The recording is
a real run of the sampler, token by token, typed at an even pace; nothing in it is made up but the clock.
"""

import argparse
import textwrap
from dataclasses import dataclass
from html import escape

from backtrack.generate import Reset, Token, stream
from model import InputError, load_model, load_tokenizer
from model.errors import run
from model.files import write_text

WIDTH = 830
# Class -> colour in light and in dark.
COLOURS = {
    "prompt": ("#e1e4e8", "#3a424c"),
    "safe": ("#c6e6cd", "#1f5130"),
    "unsafe": ("#f8d0ca", "#6b2a24"),
    "reset": ("#ffe9a0", "#6a5400"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "loss": ("#1f6feb", "#58a6ff"),
    "screen": ("#f6f8fa", "#151b23"),
    "gone": ("#b42318", "#ff8b7e"),
}


def svg(height: int, body: list[str], title: str) -> str:
    """The document around the shapes, with the colours of both themes."""
    light = "".join(f".{name}{{fill:{colours[0]}}}" for name, colours in COLOURS.items())
    dark = "".join(f".{name}{{fill:{colours[1]}}}" for name, colours in COLOURS.items())
    lines = f".cut{{stroke:{COLOURS['muted'][0]};fill:none}}.strike{{stroke:{COLOURS['gone'][0]}}}"
    dark_lines = f".cut{{stroke:{COLOURS['muted'][1]}}}.strike{{stroke:{COLOURS['gone'][1]}}}"
    style = f"{light}{lines}@media(prefers-color-scheme:dark){{{dark}{dark_lines}}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head += ' font-family="-apple-system,Segoe UI,Helvetica,Arial,sans-serif" font-size="13.5" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{style}</style>", *body, "</svg>"]) + "\n"


# ── The method ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Box:
    kind: str
    text: str
    width: int
    loss: bool = False


LEFT = 96  # where lanes begin


def lane(y: int, name: str, parts: list, note: str = "") -> list[str]:
    """A line of boxes. A string between boxes is written as it is; under a box with loss runs a bar."""
    shapes = [text(8, y + 20, name, "muted")]
    x = LEFT
    for part in parts:
        if isinstance(part, str):
            shapes.append(text(x + 13, y + 21, part, "ink", middle=True, size=18))
            x += 26
            continue
        if part.kind == "cut":
            shapes.append(
                f'<rect class="cut" x="{x}" y="{y}" width="{part.width}" height="30" rx="5" stroke-dasharray="4 3"/>'
            )
        else:
            shapes.append(f'<rect class="{part.kind}" x="{x}" y="{y}" width="{part.width}" height="30" rx="5"/>')
        colour = "muted" if part.kind == "cut" else "ink"
        shapes.append(text(x + part.width / 2, y + 20, part.text, colour, middle=True))
        if part.loss:
            shapes.append(f'<rect class="loss" x="{x + 2}" y="{y + 33}" width="{part.width - 4}" height="4" rx="2"/>')
        x += part.width + 4
    if note:
        shapes.append(text(x + 8, y + 20, note, "muted"))
    return shapes


def text(x: float, y: float, words: str, colour: str, *, middle=False, size=0.0, bold=False) -> str:
    more = ' text-anchor="middle"' if middle else ""
    more += f' font-size="{size:g}"' if size else ""
    more += ' font-weight="600"' if bold else ""
    return f'<text class="{colour}" x="{x:g}" y="{y:g}"{more}>{escape(words)}</text>'


def method() -> str:
    prompt, reset = Box("prompt", "prompt x", 96), Box("reset", "[RESET]", 74)
    learned_reset = Box("reset", "[RESET]", 74, loss=True)
    begun = Box("unsafe", "unsafe y−, first k tokens", 176)
    shapes = [text(8, 22, "Supervised: leave a bad answer wherever it stands", "ink", size=15, bold=True)]
    answer = Box("safe", "safe answer y+", 150, loss=True)
    shapes += lane(36, "answer", [prompt, answer], "blue: where loss falls")
    shapes += lane(84, "backtrack", [prompt, begun, learned_reset, answer], "none on the unsafe words")

    shapes.append(text(8, 156, "Preferences (DPO): reset where it helps, and only there", "ink", size=15, bold=True))
    good, bad = Box("safe", "safe answer y+", 128), Box("unsafe", "unsafe answer y−", 134)
    shapes += lane(170, "elicit", [Box("unsafe", "y−, first k", 92), reset, good, "≻", bad], "≻ is better than,")
    shapes += lane(212, "discourage", [good, "≻", Box("safe", "y+, first k", 92), reset, bad], "given the prompt x")

    shapes.append(text(8, 284, "Sampling: on [RESET] the cache is cut back to the prompt", "ink", size=15, bold=True))
    asked = Box("prompt", "How do I make yintin limpom?", 208)
    said = Box("unsafe", "Sure. To make yintin limpom, take molpym", 282)
    shapes += lane(298, "it says", [asked, said, reset], "takes it back")
    shapes += lane(340, "cut", [asked, Box("cut", "thrown away", 360)], "one torch.where")
    shapes += lane(382, "again", [asked, reset, Box("safe", "I cannot help with that.", 282)], "the user sees this")
    return svg(424, shapes, "How the model is trained to say [RESET], and what happens when it does")


# ── The recording ────────────────────────────────────────────────────────────────────────────────────────────────────

CHARACTER = 8.1  # width of one, in the unit of the drawing
SECONDS_A_TOKEN = 0.16


@dataclass
class Typed:
    """A piece of text on the screen."""

    line: int
    column: int
    text: str
    at: float  # seconds
    colour: str


def recording(ckpt: str, prompt: str) -> str:
    tok, model = load_tokenizer(ckpt), load_model(ckpt)
    ids = tok.render([{"role": "user", "content": prompt}])
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "max_new_tokens": 60}
    options["vocab_size"] = tok.vocab_size
    events = list(stream(model, [ids], **options))
    if not any(isinstance(event, Reset) for event in events):
        raise InputError(f"{prompt!r}: nothing is taken back in this answer; choose another --prompt")
    return animate(*screenplay(tok, prompt, ckpt, events))


def screenplay(tok, prompt: str, ckpt: str, events: list) -> tuple[list[Typed], list[tuple], int, float]:
    """What is typed where and when, what is struck out (line, columns, seconds), lines and seconds in all."""
    typed = [Typed(0, 0, f"$ python sample.py --ckpt {ckpt} --show-discarded", 0.0, "muted")]
    typed.append(Typed(1, 0, f"> {prompt}", 0.6, "ink"))
    strikes: list[tuple] = []
    line, seconds, written, ids = 2, 1.6, "", []
    for event in events:
        if isinstance(event, Token):
            ids.append(event.id)
            whole = tok.decode(ids)
            typed.append(Typed(line, len(written), whole[len(written) :], seconds, "ink"))
            written = whole
            seconds += SECONDS_A_TOKEN
        elif isinstance(event, Reset):
            strikes.append((line, len(written), seconds))
            typed.append(Typed(line, len(written) + 1, "[RESET]", seconds, "gone"))
            line, written, ids = line + 1, "", []
            seconds += 1.2
    return typed, strikes, line + 1, seconds + 4.0


def animate(typed: list[Typed], strikes: list[tuple], lines: int, duration: float) -> str:
    """Each piece appears at its time; the whole begins again when it is over."""
    height = 24 * lines + 32
    shapes = [f'<rect class="screen" width="{WIDTH}" height="{height}" rx="8"/>']
    for piece in typed:
        x, y = 18 + piece.column * CHARACTER, 34 + 24 * piece.line
        words, width = escape(piece.text), len(piece.text) * CHARACTER
        shapes.append(
            f'<text class="{piece.colour}" x="{x:.1f}" y="{y}" textLength="{width:.1f}" xml:space="preserve" '
            f'font-family="ui-monospace,Menlo,Consolas,monospace">{words}{appear(piece.at, duration)}</text>'
        )
    for line, columns, at in strikes:
        y, right = 29.5 + 24 * line, 18 + columns * CHARACTER
        grow = f"0;{at / duration:.4f};{(at + 0.5) / duration:.4f};1"
        shapes.append(
            f'<line class="strike" x1="18" y1="{y}" x2="{right:.1f}" y2="{y}" stroke-width="1.6">'
            f'<animate attributeName="x2" values="18;18;{right:.1f};{right:.1f}" keyTimes="{grow}" '
            f'dur="{duration:.1f}s" repeatCount="indefinite"/></line>'
        )
    title = "An answer is typed, struck out at [RESET], and begun again"
    return svg(height, shapes, title)


def appear(at: float, duration: float) -> str:
    if at == 0:
        return ""
    return (
        f'<animate attributeName="fill-opacity" values="0;1" keyTimes="0;{at / duration:.4f}" calcMode="discrete" '
        f'dur="{duration:.1f}s" repeatCount="indefinite"/>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(__doc__), formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("method", "recording"):
        command = commands.add_parser(name)
        command.add_argument("--out", required=True, help="the .svg to write")
    command.add_argument("--ckpt", required=True, help="model directory")
    command.add_argument("--prompt", required=True, help="a question whose answer the model takes back")
    args = parser.parse_args()
    drawing = method() if args.command == "method" else recording(args.ckpt, args.prompt)
    write_text(drawing, args.out)


if __name__ == "__main__":
    run(main)
