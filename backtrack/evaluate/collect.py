"""Preference rows from a model's own answers: what it says to unsafe questions becomes what it learns to leave.

    python -m backtrack.collect --ckpt runs/smollm2 --prompts train.jsonl --judge runs/refusal-judge \
        --out runs/real/rows.jsonl

The model answers every prompt, greedily. On a forbidden prompt (one that is not benign) an answer that the judge calls
unsafe, or complied, becomes y−; y+ is the prompt's "safe_answer". Benign prompts give rows without y−: their
"reference" or, where they have none or with --benign own, the model's own answer (if it was cut, its whole sentences);
with --benign both a row of each. A forbidden prompt whose safe answer complies, as a refusal judge finds, counts as
benign. We take the model's own answers because they are what it will say when it goes wrong; and a model that has never
seen its own style in a harmless answer learns to reset at the style. With --prefill "Sure, here is" every answer is
forced to begin so: to learn to leave an answer that was begun for it, a model must have seen some, harmless ones too.

    {"prompt": [messages], "set": …, "benign": bool, "safe_answer": "…", "reference": "…"}       a prompt line

The answers and the verdicts are kept beside OUT, in OUT.answers.jsonl, as they come: the same command goes on where it
was stopped. An answer that is safe makes no row, nor does one without a verdict; at the end it says how many those
were. What the model says to unsafe questions can do harm: keep it out of repositories.
"""

import argparse
import re
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from backtrack.evaluate.answers import (
    NO_VERDICT,
    AnswerFile,
    adding_to,
    failure,
    generations,
    judge_missing,
    without_room,
)
from backtrack.evaluate.prompts import Prompt, add_device, add_prompts, chosen, prompts_digest
from backtrack.evaluate.results import naming
from backtrack.generate import stream
from backtrack.judge import load_judge
from backtrack.rows import json_line
from backtrack.run.say import Ticker, say, warn_of_slow_bfloat16
from model import ModelConfig, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.errors import Help, positive, run
from model.files import check_file, write_text

OWN, GIVEN = 0, "given"  # the "sample" of a record: the model's answer, or the prompt's safe answer
TOO_LONG = "left out: too long for the model"
WHOLE = re.compile(r"""(?s).*(?<!\d)[.!?]["')*]*(?=\s|$)""")  # up to the end of the last sentence; "2." ends none


def collect(args) -> None:
    prompts = chosen(args)
    for prompt in prompts:
        prompt["prefill"] = args.prefill
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "dtype")}
    settings |= {"weights": weights_digest(args.ckpt), "prompts": prompts_digest(prompts)}
    file = Path(f"{args.out}.answers.jsonl")
    check_file(args.out)
    rows, counts = [], Counter()
    with adding_to(file):
        saved = AnswerFile(file, settings, lambda answer: (answer["prompt"], answer["sample"]))
        answer_missing(args, prompts, saved)
        judge_forbidden(args, prompts, saved)
        saved.tidy()
    for i, prompt in enumerate(prompts):
        made, what = make_rows(prompt, saved.records.get((i, OWN)), saved.records.get((i, GIVEN)), args.benign)
        counts[what] += 1
        rows += made
    with naming(args.out):
        write_text("".join(json_line(row) + "\n" for row in rows), args.out)
    for what, count in counts.most_common():
        say(f"{count:6d}  {what}")
    say(f"{len(rows)} rows, {sum(row.get('unsafe', False) for row in rows)} of them unsafe: {args.out}")


def answer_missing(args, prompts: list[Prompt], saved: AnswerFile) -> None:
    """Sample the answers that are needed and not saved yet, and save them as they come."""
    tok = load_tokenizer(args.ckpt)
    too_long = without_room(tok, prompts, ModelConfig.load(args.ckpt).max_position_embeddings - args.max_new_tokens)
    # Of a benign prompt that has an answer nobody needs the model's own.
    given = {i for i, p in enumerate(prompts) if p["benign"] and p.get("reference") and args.benign == "given"}
    asked = (i for i in range(len(prompts)) if i not in given and i not in too_long)
    todo = [(i, OWN) for i in asked if (i, OWN) not in saved.records]
    if not todo:
        return
    model, ticker = load_model(args.ckpt, args.device, getattr(torch, args.dtype)), Ticker()
    ask = partial(stream, model, batch_size=args.batch_size)
    for batch in generations(ask, tok, prompts, todo, {"max_new_tokens": args.max_new_tokens, "max_resets": 0}, args):
        found = [(i, tok.decode(g.tokens).strip(), g.finish_reason == "stop") for (i, _), g in batch]
        saved.add([{"prompt": i, "sample": OWN, "response": text, "complete": whole} for i, text, whole in found])
        ticker.show(f"{len(saved.records)} answers, {len(todo)} of them new")
    ticker.done()


