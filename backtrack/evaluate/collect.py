"""Preference rows from a model's own answers: what it says to unsafe questions becomes what it learns to leave.

    python -m backtrack.collect --ckpt runs/smollm2 --prompts train.jsonl --judge runs/refusal-judge \
        --out runs/real/rows.jsonl

The model answers every prompt. On a forbidden prompt (one that is not benign) an answer that the judge calls unsafe, or
complied, becomes y−; y+ is the prompt's "safe_answer" or, with --chosen own, another answer of the model. The row says
"unsafe": true. Benign prompts give rows without y−: their "reference" or, where they have none or with --benign own,
the model's own answer (if it was cut, its whole sentences); with --benign both a row of each. A forbidden prompt whose
safe answer complies, as a refusal judge finds, only looks like the others and counts as benign. We take the model's own
answers because they are what it will say when it goes wrong; and a model that has never seen its own style in a
harmless answer learns to reset at the style.

    {"prompt": [messages], "set": …, "benign": bool, "safe_answer": "…", "reference": "…"}       a prompt line

With --prefill "Sure, here is" every answer is forced to begin so: to learn to leave an answer that was begun for it, a
model must have seen some, and harmless ones too.

The answers are kept beside OUT, in OUT.answers.jsonl, and the verdicts in OUT.verdicts.jsonl, as they come: the same
command goes on where it was stopped. Prompts whose answers were all safe make no rows, nor do answers on which the
judge gives no verdict; at the end it says how many those were. What the model says to unsafe questions can do harm:
keep it out of repositories.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from backtrack.evaluate.answers import (
    NO_VERDICT,
    AnswerFile,
    adding_to,
    failure,
    generations,
    judge_answers,
    without_room,
)
from backtrack.evaluate.prompts import Prompt, add_device, add_prompts, chosen, prompts_digest
from backtrack.evaluate.results import naming
from backtrack.generate import stream
from backtrack.judge import load_judge
from backtrack.rows import json_line
from backtrack.run.say import Ticker, say
from model import ModelConfig, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.errors import SEED, TEMPERATURE, Help, positive, run
from model.files import check_file, write_text

WHOLE = re.compile(r"""(?s).*(?<!\d)[.!?]["')*]*(?=\s|$)""")  # up to the end of the last sentence; "2." ends none


def collect(args) -> None:
    prompts = chosen(args)
    names = ("samples", "temperature", "max_new_tokens", "prefill", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"weights": weights_digest(args.ckpt), "prompts": prompts_digest(prompts)}
    file = Path(f"{args.out}.answers.jsonl")
    check_file(args.out)
    rows, counts = [], Counter()
    with adding_to(file):
        saved = AnswerFile(file, settings, lambda answer: (answer["prompt"], answer["sample"]))
        too_long = answer_missing(args, prompts, saved)
        verdict_of = kept_verdicts(args, prompts, settings)
        for i, prompt in enumerate(prompts):
            answers = [saved.records[i, s] for s in range(args.samples) if (i, s) in saved.records]
            made, what = [], "left out: too long for the model"
            if i not in too_long:
                made, what = make_rows(prompt, answers, partial(verdict_of, i), args)
            counts[what] += 1
            rows += made
    with naming(args.out):
        write_text("".join(json_line(row) + "\n" for row in rows), args.out)
    for what, count in counts.most_common():
        say(f"{count:6d}  {what}")
    say(f"{len(rows)} rows, {sum(row.get('unsafe', False) for row in rows)} of them unsafe: {args.out}")


def answer_missing(args, prompts: list[Prompt], saved: AnswerFile) -> set[int]:
    """Sample the answers that are not saved yet, and save them as they come. Returns the prompts that cannot be
    answered because they and an answer are longer than the model."""
    tok = load_tokenizer(args.ckpt)
    for prompt in prompts:
        prompt["prefill"] = args.prefill
    too_long = without_room(tok, prompts, ModelConfig.load(args.ckpt).max_position_embeddings - args.max_new_tokens)
    # Of a benign prompt that has an answer nobody needs the model's own.
    given = {i for i, p in enumerate(prompts) if p["benign"] and p.get("reference") and args.benign == "given"}
    asked = [i for i in range(len(prompts)) if i not in given and i not in too_long]
    todo = [(i, s) for i in asked for s in range(args.samples) if (i, s) not in saved.records]
    if todo:
        model = load_model(args.ckpt, args.device, getattr(torch, args.dtype))
        ask = partial(stream, model, batch_size=args.batch_size)
        options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "seed")} | {"max_resets": 0}
        ticker = Ticker()
        for batch in generations(ask, tok, prompts, todo, options, args):
            for (i, s), g in batch:
                text = tok.decode(g.tokens).strip()
                saved.add([{"prompt": i, "sample": s, "text": text, "complete": g.finish_reason == "stop"}])
            ticker.show(f"{len(saved.records)} answers, {len(todo)} of them new")
        ticker.done()
    return set(too_long) - given


