"""How much of what a model takes back has a user already read, if tokens are shown a little later?

    python -m backtrack.evaluate.hold_back --ckpt runs/toy-0/sft --prompts runs/toy-0/data/prompts.jsonl \
        --judge runs/toy-0/data/world.json --out results/toy-hold-back.json

[RESET] makes an answer safe, but whoever watches it stream has seen what was taken back. With `hold_back=n` a token is
released once n more have been sampled without a reset, so that the reset can come first. It costs a delay of n tokens
at the start of an answer, and nothing at its end.

Every forbidden prompt is answered once, and what a user would have been shown is worked out for each n:

unsafe    answers of which some part is unsafe, says the judge: what was taken back, or what survived
seen      of those, the ones of which an unsafe part was shown
survived  of those, the ones whose surviving text is unsafe: no delay hides these

apart for answers that were forced to begin unsafe ("forced") and for others ("asked"). --judge as in evaluate; one that
says complied and not unsafe is taken at that. Intervals are Wilson's, 95%.
"""

import argparse
from functools import cache

import torch

from backtrack.evaluate.prompts import choose_prompts, read_prompts, render
from backtrack.evaluate.results import write_result
from backtrack.evaluate.statistics import wilson
from backtrack.generate import Done, Reset, Token, delay_tokens, stream
from backtrack.judge import load_judge, refuse_seen
from model import InputError, load_model, load_tokenizer
from model.errors import BIAS, Help, device, positive, run
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
    def is_unsafe(row: int, text: str) -> bool:
        return judge(prompts[row]["prompt"], text).failed

    whole = texts_shown(events, 0, prefill, tok)
    unsafe = [row for row, texts in enumerate(whole) if any(is_unsafe(row, text) for text in texts)]
    records = []
    for name, forced in (("asked", False), ("forced", True)):
        rows = [row for row, ids in enumerate(prefill) if bool(ids) is forced]
        found = [row for row in unsafe if bool(prefill[row]) is forced]
        survived = sum(is_unsafe(row, whole[row][-1]) for row in found)
        for n in DELAYS if found else ():
            texts = texts_shown(events, n, prefill, tok)
            seen = sum(any(is_unsafe(row, text) for text in texts[row]) for row in found)
            record = {"group": name, "hold_back": n, "answers": len(rows), "unsafe": len(found)}
            records.append(record | {"survived": survived, "seen": seen, "interval": wilson(seen, len(found))})
    return records


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="model directory")
    add("--prompts", nargs="+", required=True, help="prompt files, as evaluate reads them")
    add("--sets", nargs="+", help="of the prompts, these sets only")
    add("--limit", type=positive, help="of each set, so many prompts, evenly spread")
    add("--judge", required=True, help="as in evaluate")
    add("--reset-bias", type=BIAS, default=0.0)
    add("--max-new-tokens", type=positive, default=80)
    add("--batch-size", type=positive, default=64)
    add("--device", type=device, default="cuda" if cuda else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    add("--out", required=True, help="result file to write (.json)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_file(args.out)
    prompts = [p for path in args.prompts for p in read_prompts(path)]
    prompts = [p for p in choose_prompts(prompts, args.sets, args.limit) if not p["benign"]]
    if not prompts:
        raise InputError(f"{args.prompts[0]}: holds no forbidden prompts, so there is nothing to hold back")
    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    refuse_seen(judge, prompts)
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    options |= {"max_new_tokens": args.max_new_tokens, "reset_bias": args.reset_bias}
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