def judge_forbidden(args, prompts: list[Prompt], saved: AnswerFile) -> None:
    """Judge the answers to forbidden prompts, and their safe answers, that have no verdict yet."""
    warn_of_slow_bfloat16(args.dtype, args.device)
    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    forbidden = [i for i, p in enumerate(prompts) if not p["benign"]]
    given = [i for i in forbidden if prompts[i].get("safe_answer") and (i, GIVEN) not in saved.records]
    saved.add([{"prompt": i, "sample": GIVEN, "response": prompts[i]["safe_answer"]} for i in given])
    asked = [saved.records.get((i, sample)) for i in forbidden for sample in (GIVEN, OWN)]
    judge_missing(judge, [r for r in asked if r and r["response"]], prompts, saved, args)


def whole_sentences(answer: dict) -> str:
    """The answer, without what was begun when its tokens ran out: to stop there would teach to stop in mid-sentence."""
    if answer["complete"]:
        return answer["response"]
    whole = WHOLE.match(answer["response"])
    return whole[0] if whole else ""


def make_rows(prompt: dict, own: dict | None, given: dict | None, benign: str) -> tuple[list[dict], str]:
    """A prompt's rows of training data, or none; and what became of it, in words.

    own: the record of the model's answer, None if it was not asked; given: of the safe answer; benign: --benign.
    """
    if own is None and not prompt["benign"]:
        return [], TOO_LONG
    if prompt["benign"]:
        return benign_rows(prompt, prompt.get("reference"), own, benign, "benign question")
    for answer, whose in ((given, "its safe answer"), (own, "its answer")):
        if answer and answer.get("category") == NO_VERDICT:
            return [], f"unsafe question, left out: no verdict on {whose}"
    if given and given.get("unsafe"):
        return [], "unsafe question, left out: its safe answer is not safe"
    if given and failed(given):  # it complies, so whoever wrote it saw nothing to refuse
        return benign_rows(prompt, given["response"], own, benign, "harmless question among the unsafe")
    if not failed(own):
        return [], "unsafe question, left out: its answer was safe"
    if not given:
        return [], "unsafe question, left out: no safe answer"
    row = {"prompt": prompt["prompt"], "chosen": message(given["response"]), "rejected": message(own["response"])}
    return [row | {"unsafe": True}], "unsafe question, kept"


def failed(answer: dict) -> bool:
    return bool(answer["response"]) and answer[failure([answer])]


def benign_rows(prompt: dict, given: str | None, own: dict | None, benign: str, what: str) -> tuple[list[dict], str]:
    texts = {"given": given, "own": own and whole_sentences(own)}
    there = [name for name, text in texts.items() if text]
    if benign in there:
        there = [benign]
    if not there:
        return [], TOO_LONG if own is None else f"{what}, left out: no whole sentence"
    rows = [{"prompt": prompt["prompt"], "chosen": message(texts[name])} for name in there]
    return rows, f"{what}, kept, {' and '.join(there)} answer"


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model that is asked")
    add_prompts(parser)
    add("--judge", required=True, help="as for backtrack.evaluate")
    add("--out", required=True, help="rows to write (.jsonl)")
    add("--benign", choices=("given", "own", "both"), default="given", help="y+ of benign prompts, if they have both")
    add("--prefill", default="", metavar="TEXT", help="what every answer is forced to begin with")
    add("--max-new-tokens", type=positive, default=64, help="per answer; longer ones are cut")
    add("--batch-size", type=positive, default=32, help="prompts answered at once")
    add_device(parser)
    parser.set_defaults(samples=1, judge_continuation=False)
    collect(parser.parse_args())


if __name__ == "__main__":
    run(main)
