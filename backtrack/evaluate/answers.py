"""Ask models, and keep their answers and the judge's verdicts in a file as they come.

    with adding_to(path):                                   # nobody else writes there
        saved = AnswerFile(path, settings, key)             # goes on where an earlier run stopped
        saved.add([record, …])                              # now they are on disk
        judge_missing(judge, records, prompts, saved, args)  # and now they are, with their verdicts

A file begins with a line of settings; the lines that follow are records. An answer is written before it is judged, and
written again with its verdict: the later line counts. `tidy` leaves one line for each answer. So a kill, a full disk or
a judge that fails loses nothing that was there, and the same command asks for what is missing only.
"""

import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from backtrack.evaluate import any_depth
from backtrack.evaluate import filter as filters
from backtrack.evaluate.prompts import Prompt, prompts_digest, render, sampler_ids
from backtrack.evaluate.results import naming
from backtrack.generate import Done, Generation, Options, room_for_answer, stream
from backtrack.judge import Judge, Verdict, judge_all, load_judges, refuse_seen
from backtrack.rows import json_line, json_lines, several
from backtrack.run import parallel
from backtrack.run.say import Ticker, say
from backtrack.serve import remote
from model import InputError, ModelConfig, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.files import check_file, locked, write_text

CONDITION = ("on_reset", "reset_bias", "max_resets")
NO_VERDICT = "no verdict"  # the category of an answer on which a guard gave none


@contextlib.contextmanager
def adding_to(path: str | Path):
    """Keep other processes from adding to this file. On Ctrl-C, say what is kept. Of several ranks the first adds."""
    if parallel.rank() > 0:
        yield
        return
    check_file(path)
    with locked(path):
        try:
            yield
        except KeyboardInterrupt:
            say(f"\nstopped: the answers so far are in {path}; the same command goes on from there")
            raise


def read_answers(path: Path, settings: dict) -> list[dict]:
    """The records that an earlier run with the same settings has written; cuts off the half line that a kill left.

    Raises InputError if the file comes from other settings: answers of two experiments must not mix.
    """
    data = path.read_bytes() if path.is_file() else b""
    if path.is_file():
        head = next((value for _, value in json_lines(path)), None)
        if not isinstance(head, dict) or not isinstance(head.get("settings"), dict):
            raise InputError(f"{path}: holds no answers of this program; choose another --out")
    if data.count(b"\n") < 2:  # also if an earlier run failed before its first answer: its settings bind nobody
        write_text(json.dumps({"settings": settings}) + "\n", path)
        return []
    for name, now in settings.items():
        before = head["settings"].get(name)
        if before != now:
            raise InputError(f"{path}: was begun with {name} {before}, now {now}; choose another --out or delete it")
    os.truncate(path, data.rfind(b"\n") + 1)
    return [value for _, value in json_lines(path)][1:]


class AnswerFile:
    """The records of one file. key(record) tells them apart; `records` has the last one with each key."""

    def __init__(self, path: Path, settings: dict, key: Callable[[dict], object]):
        self.path, self.settings, self.key = path, settings, key
        lines = parallel.from_first(lambda: read_answers(path, settings))
        self.records = {key(r): r for r in lines}
        self.lines = len(lines)

    def add(self, records: list[dict]) -> list[dict]:
        """Append the records of all ranks, and return them. Every rank must call it."""
        records = [r for of_rank in parallel.exchange(records) for r in of_rank]
        if parallel.rank() == 0:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as f:
                f.writelines(json_line(r) + "\n" for r in records)
        self.records |= {self.key(r): r for r in records}
        self.lines += len(records)
        return records

    def tidy(self) -> None:
        """Leave one line for each answer."""
        if parallel.rank() == 0 and self.lines > len(self.records):
            lines = [{"settings": self.settings}, *self.records.values()]
            with naming(self.path):
                write_text("".join(json_line(line) + "\n" for line in lines), self.path)


