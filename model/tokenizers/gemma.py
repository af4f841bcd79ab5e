"""Gemma-2's and Gemma-3's chats: <start_of_turn>user⏎Hi<end_of_turn>⏎ … So are the toy's."""

import re

from model.errors import InputError
from model.tokenizers.base import Tokenizer
from model.tokenizers.pieces import MARKERS

ALTERNATE = (  # the published templates of Gemma, Llama 2 and Mistral refuse other orders so
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must go user, assistant, user, …') }}{% endif %}"
)
JINJA = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{{ '<start_of_turn>'"
    " + ('model' if message['role'] == 'assistant' else 'user') + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
JINJA3 = (
    "{% set turns, first_user_prefix = messages, '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set turns, first_user_prefix = messages[1:], messages[0]['content'] + '\n\n' %}{% endif %}"
    + JINJA.replace("in messages", "in turns").replace(
        "'\n' + message", "'\n' + (first_user_prefix if loop.first else '') + message"
    )
)
NAME = {"user": "user", "assistant": "model"}


class GemmaTokenizer(Tokenizer):
    family = "Gemma"
    marker = "<start_of_turn>"

    def __init__(self, files, text):
        is_gemma3 = str(files.config.get("model_type")).startswith("gemma3")
        super().__init__(files, text, JINJA3 if is_gemma3 else JINJA)
        self._takes_system = "first_user_prefix" in self.jinja
        special = text.special
        for name in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"):
            if name not in special:
                others = "so neither Gemma's layout nor Llama 2's, and no other is known here"
                raise InputError(f"{text.file}: no special piece {name}, {others}")
        for piece in text.pieces:
            if re.fullmatch(MARKERS, piece) and piece not in special:
                raise InputError(
                    f"{text.file}: text can spell the piece {piece}; use a Gemma tokenizer.model"
                )
        self.bos_id = self.text_start_id = special["<bos>"]
        self._turn = special["<start_of_turn>"]
        self.eos_id, self.text_end_id = special["<end_of_turn>"], special["<eos>"]
        self.turn_end = [self.eos_id, *self.encode("\n")]
        self._set_stop_ids(ignored={self.bos_id, special.get("<pad>")})
        # <reset> is the toy's own. <pad> serves small models without a spare piece: a padded
        # position has no loss.
        spare = [special[name] for name in ("<reset>", "<unused0>", "<pad>") if name in special]
        self._set_reset_id({self.bos_id, self._turn}, default=next(iter(spare), None))
        self.template_ids = sorted({self.bos_id, self._turn, self.eos_id, self.reset_id})

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Gemma's template: user and assistant take turns. Gemma-3 puts a system message in front of
        the first user's; Gemma-2 has none.

        continues: the messages continue a chat, so BOS is left out.
        """
        turns, prefix = self._turns(messages), ""
        if turns[0][0] == "system" and self._takes_system:
            prefix = turns.pop(0)[1] + "\n\n"
        if any(role == "system" for role, _ in turns):
            raise InputError(
                "Gemma's chat format has no system role; put its text into the first user message"
            )
        self._check_order(turns)
        ids = [] if continues else [self.bos_id]
        for role, content in turns:
            if prefix:  # in one piece with the line before it: it may begin with a line feed
                ids += [self._turn, *self.encode(f"user\n{prefix}{content.strip()}")]
            else:  # apart: an answer is encoded without the line before it
                ids += [self._turn, *self.encode(f"{NAME[role]}\n"), *self.encode(content.strip())]
            ids += self.turn_end
            prefix = ""
        if add_generation_prompt:
            ids += [self._turn, *self.encode("model\n")]
        return ids
