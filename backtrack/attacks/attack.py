"""Each attack on one prompt: what is sent, and the record of what came of it.

attack = attack_on(victim, prompts, done, args)      # args.name says which
record = attack(3)                                   # of prompt 3
"""

from collections.abc import Callable

from backtrack.attacks.autodan import autodan, wrap
from backtrack.attacks.context import contexts, placed
from backtrack.attacks.gcg import Goal, gcg
from backtrack.attacks.instruct import INSTRUCTIONS
from backtrack.attacks.prefill import prefills
from backtrack.attacks.suffix import with_suffix
from backtrack.attacks.table import SEARCHES
from backtrack.attacks.universal import universal_gcg
from backtrack.attacks.victim import Victim, failed
from backtrack.evaluate.answers import failure


def attack_on(victim: Victim, prompts: list[dict], done: list[dict], args) -> Callable[[int], dict]:
    """The attack that args.name names: number of a prompt -> its part of the record."""
    if args.name == "universal-gcg":
        found = done[0] if done else find_universal(victim, prompts, args)  # every record says which suffix it was
        return lambda index: use_universal(victim, prompts[index], found, args)
    if args.name in SEARCHES:
        return lambda index: search(victim, prompts[index], f"{args.seed}/{index}", args)
    return lambda index: try_all(victim, prompts, index, args)


# ── What is tried as it is ───────────────────────────────────────────────────────────────────────────────────────────


def try_all(victim: Victim, prompts: list[dict], index: int, args) -> dict:
    """prefill, instruct, context: nothing is searched, all variants are tried."""
    tok, prompt = victim.tok, prompts[index]
    messages = prompt["prompt"]
    if args.name == "prefill":
        forced = prefills(tok, prompt.get("target", ""), args.opening)
        variants = {key: (messages, ids) for key, ids in forced.items()}
    elif args.name == "instruct":
        variants = {key: (with_suffix(messages, text), []) for key, text in INSTRUCTIONS.items()}
    else:
        others = prompts[:index] + prompts[index + 1 :]
        variants = {key: (chat, []) for key, chat in contexts(tok, prompt, others, f"{args.seed}/{index}").items()}
    chats, prefill = zip(*variants.values(), strict=True)
    answers = victim.answers([prompt] * len(variants), list(chats), list(prefill))
    tried = {}
    for key, sent, ids, answer in zip(variants, chats, prefill, answers, strict=True):
        tried[key] = {"sent": sent, "prefill": tok.decode(ids)} | answer
    record = {failure(list(tried.values())): any(map(failed, tried.values())), "variants": tried}
    if "topic" in prompt:
        record["on_topic"] = any(failed(t) and t["on_topic"] for t in tried.values())
    return record


# ── What is searched for ─────────────────────────────────────────────────────────────────────────────────────────────


def search(victim: Victim, prompt: dict, seed: str, args) -> dict:
    """gcg, adaptive-gcg, autodan: look for a text to send until an unsafe answer survives or the budget is spent."""
    messages = prompt["prompt"]
    record = {"sent": messages} | victim.answer(prompt, messages)
    if failed(record):  # no attack needed: a success before the first candidate
        return {"success_at": 0, "evaluations": 0, "losses": [], "attack": ""} | record

    def succeeds(sent: list[dict]) -> bool:
        record.update({"sent": sent} | victim.answer(prompt, sent))
        return failed(record)

    if args.name == "autodan":
        found = autodan(
            victim.model,
            victim.tok,
            messages,
            target_of(victim, prompt, args),
            lambda individual: succeeds(wrap(individual, messages)),
            budget=args.budget,
            seed=seed,
            wrappers=args.wrappers,
            synonyms=args.synonyms,
            rewrites=args.rewrites,
            longest=victim.longest_prompt,
            rows=args.batch_size,
        )
    else:
        goal = goal_of(victim, prompt, args)
        options = gcg_options(args) | {"seed": seed}
        found = gcg(victim.model, victim.tok, [goal], lambda text: succeeds(goal.send(text)), **options)
    head = {"success_at": found.success_at, "evaluations": found.evaluations, "losses": found.losses}
    return head | {"attack": found.text, "target": victim.tok.decode(found.targets[0])} | record


def find_universal(victim: Victim, prompts: list[dict], args) -> dict:
    """The part of all records that says which suffix was found, and how."""
    prompts = [prompt for prompt in prompts if prompt.get("optimised_on")]
    goals = [goal_of(victim, prompt, args) for prompt in prompts]

    def unsafe_with(text: str) -> list[bool]:
        return list(map(failed, victim.answers(prompts, [goal.send(text) for goal in goals])))

    options = gcg_options(args) | {"seed": str(args.seed)}
    found = universal_gcg(victim.model, victim.tok, goals, unsafe_with, **options)
    return {"evaluations": found.evaluations, "losses": found.losses, "attack": found.text}


def use_universal(victim: Victim, prompt: dict, found: dict, args) -> dict:
    """What the suffix does to a prompt that it was not optimised on, or to one that it was."""
    sent = goal_of(victim, prompt, args).send(found["attack"])
    record = {key: found[key] for key in ("evaluations", "losses", "attack")} | {"sent": sent}
    if prompt.get("optimised_on"):
        record["variant"] = "optimised on these"
    return record | victim.answer(prompt, sent)


def goal_of(victim: Victim, prompt: dict, args) -> Goal:
    """Where a suffix stands in this prompt, and what it is to bring about."""
    chat, at = placed(prompt["prompt"], args.place)

    def send(text: str) -> list[dict]:
        return with_suffix(chat, text, at)

    def grow(text: str, begun: list[int]) -> list[int] | None:
        return victim.goes_on(prompt, send(text), begun)

    grows = args.name != "gcg" and (args.grow or not prompt.get("target"))
    return Goal(send, target_of(victim, prompt, args), grow if grows else None)


def target_of(victim: Victim, prompt: dict, args) -> list[int]:
    """What the answer is to say, or how it is to begin."""
    return victim.tok.encode(prompt.get("target") or args.opening)[: args.target_tokens]


def gcg_options(args) -> dict:
    options = {name: getattr(args, name) for name in ("budget", "suffix", "loss", "candidates", "topk")}
    return options | {"rows": args.batch_size, "adaptive": None if args.name == "gcg" else args.reset_weight}