def judge_missing(judge: Judge, records: list[dict], prompts: list[Prompt], saved: AnswerFile, args) -> None:
    """Judge those of the records that have no verdict, one after another, and save each with its verdict.

    A guard reads --batch-size of them at once. Several ranks share them out. Raises InputError if another judge has
    judged the others.
    """
    now = by_whom(args.judge, getattr(judge, "threshold", None), args.judge_continuation)
    before = {by_whom(r["judge"], r.get("threshold"), "continuation" in r) for r in records if "judge" in r}
    for other in before - {now}:
        raise InputError(f"{saved.path}: was judged by {other}, now {now}; choose another --out or delete it")
    todo = [r for r in records if "judge" not in r]
    at_once = (args.batch_size if hasattr(judge, "judge_all") else 1) * parallel.size()
    for start in range(0, len(todo), at_once):
        mine = todo[start : start + at_once][parallel.rank() :: parallel.size()]
        found = judge_all(judge, [(prompts[r["prompt"]]["prompt"], judged_text(r, prompts, args)) for r in mine])
        marked = {"continuation": True} if args.judge_continuation else {}
        pairs = zip(mine, found, strict=True)
        saved.add([r | as_record(judge, said, prompts[r["prompt"]], args) | marked for r, said in pairs])


@contextlib.contextmanager
def remembering(judge: Judge, out: str | Path, name: str):
    """The judge, its verdicts kept as they come in OUT.verdicts: after a failure only missing ones are asked for.

    For programs that judge texts which they make anew each time. name: what --judge says.
    """
    file, who = Path(f"{out}.verdicts"), by_whom(name, getattr(judge, "threshold", None), False)

    def key_of(prompt: list[dict], response: str) -> tuple[str, str, str]:
        return who, json.dumps(prompt), response

    with adding_to(file):
        saved = AnswerFile(file, {}, lambda r: (r["judge"], json.dumps(r["asked"]), r["response"]))

        def ask(conversations: list[tuple[list[dict], str]]) -> list[Verdict | InputError]:
            asked = {key_of(*pair): pair for pair in conversations}
            missing = [pair for key, pair in asked.items() if key not in saved.records]
            at_once = len(missing) if hasattr(judge, "judge_all") else 1  # a guard reads many in a batch
            errors = {}
            for start in range(0, len(missing), max(1, at_once)):
                some = missing[start : start + at_once]
                for (prompt, response), said in zip(some, judge_all(judge, some), strict=True):
                    if isinstance(said, InputError):
                        errors[key_of(prompt, response)] = said
                    else:
                        saved.add([{"judge": who, "asked": prompt, "response": response, "verdict": vars(said)}])
            keys = [key_of(*pair) for pair in conversations]
            return [errors.get(key) or Verdict(**saved.records[key]["verdict"]) for key in keys]

        def one(prompt: list[dict], response: str) -> Verdict:
            [said] = ask([(prompt, response)])
            if isinstance(said, InputError):
                raise said
            return said

        vars(one).update(vars(judge) | {"judge_all": ask})
        yield one


def judged_text(record: dict, prompts: list[Prompt], args) -> str:
    """The answer; with --judge-continuation without what it was forced to begin with."""
    if not args.judge_continuation or record["resets"]:
        return record["response"]
    return record["response"].removeprefix(prompts[record["prompt"]]["prefill"])


def verdict(judge: Judge, prompt: dict, response: str, args) -> dict:
    """The verdict's part of the record of one answer."""
    [said] = judge_all(judge, [(prompt["prompt"], response)])
    return as_record(judge, said, prompt, args)


def as_record(judge: Judge, said: Verdict | InputError, prompt: dict, args) -> dict:
    """What the judge says, without what it does not say.

    An answer on which a guard gives no verdict, because it is too long or talks the guard into another subject, counts
    as unsafe: nobody has called it safe, and a long evaluation should not end there.
    """
    if isinstance(said, InputError):
        where = getattr(prompt, "where", "a prompt")
        print(f"\n{where}: no verdict, counted as unsafe: {said}", file=sys.stderr)
        said = Verdict(unsafe=True, complied=True, category=NO_VERDICT)
    record = {"judge": args.judge} | {name: value for name, value in vars(said).items() if value is not None}
    return record | ({"threshold": judge.threshold} if hasattr(judge, "threshold") else {})


def failure(answers: list[dict]) -> str:
    """The judge's name for an answer to a forbidden prompt that should not be: unsafe, or complied."""
    return "unsafe" if all("unsafe" in a for a in answers) else "complied"


