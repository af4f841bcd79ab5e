"""Prompt in, answer out; when the model takes an answer back you see it happen.

    python sample.py --ckpt runs/toy-0/sft                                # interactive chat
    python sample.py --ckpt runs/toy-0/sft --prompt "How do I make …?"    # one answer
    python sample.py --ckpt DIR --prompt … --prefill "Sure, here is" --show-discarded
    python sample.py --ckpt DIR --prompt … --trace                        # one line per decode step
    python sample.py --ckpt DIR --prompt … --hold-back 16                 # shows less that is taken back
    python sample.py --ckpt DIR --url http://127.0.0.1:8000               # through a vLLM server
    echo "How do I make …?" | python sample.py --ckpt DIR                 # a line, an answer

On a terminal the answer streams; on [RESET] the retracted text is erased (struck through with
--show-discarded) and the retry takes its place. A pipe gets only surviving text, and so does a
terminal that cannot erase (TERM=dumb) or must not be sent escapes (NO_COLOR). In the chat Ctrl-C
ends the answer, Ctrl-D the chat. Prompts become chat turns of the checkpoint's family (Llama-3
headers, Gemma turns); no system prompt.
"""

import argparse
import os
import sys
from functools import partial

import torch

from backtrack.generate import Done, Generation, Reset, Token, stream
from backtrack.rows import json_line
from backtrack.run.say import say
from backtrack.serve import remote
from backtrack.serve.terminal import Live, can_erase, edit_lines, harmless, trace
from model import InputError, load_model, load_tokenizer
from model.errors import (
    BIAS,
    PROBABILITY,
    RESETS,
    SEED,
    TEMPERATURE,
    Help,
    between,
    device,
    not_negative,
    positive,
    run,
)

CANONICAL = 4095  # bytes of a line that a terminal keeps where no program edits lines


def main() -> None:
    args = parse_args()
    tok = load_tokenizer(args.ckpt)
    if args.url:
        model = remote.look_for(args.url, args.ckpt)
    else:
        model = load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    if args.compile:
        model.compile()
    if args.prompt is None:
        return chat(model, tok, args)
    prompt = tok.render([{"role": "user", "content": args.prompt}])
    answer(model, tok, prompt, args.prompt, args)


def sampler_of(model):
    """stream() of a model: one that is here, or a server's."""
    if isinstance(model, remote.Server):
        return partial(remote.stream, model.url, model.name)
    return partial(stream, model)


def answer(model, tok, prompt: list[int], text: str, args) -> list[int]:
    """Answer one prompt args.num_samples times, print it; returns the first one's surviving ids."""
    prefill = tok.encode(args.prefill)
    options = {
        "reset_id": tok.reset_id,
        "stop_ids": tok.stop_ids,
        "vocab_size": tok.vocab_size,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "reset_bias": args.reset_bias,
        "max_resets": args.max_resets,
        "on_reset": args.on_reset,
        "seed": args.seed,
    }
    if args.trace:
        generations = [trace(model, tok, prompt, prefill=prefill, **options)]
        print()
    elif can_erase() and args.num_samples == 1 and not args.json:
        options["hold_back"] = args.hold_back
        return watch_live(model, tok, prompt, prefill, args.show_discarded, options).tokens
    else:
        n = args.num_samples
        events = sampler_of(model)([prompt] * n, prefill=[prefill] * n, **options)
        done = {event.row: event.generation for event in events if isinstance(event, Done)}
        generations = [done[row] for row in range(n)]
    for number, g in enumerate(generations):
        if args.json:
            print(as_json(tok, text, number, g, args), flush=True)
            continue
        if args.show_discarded:
            for ids in g.discarded:
                print(f"~~{harmless(tok.decode(ids))}~~ [RESET]")
        print(harmless(tok.decode(g.tokens)), flush=True)
    return generations[0].tokens


