"""Universal GCG: one suffix for every prompt, optimised on some prompts and tested on others.

    python -m backtrack.attacks universal-gcg --ckpt runs/toy-0/sft --judge runs/toy-0/data/world.json \
        --optimise runs/toy-0/data/prompts.jsonl --optimise-sets seen --optimise-limit 8 \
        --prompts runs/toy-0/data/prompts.jsonl --sets unseen --out runs/toy-0/universal.jsonl --budget 16384

Zou et al. 2023 (arXiv 2307.15043), algorithm 2, but with all prompts from the start. The loss is that of adaptive-gcg,
its mean over the prompts optimised on; a candidate is scored on each of them, and each counts as one of --budget. Found
once, such a suffix costs nothing to use: whoever has read it can put it behind a question of their own.

Of all suffixes that were the best for a while, the one is kept that got unsafe answers to most of the prompts optimised
on; of equals the last, whose loss is the lowest. The prompts tested have no part in that.
"""

from collections.abc import Callable

from backtrack.attacks.gcg import Goal, gcg
from backtrack.attacks.objective import Search


def universal_gcg(model, tok, goals: list[Goal], unsafe_with: Callable[[str], list[bool]], **options) -> Search:
    """The suffix for all `goals`; options as of gcg.

    unsafe_with  text of a suffix -> for each goal: does the sampler let an unsafe answer survive? The search ends when
                 all do. success_at of what is returned says when that was.
    """
    most, kept = -1, ""

    def all_unsafe_with(text: str) -> bool:
        nonlocal most, kept
        successes = unsafe_with(text)
        if sum(successes) >= most:
            most, kept = sum(successes), text
        return all(successes)

    found = gcg(model, tok, goals, all_unsafe_with, **options)
    found.text = kept
    return found