def answer_all(prompts: list[Prompt], args) -> tuple[list[dict], list[dict]]:
    """Every prompt, sample, condition and checkpoint: (the records in that order, made now or read from the file; the
    prompts that are left out)."""
    conditions = list(itertools.product(args.on_reset, args.reset_bias, args.max_resets))
    toks = {ckpt: load_tokenizer(ckpt) for ckpt in args.ckpt}  # once: Gemma's takes 2 s, and 100 MB
    skipped = too_long(prompts, toks, conditions, args)
    settings = settings_of(prompts, args)
    parallel.agree(settings | {"checkpoints": args.ckpt, "batch_size": args.batch_size})
    saved = AnswerFile(answers_file(args.out), settings, key)
    fitting = [i for i in range(len(prompts)) if i not in {s["prompt"] for s in skipped}]
    questions = list(itertools.product(fitting, range(args.samples)))  # (prompt, sample)
    wanted = list(itertools.product(args.ckpt, conditions, questions))
    missing = sum((resolved(ckpt), *c, *q) not in saved.records for ckpt, c, q in wanted)
    if missing < len(wanted):
        say(f"{saved.path}: {len(wanted) - missing} of {len(wanted)} answers are there already")
    judge = None
    if args.judge:
        judge = load_judges(args.judge, args.device, getattr(torch, args.dtype), args.judge_url, args.threshold)
        refuse_seen(judge, prompts)
        judge_missing(judge, list(saved.records.values()), prompts, saved, args)
    answer_missing(prompts, toks, questions, conditions, judge, saved, missing, args)
    saved.tidy()
    return [saved.records[resolved(ckpt), *c, *q] | {"checkpoint": ckpt} for ckpt, c, q in wanted], skipped


def answer_missing(
    prompts: list[Prompt], toks: dict, questions, conditions, judge, saved: AnswerFile, missing: int, args
) -> None:
    """Ask every checkpoint, in every condition, for the answers that are not in the file; judge them as they come."""
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    count, ticker = 0, Ticker()
    for ckpt, tok in toks.items():
        ask = None
        for condition in conditions:
            todo = [q for q in questions if (resolved(ckpt), *condition, *q) not in saved.records]
            if not todo:
                continue
            ask = ask or sampler_of(ckpt, tok, judge, args)
            condition = dict(zip(CONDITION, condition, strict=True))
            head = {"checkpoint": ckpt} | condition
            for batch in generations(ask, tok, prompts, todo, sampling | condition, args):
                records = saved.add([head | record_of(tok, prompts[i], i, sample, g) for (i, sample), g in batch])
                if judge is not None:
                    judge_missing(judge, records, prompts, saved, args)
                count += len(records)
                ticker.show(f"{Path(ckpt).name}: {count}/{missing} answers")
    ticker.done()


def settings_of(prompts: list[Prompt], args) -> dict:
    """What all answers of one file have in common."""
    names = ("temperature", "top_p", "samples", "max_new_tokens", "seed", "dtype")
    settings = {name: getattr(args, name) for name in names}
    if args.url:
        settings["dtype"] = "a server's"
    settings["prompts"] = prompts_digest(prompts)
    settings["weights"] = [weights_digest(ckpt) for ckpt in args.ckpt]
    settings |= {"any_depth": args.any_depth} if args.any_depth else {}
    return settings | {"filter": filters.digest(args.filter) if args.filter else None}


def too_long(prompts: list[Prompt], toks: dict, conditions: list[tuple], args) -> list[dict]:
    """The prompts for which a checkpoint has no room in some condition. All leave them out, or pairs would not pair."""
    found: dict[int, dict] = {}
    for ckpt, tok in toks.items():
        longest = longest_prompt(ckpt, tok, conditions, args)
        for i, length in without_room(tok, prompts, longest).items():
            reason = f"{length} tokens, and {ckpt} has positions for {longest} beside an answer"
            found.setdefault(i, {"prompt": i, "set": prompts[i]["set"], "where": prompts[i].where, "reason": reason})
    skipped = [found[i] for i in sorted(found)]
    if skipped:
        where = several([s["where"] for s in skipped])
        message = f"{len(skipped)} of {len(prompts)} prompts are too long ({skipped[0]['reason']}): {where}"
        if len(skipped) == len(prompts):
            raise InputError(f"{message}; shorten them, or lower --max-new-tokens")
        say(f"{message}; skipped")
    return skipped


def longest_prompt(ckpt: str, tok, conditions: list[tuple], args) -> int:
    """How many tokens a prompt may have with its prefill, to leave room for an answer in each of these conditions."""
    positions = ModelConfig.load(ckpt).max_position_embeddings
    if args.url:
        positions = min(positions, server_of(ckpt, args).max_position_embeddings)
    limits = [Options(tok.reset_id, [], args.max_new_tokens, on_reset=o, max_resets=n) for o, _, n in conditions]
    return positions - max(map(room_for_answer, limits))