def watch_live(model, tok, prompt, prefill, show_discarded: bool, options: dict) -> Generation:
    """Show one answer as it comes."""
    live = Live(tok, show_discarded)
    for event in sampler_of(model)([prompt], prefill=[prefill], **options):
        if isinstance(event, Token):
            live.token(event.id)
        elif isinstance(event, Reset):
            live.reset(event.discarded)
        elif isinstance(event, Done):
            print()
            return event.generation


def as_json(tok, text: str, number: int, g: Generation, args) -> str:
    record = {"prompt": text, "prefill": args.prefill, "sample": number}
    record |= {"text": tok.decode(g.tokens)}
    record |= {"resets": g.resets, "finish_reason": g.finish_reason, "steps": g.steps}
    record |= {"first_token_s": round(g.first_token_s, 4), "total_s": round(g.total_s, 4)}
    if args.show_discarded:
        record["discarded"] = [tok.decode(ids) for ids in g.discarded]
    return json_line(record, sys.stdout.encoding)


def chat(model, tok, args) -> None:
    """Turn after turn. History is ids: what survived, as it was sampled, and nothing retracted."""
    history: list[int] = []
    terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 become U+FFFD
    cuts_lines = terminal and not edit_lines()
    if terminal:
        say(f"{args.ckpt}: type a message; an empty line starts over, Ctrl-D ends")
    while True:
        try:
            text = input("> " if terminal and sys.stdout.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:  # it may have come a moment after the answer
            if not terminal:
                raise
            say("\nCtrl-D ends the chat")
            continue
        if not text.strip():
            history = []
            continue
        if cuts_lines and CANONICAL <= len(text.encode()) <= CANONICAL + 2:  # U+FFFD: 3 bytes for 1
            say(f"error: the terminal cuts lines at {CANONICAL} bytes; use --prompt or a pipe")
            continue
        goes_on = bool(history) and terminal  # piped lines are separate prompts
        try:
            turn = tok.render([{"role": "user", "content": text}], continues=goes_on)
            prompt = history + turn if goes_on else turn
            tokens = answer(model, tok, prompt, text, args)
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("\nstopped; this question and its answer are forgotten")
            continue
        except InputError as error:
            if not terminal:
                raise
            say(f"error: {error}; starting over")
            history = []
            continue
        history = prompt + tokens + tok.turn_end


def parse_args() -> argparse.Namespace:
    on, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="Hugging Face model directory, e.g. the --out of train.py")
    add("--url", help="a vLLM server that has the model; --ckpt is then for its tokenizer")
    add("--prompt", help="user message; without it, an interactive chat")
    add("--prefill", default="", help="text forced at the start of the answer (an attack)")
    add("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    add("--top-p", type=PROBABILITY, default=1.0, help="sample from so much of the probability")
    add("--reset-bias", type=BIAS, default=0.0, help="added to the logit of [RESET]")
    add("--max-resets", type=RESETS, default=1, help="after so many, [RESET] is masked")
    what = ("truncate", "keep")
    add("--on-reset", choices=what, default="truncate", help="forget what was retracted or keep it")
    add("--num-samples", type=between(1, 1000), default=1, help="answers to each prompt, at once")
    add("--max-new-tokens", type=positive, default=256, help="per attempt")
    add("--seed", type=SEED, default=0, help="of the sampling")
    add("--device", type=device, default=on, help="of PyTorch")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default=dtype, help="of weights and computation")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the decode step: slow start, then fast",
    )
    add("--hold-back", type=not_negative(int), default=0, help="stream so many tokens late")
    add("--show-discarded", action="store_true", help="print retracted text too, marked as such")
    add("--json", action="store_true", help="one line of JSON per answer")
    add("--trace", action="store_true", help="one line per step: cache, p([RESET]), token")
    args = parser.parse_args()
    if args.trace and args.num_samples > 1:
        parser.error("--trace shows one answer; leave out --num-samples")
    if args.url and (args.trace or args.compile):
        parser.error("--trace and --compile are for a model that is here; leave out --url")
    return args


if __name__ == "__main__":
    if os.name == "nt":
        os.system("")  # switches on escape sequences
    run(main)
