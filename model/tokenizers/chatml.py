"""ChatML: <|im_start|>user⏎Hi<|im_end|>⏎ … These are the chats of SmolLM2, Qwen2.5 and Qwen3.

The three differ in how a chat begins that has no system turn, and Qwen3 in how an answer begins:

    SmolLM2     You are a helpful AI assistant named SmolLM, trained by Hugging Face
    Qwen2.5     You are Qwen, created by Alibaba Cloud. You are a helpful assistant.
    Qwen3       no system turn; an answer begins with an empty <think> block: thinking is off
"""

import re

from model.errors import InputError
from model.tokenizers.base import Tokenizer
from model.tokenizers.templates import THINKING_OFF

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
KNOWN_SYSTEMS = (SMOLLM2_SYSTEM, QWEN25_SYSTEM, "You are a helpful assistant.")  # Qwen2's
SYSTEM_BEGINS = r"<\|im_start\|>system(?:\\n|\n)"  # in a template; \n may be written as an escape
TURN = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'"


def _jinja(system: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}{{ " + TURN + " }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# In Qwen3's chats the last answer has the block, and those before it have lost theirs.
QWEN3_JINJA = (
    "{% for message in messages %}{% if loop.last and message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message['content'].lstrip('\n')"
    " + '<|im_end|>\n' }}{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)


class ChatMLTokenizer(Tokenizer):
    family = "ChatML"
    marker = "<|im_start|>"

    def __init__(self, files, text):
        kind = files.config.get("model_type")
        system = QWEN25_SYSTEM if kind == "qwen2" else SMOLLM2_SYSTEM
        super().__init__(files, text, QWEN3_JINJA if kind == "qwen3" else _jinja(system))
        special = text.special
        ends = [name for name in ("<|endoftext|>", "<|end_of_text|>") if name in special]
        if not ends:
            others = "so neither SmolLM2's tokenizer nor Qwen's"
            raise InputError(f"{text.file}: no special token <|endoftext|>, {others}")
        self._start, self.eos_id = special["<|im_start|>"], special["<|im_end|>"]
        self.text_end_id = special[ends[0]]
        self.turn_end = [self.eos_id, *self.encode("\n")]
        self._set_stop_ids(ignored={self._start})
        # SmolLM2-Instruct calls <|im_start|> its BOS, and writes no other one. Plain texts never
        # began with it: <|endoftext|> stood between them, and it is the BOS of the base model and
        # of Qwen.
        named = special.get(files.named_token("bos_token"), files.config.get("bos_token_id"))
        self.bos_id = named if named in special.values() else self._start
        self.text_start_id = self.text_end_id if self.bos_id == self._start else self.bos_id

        self._think = []  # what an answer begins with
        if "enable_thinking" in self.jinja or self.jinja == QWEN3_JINJA:
            if not {"<think>", "</think>"} <= special.keys():
                raise InputError(f"{text.file}: has no <think> and </think>; use Qwen3's")
            blank = self.encode("\n\n")
            self._think = [special["<think>"], *blank, special["</think>"], *blank]
            if not self.jinja.startswith((THINKING_OFF, QWEN3_JINJA)):
                self.jinja = THINKING_OFF + self.jinja

        markers = {self._start, *self.special_ids.intersection(self._think)}
        spare = {*special.values()} - markers - {self.bos_id, *self.stop_ids}
        # Qwen's text models never see <|quad_end|>, a corner of a picture. Its other spare tokens
        # serve code (<|fim_pad|>, <|file_sep|>) and tools, and were trained.
        first = [special[name] for name in ("<empty_output>", "<|quad_end|>") if name in special]
        self._set_reset_id({*markers, self.bos_id}, next(iter(first), max(spare, default=None)))
        self.template_ids = sorted({*markers, self.eos_id, self.reset_id})

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """The checkpoint's template. It leaves white space around contents as it is.

        continues: the messages continue a chat, so a default system turn and BOS are left out.
        """
        turns, ids = self._turns(messages), []
        if "<think>" in self.jinja and not self._think:
            why = "thinks before every answer, which cannot be turned off"
            raise InputError(f"{self._files.template_file}: {why}; use one with enable_thinking")
        if not continues:
            turns = self._with_system_turn(turns)
            if "bos_token" in (self.chat_template or ""):  # not in SmolLM2's
                ids.append(self.bos_id)
        answer_begins = [self._start, *self.encode("assistant\n"), *self._think]
        for position, (role, content) in enumerate(turns):
            if self._think and role == "assistant" and "</think>" in content:
                raise InputError(
                    f"message {position} has </think> in it: leave it out, thinking is off"
                )
            if self._think and role == "assistant" and position == len(turns) - 1:
                ids += answer_begins + self.encode(content.lstrip("\n")) + self.turn_end
            else:  # earlier answers have lost their block
                ids += [self._start, *self.encode(f"{role}\n{content}"), *self.turn_end]
        return ids + answer_begins if add_generation_prompt else ids

    def _with_system_turn(self, turns):
        """The turns behind the template's own system turn, which a chat without one begins with."""
        if turns[0][0] == "system" or not re.search(SYSTEM_BEGINS + r"[^'\"]", self.jinja):
            return turns
        for system in KNOWN_SYSTEMS:
            if re.search(SYSTEM_BEGINS + re.escape(system) + re.escape("<|im_end|>"), self.jinja):
                return [("system", system), *turns]
        why = "begins with a system turn that is not known here"
        raise InputError(
            f"{self._files.template_file}: {why}; begin the chat with a system message"
        )
