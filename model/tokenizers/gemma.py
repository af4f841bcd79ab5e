"""Gemma's chats: <start_of_turn>user⏎Hi<end_of_turn>⏎ … The toy writes its chats so, too."""

import re

from model.errors import InputError
from model.tokenizers.base import Tokenizer
from model.tokenizers.pieces import MARKERS

ALTERNATE = (  # the published templates of Gemma and Llama 2 refuse other orders so
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must go user, assistant, user, …') }}{% endif %}"
)
JINJA = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{{ '<start_of_turn>'"
    " + ('model' if message['role'] == 'assistant' else 'user') + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class GemmaTokenizer(Tokenizer):
    marker = "<start_of_turn>"

    def __init__(self, files, text):
        super().__init__(files, text, JINJA)
        special = text.special
        for name in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"):
            if name not in special:
                raise InputError(
                    f"{text.file}: no special piece {name}, so not Gemma's layout, and not Llama"
                    " 2's either; no other is known here: use a Gemma or Llama 2 checkpoint"
                )
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
        """Gemma's template: no system turn, and user and assistant take turns.

        continues: the messages continue a chat, so BOS is left out.
        """
        ids = [] if continues else [self.bos_id]
        for position, (role, content) in enumerate(self._turns(messages)):
            if role == "system":
                raise InputError(
                    "Gemma's chat format has no system role;"
                    " put its text into the first user message"
                )
            if role != ("user", "assistant")[position % 2]:
                raise InputError(
                    f"message {position} is the {role}'s; Gemma's chats go user, assistant, user, …"
                )
            ids += self._open(role) + self.encode(content.strip()) + self.turn_end
        return ids + self._open("assistant") if add_generation_prompt else ids

    def _open(self, role):
        return [self._turn, *self.encode("model\n" if role == "assistant" else "user\n")]
