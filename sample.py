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

from backtrack.generate import Generation, in_order, stream
from backtrack.rows import json_line
from backtrack.run.say import say
from backtrack.serve import arguments, remote
from backtrack.serve.terminal import can_erase, edit_lines, harmless, trace, type_out
from model import InputError, errors

HOW = ("max_new_tokens", "temperature", "top_p", "reset_bias", "max_resets", "on_reset", "seed")


def main() -> None:
    args = parse_args()
    tok, model = arguments.load(args)
    if args.url:
        how = {"timeout_s": model.timeout_s, "api_key": model.api_key}
        sampler = partial(remote.stream, model.url, model.name, **how)
    else:
        if args.compile:
            model.compile()
        sampler = partial(stream, model)
    if args.prompt is None:
        return chat(sampler, tok, args)
    prompt = tok.render([{"role": "user", "content": args.prompt}])
    answer(sampler, tok, prompt, args.prompt, args)


def answer(sampler, tok, prompt: list[int], text: str, args) -> list[int]:
    """Answer one prompt args.num_samples times, print it; returns the first one's surviving ids."""
    prefill, n = tok.encode(args.prefill), args.num_samples
    options = {name: getattr(args, name) for name in HOW}
    options |= {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    if args.trace:
        generations = [trace(sampler, tok, prompt, prefill=prefill, **options)]
        print()
    elif can_erase() and n == 1 and not args.json:
        options["hold_back"] = args.hold_back
        events = sampler([prompt], prefill=[prefill], **options)
        return type_out(events, tok, args.show_discarded, 1 / 20 if args.slow else 0)
    else:
        generations = in_order(sampler([prompt] * n, prefill=[prefill] * n, **options), n)
    for number, g in enumerate(generations):
        if args.json:
            print(as_json(tok, text, number, g, args), flush=True)
            continue
        if args.show_discarded:
            for ids in g.discarded:
                print(f"~~{harmless(tok.decode(ids))}~~ [RESET]")
        print(harmless(tok.decode(g.tokens)), flush=True)
    return generations[0].tokens


def as_json(tok, text: str, number: int, g: Generation, args) -> str:
    record = {"prompt": text, "prefill": args.prefill, "sample": number}
    record |= {"text": tok.decode(g.tokens), "resets": g.resets}
    record |= {"finish_reason": g.finish_reason, "steps": g.steps}
    record |= {"first_token_s": round(g.first_token_s, 4), "total_s": round(g.total_s, 4)}
    if args.show_discarded:
        record["discarded"] = [tok.decode(ids) for ids in g.discarded]
    return json_line(record, sys.stdout.encoding)


def chat(sampler, tok, args) -> None:
    """Turn after turn. History is ids: what survived, as it was sampled, and nothing retracted."""
    history: list[int] = []
    terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 become U+FFFD
    if terminal:
        edit_lines()
        say(f"{args.ckpt}: type a message; an empty line starts over, Ctrl-D ends")
    while True:
        try:
            text = input("> " if terminal and sys.stdout.isatty() else "")
            if not text.strip():
                history = []
                continue
            message = [{"role": "user", "content": text}]
            prompt = history + tok.render(message, continues=bool(history))
            tokens = answer(sampler, tok, prompt, text, args)
            if terminal:  # lines from a pipe are separate prompts
                history = prompt + tokens + tok.turn_end
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("\nstopped; what was asked last is forgotten; Ctrl-D ends the chat")
        except InputError as error:
            if not terminal:
                raise
            say(f"error: {error}; starting over")
            history = []


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=errors.Help)
    arguments.add_model(parser)
    add = parser.add_argument
    add("--prompt", help="user message; without it, an interactive chat")
    add("--prefill", default="", help="text forced at the start of the answer (an attack)")
    add("--temperature", type=errors.TEMPERATURE, default=0.0, help="0 is greedy")
    add("--top-p", type=errors.PROBABILITY, default=1.0, help="sample from that much probability")
    add("--num-samples", type=errors.between(1, 1000), default=1, help="answers to each prompt")
    add("--max-new-tokens", type=errors.positive, default=256, help="per attempt")
    add("--seed", type=errors.SEED, default=0, help="of the sampling")
    add("--compile", action="store_true", help="torch.compile the step: slow start, then fast")
    add("--hold-back", type=errors.not_negative(int), default=0, help="stream so many tokens late")
    add("--slow", action="store_true", help="stream some 20 tokens a second, to be read along")
    add("--show-discarded", action="store_true", help="print retracted text too, marked as such")
    add("--json", action="store_true", help="one line of JSON per answer")
    add("--trace", action="store_true", help="one line per step: cache, p([RESET]), token")
    args = parser.parse_args()
    if args.trace and (args.num_samples > 1 or args.json):
        parser.error("--trace shows one answer, as text; leave out --num-samples and --json")
    if args.url and (args.trace or args.compile):
        parser.error("--trace and --compile are for a model that is here; leave out --url")
    return args


def program() -> None:
    if os.name == "nt":
        os.system("")  # switches on escape sequences
    errors.run(main)


if __name__ == "__main__":
    program()
