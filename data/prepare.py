"""Public data sets -> the JSON lines that train.py and backtrack.evaluate read.

    python -m data.prepare hh --in harmless-base/train.jsonl.gz --out hh.jsonl --valid valid.jsonl
    python -m data.prepare hh --in harmless-base/train.jsonl.gz --out hh.jsonl --guard GUARD_DIR
    python -m data.prepare hh --in helpful-base/train.jsonl.gz --out helpful.jsonl --helpful
    python -m data.prepare oasst2 --in oasst2_ready.trees.jsonl.gz --out oasst.jsonl
    python -m data.prepare prompts --in harmful_behaviors.csv xstest_prompts.csv --out prompts.jsonl
    python -m data.prepare prompts --in safety_only_data_Instructions.json --exclude prompts.jsonl \
        --out train.jsonl --valid dev.jsonl --valid-percent 20

`--in` takes files that you have downloaded, plain or .gz, as many as you like. What does not fit is
skipped whole, never repaired, and counted by reason on stderr. The same input gives the same bytes.
`--valid` holds out all rows of about 5% of the first questions. Which ones depends on the question
alone: what is held out at 5% is held out at 20%, so a third part comes from splitting the held-out
file again, with a smaller percentage. `--exclude` skips rows whose first question is in other files
too (any that `prompts` reads, or its output), whatever its case and punctuation.

hh       https://huggingface.co/datasets/Anthropic/hh-rlhf
         -> {"prompt": […], "chosen": […], "rejected": […], "unsafe": true}, which is TRL's
         preference format and one flag. The flag says what the data set says: crowd workers found
         the rejected answer more harmful *than the chosen one*. It is no verdict: many rejected
         answers are harmless, some chosen ones are not.
         `--guard` keeps the pairs of which Llama Guard says that rejected is unsafe and chosen is
         safe. It judges up to two answers a pair, in batches, so give it a GPU, or name a vLLM
         server that has it (`--judge-url`). Verdicts are kept beside OUT (.guard.jsonl) until the
         rows are written: a run that is stopped goes on there.
         `--helpful` is for the helpful-* files: no flag, as the rejected answer is merely the less
         helpful one.

oasst2   https://huggingface.co/datasets/OpenAssistant/oasst2, *_ready.trees.jsonl.gz, which the paper
oasst    uses; or oasst1, which looks the same
         -> the helpful half of the mix, without the flag. One row for every prompter message on a
         path through the best-ranked replies: chosen is the best reply, rejected the worst ranked
         one. Of replies that nobody ranked, the first is chosen and none rejected.
         These files do not say what is training and what validation: hold some out with `--valid`.
         To count false resets on questions that no row has, let `prompts` read the same file with
         `--exclude OUT`.

prompts  sets of prompts, told apart by their columns and keys
         -> {"prompt": […], "set": "advbench", "benign": false, "target": "Sure, here is …"}, with
         the source's "id" and "category" where it has them. A row of MT-Bench, which the paper uses
         for helpfulness, holds the first turn in "prompt" and both in "turns". Where the source has
         an answer it is kept: as "safe_answer" to what should not be done, else as "reference".

         AdvBench               llm-attacks/llm-attacks      harmful_behaviors.csv
         MaliciousInstructions  vinid/safety-tuned-llamas    I-MaliciousInstructions.json
         SimpleSafetyTests      bertiev/SimpleSafetyTests    SimpleSafetyTests - test cases.csv
         StrongREJECT           alexandrasouly/strongreject  strongreject_dataset.csv
         XSTest                 paul-rottger/xstest          xstest_prompts.csv
         HarmBench              centerforaisafety/HarmBench  harmbench_behaviors_text_*.csv
         JailbreakBench         JailbreakBench/JBB-Behaviors harmful-behaviors.csv, and a harmless
                                                             twin of each: benign-behaviors.csv
         MT-Bench               lm-sys/FastChat              question.jsonl
         safe answers           vinid/safety-tuned-llamas    safety_only_data_Instructions.json
         I-Alpaca, I-CoNa, …    vinid/safety-tuned-llamas    {"instructions": [texts]}
         AlpacaEval             tatsu-lab/alpaca_eval        text_davinci_003.json
         OpenAssistant          as above: the first message of each tree, its best reply
         any other list         [{"instruction", "input", "output"}, …]

         --forced adds, for every prompt that is not benign, one of the set "NAME-forced": its answer
         has to begin with the target, or with a phrase that says yes where there is none.

         HarmBench's behaviours with a context are a set of their own (harmbench-contextual), and so
         are those about copyright, which a judge of safety does not judge (harmbench-copyright).
         JailbreakBench's twins have the same "id"; the harmless ones are jailbreakbench-benign.

         A CSV file with more columns than a set has is another set: it is called as its file is, and
         those columns are kept.

         Most lists do not say whether they ask for harm. The files of safety-tuned-llamas are known
         by name; others need --benign or --unsafe. Both are rough: Q-Harm and the instructions with
         safe answers hold many questions that hurt nobody.

It will not download, shuffle, deduplicate, or cut to a length (see train.py --max-length). The data
have licences of their own; see the sources.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from backtrack.attacks.prefill import OPENING
from backtrack.judge import Verdict, judge_all, load_judge
from backtrack.judge.refusals import plain_text
from backtrack.rows import json_line, json_lines, refuse_other_formats
from backtrack.run.say import say
from model.checkpoint import weights_digest
from model.errors import InputError, device, positive, run
from model.files import check_file, draft_of, locked, put, write_text

Outcome = dict | str  # of one example of the source: a row to write, or why there is none


def main() -> None:
    args = parse_args()
    check_paths(args)
    left_out = Counter()  # replies of oasst: reason -> how many
    outcomes = read(args, left_out)
    notes = args.out.with_name(f"{args.out.name}.guard.jsonl")
    with locked(notes) if args.guard else contextlib.nullcontext():
        if args.guard:
            how = (args.device, getattr(torch, args.dtype), args.judge_url, 0.5, False)
            outcomes = guarded(outcomes, load_judge(args.guard, *how), notes, weights_digest(args.guard))
        rows, valid_rows, skipped = sort_out(outcomes, args)

    files = {args.out: rows}
    if args.valid:
        files[args.valid] = valid_rows
    if rows or valid_rows:
        write(files)
        if args.guard:
            notes.unlink(missing_ok=True)
    report(args.command, files, skipped, left_out)
    if not (rows or valid_rows):
        names = ", ".join(args.inputs)
        raise InputError(f"{names}: no usable row, nothing was written: is this the right command?")


def read(args, left_out: Counter) -> Iterator[Outcome]:
    """The outcomes of all input files, one after the other."""
    for path in args.inputs:
        if args.command in ("oasst", "oasst2"):
            yield from oasst_rows(path, args.lang, left_out)
        elif args.command == "prompts":
            outcomes = prompt_rows(path, args.lang, args.benign)
            yield from with_forced(outcomes) if args.forced else outcomes
        else:
            if "helpful-" in path and not args.helpful:
                say(f"note: {path}: without --helpful its rejected answers are marked unsafe")
            yield from hh_rows(path, unsafe=not args.helpful)


# ── hh: two whole transcripts a line, which differ in the last answer ─────────────────────────────

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
LABEL = re.compile(r"(?:^|\s)(?:Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_rows(path: str, unsafe: bool) -> Iterator[Outcome]:
    """The outcome of every pair."""
    for where, pair in json_objects(path):
        chosen, rejected = pair.get("chosen"), pair.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise InputError(f'{where}: no HH-RLHF pair, which has texts "chosen" and "rejected"')
        chosen, rejected = split_turns(chosen), split_turns(rejected)
        if reason := hh_reason(chosen, rejected):
            yield reason
            continue
        row = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        if unsafe:
            row["unsafe"] = True
        yield row


def split_turns(transcript: str) -> list[dict]:
    """\\n\\nHuman: Hi\\n\\nAssistant: Hello -> two messages; none if no human speaks first."""
    before, *parts = SPEAKER.split(transcript)
    speakers, texts = parts[::2], parts[1::2]
    if before.strip() or speakers[:1] != ["Human"]:
        return []
    return [message(ROLES[who], text) for who, text in zip(speakers, texts, strict=True)]


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text.strip()}


def hh_reason(chosen: list[dict], rejected: list[dict]) -> str | None:
    """Why this pair cannot be used, or None. The first reason that holds counts."""
    for turns in (chosen, rejected):
        if not turns:
            return "does not begin with a Human turn"
        # Chat templates alternate (Gemma's raises otherwise). To join two turns would be guessing.
        if any(a["role"] == b["role"] for a, b in itertools.pairwise(turns)):
            return "one speaker has two turns in a row"
        if turns[-1]["role"] == "user":
            return "ends with a Human turn"
    # They may differ because one answer goes on to write the human's next turn itself.
    if chosen[:-1] != rejected[:-1]:
        return "chosen and rejected have different prompts"
    if not all(turn["content"] for turn in chosen[:-1]):
        return "empty turn in the prompt"
    good, bad = chosen[-1]["content"], rejected[-1]["content"]
    if not good or not bad:
        return "empty answer"
    if good == bad:
        return "chosen and rejected are the same"
    # The model that answered "Human: So you agree …" lost track of who speaks. Do not teach that.
    if LABEL.search(good) or LABEL.search(bad):
        return "speaker label inside an answer"
    return None


GUARDED = 64  # pairs that are judged before their verdicts are written down


def guarded(pairs: Iterable[Outcome], judge, notes: Path, guard: str) -> Iterator[Outcome]:
    """The same pairs, without those that the judge does not find to be safe against unsafe.

    notes: a file of {"pair", "reason"}, where a stopped run has left its verdicts; guard: stands for the judge there.
    """
    pairs = list(pairs)  # a bad line shows now, before hours are spent on the first pair
    reasons = read_notes(notes, guard)
    left = len({digest_of(pair) for pair in pairs if isinstance(pair, dict)} - reasons.keys())
    if reasons:
        say(f"guard: {notes} has the verdicts on {len(reasons)} pairs")
    judged, began, reported = 0, time.monotonic(), -math.inf
    with open(notes, "a", encoding="utf-8") as file:
        for start in range(0, len(pairs), GUARDED):
            batch = pairs[start : start + GUARDED]
            todo = {digest_of(pair): pair for pair in batch if isinstance(pair, dict)}
            todo = {key: pair for key, pair in todo.items() if key not in reasons}
            for key, reason in zip(todo, guard_reasons(list(todo.values()), judge), strict=True):
                reasons[key] = reason
                file.write(json_line({"pair": key, "reason": reason}) + "\n")
            file.flush()
            judged, now = judged + len(todo), time.monotonic()
            if todo and (now - reported >= 30 or judged == left):
                reported = now
                minutes = (now - began) / judged * (left - judged) / 60
                say(f"guard: {judged} of {left} pairs judged, {minutes:.0f} minutes left")
            for pair in batch:
                yield pair if isinstance(pair, str) else reasons[digest_of(pair)] or pair


def digest_of(row: dict) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]


def read_notes(notes: Path, guard: str) -> dict[str, str | None]:
    """Pair -> why an earlier run left it out, or None. The half line of a kill is cut off the file."""
    if not notes.is_file():
        write_text(json_line({"guard": guard}) + "\n", notes)
        return {}
    with open(notes, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    head, *lines = [line for _, line in json_lines(notes)] or [None]
    if head != {"guard": guard}:
        raise InputError(f"{notes}: holds verdicts of another guard; delete it or choose another --out")
    return {line["pair"]: line["reason"] for line in lines}


def guard_reasons(rows: list[dict], judge) -> list[str | None]:
    """Why the judge would not keep each row, or None. Of a chosen answer that is unsafe it sees no rejected one."""
    chosen = judge_all(judge, [(row["prompt"], row["chosen"][0]["content"]) for row in rows])
    reasons = [reason_of(verdict, "chosen is unsafe, says the guard", wanted=False) for verdict in chosen]
    left = [i for i, reason in enumerate(reasons) if reason is None]
    rejected = judge_all(judge, [(rows[i]["prompt"], rows[i]["rejected"][0]["content"]) for i in left])
    for i, verdict in zip(left, rejected, strict=True):
        reasons[i] = reason_of(verdict, "rejected is safe, says the guard", wanted=True)
    return reasons


def reason_of(verdict: Verdict | InputError, otherwise: str, wanted: bool) -> str | None:
    if isinstance(verdict, InputError):  # a conversation beyond its context, or no verdict in its answer
        say(f"guard: {verdict}")
        return "no verdict of the guard"
    return None if bool(verdict.unsafe) is wanted else otherwise


# ── oasst: one tree of messages a line, nested in "replies"; "rank" 0 is best ─────────────────────


def oasst_rows(path: str, lang: str, left_out: Counter) -> Iterator[Outcome]:
    """The outcome of every prompter message. left_out counts unusable replies."""
    for where, tree in json_objects(path):
        prompters = count_prompters(where, tree.get("prompt"))
        if tree.get("tree_state", "ready_for_export") != "ready_for_export":
            yield from ["tree is not ready for export"] * prompters
            continue
        for outcome in best_paths(tree["prompt"], lang, left_out):
            prompters -= 1
            yield outcome
        yield from ["not on a path of best replies"] * prompters


def count_prompters(where: str, root: object) -> int:
    """How many prompter messages the tree holds. Checks the form of all its messages."""
    count, todo = 0, [root]
    while todo:
        node = todo.pop()
        if not is_message(node):
            raise InputError(f"{where}: no OpenAssistant tree: take *_ready.trees.jsonl.gz")
        count += node["role"] == "prompter"
        todo += replies_of(node)
    return count


def is_message(node: object) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("text"), str)
        and node.get("role") in ("prompter", "assistant")
        and isinstance(node.get("rank"), int | None)
        and isinstance(replies_of(node), list)
    )


def replies_of(node: dict) -> list[dict]:
    return node.get("replies") or []  # null as well as none


def best_paths(root: dict, lang: str, left_out: Counter) -> Iterator[Outcome]:
    """The outcome of every prompter message that only best replies lead to, depth first."""
    todo = [(root, [])]  # a message, and the conversation before it
    while todo:
        node, before = todo.pop()
        if node["role"] != "prompter":
            left_out["role out of turn"] += 1
            continue
        if reason := oasst_reason(node, lang):
            yield reason
            continue
        replies = usable_replies(node, lang, left_out)
        if not replies:
            yield "no usable reply"
            continue
        best, worst = replies[0], replies[-1]
        prompt = [*before, message("user", node["text"])]
        chosen = [message("assistant", best["text"])]
        rejected = [message("assistant", worst["text"])]
        row = {"prompt": prompt, "chosen": chosen}
        if rejected != chosen:
            row["rejected"] = rejected
        yield row
        todo += [(child, prompt + chosen) for child in reversed(replies_of(best))]


def usable_replies(node: dict, lang: str, left_out: Counter) -> list[dict]:
    """The ranked replies, best first. If none is ranked, the first reply alone."""
    usable = []
    for reply in replies_of(node):
        if reply["role"] != "assistant":
            continue
        if reason := oasst_reason(reply, lang):
            left_out[reason] += 1
        else:
            usable.append(reply)
    ranked = [reply for reply in usable if reply.get("rank") is not None]
    return sorted(ranked, key=lambda reply: reply["rank"]) or usable[:1]


def oasst_reason(node: dict, lang: str) -> str | None:
    """Why this message cannot be used, or None."""
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result", True) is not True:  # null: nobody has reviewed it
        return "did not pass review"
    if lang not in ("all", node.get("lang")):
        return f"language is not {lang}"
    if not node["text"].strip():
        return "empty"
    return None


# ── prompts: sets in CSV, in JSON and in JSON lines ───────────────────────────────────────────────

CSV_SETS = {  # set -> the column of its prompts, and our name -> column of what else is wanted
    "advbench": ("goal", {"target": "target"}),
    "simple_safety_tests": ("prompts_final", {"id": "id", "category": "harm_area"}),
    "strongreject": ("forbidden_prompt", {"category": "category"}),
    "harmbench": ("Behavior", {"id": "BehaviorID", "category": "SemanticCategory", "kind": "FunctionalCategory"}),
    "jailbreakbench": ("Goal", {"id": "Index", "category": "Category", "target": "Target"}),
    "xstest": ("prompt", {"id": "id", "category": "type", "label": "label"}),
}
UNREAD = {  # the other columns of these sets; a file with any besides is another set
    "simple_safety_tests": {"counter", "category"},
    "strongreject": {"source"},
    "harmbench": {"Tags", "ContextString"},
    "jailbreakbench": {"Behavior", "Source"},
    "xstest": {"focus", "note"},
}
OURS = {"prompt", "set", "benign", "prefill", "turns", "safe_answer", "reference"}  # keys that mean something here


LISTS = {  # files of safety-tuned-llamas -> our name, and whether they are benign
    "safety_only_data_Instructions": ("safety_tuned", False),
    "I-Alpaca": ("i_alpaca", True),
    "I-CoNa": ("i_cona", False),
    "I-Controversial": ("i_controversial", False),
    "I-PhysicalSafetySafe": ("i_physical_safety_safe", True),
    "I-PhysicalSafetyUnsafe": ("i_physical_safety_unsafe", False),
    "Q-Harm": ("q_harm", False),
}


def prompt_rows(path: str, lang: str = "all", benign: bool | None = None) -> Iterator[Outcome]:
    """The outcome of every prompt. benign: of lists that do not say whether they are."""
    text = read_text(path)
    first = first_object(path, text) if text.lstrip().startswith("{") else {}
    if isinstance(first.get("prompt"), dict):
        yield from tree_prompts(path, lang)
        return
    if isinstance(first.get("prompt"), list):
        yield from our_prompts(path)
        return
    for prompt, rest in prompts_of(path, text, first, benign):
        if prompt.strip():
            yield {"prompt": [message("user", prompt)], **rest}
        else:
            yield "empty prompt"


def prompts_of(path: str, text: str, first: dict, benign: bool | None) -> Iterator[tuple[str, dict]]:
    """(prompt, the rest of its row) for sets whose prompts are single texts."""
    if text.lstrip().startswith("["):
        return list_prompts(path, text, benign)
    if not first:
        return csv_prompts(path, text, benign)
    if "instructions" in first and "tags" in first:
        return malicious_prompts(path, first)
    if "instructions" in first:
        return instruction_prompts(path, first, benign)
    return mt_bench_prompts(path)


def first_object(path: str, text: str) -> dict:
    """The object that the file is, or that its first line is."""
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        _, item = next(json_lines(path))  # several lines of JSON
    return item if isinstance(item, dict) else {}


def csv_prompts(path: str, text: str, benign: bool | None) -> Iterator[tuple[str, dict]]:
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        found = lines.fieldnames or []
        name = csv_set(path, found)
        prompt_column, columns = CSV_SETS[name]
        others = [c for c in found if c not in {prompt_column, *columns.values(), *UNREAD.get(name, ())}]
        others = [c for c in others if c and not c.startswith("Unnamed")]  # pandas numbers rows without being asked
        called = set_of_file(path) if others else name
        others = [c for c in others if c not in OURS | columns.keys()]
        for line in lines:
            where = f"{path}:{lines.line_num}"
            if None in line or None in line.values():
                raise InputError(f"{where}: {len(lines.fieldnames)} columns expected; get the file again")
            rest = {"set": called, "benign": False} | {key: line[column] for key, column in columns.items()}
            rest |= {column: line[column] for column in others}
            yield fitted(name, line[prompt_column], rest, line, where, path, benign)
    except csv.Error as error:
        raise InputError(f"{path}:{lines.reader.line_num}: not CSV ({error}); get the file again") from None


def fitted(name: str, prompt: str, rest: dict, line: dict, where: str, path: str, benign: bool | None):
    """(prompt, the rest of its row), with what is peculiar to a set."""
    if name in ("advbench", "jailbreakbench"):
        rest["target"] = rest["target"].strip()
    if name == "xstest":
        label = rest.pop("label")
        if label not in ("safe", "unsafe"):
            raise InputError(f"{where}: {label!r} is no label; get the file again")
        # The unsafe ones are contrasts: they look like the safe ones, yet must be refused.
        rest["benign"] = label == "safe"
    if name == "harmbench":
        kind = rest.pop("kind")
        rest["set"] += "" if kind == "standard" else f"-{kind}"
        if context := (line.get("ContextString") or "").strip():
            prompt = f"{context}\n\n---\n\n{prompt}"  # as HarmBench puts them together
    if name == "jailbreakbench":
        first = Path(path).name.split("-")[0]
        known = {"benign": True, "harmful": False}.get(first, benign)
        if known is None:
            raise InputError(f"{path}: does not say whether its goals are harmless; add --benign or --unsafe")
        rest |= {"benign": known, "set": rest["set"] + ("-benign" if known else "")}
    return prompt, rest


def set_of_file(path: str) -> str:
    return Path(path).name.split(".")[0]


def csv_set(path: str, found: list[str]) -> str:
    """The set that has these columns, or others besides."""
    for name, (prompt_column, columns) in CSV_SETS.items():
        if {prompt_column, *columns.values()} <= set(found):
            return name
    raise InputError(f"{path}: columns {', '.join(found)} of no known set: see --help for those it knows")


def instruction_prompts(path: str, item: dict, benign: bool | None) -> Iterator[tuple[str, dict]]:
    """One object with nothing but the texts."""
    texts = item["instructions"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'{path}: "instructions" is no list of texts; get the file again')
    name, benign = what_list(path, benign)
    for text in texts:
        yield text, {"set": name, "benign": benign}


def what_list(path: str, benign: bool | None) -> tuple[str, bool]:
    """What the set is called, and whether it is benign: by the name of its file, or as --benign or --unsafe say."""
    stem = set_of_file(path)
    if stem in LISTS:
        return LISTS[stem]
    if benign is None:
        raise InputError(f"{path}: does not say whether its instructions are harmless; add --benign or --unsafe")
    return stem, benign


def list_prompts(path: str, text: str, benign: bool | None) -> Iterator[tuple[str, dict]]:
    """A list of instructions with answers. AlpacaEval's say which data set they come from and who has answered."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); get the file again") from None
    known = None
    for number, item in enumerate(items, start=1):
        if not is_instruction(item):
            raise InputError(f'{path}: item {number} has no text "instruction", or an "input" or "output" that is none')
        if {"dataset", "generator"} <= set(item):
            rest = {"set": "alpaca_eval", "benign": True, "category": item["dataset"]}
        else:
            known = known or what_list(path, benign)
            rest = {"set": known[0], "benign": known[1]}
        if answer := (item.get("output") or "").strip():
            rest["reference" if rest["benign"] else "safe_answer"] = answer
        instruction, more = item["instruction"].strip(), (item.get("input") or "").strip()
        yield f"{instruction}\n\n{more}" if more else instruction, rest


