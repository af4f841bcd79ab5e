"""Published sets of prompts, told apart by their columns and keys.

    -> {"prompt": […], "set": "advbench", "benign": false, "target": "Sure, here is …"}

    AdvBench               llm-attacks/llm-attacks      harmful_behaviors.csv
    MaliciousInstructions  vinid/safety-tuned-llamas    I-MaliciousInstructions.json
    SimpleSafetyTests      bertiev/SimpleSafetyTests    SimpleSafetyTests - test cases.csv
    StrongREJECT           alexandrasouly/strongreject  strongreject_dataset.csv
    XSTest                 paul-rottger/xstest          xstest_prompts.csv
    HarmBench              centerforaisafety/HarmBench  harmbench_behaviors_text_*.csv
    JailbreakBench         JailbreakBench/JBB-Behaviors harmful-behaviors.csv, and harmless twins:
                                                        benign-behaviors.csv
    MT-Bench               lm-sys/FastChat              question.jsonl
    safe answers           vinid/safety-tuned-llamas    safety_only_data_Instructions.json
    I-Alpaca, I-CoNa, …    vinid/safety-tuned-llamas    {"instructions": [texts]}
    AlpacaEval             tatsu-lab/alpaca_eval        text_davinci_003.json
    OpenAssistant          OpenAssistant/oasst2         the first message of each tree, its best reply
    any other list         [{"instruction", "input", "output"}, …]

"id", "category" and MT-Bench's "turns" come along, and so does an answer: as "safe_answer" to what
should not be done, else as "reference". Most lists do not say whether they ask for harm: those of
safety-tuned-llamas are known by name (roughly: Q-Harm holds many questions that hurt nobody), others
need `--benign` or `--unsafe`. HarmBench's behaviours about copyright, which a judge of safety does
not judge, and those with a context are sets of their own.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from data.prepare import Outcome, json_objects, message, question, read_text, words_of
from data.prepare.oasst import NOT_READY, count_prompters, is_ready, oasst_reason, usable_replies
from model import InputError

CSV_SETS = {  # set -> our names for the columns that are read
    "advbench": {"prompt": "goal", "target": "target"},
    "simple_safety_tests": {"prompt": "prompts_final", "id": "id", "category": "harm_area"},
    "strongreject": {"prompt": "forbidden_prompt", "category": "category"},
    "harmbench": {
        "prompt": "Behavior",
        "id": "BehaviorID",
        "category": "SemanticCategory",
        "kind": "FunctionalCategory",
        "context": "ContextString",
    },
    "jailbreakbench": {"prompt": "Goal", "id": "Index", "category": "Category", "target": "Target"},
    "xstest": {"prompt": "prompt", "id": "id", "category": "type", "label": "label"},
}
LISTS = {  # files known by name, of safety-tuned-llamas and JailbreakBench -> our name, and whether they are benign
    "safety_only_data_Instructions": ("safety_tuned", False),
    "I-Alpaca": ("i_alpaca", True),
    "I-CoNa": ("i_cona", False),
    "Q-Harm": ("q_harm", False),
    "harmful-behaviors": ("jailbreakbench", False),
    "benign-behaviors": ("jailbreakbench-benign", True),
}


def prompt_rows(path: str, benign: bool | None = None) -> Iterator[Outcome]:
    """The outcome of every prompt. benign: of lists that do not say whether they are."""
    text = read_text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # a line for each prompt: JSON or CSV
        whole = None
    if isinstance(whole, list):
        yield from answered_prompts(path, whole, benign)
    elif isinstance(whole, dict) and "instructions" in whole:
        yield from text_prompts(path, whole, benign)
    elif text.lstrip().startswith(("{", "[")):
        yield from (line_prompt(where, item) for where, item in json_objects(path))
    else:
        yield from csv_prompts(path, text, benign)


def questions_of(paths: list[str]) -> dict[str, str]:
    """Question -> the file that it is in."""
    # Harmless or not makes no difference here.
    rows = [(row, path) for path in paths for row in prompt_rows(path, benign=False) if isinstance(row, dict)]
    return {words_of(question(row)): path for row, path in reversed(rows)}


def row_of(prompt: str, name: str, benign: bool, **more) -> Outcome:
    if not prompt.strip():
        return "empty prompt"
    return {"prompt": [message("user", prompt)], "set": name, "benign": benign, **more}


def csv_prompts(path: str, text: str, benign: bool | None) -> Iterator[Outcome]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        found = lines.fieldnames or []
        kind = next((name for name, columns in CSV_SETS.items() if {*columns.values()} <= {*found}), None)
        if kind is None:
            known = "`python -m data.prepare prompts --help` names those it knows"
            raise InputError(f"{path}: columns {', '.join(found)} of no known set: {known}")
        for line in lines:
            where = f"{path}:{lines.line_num}"
            if None in line or None in line.values():
                raise InputError(f"{where}: {len(found)} columns expected; get the file again")
            row = {ours: line[column].strip() for ours, column in CSV_SETS[kind].items()}
            yield csv_row(kind, row, where, benign)
    except csv.Error as error:
        raise InputError(f"{path}:{lines.reader.line_num}: not CSV ({error}); get the file again") from None


def csv_row(kind: str, row: dict, where: str, benign: bool | None) -> Outcome:
    """The outcome, after what has to be done in one kind of set alone."""
    name, harmless, prompt = kind, False, row.pop("prompt")
    if kind == "xstest":  # its unsafe prompts look like the safe ones, yet must be refused
        label = row.pop("label")
        if label not in ("safe", "unsafe"):
            raise InputError(f"{where}: {label!r} is no label; get the file again")
        harmless = label == "safe"
    elif kind == "harmbench":
        behaviour, context = row.pop("kind"), row.pop("context")
        name += "" if behaviour == "standard" else f"-{behaviour}"
        prompt = f"{context}\n\n---\n\n{prompt}" if context else prompt  # as HarmBench does it
    elif kind == "jailbreakbench":
        name, harmless = what_list(where.rpartition(":")[0], benign)
    return row_of(prompt, name, harmless, **row)


def what_list(path: str, benign: bool | None) -> tuple[str, bool]:
    """What the set is called, and whether it is benign: by the name of its file, or as --benign or --unsafe say."""
    name = Path(path).name.split(".")[0]
    if name not in LISTS and benign is None:
        raise InputError(f"{path}: does not say whether it is harmless; add --benign or --unsafe")
    return LISTS.get(name, (name, benign))


def text_prompts(path: str, item: dict, benign: bool | None) -> Iterator[Outcome]:
    """One object with the texts in one list, and in MaliciousInstructions their categories in another."""
    texts, tags = item["instructions"], item.get("tags")
    of_texts = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not of_texts or not (tags is None or (isinstance(tags, list) and len(tags) == len(texts))):
        raise InputError(f'{path}: "instructions" are no texts, or do not match "tags"; get the file again')
    if tags is None:
        yield from (row_of(text, *what_list(path, benign)) for text in texts)
    else:
        pairs = zip(texts, tags, strict=True)
        yield from (row_of(text, "malicious_instructions", False, category=tag) for text, tag in pairs)


def answered_prompts(path: str, items: list, benign: bool | None) -> Iterator[Outcome]:
    """Instructions with answers. AlpacaEval's say which data set they come from and who has answered."""
    for number, item in enumerate(items, start=1):
        try:
            instruction, more, answer = ((item.get(key) or "").strip() for key in ("instruction", "input", "output"))
        except AttributeError:
            raise InputError(f'{path}: item {number} has no texts "instruction", "input" and "output"') from None
        if {"dataset", "generator"} <= set(item):
            name, harmless, rest = "alpaca_eval", True, {"category": item["dataset"]}
        else:
            (name, harmless), rest = what_list(path, benign), {}
        if answer:
            rest["reference" if harmless else "safe_answer"] = answer
        yield row_of(f"{instruction}\n\n{more}" if more else instruction, name, harmless, **rest)


