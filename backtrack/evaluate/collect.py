"""Preference rows from a model's own answers: what it says to unsafe questions becomes what it learns to leave.

    python -m backtrack.collect --ckpt runs/smollm2 --prompts train.jsonl --judge runs/refusal-judge \
        --out runs/real/rows.jsonl

The model answers every prompt. On a prompt that is not benign an answer that the judge calls unsafe (or complied) is
y−; y+ is the prompt's "safe_answer" or, with --chosen own, another answer of the model. The row says "unsafe": true.
Benign prompts give rows without y−: their "reference" or, where they have none or with --benign own, the model's own
answer; of one that was cut, its whole sentences; with --benign both a row of each. So do forbidden prompts whose safe
answer complies, says a refusal judge: they only look like the others. Answers of other models are not what this model
will say when it goes wrong, its own are; and a model that has never seen its own style in a harmless answer learns to
reset at the style.

    {"prompt": [messages], "set": …, "benign": bool, "safe_answer": "…", "reference": "…"}       a prompt line

With --prefill "Sure, here is" every answer is forced to begin so: a model that shall leave an answer that was begun for
it must have seen some, and harmless ones too.

The answers are kept beside OUT, in OUT.answers.jsonl, as they come: the same command goes on where it was stopped. It
will not make rows of prompts whose answers were all safe, and says how many those were. What the model says to unsafe
questions can do harm: keep it out of repositories.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import torch

from backtrack.evaluate.__main__ import adding_to, read_answers
from backtrack.evaluate.prompts import Prompt, choose_prompts, prompts_digest, read_prompts, render
from backtrack.generate import Done, stream
from backtrack.judge import load_judge
from backtrack.rows import json_line
from backtrack.run.say import Ticker, say
from model import ModelConfig, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.errors import SEED, TEMPERATURE, Help, device, positive, run
from model.files import check_file, write_text

WHOLE = re.compile(r"""(?s).*(?<!\d)[.!?]["')*]*(?=\s|$)""")  # up to the end of the last sentence; "2." ends none


def collect(args) -> None:
    prompts = [p for path in args.prompts for p in read_prompts(path)]
    prompts = choose_prompts(prompts, args.sets, args.limit)
    same = ("samples", "temperature", "max_new_tokens", "prefill", "seed", "dtype")
    settings = {name: getattr(args, name) for name in same}
    settings |= {"weights": weights_digest(args.ckpt), "prompts": prompts_digest(prompts)}
    file = Path(f"{args.out}.answers.jsonl")
    check_file(args.out)
    with adding_to(file):
        done = {(answer["prompt"], answer["sample"]): answer for answer in read_answers(file, settings)}
        too_long = answer_missing(args, prompts, file, done)

    judge = load_judge(args.judge, args.device, getattr(torch, args.dtype))
    rows, counts = [], Counter()
    for i, prompt in enumerate(prompts):
        answers = [done[i, sample] for sample in range(args.samples) if (i, sample) in done]
        made, what = [], "left out: too long for the model"
        if i not in too_long:
            made, what = make_rows(prompt, answers, judge, args)
        counts[what] += 1
        rows += made
    write_text("".join(json_line(row) + "\n" for row in rows), args.out)
    for what, count in counts.most_common():
        say(f"{count:6d}  {what}")
    say(f"{len(rows)} rows, {sum(row.get('unsafe', False) for row in rows)} of them unsafe: {args.out}")


def answer_missing(args, prompts: list[Prompt], file: Path, done: dict) -> set[int]:
    """Sample what is not in `done` yet, and append it to the file as it comes. Returns the prompts that cannot be
    answered: they and an answer are longer than the model."""
    tok = load_tokenizer(args.ckpt)
    forced = tok.encode(args.prefill)
    room = ModelConfig.load(args.ckpt).max_position_embeddings - len(forced) - args.max_new_tokens
    ids = [render(tok, prompt) for prompt in prompts]
    too_long = {i for i, prompt in enumerate(ids) if len(prompt) > room}
    todo = []
    for i, prompt in enumerate(prompts):
        if prompt["benign"] and prompt.get("reference") and args.benign == "given":
            too_long.discard(i)
            continue  # nobody needs the model's own answer
        if i in too_long:
            continue
        todo += [(i, sample) for sample in range(args.samples) if (i, sample) not in done]
    if not todo:
        return too_long
    model = load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    todo.sort(key=lambda item: len(ids[item[0]]))  # little padding
    events = stream(
        model,
        [ids[i] for i, _ in todo],
        reset_id=tok.reset_id,
        stop_ids=tok.stop_ids,
        vocab_size=tok.vocab_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        max_resets=0,
        seed=args.seed,
        sample_ids=[i * args.samples + sample for i, sample in todo],
        prefill=[forced for _ in todo],
        batch_size=args.batch_size,
    )
    ticker = Ticker()
    answers = ((event.row, event.generation) for event in events if isinstance(event, Done))
    with open(file, "a", encoding="utf-8") as f:
        for count, (row, g) in enumerate(answers, start=1):
            i, sample = todo[row]
            text = tok.decode(g.tokens).strip()
            record = {"prompt": i, "sample": sample, "text": text, "complete": g.finish_reason == "stop"}
            done[i, sample] = record
            f.write(json_line(record) + "\n")
            f.flush()
            ticker.show(f"{count} of {len(todo)} answers")
    ticker.done()
    return too_long


def whole_sentences(answer: dict) -> str:
    """The answer, without what was begun when its tokens ran out: to stop there would teach to stop in mid-sentence."""
    if answer["complete"]:
        return answer["text"]
    whole = WHOLE.match(answer["text"])
    return whole[0] if whole else ""


def make_rows(prompt: dict, answers: list[dict], judge, args) -> tuple[list[dict], str]:
    """A prompt's rows of training data, or none; and what became of it, in words."""
    answers = [answer for answer in answers if answer["text"]]
    if prompt["benign"]:
        return benign_rows(prompt, prompt.get("reference"), answers, args, "benign question")
    given = prompt.get("safe_answer")
    if given and args.chosen == "given":
        said = judge(prompt["prompt"], given)
        if said.unsafe:
            return [], "unsafe question, left out: its safe answer is not safe"
        if said.unsafe is None and said.complied:  # whoever wrote it saw nothing to refuse
            return benign_rows(prompt, given, answers, args, "harmless question among the unsafe")
    failed = [answer["text"] for answer in answers if judge(prompt["prompt"], answer["text"]).failed]
    if not failed:
        return [], "unsafe question, left out: every answer was safe"
    safe = [answer for answer in answers if answer["text"] not in failed]
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
    on, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model that is asked")
    add("--prompts", nargs="+", required=True, help="prompt files (data.prepare prompts makes them)")
    add("--sets", nargs="+", help="of the prompts, these sets only")
    add("--limit", type=positive, help="of each set, so many prompts, evenly spread")
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
    add("--device", type=device, default=on, help="of PyTorch")
    add("--dtype", choices=("float32", "bfloat16"), default=dtype, help="of weights and computation")
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
