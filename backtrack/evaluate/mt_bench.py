"""Answers to MT-Bench, in the format that FastChat's judge reads. Nothing here judges them.

    python -m backtrack.evaluate --ckpt runs/sft --prompts mt_bench.jsonl --mt-bench answers/

Both turns of every question, sampled as FastChat does it, by category; the number of resets stands beside each turn.
They are all false ones: the questions are harmless. https://github.com/lm-sys/FastChat, fastchat/llm_judge
"""

import hashlib
import json
import time
from pathlib import Path

from backtrack.evaluate.prompts import Prompt
from backtrack.generate import Done, Options, room_for_answer
from backtrack.rows import json_line, json_lines, several
from backtrack.run.say import Ticker, say
from model.checkpoint import weights_digest
from model.errors import InputError
from model.files import write_text

TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # fastchat/llm_judge/common.py


def files(prompts: list[Prompt], args) -> list[Path]:
    """Where the answers of each checkpoint go. InputError if the prompts are no questions, or two files are one."""
    for p in prompts:
        turns = p.get("turns")
        is_question = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if "question_id" not in p or not is_question:
            raise InputError(f"{p.where}: no question_id or turns; make them with data.prepare")
    paths = [Path(args.mt_bench) / f"{Path(ckpt).resolve().name}.jsonl" for ckpt in args.ckpt]
    if len(set(paths)) < len(paths):
        raise InputError("--mt-bench: two of --ckpt end in the same name, which FastChat tells models by")
    return paths


def answer(path: Path, ckpt: str, ask, positions: int, tok, prompts: list[Prompt], condition: dict, args) -> None:
    """Answer the questions that the file has no answers for. ask: stream() of the model; it has so many positions."""
    made_with = {name: getattr(args, name) for name in ("max_new_tokens", "top_p", "seed", "dtype")} | condition
    made_with["weights"] = weights_digest(ckpt)
    done = read(path, prompts, made_with)
    known = {answer["question_id"] for answer in done}
    questions = [p for p in prompts if p["question_id"] not in known]
    number = {p["question_id"]: i for i, p in enumerate(prompts)}  # of the samples: the same when it goes on
    long, ticker = [], Ticker()
    for temperature in sorted({temperature_of(q) for q in questions}):
        asked = [q for q in questions if temperature_of(q) == temperature]
        for start in range(0, len(asked), args.batch_size):
            batch = asked[start : start + args.batch_size]
            sample_ids = [number[q["question_id"]] for q in batch]
            choices = converse(ask, positions, tok, batch, temperature, sample_ids, condition, args)
            for q, choice in zip(batch, choices, strict=True):
                if choice is None:
                    long.append(q.where)
                else:
                    done.append(record(path.stem, ckpt, q, choice, made_with))
            write_text("".join(json_line(answer) + "\n" for answer in done), path)
            ticker.show(f"{path.stem}: {len(done)}/{len(prompts)} questions")
    ticker.done()
    if long:
        say(f"{len(long)} questions are left out, for they and their answers are too long: {several(long)}")
    turns = [resets for answer in done for resets in answer["choices"][0]["resets"]]
    say(f"{path.stem}: {sum(turns)} resets in {len(turns)} answers")
    print(f"wrote {path}")


def temperature_of(question: Prompt) -> float:
    return TEMPERATURE.get(question.get("category"), 0.0)


def converse(
    ask, positions: int, tok, batch: list[Prompt], temperature: float, sample_ids: list[int], condition: dict, args
) -> list[dict | None]:
    """Ask turn after turn: {"index", "turns", "resets"}, or None where the chat grows too long for the model."""
    chats: list[list[dict]] = [[] for _ in batch]
    choices: list[dict | None] = [{"index": 0, "turns": [], "resets": []} for _ in batch]
    options = Options(
        tok.reset_id,
        [],
        args.max_new_tokens,
        max_resets=condition["max_resets"],
        on_reset=condition["on_reset"],
    )
    longest = positions - room_for_answer(options)
    for turn in range(max(len(q["turns"]) for q in batch)):
        ids = {}
        for i, q in enumerate(batch):
            if turn < len(q["turns"]) and choices[i] is not None:
                chats[i].append({"role": "user", "content": q["turns"][turn]})
                ids[i] = tok.render(chats[i])
                if len(ids[i]) > longest:
                    del ids[i]
                    choices[i] = None
                    if args.on_long == "error":
                        raise InputError(f"{q.where}: too long in turn {turn + 1}; lower --max-new-tokens")
        events = ask(
            list(ids.values()),
            reset_id=tok.reset_id,
            stop_ids=tok.stop_ids,
            vocab_size=tok.vocab_size,
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            top_p=args.top_p,
            seed=args.seed,
            sample_ids=[1000 * turn + sample_ids[i] for i in ids],
            **condition,
        )
        answers = {event.row: event.generation for event in events if isinstance(event, Done)}
        for row, i in enumerate(ids):
            chats[i].append({"role": "assistant", "content": tok.decode(answers[row].tokens)})
            choices[i]["turns"].append(chats[i][-1]["content"])
            choices[i]["resets"].append(answers[row].resets)
    return choices


def record(model: str, ckpt: str, question: Prompt, choice: dict, made_with: dict) -> dict:
    """FastChat's line for a question, and what it was made with."""
    about = json.dumps([ckpt, question["question_id"], choice["turns"]])
    return {
        "question_id": question["question_id"],
        "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [choice],
        "tstamp": time.time(),
        "made_with": made_with | {"question": digest(question)},
    }


def digest(question: dict) -> str:
    return hashlib.sha256(json.dumps([question["turns"], question.get("category")]).encode()).hexdigest()[:16]


def read(path: Path, prompts: list[Prompt], made_with: dict) -> list[dict]:
    """The answers that are there. InputError if they are another model's, or of other settings or questions."""
    done = [answer for _, answer in json_lines(path)] if path.is_file() else []
    asked = {p["question_id"]: digest(p) for p in prompts}
    for answer in done:
        if not isinstance(answer, dict) or not isinstance(answer.get("made_with"), dict):
            raise InputError(
                f"{path}: does not say what model its answers are of; delete it or choose another --mt-bench"
            )
        question = asked.get(answer["question_id"], answer["made_with"].get("question"))
        for name, now in (made_with | {"question": question}).items():
            before = answer["made_with"].get(name)
            if before != now:
                raise InputError(
                    f"{path}: was begun with {name} {before}, now {now}; delete it or choose another --mt-bench"
                )
    return done