def kept_verdicts(args, prompts: list[Prompt], settings: dict) -> Callable[[int, str], dict]:
    """The verdict on a text as an answer to prompt i: read from OUT.verdicts.jsonl, or made now and kept there."""
    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    path = Path(f"{args.out}.verdicts.jsonl")
    saved = AnswerFile(path, settings, lambda verdict: (verdict["judge"], verdict["prompt"], verdict["text"]))

    def verdict_of(i: int, text: str) -> dict:
        if (args.judge, i, text) not in saved.records:
            judge_answers(judge, [({"prompt": i, "text": text}, prompts[i], text)], saved, args)
        return saved.records[args.judge, i, text]

    return verdict_of


def whole_sentences(answer: dict) -> str:
    """The answer, without what was begun when its tokens ran out: to stop there would teach to stop in mid-sentence."""
    if answer["complete"]:
        return answer["text"]
    whole = WHOLE.match(answer["text"])
    return whole[0] if whole else ""


def make_rows(prompt: dict, answers: list[dict], verdict_of: Callable[[str], dict], args) -> tuple[list[dict], str]:
    """A prompt's rows of training data, or none; and what became of it, in words. verdict_of: text -> verdict."""
    answers = [answer for answer in answers if answer["text"]]
    if prompt["benign"]:
        return benign_rows(prompt, prompt.get("reference"), answers, args, "benign question")
    given = prompt.get("safe_answer") if args.chosen == "given" else None
    if given:
        said = verdict_of(given)
        if said.get("category") == NO_VERDICT:
            return [], "unsafe question, left out: no verdict on its safe answer"
        if said.get("unsafe"):
            return [], "unsafe question, left out: its safe answer is not safe"
        if "unsafe" not in said and said["complied"]:  # whoever wrote it saw nothing to refuse
            return benign_rows(prompt, given, answers, args, "harmless question among the unsafe")
    judged = [(answer, verdict_of(answer["text"])) for answer in answers]
    judged = [(answer, said) for answer, said in judged if said.get("category") != NO_VERDICT]
    if answers and not judged:
        return [], "unsafe question, left out: no verdict on its answers"
    failed = [answer["text"] for answer, said in judged if said[failure([said])]]
    if not failed:
        return [], "unsafe question, left out: every answer was safe"
    safe = [answer for answer, _ in judged if answer["text"] not in failed]
    chosen = given if args.chosen == "given" else first_whole(safe)
    if not chosen:
        return [], f"unsafe question, left out: no safe answer ({args.chosen})"
    row = {"prompt": prompt["prompt"], "chosen": message(chosen), "rejected": message(failed[0]), "unsafe": True}
    return [row], "unsafe question, kept"


def benign_rows(prompt: dict, given: str | None, answers: list[dict], args, what: str) -> tuple[list[dict], str]:
    texts = {"given": given, "own": first_whole(answers)}
    there = [name for name, text in texts.items() if text]
    if args.benign in there:
        there = [args.benign]
    if not there:
        return [], f"{what}, left out: no whole sentence"
    rows = [{"prompt": prompt["prompt"], "chosen": message(texts[name])} for name in there]
    return rows, f"{what}, kept, {' and '.join(there)} answer"


def first_whole(answers: list[dict]) -> str | None:
    return next((text for answer in answers if (text := whole_sentences(answer))), None)


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model that is asked")
    add_prompts(parser)
    add("--judge", required=True, help="as for backtrack.evaluate")
    add("--out", required=True, help="rows to write (.jsonl)")
    add("--chosen", choices=("given", "own"), default="given", help="y+: the data set's safe answer, or the model's")
    add("--benign", choices=("given", "own", "both"), default="given", help="y+ of benign prompts, if they have both")
    add("--samples", type=positive, default=1, help="answers per prompt")
    add("--prefill", default="", metavar="TEXT", help="what every answer is forced to begin with")
    add("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy")
    add("--max-new-tokens", type=positive, default=64, help="per answer; longer ones are cut")
    add("--batch-size", type=positive, default=32, help="prompts answered at once")
    add("--seed", type=SEED, default=0, help="of the sampling")
    add_device(parser)
    args = parser.parse_args()
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples needs a --temperature: greedy answers are all the same")
    if args.chosen == "own" and args.samples == 1:
        parser.error("--chosen own needs --samples: one answer cannot be both the unsafe and the safe one")
    return args


def main() -> None:
    collect(parse_args())


if __name__ == "__main__":
    run(main)
