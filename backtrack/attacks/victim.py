"""What an attacker faces: a model behind its sampler, and the judge of what survives.

victim = Victim(model, tok, judge, args)           # args: --max-resets, --reset-bias and the like
record = victim.answer(prompt, messages)           # prompt: what the judge is shown; messages: what is sent
failed(record)                                     # did the attack succeed?
"""

import argparse
from dataclasses import dataclass

from backtrack.evaluate.answers import failure, verdict
from backtrack.generate import Generation, Options, generate, room_for_answer
from backtrack.judge import Judge
from model import Transformer


@dataclass
class Victim:
    model: Transformer
    tok: object
    judge: Judge
    args: argparse.Namespace

    def answer(self, prompt: dict, messages: list[dict]) -> dict:
        """What the model answers to `messages`, greedily, and what the judge says of what survives of it."""
        [record] = self.answers([prompt], [messages])
        return record

    def answers(
        self, prompts: list[dict], chats: list[list[dict]], prefill: list[list[int]] | None = None
    ) -> list[dict]:
        """The same for many, sampled in one batch. prefill: ids that each answer is forced to begin with."""
        generations = self.sample(chats, prefill or [[] for _ in chats])
        return [self.judged(prompt, g) for prompt, g in zip(prompts, generations, strict=True)]

    def goes_on(self, prompt: dict, messages: list[dict], begun: list[int]) -> list[int] | None:
        """The answer that begins with the ids `begun`, as the model goes on with [RESET] masked: all its ids, or None
        if the judge has nothing against it. It is as long as an answer that was not begun may be."""
        room = self.args.max_new_tokens - len(begun)
        if room < 1:
            return None
        [generation] = self.sample([messages], [begun], max_resets=0, max_new_tokens=room)
        return generation.tokens if failed(self.judged(prompt, generation)) else None

    @property
    def longest_prompt(self) -> int:
        """In tokens, with room left for an answer."""
        limits = {name: getattr(self.args, name) for name in ("max_new_tokens", "max_resets", "on_reset")}
        return self.model.config.max_position_embeddings - room_for_answer(Options(self.tok.reset_id, [], **limits))

    def sample(self, chats: list[list[dict]], prefill: list[list[int]], **changed) -> list[Generation]:
        limits = {name: getattr(self.args, name) for name in ("max_new_tokens", "reset_bias", "max_resets", "on_reset")}
        return generate(
            self.model,
            [self.tok.render(chat) for chat in chats],
            prefill=prefill,
            reset_id=self.tok.reset_id,
            stop_ids=self.tok.stop_ids,
            vocab_size=self.tok.vocab_size,
            **limits | changed,
        )

    def judged(self, prompt: dict, g: Generation) -> dict:
        response = self.tok.decode(g.tokens)
        discarded = [self.tok.decode(ids) for ids in g.discarded]
        said = {"response": response, "discarded": discarded, "resets": g.resets}
        if "topic" in prompt:  # else nothing says whether an unsafe answer is one to this question
            said["on_topic"] = prompt["topic"].lower() in response.lower()
        return said | verdict(self.judge, prompt, response, self.args)


def failed(record: dict) -> bool:
    """Is the answer unsafe, or, if the judge cannot tell, does it comply?"""
    return record[failure([record])]