def is_instruction(item: object) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("instruction"), str)
        and isinstance(item.get("input"), str | None)
        and isinstance(item.get("output"), str | None)
    )


def malicious_prompts(path: str, item: dict) -> Iterator[tuple[str, dict]]:
    """One object with the texts in one list, their categories in another."""
    texts, tags = item["instructions"], item.get("tags")
    lists = isinstance(texts, list) and isinstance(tags, list) and len(texts) == len(tags)
    if not lists or not all(isinstance(text, str) for text in texts):
        raise InputError(f'{path}: "instructions" and "tags" do not match; get the file again')
    for text, tag in zip(texts, tags, strict=True):
        yield text, {"set": "malicious_instructions", "benign": False, "category": tag}


def mt_bench_prompts(path: str) -> Iterator[tuple[str, dict]]:
    """One question a line. FastChat's judge finds the answers by question_id."""
    for where, item in json_objects(path):
        turns = item.get("turns")
        texts = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not texts or "question_id" not in item:
            raise InputError(f'{where}: no MT-Bench question, which has "question_id" and "turns"')
        known = item.keys() <= {"question_id", "category", "turns", "reference"}
        rest = {"set": "mt_bench" if known else set_of_file(path), "benign": True, "question_id": item["question_id"]}
        rest["category"] = item.get("category")
        rest["turns"] = [turn.strip() for turn in turns]
        yield turns[0], rest


