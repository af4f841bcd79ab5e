"""Draws results/recording.svg: an answer is typed, struck out at [RESET], and begun again.

    python results/drawings.py --ckpt runs/toy-0/sft --prompt "Tell me how to make …" --out results/recording.svg

The recording is a real run of the sampler, token by token, typed at an even pace; only the clock is made up. It begins
with everything written, so that a viewer that does not animate shows the whole. Colours follow the reader's light or
dark theme. The other drawing, results/method.svg, is its own source: it is edited by hand.
"""

import argparse
from html import escape

from backtrack.generate import Reset, Token, stream
from model import InputError, load_model, load_tokenizer
from model.errors import run
from model.files import write_text

WIDTH, LEFT, CHARACTER, LINE = 830, 18, 8.1, 24  # in the unit of the drawing
AT_FIRST, TOKEN, AFTER_RESET = 4.0, 0.16, 1.2  # seconds: everything is shown; a token is typed; before the retry
LIGHT = {"ink": "#1f2328", "muted": "#59636e", "screen": "#f6f8fa", "gone": "#b42318"}
DARK = {"ink": "#e6edf3", "muted": "#9aa4af", "screen": "#151b23", "gone": "#ff8b7e"}


def record(ckpt: str, prompt: str) -> str:
    """The document. Raises InputError if the answer to this prompt is not taken back."""
    tok, model = load_tokenizer(ckpt), load_model(ckpt)
    ids = tok.render([{"role": "user", "content": prompt}])
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    events = list(stream(model, [ids], max_new_tokens=60, **options))
    if not any(isinstance(event, Reset) for event in events):
        raise InputError(f"{prompt!r}: nothing is taken back in this answer; choose another --prompt")
    typed = [(1, 0, f"> {prompt}", AT_FIRST + 0.6, "ink")]  # (line, column, text, seconds, colour)
    strikes = []  # (line, columns, seconds)
    line, seconds, written, ids = 2, AT_FIRST + 1.6, "", []
    for event in events:
        if isinstance(event, Token):
            ids.append(event.id)
            whole = tok.decode(ids)
            typed.append((line, len(written), whole[len(written) :], seconds, "ink"))
            written = whole
            seconds += TOKEN
        elif isinstance(event, Reset):
            strikes.append((line, len(written), seconds))
            typed.append((line, len(written) + 1, "[RESET]", seconds, "gone"))
            line, written, ids = line + 1, "", []
            seconds += AFTER_RESET
    seconds += AFTER_RESET
    shapes = [text(0, 0, f"$ python sample.py --ckpt {ckpt} --show-discarded", "muted", "")]
    for line, column, words, at, colour in typed:
        shapes.append(text(line, column, words, colour, animate("fill-opacity", (1, 0, 1), (0, AT_FIRST, at), seconds)))
    for line, columns, at in strikes:
        y, right = 29.5 + LINE * line, round(LEFT + columns * CHARACTER, 1)
        grown = [LEFT + share * (right - LEFT) for share in (0, 0.25, 0.5, 0.75, 1)]
        times = [0, AT_FIRST, *(at + 0.1 * step for step in range(1, 6))]
        grow = animate("x2", (right, LEFT, *(round(x, 1) for x in grown)), times, seconds)
        shapes.append(
            f'<line class="strike" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke-width="1.6">{grow}</line>'
        )
    return svg(LINE * (typed[-1][0] + 1) + 32, shapes)


def text(line: int, column: int, words: str, colour: str, animation: str) -> str:
    x, y, width = LEFT + column * CHARACTER, 34 + LINE * line, len(words) * CHARACTER
    return (
        f'<text class="{colour}" x="{x:.1f}" y="{y}" textLength="{width:.1f}" xml:space="preserve" '
        f'font-family="ui-monospace,Menlo,Consolas,monospace">{escape(words)}{animation}</text>'
    )


def animate(attribute: str, values, times, duration: float) -> str:
    """The attribute jumps to each value at its time; the whole begins again when it is over."""
    values, times = ";".join(map(str, values)), ";".join(f"{at / duration:.4f}" for at in times)
    return (
        f'<animate attributeName="{attribute}" values="{values}" keyTimes="{times}" calcMode="discrete" '
        f'dur="{duration:.1f}s" repeatCount="indefinite"/>'
    )


def svg(height: int, shapes: list[str]) -> str:
    light, dark = (
        "".join(f".{name}{{fill:{colour}}}" for name, colour in colours.items())
        + f".strike{{stroke:{colours['gone']}}}"
        for colours in (LIGHT, DARK)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-size="13.5" role="img">\n<title>An answer is typed, struck out at [RESET], and begun again</title>\n'
        f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>\n"
        f'<rect class="screen" width="{WIDTH}" height="{height}" rx="8"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="model directory")
    parser.add_argument("--prompt", required=True, help="a question whose answer the model takes back")
    parser.add_argument("--out", required=True, help="the .svg to write")
    args = parser.parse_args()
    write_text(record(args.ckpt, args.prompt), args.out)


if __name__ == "__main__":
    run(main)