def line_prompt(where: str, item: dict) -> Outcome:
    """The outcome of a line: an OpenAssistant tree, what this program has written before, or MT-Bench's question."""
    prompt, turns = item.get("prompt"), item.get("turns")
    if isinstance(prompt, dict):
        return tree_prompt(where, item)
    if isinstance(prompt, list) and prompt and all(map(is_turn, prompt)):
        return item
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns) or "question_id" not in item:
        raise InputError(f'{where}: "prompt" is no list of messages, nor is it a tree or a question of MT-Bench')
    # FastChat's judge finds the answers by question_id.
    rest = {"question_id": item["question_id"], "category": item.get("category"), "turns": [t.strip() for t in turns]}
    return row_of((turns or [""])[0], "mt_bench", True, **rest)


def tree_prompt(where: str, tree: dict) -> Outcome:
    """The first message of an OpenAssistant tree, with its best reply."""
    count_prompters(where, tree["prompt"])  # checks its form
    if reason := oasst_reason(tree["prompt"]) if is_ready(tree) else NOT_READY:
        return reason
    replies = usable_replies(tree["prompt"])
    answer = {"reference": replies[0]["text"].strip()} if replies else {}
    name = "oasst2" if "oasst2" in Path(where).name else "oasst"
    return row_of(tree["prompt"]["text"], name, True, **answer)


def is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
