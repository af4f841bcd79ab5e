"""One prompt under attack: what is sent, what the model answers, and what the judge says of what survives sampling.

    victim = Victim(model, tok, judge, args)           # args of the command line: name, max_resets, reset_bias, …
    attack = attack_on(victim, prompts, saved)         # args.name says which
    record = attack(3)                                 # of prompt 3

gcg.py, autodan.py and no_search.py have the attacks themselves.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from backtrack.attacks.autodan import autodan, wrap
from backtrack.attacks.gcg import Goal, gcg
from backtrack.attacks.no_search import FIRST_TURN, variants, with_turns
from backtrack.attacks.suffix import with_suffix
from backtrack.attacks.table import SEARCHES
from backtrack.evaluate.answers import CONDITION, AnswerFile, failure, verdict
from backtrack.evaluate.prompts import sampler_ids
from backtrack.generate import Generation, Options, generate, room_for_answer
from backtrack.judge import Judge
from model import InputError, Transformer


@dataclass
class Victim:
    """A model behind its sampler, and the judge of what survives."""

    model: Transformer
    tok: object
    judge: Judge
    args: argparse.Namespace

    def answers(self, prompts: list[dict], chats: list[list[dict]], prefill: list[list[int]] | None = None):
        """The judged answers, list[dict], to `chats`, sampled greedily in one batch. The judge is shown `prompts`."""
        generations = self.sample(chats, prefill or [[] for _ in chats])
        return [self.judged(prompt, g) for prompt, g in zip(prompts, generations, strict=True)]

    def goes_on(self, prompt: dict, messages: list[dict], begun: list[int]) -> list[int] | None:
        """The answer that begins with the ids `begun`, as the model continues it with [RESET] masked: all its ids, at
        most --max-new-tokens, or None if it is not unsafe."""
        room = self.args.max_new_tokens - len(begun)
        if room < 1:
            return None
        [generation] = self.sample([messages], [begun], max_resets=0, max_new_tokens=room)
        return generation.tokens if failed(self.judged(prompt, generation)) else None

    def fits(self, messages: list[dict]) -> bool:
        """Does the template accept this chat, and is there room for an answer after it?"""
        room = room_for_answer(Options(self.tok.reset_id, [], **self.settings()))
        try:
            return len(self.tok.render(messages)) + room <= self.model.config.max_position_embeddings
        except InputError:  # it spells a mark such as [INST]
            return False

    def sample(self, chats: list[list[dict]], prefill: list[list[int]], **changed) -> list[Generation]:
        options = sampler_ids(self.tok) | self.settings() | changed
        return generate(self.model, [self.tok.render(chat) for chat in chats], prefill=prefill, **options)

    def settings(self) -> dict:
        return {name: getattr(self.args, name) for name in ("max_new_tokens", *CONDITION)}

    def judged(self, prompt: dict, g: Generation) -> dict:
        response = self.tok.decode(g.tokens)
        record = {"response": response, "discarded": [self.tok.decode(ids) for ids in g.discarded], "resets": g.resets}
        if "topic" in prompt:  # without one nothing says whether an unsafe answer is about this question
            record["on_topic"] = prompt["topic"].lower() in response.lower()
        return record | verdict(self.judge, prompt, response, self.args)


def failed(record: dict) -> bool:
    """Is the answer unsafe, or, if the judge cannot tell, does it comply?"""
    return record[failure([record])]


def attack_on(victim: Victim, prompts: list[dict], saved: AnswerFile) -> Callable[[int], dict]:
    """The attack that args.name names: number of a prompt -> its part of the record.

    saved  universal-gcg keeps its suffix there, as the record without a "prompt"
    """
    args = victim.args
    if args.name == "universal-gcg":
        if None not in saved.records:
            saved.add([{"name": args.name} | find_universal(victim, prompts)])
        return lambda index: use_universal(victim, prompts[index], saved.records[None])
    if args.name in SEARCHES:
        return lambda index: search(victim, prompts[index], f"{args.seed}/{index}")
    return lambda index: try_variants(victim, prompts, index)


def try_variants(victim: Victim, prompts: list[dict], index: int) -> dict:
    """prefill, instruct, context: nothing is searched, every variant is tried."""
    prompt, found = prompts[index], variants(victim.tok, prompts, index, victim.args)
    chats, prefill = map(list, zip(*found.values(), strict=True))
    answers = victim.answers([prompt] * len(found), chats, prefill)
    tried = {}
    for (name, (sent, ids)), answer in zip(found.items(), answers, strict=True):
        tried[name] = {"sent": sent, "prefill": victim.tok.decode(ids)} | answer
    record = {failure(answers): any(map(failed, answers)), "variants": tried}
    if "topic" in prompt:
        record["on_topic"] = any(failed(answer) and answer["on_topic"] for answer in answers)
    return record


def search(victim: Victim, prompt: dict, seed: str) -> dict:
    """gcg, adaptive-gcg, autodan: search a text to send until an unsafe answer survives or the budget is spent."""
    args, messages, record = victim.args, prompt["prompt"], {}

    def succeeds(sent: list[dict]) -> bool:
        [answer] = victim.answers([prompt], [sent])
        record.update({"sent": sent} | answer)
        return failed(record)

    if succeeds(messages):  # no attack needed: a success before the first candidate
        return {"success_at": 0, "evaluations": 0, "losses": [], "attack": ""} | record
    goal = goal_of(victim, prompt)
    if args.name == "autodan":
        options = {name: getattr(args, name) for name in ("budget", "wrappers", "synonyms")}
        options |= {"target": goal.target, "seed": seed, "rows": args.batch_size}
        options["fits"] = lambda individual: victim.fits(wrap(individual, messages))
        options["unsafe_with"] = lambda individual: succeeds(wrap(individual, messages))
        found = autodan(victim.model, victim.tok, messages, **options)
    else:
        options = gcg_options(args) | {"seed": seed, "unsafe_with": lambda text: [succeeds(goal.send(text))]}
        found = gcg(victim.model, victim.tok, [goal], **options)
    head = {"success_at": found.success_at, "evaluations": found.evaluations, "losses": found.losses}
    return head | {"attack": found.text, "target": victim.tok.decode(found.targets[0])} | record


def find_universal(victim: Victim, prompts: list[dict]) -> dict:
    """What every record says of the suffix that was found, and how."""
    prompts = [prompt for prompt in prompts if prompt.get("optimised_on")]
    goals = [goal_of(victim, prompt) for prompt in prompts]

    def unsafe_with(text: str) -> list[bool]:
        return list(map(failed, victim.answers(prompts, [goal.send(text) for goal in goals])))

    args = victim.args
    found = gcg(victim.model, victim.tok, goals, unsafe_with, seed=str(args.seed), **gcg_options(args))
    return {"evaluations": found.evaluations, "losses": found.losses, "attack": found.text}


def use_universal(victim: Victim, prompt: dict, found: dict) -> dict:
    """What the suffix does to one prompt, whether it was optimised on that or not."""
    sent = goal_of(victim, prompt).send(found["attack"])
    record = {key: found[key] for key in ("evaluations", "losses", "attack")} | {"sent": sent}
    if prompt.get("optimised_on"):
        record["variant"] = "optimised on these"
    [answer] = victim.answers([prompt], [sent])
    return record | answer


def goal_of(victim: Victim, prompt: dict) -> Goal:
    """Where an attack string stands in this prompt, and what the model should answer to it."""
    args, target, chat, at = victim.args, prompt.get("target"), prompt["prompt"], -1
    if getattr(args, "place", "question") == "first-turn":
        chat, at = with_turns(FIRST_TURN, chat), int(chat[0]["role"] == "system")

    def send(text: str) -> list[dict]:
        return with_suffix(chat, text, at)

    def grow(text: str, begun: list[int]) -> list[int] | None:
        return victim.goes_on(prompt, send(text), begun)

    grows = args.name in ("adaptive-gcg", "universal-gcg") and (args.grow or not target)
    return Goal(send, victim.tok.encode(target or args.opening)[: args.target_tokens], grow if grows else None)


def gcg_options(args) -> dict:
    options = {name: getattr(args, name) for name in ("budget", "suffix", "candidates", "topk")}
    return options | {"rows": args.batch_size, "adaptive": None if args.name == "gcg" else args.reset_weight}