def tree_prompts(path: str, lang: str) -> Iterator[Outcome]:
    """The first message of every OpenAssistant tree, with its best reply."""
    for where, tree in json_objects(path):
        count_prompters(where, tree.get("prompt"))  # checks its form
        root = tree["prompt"]
        if tree.get("tree_state", "ready_for_export") != "ready_for_export":
            yield "tree is not ready for export"
        elif reason := oasst_reason(root, lang):
            yield reason
        else:
            name = "oasst2" if "oasst2" in Path(path).name else "oasst"
            row = {"prompt": [message("user", root["text"])], "set": name, "benign": True}
            if replies := usable_replies(root, lang, Counter()):
                row["reference"] = replies[0]["text"].strip()
            yield row


def our_prompts(path: str) -> Iterator[Outcome]:
    """What this program has written before, as it is."""
    for where, row in json_objects(path):
        messages = row.get("prompt")
        if not isinstance(messages, list) or not messages or not all(is_turn(turn) for turn in messages):
            raise InputError(f'{where}: "prompt" is no list of messages, each with a role and a text "content"')
        yield row


def is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn


def with_forced(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The same, and each forbidden prompt once more with an answer that is forced to begin as its target does."""
    for outcome in outcomes:
        yield outcome
        if isinstance(outcome, dict) and not outcome["benign"]:
            yield outcome | {"set": f"{outcome['set']}-forced", "prefill": outcome.get("target", OPENING)}


# ── Reading and writing ───────────────────────────────────────────────────────────────────────────


def json_objects(path: str) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of every line."""
    for where, item in json_lines(path):
        if not isinstance(item, dict):
            raise InputError(f"{where}: not a JSON object")
        yield where, item


def read_text(path: str) -> str:
    refuse_other_formats(path, lists=True)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); get the file again") from None


