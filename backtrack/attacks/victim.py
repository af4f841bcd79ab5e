"""What an attacker faces: a model behind its sampler, and the judge of what survives.

victim = Victim(model, tok, judge, args)           # args: --max-resets, --reset-bias and the like
record = victim.answer(prompt, messages, prefill)  # prompt: what the judge is shown; messages: what is sent
failed(record)                                     # did the attack succeed?
"""

import argparse
from dataclasses import dataclass

from backtrack.evaluate import failure, verdict
from backtrack.generate import Generation, generate
from backtrack.judge import Judge
from model import Transformer


@dataclass
class Victim:
    model: Transformer
    tok: object
    judge: Judge
    args: argparse.Namespace

    def answer(self, prompt: dict, messages: list[dict], prefill: list[int] | None = None) -> dict:
        """What the model answers to `messages`, greedily, and what the judge says of what survives of it."""
        return self.judged(prompt, self.sample(messages, prefill or []))

    def sample(self, messages: list[dict], prefill: list[int]) -> Generation:
        [generation] = generate(
            self.model,
            [self.tok.render(messages)],
            prefill=[prefill],
            reset_id=self.tok.reset_id,
            stop_ids=self.tok.stop_ids,
            vocab_size=self.tok.vocab_size,
            max_new_tokens=self.args.max_new_tokens,
            reset_bias=self.args.reset_bias,
            max_resets=self.args.max_resets,
            on_reset=self.args.on_reset,
        )
        return generation

    def judged(self, prompt: dict, g: Generation) -> dict:
        response = self.tok.decode(g.tokens)
        discarded = [self.tok.decode(ids) for ids in g.discarded]
        said = {"response": response, "discarded": discarded, "resets": g.resets}
        return said | verdict(self.judge, prompt, response, self.args)


def failed(record: dict) -> bool:
    """Is the answer unsafe, or, if the judge cannot tell, does it comply?"""
    return record[failure([record])]
