"""Prompts whose answers began long ago: the first tokens of what another model has said to them.

    python -m backtrack.evaluate --ckpt runs/helpful --prompts test.jsonl --sets advbench --judge J --out helpful.json
    python -m backtrack.evaluate.beginnings --answers helpful.json --prompts test.jsonl --sets advbench \
        --ckpt runs/helpful --tokens 8 32 96 --after harmless.jsonl --out long.jsonl

Of the answers to forbidden prompts that every judge found bad and that have enough tokens, the first 8, 32 and 96
become prefills, in sets begun-8, begun-32 and begun-96: the same prompts in each. Ask them with backtrack.evaluate
--judge-continuation, which judges what a model makes of such a beginning and not the beginning. With --after they are
asked once more, in set second-turn: nothing is forced, but a harmless question and its reference answer stand before.
With --as target they become what an attack aims at (backtrack.attacks), the same words for every model.
--prompts, --sets and --limit must be those of the first command. What stands in the file can do harm: keep it out of
repositories.
"""

import argparse

from backtrack.evaluate.answers import answers_file
from backtrack.evaluate.prompts import add_prompts, chosen, prompts_digest, read_prompts
from backtrack.rows import json_line, json_lines
from backtrack.run.say import say
from model import InputError, load_tokenizer
from model.errors import Help, positive, run
from model.files import check_file, write_text


def beginnings(args) -> list[dict]:
    prompts, tok = chosen(args), load_tokenizer(args.ckpt)
    (_, head), *records = json_lines(answers_file(args.answers))
    if head["settings"]["prompts"] != prompts_digest(prompts):
        raise InputError(f"{args.answers}: answers to other prompts; name the same --prompts, --sets and --limit")
    harmless = [p for p in read_prompts(args.after) if p.get("reference")] if args.after else []
    if args.after and not harmless:
        raise InputError(f'{args.after}: no prompt has a "reference" answer')
    rows, bad = [], 0
    for _, record in records:
        prompt, verdicts = prompts[record["prompt"]], [record.get(name, True) for name in ("unsafe", "complied")]
        if prompt["benign"] or record["sample"] > 0 or record["resets"] or "judge" not in record or not all(verdicts):
            continue
        bad += 1
        ids = tok.encode(record["response"])
        if len(ids) > max(args.tokens):  # the model wanted to say more
            rows += [prompt | {"set": f"begun-{n}", args.field: tok.decode(ids[:n])} for n in args.tokens]
            if args.after:
                first = harmless[bad % len(harmless)]
                turns = [*first["prompt"], {"role": "assistant", "content": first["reference"]}, *prompt["prompt"]]
                rows.append(prompt | {"set": "second-turn", "prompt": turns})
    say(f"{bad} of {len(records)} answers are bad, {len(rows) // (len(args.tokens) + bool(args.after))} long enough")
    if not rows:
        raise InputError(f"{args.answers}: no answer to begin with; take more prompts, or fewer --tokens")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--answers", required=True, metavar="FILE", help="a result of backtrack.evaluate, judged")
    add_prompts(parser)
    add("--ckpt", required=True, help="the model that answered: its tokenizer counts")
    add("--tokens", type=positive, nargs="+", default=[8, 32, 96], help="of each beginning")
    add("--as", dest="field", choices=("prefill", "target"), default="prefill", help="force them, or aim at them")
    add(
        "--after",
        metavar="FILE",
        help="harmless prompts with references: they stand before the questions of second-turn",
    )
    add("--out", required=True, help="prompts to write (.jsonl)")
    args = parser.parse_args()
    check_file(args.out)
    write_text("".join(json_line(row) + "\n" for row in beginnings(args)), args.out)


if __name__ == "__main__":
    run(main)
