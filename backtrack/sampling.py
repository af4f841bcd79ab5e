"""The options of an answer, and what is refused before the first token is sampled.

generate.py and serve/remote.py take the same options and call `checked`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model import InputError


@dataclass
class Options:
    """What every batch row has in common. remote.py takes the same, all but the last two."""

    reset_id: int | None  # the id of [RESET]; None makes this an ordinary sampler
    stop_ids: Iterable[int]  # ids that end an answer and are not part of it
    max_new_tokens: int  # most tokens sampled in each attempt; prefilled tokens do not count
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the likeliest tokens that have this much probability together
    reset_bias: float = 0.0  # added to the logit of [RESET]: the paper's dial
    max_resets: int = 1  # after that many, [RESET] is masked (1 in the paper)
    on_reset: str = "truncate"  # a retry sees prompt ⊕ [RESET]^r; "keep" (paper): all that was said
    vocab_size: int | None = None  # the tokenizer's: ids from there on are padding, never sampled
    hold_back: int = 0  # Token events come this many sampled tokens later: see `delay_tokens`
    batch_size: int | None = None  # most batch rows at once, one batch after another; None: all
    watch: Callable | None = None  # called each step with the logits (B, V) and the KVCache

    def __post_init__(self):
        self.stop_ids = sorted(set(self.stop_ids))
        if self.reset_id is None:
            self.max_resets = 0


def checked(options: Options, prompts, prefill, sample_ids, seed: int, config):
    """Prefills and seeds, one for each prompt. Raises InputError for what is out of range.

    config: what knows vocab_size and max_position_embeddings: a model's config, or a Server.
    """
    check_options(options, config.vocab_size)
    prefill = [[] for _ in prompts] if prefill is None else prefill
    sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
    for what, given in (("prefills", prefill), ("sample_ids", sample_ids)):
        if len(given) != len(prompts):
            raise InputError(f"{len(given)} {what} for {len(prompts)} prompts")
    for row, (prompt, forced) in enumerate(zip(prompts, prefill, strict=True)):
        check_prompt(row, prompt, forced, options, config)
    return prefill, [f"{seed}/{i}" for i in sample_ids]


def check_options(options: Options, vocab_size: int) -> None:
    at_least = {"max_new_tokens": 1, "max_resets": 0, "hold_back": 0, "batch_size": 1}
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, must be {least} or more")
    if not options.temperature >= 0.0:
        raise InputError(f"temperature is {options.temperature}, must be 0 (greedy) or positive")
    if not 0.0 < options.top_p <= 1.0:
        raise InputError(f"top_p is {options.top_p}, must be in (0, 1]")
    if options.on_reset not in ("truncate", "keep"):
        raise InputError(f"on_reset is {options.on_reset!r}, must be 'truncate' or 'keep'")
    if options.reset_id in options.stop_ids:
        raise InputError(f"reset_id {options.reset_id} is also a stop id")
    vocab_size = min(vocab_size, options.vocab_size or vocab_size)
    special = [*options.stop_ids, *([] if options.reset_id is None else [options.reset_id])]
    for id in special:
        if not 0 <= id < vocab_size:
            raise InputError(
                f"stop or reset id {id} is outside the model's vocabulary of {vocab_size}"
            )


def check_prompt(row: int, prompt: list[int], forced: list[int], options: Options, config) -> None:
    if not prompt:
        raise InputError(f"prompt {row} is empty; it needs at least one token (BOS)")
    if not all(0 <= id < config.vocab_size for id in (*prompt, *forced)):
        raise InputError(
            f"prompt {row} has ids outside the model's vocabulary of {config.vocab_size};"
            " wrong tokenizer?"
        )
    if options.reset_id in forced or not set(options.stop_ids).isdisjoint(forced):
        raise InputError(
            f"prefill {row} contains [RESET] or a stop id; it must be the plain beginning of an"
            " answer"
        )
    need = len(prompt) + len(forced) + room_for_answer(options)
    if need > config.max_position_embeddings:
        raise InputError(
            f"prompt {row} is too long: {len(prompt)} tokens, and {need} with room for the answer,"
            f" but the model has {config.max_position_embeddings} positions; shorten it or lower"
            " max_new_tokens"
        )


def room_for_answer(options) -> int:
    """Positions that an answer may take besides its prompt and its prefill, resets included.

    "truncate" needs room for one attempt at a time, "keep" for all attempts.
    """
    attempts = options.max_new_tokens
    if options.on_reset == "keep":
        attempts *= options.max_resets + 1
    return options.max_resets + attempts