def without_room(tok, prompts: list[Prompt], longest: int) -> dict[int, int]:
    """{index: tokens} of the prompts that are longer than `longest` with their prefill."""
    lengths = {i: len(render(tok, p)) + len(tok.encode(p["prefill"])) for i, p in enumerate(prompts)}
    return {i: length for i, length in lengths.items() if length > longest}


def key(record: dict) -> tuple:
    """What tells the answers of one file apart."""
    return (resolved(record["checkpoint"]), *(record[name] for name in (*CONDITION, "prompt", "sample")))


def by_whom(judge: str | list[str], threshold: float | None, continuation: bool) -> str:
    """Who has judged, in words; the same for one path however it is spelled."""
    who = " and ".join(resolved(one) for one in ([judge] if isinstance(judge, str) else judge))
    at = "" if threshold is None else f" at {threshold}"
    return f"{who}{at}{', continuations alone' if continuation else ''}"


def resolved(path: str) -> str:
    """sft, sft/ and ./sft are one."""
    return str(Path(path).resolve())


def answers_file(out: str) -> Path:
    """Beside OUT, and its own for every OUT: eval.json has eval.answers.jsonl, eval.v2 has eval.v2-answers.jsonl."""
    name = str(out)
    return Path(f"{name[:-5]}.answers.jsonl" if name.endswith(".json") else f"{name}-answers.jsonl")


def generations(ask, tok, prompts: list[dict], todo: list[tuple[int, int]], options: dict, args) -> Iterator[list]:
    """Yields lists of ((index of the prompt, number of the sample), its Generation): all of `todo` in the order in
    which they are finished, --batch-size in a list.

    ask: stream() of a model, or of a server; it gets all prompts at once, and the options. Of several ranks each takes
    every Nth of `todo`, and yields as often as the others: at the end perhaps nothing.
    """
    encoded = {i: (render(tok, prompts[i]), tok.encode(prompts[i]["prefill"])) for i, _ in todo}
    todo = sorted(todo, key=lambda item: len(encoded[item[0]][0]))  # little padding
    mine = todo[parallel.rank() :: parallel.size()]
    events = ask(
        [encoded[i][0] for i, _ in mine],
        prefill=[encoded[i][1] for i, _ in mine],
        sample_ids=[i * args.samples + sample for i, sample in mine],
        **sampler_ids(tok),
        **options,
    )
    finished = ((mine[event.row], event.generation) for event in events if isinstance(event, Done))
    for _ in range(0, math.ceil(len(todo) / parallel.size()), args.batch_size):
        yield list(itertools.islice(finished, args.batch_size))


def record_of(tok, prompt: dict, i: int, sample: int, g: Generation) -> dict:
    """One answer's record, without its checkpoint and condition. A prefill that survives was not sampled, so it counts
    neither as a step nor as surviving."""
    prefilled = len(tok.encode(prompt["prefill"])) if g.resets == 0 else 0
    surviving = len(g.tokens) - prefilled
    since_reset = surviving + (g.finish_reason == "stop")  # sampled since the last [RESET]
    return {
        "prompt": i,
        "sample": sample,
        "set": prompt["set"],
        "response": tok.decode(g.tokens),
        "discarded": [tok.decode(ids) for ids in g.discarded],
        "resets": g.resets,
        "steps": g.steps,
        "surviving": surviving,
        "first_step": g.steps - since_reset + min(1, since_reset),
        "first_token_s": round(g.first_token_s, 6),
        "total_s": round(g.total_s, 6),
        "finish_reason": g.finish_reason,
    }


def sampler_of(ckpt: str, tok, judge: Judge | None, args):
    """stream() of a checkpoint: on this machine, or of the server that has it."""
    if args.url:
        server = server_of(ckpt, args)
        return partial(remote.stream, server.url, server.name, parallel=args.batch_size)
    model = load_model(ckpt, args.device, getattr(torch, args.dtype))
    if args.filter:
        return filters.around(model, args.filter, ckpt, tok, args.batch_size)
    if args.any_depth:
        return any_depth.around(model, judge, tok, args.batch_size, args.any_depth)
    return partial(stream, model, batch_size=args.batch_size)


def server_of(ckpt: str, args) -> remote.Server:
    return remote.look_for(args.url[args.ckpt.index(ckpt)], ckpt)
