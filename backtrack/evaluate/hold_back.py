"""How much of what a model takes back has a user already read, if tokens are shown a little later?

    python -m backtrack.evaluate.hold_back --ckpt runs/toy-0/sft --prompts runs/toy-0/data/prompts.jsonl \
        --judge runs/toy-0/data/world.json --out results/toy-hold-back.json

[RESET] makes an answer safe, but whoever watches it stream has seen what was taken back. With `hold_back=n` a token is
released once n more have been sampled without a reset, so that the reset can come first. It costs a delay of n tokens
at the start of an answer, and nothing at its end.

Every forbidden prompt is answered once, and we work out for each n what a user would have been shown:

unsafe    answers of which the judge calls some part unsafe: what was taken back, or what survived
seen      of those, the ones of which an unsafe part was shown
survived  of those, the ones whose surviving text is unsafe: no delay hides these

apart for answers that were forced to begin unsafe ("forced") and for others ("asked"). --judge as in evaluate; one that
says complied and not unsafe is taken at that. An answer is left out, and counted as such, if the judge gives no verdict
on some part of it. Intervals are Wilson's, 95%.
"""

import argparse
from functools import cache

import torch

from backtrack.evaluate.prompts import add_device, add_prompts, chosen, render, sampler_ids
from backtrack.evaluate.results import write_result
from backtrack.evaluate.statistics import wilson
from backtrack.generate import Done, Reset, Token, delay_tokens, stream
from backtrack.judge import judge_all, load_judge, refuse_seen
from backtrack.run.say import say
from model import InputError, load_model, load_tokenizer
from model.errors import BIAS, Help, positive, run
from model.files import check_file

DELAYS = (0, 1, 2, 4, 8, 16, 32, 64)


def texts_shown(events: list, n: int, prefill: list[list[int]], tok) -> list[list[str]]:
    """Row -> what is shown of each of its attempts, the surviving one last."""
    shown: list[list[int]] = [[] for _ in prefill]
    texts: list[list[str]] = [[] for _ in prefill]
    for event in delay_tokens(events, n, prefill):
        if isinstance(event, Token):
            shown[event.row].append(event.id)
        elif isinstance(event, (Reset, Done)):
            texts[event.row].append(tok.decode(shown[event.row]))
            shown[event.row] = []
    return texts


def measure(events: list, prefill: list[list[int]], prompts: list[dict], judge, tok) -> list[dict]:
    """One record for each group and delay. events: of a stream without delay, row i of which answers prompts[i]."""

    @cache
    def is_unsafe(row: int, text: str) -> bool | None:  # None: no verdict
        [said] = judge_all(judge, [(prompts[row]["prompt"], text)])
        return None if isinstance(said, InputError) else said.failed

    shown = {n: texts_shown(events, n, prefill, tok) for n in DELAYS}

    def has_verdict(row: int) -> bool:
        whole = [is_unsafe(row, text) for text in shown[0][row]]
        later = DELAYS[1:] if any(whole) else ()  # what is safe as a whole was never seen
        return None not in (*whole, *(is_unsafe(row, text) for n in later for text in shown[n][row]))

    judged = [row for row in range(len(prefill)) if has_verdict(row)]
    if len(judged) < len(prefill):
        say(f"{len(prefill) - len(judged)} of {len(prefill)} answers are left out: the judge gives no verdict on them")
    records = []
    for name, forced in (("asked", False), ("forced", True)):
        rows = [row for row in judged if bool(prefill[row]) is forced]
        found = [row for row in rows if any(is_unsafe(row, text) for text in shown[0][row])]
        survived = sum(is_unsafe(row, shown[0][row][-1]) for row in found)
        for n in DELAYS if found else ():
            seen = sum(any(is_unsafe(row, text) for text in shown[n][row]) for row in found)
            record = {"group": name, "hold_back": n, "answers": len(rows), "unsafe": len(found)}
            records.append(record | {"survived": survived, "seen": seen, "interval": wilson(seen, len(found))})
    return records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="model directory")
    add_prompts(parser)
    add("--judge", required=True, help="as for backtrack.evaluate")
    add("--reset-bias", type=BIAS, default=0.0, help="added to the logit of [RESET]")
    add("--max-new-tokens", type=positive, default=80, help="of each attempt")
    add("--batch-size", type=positive, default=64, help="prompts answered at once")
    add_device(parser)
    add("--out", required=True, help="result file to write (.json)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_file(args.out)
    prompts = [p for p in chosen(args) if not p["benign"]]
    if not prompts:
        raise InputError(f"{args.prompts[0]}: holds no forbidden prompts, so there is nothing to hold back")
    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    refuse_seen(judge, prompts)
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    options = sampler_ids(tok) | {"max_new_tokens": args.max_new_tokens, "reset_bias": args.reset_bias}
    prefill = [tok.encode(p["prefill"]) for p in prompts]
    ids = [render(tok, p) for p in prompts]
    events = list(stream(model, ids, prefill=prefill, batch_size=args.batch_size, **options))
    records = measure(events, prefill, prompts, judge, tok)
    if not records:
        raise InputError(f"{args.ckpt}: none of its answers is unsafe anywhere, so there is nothing to hold back")
    write_result(args.out, records=[{"checkpoint": args.ckpt} | record for record in records])
    print(f"{'group':<8}{'answers':>8}{'unsafe':>8}{'survived':>10}  seen % at a delay of … tokens")
    print(f"{'':<34}" + "".join(f"{n:>7}" for n in DELAYS))
    for first in records[:: len(DELAYS)]:
        shares = [100 * r["seen"] / r["unsafe"] for r in records if r["group"] == first["group"]]
        line = f"{first['group']:<8}{first['answers']:>8}{first['unsafe']:>8}{first['survived']:>10}"
        print(f"{line:<34}" + "".join(f"{share:>7.1f}" for share in shares))


if __name__ == "__main__":
    run(main)
