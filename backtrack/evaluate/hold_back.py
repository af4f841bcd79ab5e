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
from functools import partial

import torch

from backtrack.evaluate.answers import AnswerFile, adding_to, answers_file, generations, remembering
from backtrack.evaluate.prompts import add_device, add_prompts, chosen, prompts_digest
from backtrack.evaluate.results import print_records, write_result
from backtrack.evaluate.statistics import wilson
from backtrack.generate import stream
from backtrack.judge import judge_all, load_judge, refuse_seen
from backtrack.run.say import say
from model import InputError, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.errors import BIAS, Help, positive, run
from model.files import check_file

DELAYS = (0, 1, 2, 4, 8, 16, 32, 64)


def attempts_of(prompts: list[dict], args) -> list[list[list[int]]]:
    """Prompt -> the ids of each attempt, the surviving one last. They are kept in a file as they come."""
    settings = {name: getattr(args, name) for name in ("reset_bias", "max_new_tokens", "dtype")}
    settings |= {"prompts": prompts_digest(prompts), "weights": weights_digest(args.ckpt)}
    with adding_to(answers_file(args.out)):
        saved = AnswerFile(answers_file(args.out), settings, lambda record: record["prompt"])
        todo = [(i, 0) for i in range(len(prompts)) if i not in saved.records]
        if todo:
            tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device, getattr(torch, args.dtype))
            options = {"max_new_tokens": args.max_new_tokens, "reset_bias": args.reset_bias}
            ask = partial(stream, model, batch_size=args.batch_size)
            for batch in generations(ask, tok, prompts, todo, options, args):
                saved.add([{"prompt": i, "attempts": [*g.discarded, g.tokens]} for (i, _), g in batch])
    return [saved.records[i]["attempts"] for i in range(len(prompts))]


def texts_shown(attempts: list[list[int]], n: int, forced: int, tok) -> list[str]:
    """What `delay_tokens` in generate.py shows of each attempt. forced: the length of the first's prefill."""
    *discarded, surviving = attempts
    texts = []
    for ids in discarded:
        sampled = len(ids) - (0 if texts else forced)
        texts.append(tok.decode(ids[: len(ids) - n] if sampled >= n else []))
    return [*texts, tok.decode(surviving)]


def verdicts(attempts: list[list[int]], forced: int, prompt: dict, judge, tok) -> dict[int, list[bool]] | None:
    """Delay -> whether what is shown of each attempt is unsafe; None if the judge gives no verdict on some part."""
    shown = {n: texts_shown(attempts, n, forced, tok) for n in DELAYS}
    texts = list({text for of_n in shown.values() for text in of_n})
    said = dict(zip(texts, judge_all(judge, [(prompt["prompt"], text) for text in texts]), strict=True))
    if any(isinstance(verdict, InputError) for verdict in said.values()):
        return None
    return {n: [said[text].failed for text in of_n] for n, of_n in shown.items()}


def measure(answers: list[list[list[int]]], prefill: list[list[int]], prompts: list[dict], judge, tok) -> list[dict]:
    """One record for each group and delay. answers: the attempts of each prompt."""
    said = [verdicts(a, len(p), prompt, judge, tok) for a, p, prompt in zip(answers, prefill, prompts, strict=True)]
    if None in said:
        say(f"{said.count(None)} of {len(said)} answers are left out: the judge gives no verdict on them")
    records = []
    for name, forced in (("asked", False), ("forced", True)):
        group = [v for v, p in zip(said, prefill, strict=True) if v is not None and bool(p) is forced]
        unsafe = [v for v in group if any(v[0])]
        survived = sum(v[0][-1] for v in unsafe)
        for n in DELAYS if unsafe else ():
            seen = sum(any(v[n]) for v in unsafe)
            record = {"group": name, "hold_back": n, "answers": len(group), "unsafe": len(unsafe)}
            records.append(record | {"survived": survived, "seen": seen, "interval": wilson(seen, len(unsafe))})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="model directory")
    add_prompts(parser)
    add("--judge", required=True, help="as for backtrack.evaluate")
    add("--reset-bias", type=BIAS, default=0.0, help="added to the logit of [RESET]")
    add("--max-new-tokens", type=positive, default=80, help="of each attempt")
    add("--batch-size", type=positive, default=64, help="prompts answered at once")
    add_device(parser)
    add("--out", required=True, help="result file to write (.json); answers go beside it (.answers.jsonl)")
    parser.set_defaults(samples=1)
    args = parser.parse_args()
    check_file(args.out)
    prompts = [p for p in chosen(args) if not p["benign"]]
    if not prompts:
        raise InputError(f"{args.prompts[0]}: holds no forbidden prompts, so there is nothing to hold back")
    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    refuse_seen(judge, prompts)
    tok = load_tokenizer(args.ckpt)
    prefill = [tok.encode(p["prefill"]) for p in prompts]
    attempts = attempts_of(prompts, args)
    with remembering(judge, args.out, args.judge) as kept:
        records = measure(attempts, prefill, prompts, kept, tok)
    if not records:
        raise InputError(f"{args.ckpt}: none of its answers is unsafe anywhere, so there is nothing to hold back")
    write_result(args.out, records=[{"checkpoint": args.ckpt} | record for record in records])
    print_records(records)


if __name__ == "__main__":
    run(main)
