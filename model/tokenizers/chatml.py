"""ChatML: <|im_start|>user⏎Hi<|im_end|>⏎ … These are SmolLM2's chats."""

from model.errors import InputError
from model.tokenizers.base import Tokenizer

# SmolLM2-Instruct's template begins with this turn, unless the chat begins with a system turn.
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
JINJA = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatMLTokenizer(Tokenizer):
    marker = "<|im_start|>"

    def __init__(self, files, text):
        super().__init__(files, text, JINJA)
        special = text.special
        ends = [name for name in ("<|endoftext|>", "<|end_of_text|>") if name in special]
        if not ends:
            raise InputError(
                f"{text.file}: no special token <|endoftext|>, so not SmolLM2's; use a"
                " tokenizer.json that has one"
            )
        self._start, self.eos_id = special["<|im_start|>"], special["<|im_end|>"]
        self.text_end_id = special[ends[0]]
        self.turn_end = [self.eos_id, *self.encode("\n")]
        self._set_stop_ids(ignored={self._start})
        # SmolLM2-Instruct calls <|im_start|> its BOS, and writes no other one. Plain texts never
        # began with it: <|endoftext|> stood between them, and it is the base model's BOS.
        self.bos_id = special.get(files.named_token("bos_token"), self._start)
        self.text_start_id = self.text_end_id if self.bos_id == self._start else self.bos_id

        used = {self._start, self.bos_id}
        spare = {*special.values()} - used - {*self.stop_ids}
        default = special.get("<empty_output>", max(spare, default=None))
        self._set_reset_id(used, default)
        self.template_ids = sorted({self._start, self.eos_id, self.reset_id})

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """The checkpoint's template. It leaves white space around contents as it is.

        continues: the messages continue a chat, so a default system turn and BOS are left out.
        """
        turns, ids = self._turns(messages), []
        if not continues:
            turns = self._with_system_turn(turns)
            if "bos_token" in (self.chat_template or ""):  # not in SmolLM2's
                ids.append(self.bos_id)
        for role, content in turns:
            ids += [self._start, *self.encode(f"{role}\n{content}"), *self.turn_end]
        return ids + [self._start, *self.encode("assistant\n")] if add_generation_prompt else ids

    def _with_system_turn(self, turns):
        if turns[0][0] == "system":
            return turns
        if SMOLLM2_SYSTEM in self.jinja:
            return [("system", SMOLLM2_SYSTEM), *turns]
        if "<|im_start|>system" in self.jinja:
            raise InputError(
                "this checkpoint's chat template may begin with a system turn that is not known"
                " here; begin the chat with a system message"
            )
        return turns