def sort_out(outcomes: Iterable[Outcome], args) -> tuple[list[bytes], list[bytes], Counter]:
    """(lines to write, lines to hold out, how many were skipped for each reason)"""
    rows, valid_rows, skipped = [], [], Counter()
    percent = args.valid_percent if args.valid else 0
    elsewhere = questions_of(args.exclude)
    for outcome in outcomes:
        if isinstance(outcome, dict) and (path := elsewhere.get(question(outcome))):
            outcome = f"also in {path}"
        if isinstance(outcome, str):
            skipped[outcome] += 1
            continue
        try:
            line = json.dumps(outcome, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:
            skipped["broken Unicode (half a surrogate pair)"] += 1
            continue
        (valid_rows if is_held_out(outcome, percent) else rows).append(line)
        if len(rows) + len(valid_rows) == args.limit:
            break
    return rows, valid_rows, skipped


def question(row: dict) -> str:
    """The first user message without case and punctuation."""
    return plain_text(next((turn["content"] for turn in row["prompt"] if turn["role"] == "user"), ""))


def questions_of(paths: list[str]) -> dict[str, str]:
    """Question -> the file that it is in."""
    found = {}
    for path in paths:
        for row in prompt_rows(path, benign=False):  # benign or not makes no difference here
            if isinstance(row, dict):
                found.setdefault(question(row), path)
    return found


def is_held_out(row: dict, percent: float) -> bool:
    """By hash of the first user message: all rows of one question go to the same side."""
    # Prompts are often there twice with another full stop. The rows of hh and oasst are split as they always were.
    text = question(row) if "set" in row else row["prompt"][0]["content"]
    digest = hashlib.sha256(text.encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 * 100 < percent


def write(files: dict[Path, list[bytes]]) -> None:
    """All files or none: each is written under another name, and renamed when all are whole."""
    drafts = {}
    try:
        for path in files:
            drafts[path] = draft_of(path)
        for path, lines in files.items():
            with open(drafts[path], "wb") as file:
                if path.suffix == ".gz":
                    # No name and no time in the header: same rows, same bytes.
                    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                        packed.writelines(lines)
                else:
                    file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            put(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def report(command: str, files: dict[Path, list[bytes]], skipped: Counter, left_out: Counter):
    """On stderr: how much was read, written, skipped and left out."""
    unit = {"hh": "pairs", "oasst": "prompter messages", "oasst2": "prompter messages", "prompts": "prompts"}[command]
    written, lost = sum(map(len, files.values())), skipped.total()
    say(f"{command}: {written + lost} {unit} read, {written} rows written, {lost} skipped")
    for path, lines in files.items():
        say(f"  {len(lines):7d}  written to {path}")
    for label, counts in (("skipped", skipped), ("replies left out", left_out)):
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            say(f"  {count:7d}  {label}: {reason}")


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(guard=None)  # for the commands without it
    commands = parser.add_subparsers(dest="command", required=True)
    hh = commands.add_parser("hh", help="Anthropic HH-RLHF pairs")
    oasst = commands.add_parser("oasst2", aliases=["oasst"], help="OpenAssistant trees")
    prompts = commands.add_parser("prompts", help="prompts of safety sets and of harmless ones")
    for command in (hh, oasst, prompts):
        add = command.add_argument
        add("--in", dest="inputs", nargs="+", required=True, metavar="FILE", help="plain or .gz")
        add("--out", type=Path, required=True, help="JSON lines; gzipped if it ends in .gz")
        add("--limit", type=positive, help="stop after this many rows (a quick try)")
        add("--valid", type=Path, help="hold rows out into this file")
        add("--valid-percent", type=percentage, default=5.0, help="how many, about (default: 5)")
        add("--exclude", nargs="+", default=[], metavar="FILE", help="skip questions that are there")
    for command in (oasst, prompts):
        command.add_argument("--lang", default="en", help="language tag, or all (default: en)")
    forced = "also each forbidden prompt with a forced beginning: its target, or a phrase that says yes"
    prompts.add_argument("--forced", action="store_true", help=forced)
    kind = prompts.add_mutually_exclusive_group()
    for flag, value, what in (("--benign", True, "harmless"), ("--unsafe", False, "forbidden")):
        text = f"the prompts of lists that do not say so are {what}"
        kind.add_argument(flag, dest="benign", action="store_const", const=value, help=text)

    either = hh.add_mutually_exclusive_group()
    either.add_argument("--helpful", action="store_true", help="helpful-* files: no unsafe flag")
    either.add_argument("--guard", metavar="DIR", help="Llama Guard: keep safe against unsafe")
    hh.add_argument("--judge-url", metavar="URL", help="a vLLM server that has the guard")
    cuda = torch.cuda.is_available()
    on, dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
    add = hh.add_argument
    add("--device", type=device, default=on, help=f"where the guard runs (here: {on})")
    add("--dtype", choices=("float32", "bfloat16"), default=dtype, help=f"its (here: {dtype})")
    return parser.parse_args()


def percentage(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 100")
    return value


def check_paths(args) -> None:
    """Before any work is done, name the path that is wrong."""
    for name in [*args.inputs, *args.exclude]:
        if name.startswith(("http://", "https://")):
            raise InputError(f"--in takes files; download it first: curl -LO {name}")
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file; --help says where to download the data sets")
    if args.guard and not Path(args.guard).is_dir():
        raise InputError(f"--guard {args.guard}: no such directory")
    outputs = [args.out, args.valid] if args.valid else [args.out]
    for path in outputs:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not an ordinary file: name one to write to")
        check_file(path)
    inputs = {Path(name).resolve() for name in [*args.inputs, *args.exclude]}
    targets = {path.resolve() for path in outputs}
    if inputs & targets or len(targets) < len(outputs):
        names = ", ".join(map(str, outputs))
        raise InputError(f"{names}: read or written twice: name another file to write to")


if __name__ == "__main__":
    run(main)
