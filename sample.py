"""Prompt in, answer out; when the model takes an answer back you see it happen.

    python sample.py --ckpt runs/toy-0/sft                                   # interactive chat
    python sample.py --ckpt runs/toy-0/sft --prompt "How do I make …?"       # one answer
    python sample.py --ckpt DIR --prompt … --prefill "Sure, here is" --show-discarded
    echo "How do I make …?" | python sample.py --ckpt DIR                    # a line, an answer

On a terminal the answer streams; on [RESET] the retracted text is erased (struck through with --show-discarded) and
the retry takes its place. In a pipe only surviving text is printed. Prompts become chat turns of the checkpoint's
family (Llama-3 headers, Gemma turns); no system prompt is added.
"""

import argparse
import json
import os
import shutil
import sys
import unicodedata

import torch

from backtrack.generate import Done, Reset, Token, stream
from model import InputError, load_model, load_tokenizer
from model.errors import device, run

DIM, STRUCK, PLAIN = "\x1b[2m", "\x1b[2;9m", "\x1b[0m"
# What a model says must not move the cursor or change the terminal: tabs, escapes and the like become spaces.
HARMLESS = {code: " " for code in (*range(32), *range(127, 160)) if code != ord("\n")}


class Live:
    """One streamed answer on a terminal. Text whose bytes are not complete yet is held back."""

    def __init__(self, tok, show_discarded: bool):
        self.tok, self.show_discarded = tok, show_discarded
        self.ids, self.shown = [], ""

    def token(self, id: int) -> None:
        self.ids.append(id)
        text = self.tok.decode(self.ids).rstrip("\ufffd")  # half a UTF-8 character: wait for the rest
        if text.startswith(self.shown):
            self._write(text[len(self.shown) :].translate(HARMLESS))
            self.shown = text

    def reset(self, discarded: list[int]) -> None:
        lines = sum(_rows(line) for line in self.shown.split("\n"))
        up = min(lines, shutil.get_terminal_size().lines) - 1  # what has scrolled away cannot be erased
        self._write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")
        if self.show_discarded:
            self._write(STRUCK + self.tok.decode(discarded).translate(HARMLESS) + f"{PLAIN} ")
        self._write(f"{DIM}[RESET]{PLAIN}\n")
        self.ids, self.shown = [], ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _rows(line: str) -> int:
    """How many rows of the terminal a line takes up."""
    width, rows, column = max(1, shutil.get_terminal_size().columns), 1, 0
    for c in line:
        columns = 0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1
        columns = 2 if unicodedata.east_asian_width(c) in "WF" else columns
        if column + columns > width:  # a wide character is not split: it may leave a column empty
            rows, column = rows + 1, 0
        column += columns
    return rows


def answer(model, tok, prompt_ids: list[int], text: str, args) -> list[int]:
    """Sample args.num_samples answers to one prompt and print them; returns the first one's surviving tokens."""
    n = args.num_samples
    events = stream(
        model,
        [prompt_ids] * n,
        reset_id=tok.reset_id,
        stop_ids=tok.stop_ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        reset_bias=args.reset_bias,
        max_resets=args.max_resets,
        on_reset=args.on_reset,
        prefill=[tok.encode(args.prefill)] * n,
        seed=args.seed,
    )
    live = Live(tok, args.show_discarded) if sys.stdout.isatty() and n == 1 and not args.json else None
    finished = {}
    for event in events:
        if isinstance(event, Done):
            finished[event.row] = event.generation
        elif live and isinstance(event, Token):
            live.token(event.id)
        elif live and isinstance(event, Reset):
            live.reset(event.discarded)
    if live:
        print()
        return finished[0].tokens
    for row in range(n):
        g = finished[row]
        if args.json:
            record = {"prompt": text, "prefill": args.prefill, "sample": row, "text": tok.decode(g.tokens)}
            record |= {"resets": g.resets, "finish_reason": g.finish_reason, "steps": g.steps}
            record |= {"first_token_s": round(g.first_token_s, 4), "total_s": round(g.total_s, 4)}
            if args.show_discarded:
                record["discarded"] = [tok.decode(ids) for ids in g.discarded]
            print(json.dumps(record, ensure_ascii=False), flush=True)
            continue
        if args.show_discarded:
            for ids in g.discarded:
                print(f"~~{tok.decode(ids)}~~ [RESET]")
        print(tok.decode(g.tokens), flush=True)
    return finished[0].tokens


def chat(model, tok, args) -> None:
    """Turn after turn. The history is token ids: what survived goes in as it was sampled, what was retracted never."""
    history: list[int] = []
    terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 become U+FFFD
    if terminal:
        print(f"{args.ckpt}: type a message; an empty line starts over, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            text = input("> " if terminal and sys.stdout.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            history = []
            continue
        turn = tok.render([{"role": "user", "content": text}])
        ids = history + turn[1:] if history and terminal else turn  # BOS only once; piped lines are separate prompts
        try:
            tokens = answer(model, tok, ids, text, args)
        except InputError as error:
            if not terminal:
                raise
            print(f"error: {error}; starting over", file=sys.stderr)
            history = []
            continue
        history = ids + tokens + tok.turn_end


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="Hugging Face model directory, e.g. the --out of train.py")
    parser.add_argument("--prompt", help="user message; without it, an interactive chat")
    parser.add_argument("--prefill", default="", help="text forced at the start of the answer (an attack)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--reset-bias", type=float, default=0.0, help="added to the logit of [RESET]")
    parser.add_argument("--max-resets", type=int, default=1)
    parser.add_argument("--on-reset", choices=("truncate", "keep"), default="truncate", help="what a retry sees")
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per attempt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if cuda else "cpu")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decode step: slow start, then faster")
    parser.add_argument("--show-discarded", action="store_true", help="print retracted text too, marked as such")
    parser.add_argument("--json", action="store_true", help="one line of JSON per answer")
    args = parser.parse_args()
    if args.num_samples < 1:
        parser.error("--num-samples must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")  # what the terminal or the file cannot hold becomes a question mark
    tok = load_tokenizer(args.ckpt)
    model = load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    if args.compile:
        model.compile()
    if args.prompt is None:
        return chat(model, tok, args)
    ids = tok.render([{"role": "user", "content": args.prompt}])
    answer(model, tok, ids, args.prompt, args)


if __name__ == "__main__":
    if os.name == "nt":
        os.system("")  # switches on escape sequences
    run(main)
