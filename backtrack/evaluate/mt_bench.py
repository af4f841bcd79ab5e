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

from backtrack.evaluate.answers import CONDITION, adding_to, positions_of, sampler_of
from backtrack.evaluate.prompts import Prompt, sampler_ids
from backtrack.evaluate.results import naming
from backtrack.generate import Done, Options, room_for_answer
from backtrack.rows import json_line, json_lines, several
from backtrack.run.say import Ticker, say
from model import load_tokenizer
from model.checkpoint import weights_digest
from model.errors import InputError
from model.files import write_text

TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # fastchat/llm_judge/common.py
TOO_LONG = "too long"


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
        with adding_to(path):
            answer(path, ckpt, prompts, args)


def answer(path: Path, ckpt: str, prompts: list[Prompt], args) -> None:
    """Answer the questions that the file has no answers for."""
    tok, ask, positions = load_tokenizer(ckpt), sampler_of(ckpt, args), positions_of(ckpt, args)
    condition = {name: getattr(args, name)[0] for name in CONDITION}
    limits = {"max_resets": condition["max_resets"], "on_reset": condition["on_reset"]}
    longest = positions - room_for_answer(Options(tok.reset_id, [], args.max_new_tokens, **limits))
    made_with = {name: getattr(args, name) for name in ("max_new_tokens", "top_p", "seed", "dtype")} | condition
    made_with["weights"] = weights_digest(ckpt)
    done = read(path, prompts, made_with)
    known = {answer["question_id"] for answer in done}
    number = {p["question_id"]: i for i, p in enumerate(prompts)}  # of the samples: the same when it goes on
    questions = [p for p in prompts if p["question_id"] not in known]
    left_out, ticker = [], Ticker()
    for temperature in sorted({temperature_of(q) for q in questions}):
        asked = [q for q in questions if temperature_of(q) == temperature]
        for start in range(0, len(asked), args.batch_size):
            batch = asked[start : start + args.batch_size]
            sampling = {"temperature": temperature, "top_p": args.top_p, "seed": args.seed}
            options = sampling | condition | sampler_ids(tok) | {"max_new_tokens": args.max_new_tokens}
            sample_ids = [number[q["question_id"]] for q in batch]
            for q, choice in zip(batch, converse(ask, tok, batch, longest, sample_ids, options), strict=True):
                if isinstance(choice, str):
                    left_out.append(f"{q.where} ({choice})")
                    if TOO_LONG in choice and args.on_long == "error":
                        raise InputError(f"{left_out[-1]}; lower --max-new-tokens, or --on-long skip")
                else:
                    done.append(record(path.stem, ckpt, q, choice, made_with))
            with naming(path):
                write_text("".join(json_line(answer) + "\n" for answer in done), path)
            ticker.show(f"{path.stem}: {len(done)}/{len(prompts)} questions")
    ticker.done()
    if left_out:
        say(f"{len(left_out)} questions are left out: {several(left_out)}")
    turns = [resets for answer in done for resets in answer["choices"][0]["resets"]]
    say(f"{path.stem}: {sum(turns)} resets in {len(turns)} answers")
    print(f"wrote {path}")


def temperature_of(question: Prompt) -> float:
    return TEMPERATURE.get(question.get("category"), 0.0)


def converse(ask, tok, batch: list[Prompt], longest: int, sample_ids: list[int], options: dict) -> list[dict | str]:
    """Ask turn after turn. For each question {"index", "turns", "resets"}, or why it has no answer: the chat grows
    longer than `longest` tokens, or an answer cannot be rendered for the next turn (in Llama 2's format none may spell
    [INST])."""
    chats: list[list[dict]] = [[] for _ in batch]
    choices: list[dict | str] = [{"index": 0, "turns": [], "resets": []} for _ in batch]
    for turn in range(max(len(q["turns"]) for q in batch)):
        ids = {}
        for i, q in enumerate(batch):
            if turn < len(q["turns"]) and not isinstance(choices[i], str):
                chats[i].append({"role": "user", "content": q["turns"][turn]})
                try:
                    ids[i] = tok.render(chats[i])
                    if len(ids[i]) > longest:
                        raise InputError(TOO_LONG)
                except InputError as error:
                    ids.pop(i, None)
                    choices[i] = f"turn {turn + 1}: {error}"
        sample_ids_now = [1000 * turn + sample_ids[i] for i in ids]
        events = ask(list(ids.values()), sample_ids=sample_ids_now, **options)
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
    """The answers that are there. Raises InputError if they are another model's, or of other settings or questions."""
    done = [answer for _, answer in json_lines(path)] if path.is_file() else []
    asked = {p["question_id"]: digest(p) for p in prompts}
    way_out = "delete it or choose another --mt-bench"
    for answer in done:
        if not isinstance(answer, dict) or not isinstance(answer.get("made_with"), dict):
            raise InputError(f"{path}: does not say what model its answers are of; {way_out}")
        question = asked.get(answer["question_id"], answer["made_with"].get("question"))
        for name, now in (made_with | {"question": question}).items():
            before = answer["made_with"].get(name)
            if before != now:
                raise InputError(f"{path}: was begun with {name} {before}, now {now}; {way_out}")
    return done
