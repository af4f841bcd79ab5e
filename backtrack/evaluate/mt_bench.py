"""Answers to MT-Bench, in the format that FastChat's judge reads. Nothing here judges them.

    python -m backtrack.evaluate --ckpt runs/sft --prompts mt_bench.jsonl --mt-bench answers/

Both turns of every question, sampled at the temperature that FastChat gives its category; the number of resets stands
beside each turn. All resets are false ones: the questions are harmless. https://github.com/lm-sys/FastChat,
fastchat/llm_judge
"""

import hashlib
import json
import time
from pathlib import Path

from backtrack.evaluate.answers import CONDITION, AnswerFile, adding_to, longest_prompt, sampler_of
from backtrack.evaluate.prompts import Prompt, prompts_digest, sampler_ids
from backtrack.evaluate.results import naming
from backtrack.generate import Done
from backtrack.rows import json_line, several
from backtrack.run.say import Ticker, say
from model import load_tokenizer
from model.checkpoint import weights_digest
from model.errors import InputError
from model.files import write_text

TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # fastchat/llm_judge/common.py


def answer_all(prompts: list[Prompt], args) -> None:
    """Let every --ckpt answer all questions. Raises InputError if the prompts are none, or two files would be one."""
    for p in prompts:
        turns = p.get("turns")
        is_question = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if "question_id" not in p or not is_question:
            raise InputError(f"{p.where}: no question_id or turns; make them with data.prepare")
    paths = [Path(args.mt_bench) / f"{Path(ckpt).resolve().name}.jsonl" for ckpt in args.ckpt]
    if len(set(paths)) < len(paths):
        raise InputError("--mt-bench: two of --ckpt end in the same name, which FastChat tells models by")
    for ckpt, path in zip(args.ckpt, paths, strict=True):
        file = path.with_suffix(".answers")  # FastChat reads every .jsonl as a model's answers
        with adding_to(file):
            answer(file, path, ckpt, prompts, args)


def answer(file: Path, path: Path, ckpt: str, prompts: list[Prompt], args) -> None:
    """Answer the questions that the file has no answers for, and write all answers to `path`."""
    tok = load_tokenizer(ckpt)
    ask = sampler_of(ckpt, tok, None, args)
    condition = {name: getattr(args, name)[0] for name in CONDITION}
    longest = longest_prompt(ckpt, tok, [tuple(condition.values())], args)
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "top_p", "seed", "dtype")} | condition
    settings |= {"weights": weights_digest(ckpt), "prompts": prompts_digest(prompts)}
    saved = AnswerFile(file, settings, lambda answer: answer["question_id"])
    sampling = {"top_p": args.top_p, "seed": args.seed, "max_new_tokens": args.max_new_tokens}
    left_out, ticker = [], Ticker()
    for temperature in (0.0, *sorted(set(TEMPERATURE.values()))):
        asked = [(i, q) for i, q in enumerate(prompts) if TEMPERATURE.get(q.get("category"), 0.0) == temperature]
        asked = [(i, q) for i, q in asked if q["question_id"] not in saved.records]
        for start in range(0, len(asked), args.batch_size):
            numbers, batch = zip(*asked[start : start + args.batch_size], strict=True)
            options = sampling | condition | sampler_ids(tok) | {"temperature": temperature}
            choices = converse(ask, tok, batch, longest, numbers, options)
            pairs = list(zip(batch, choices, strict=True))
            left_out += [f"{q.where} ({choice})" for q, choice in pairs if isinstance(choice, str)]
            saved.add([record(path.stem, q, choice) for q, choice in pairs if not isinstance(choice, str)])
            ticker.show(f"{path.stem}: {len(saved.records)}/{len(prompts)} questions")
    ticker.done()
    if left_out:
        say(f"{len(left_out)} questions are left out: {several(left_out)}")
    turns = [resets for answer in saved.records.values() for resets in answer["choices"][0]["resets"]]
    say(f"{path.stem}: {sum(turns)} resets in {len(turns)} answers")
    with naming(path):
        write_text("".join(json_line(answer) + "\n" for answer in saved.records.values()), path)
    print(f"wrote {path}")


def converse(ask, tok, batch, longest: int, sample_ids, options: dict) -> list[dict | str]:
    """Ask turn after turn. For each question {"index", "turns", "resets"}, or why it has no answer: the chat grows
    longer than `longest` tokens, or an answer cannot be rendered for the next turn (in Llama 2's format none may spell
    [INST])."""
    chats: list[list[dict]] = [[] for _ in batch]
    choices: list[dict | str] = [{"index": 0, "turns": [], "resets": []} for _ in batch]
    for turn in range(max(len(q["turns"]) for q in batch)):
        ids = {}
        for i, q in enumerate(batch):
            if turn == len(chats[i]) // 2 < len(q["turns"]):
                chats[i].append({"role": "user", "content": q["turns"][turn]})
                try:
                    ids[i] = tok.render(chats[i])
                except InputError as error:
                    choices[i] = f"turn {turn + 1}: {error}"
                if len(ids.get(i, ())) > longest:
                    choices[i] = f"turn {turn + 1}: {len(ids.pop(i))} tokens are too long"
        events = ask(list(ids.values()), sample_ids=[1000 * turn + sample_ids[i] for i in ids], **options)
        answers = {event.row: event.generation for event in events if isinstance(event, Done)}
        for row, i in enumerate(ids):
            chats[i].append({"role": "assistant", "content": tok.decode(answers[row].tokens)})
            choices[i]["turns"].append(chats[i][-1]["content"])
            choices[i]["resets"].append(answers[row].resets)
    return choices


def record(model: str, question: Prompt, choice: dict) -> dict:
    """FastChat's line for a question."""
    about = json.dumps([model, question["question_id"], choice["turns"]])
    return {
        "question_id": question["question_id"],
        "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [choice],
        "tstamp": time.time(),
    }
