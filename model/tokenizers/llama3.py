"""Llama-3's chats: <|start_header_id|>user<|end_header_id|>⏎⏎Hi<|eot_id|> …"""

from model.errors import InputError
from model.tokenizers.base import Tokenizer

# A tiktoken file has neither the regex that cuts text into words nor the special tokens. Both are
# published in github.com/meta-llama/llama3, llama/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Ids count from the end of the ordinary ones. The reserved tokens between these have other names in
# every release; the last one has another number in 3.1, but the same id.
LLAMA3_SPECIAL = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eot_id|>": 9,
    "<|reserved_special_token_250|>": 255,
}
JINJA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class Llama3Tokenizer(Tokenizer):
    family = "Llama-3"
    marker = "<|start_header_id|>"

    def __init__(self, files, text):
        super().__init__(files, text, JINJA)
        if text.missing_bytes:
            lacks = "lacks single bytes, so some text cannot be encoded"
            raise InputError(f"{text.file}: {lacks}; download it again")
        special = text.special
        for token in LLAMA3_SPECIAL:
            if token not in special and "reserved" not in token:
                others = "so neither a Llama-3 tokenizer nor one with ChatML's tokens"
                raise InputError(f"{text.file}: no special token {token}, {others}")
        if "date_string" in self.jinja:  # 3.1 and 3.2 write the date, which render() leaves out
            self.jinja = JINJA
        self.bos_id = self.text_start_id = special["<|begin_of_text|>"]
        self.eos_id, self.text_end_id = special["<|eot_id|>"], special["<|end_of_text|>"]
        self._header = special["<|start_header_id|>"]
        self._header_end = special["<|end_header_id|>"]
        self.turn_end = [self.eos_id]
        end_of_message = self.bos_id + 8  # <|eom_id|>: then a tool is called, which we do not do
        self._set_stop_ids(ignored={self.bos_id, end_of_message})

        markers = {self.bos_id, self._header, self._header_end}
        reserved = [i for name, i in special.items() if name.startswith("<|reserved_special_")]
        spare = reserved or {*special.values()} - markers - {*self.stop_ids}
        self._set_reset_id(markers, default=max(spare, default=None))
        self.template_ids = sorted({*markers, self.eos_id, self.reset_id})

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Llama-3's template, without the date that 3.1 and 3.2 write into the system turn.

        continues: the messages continue a chat, so BOS is left out.
        """
        ids = [] if continues else [self.bos_id]
        for role, content in self._turns(messages):
            ids += self._open(role) + self.encode(content.strip()) + self.turn_end
        return ids + self._open("assistant") if add_generation_prompt else ids

    def _open(self, role):
        return [self._header, *self.encode(role), self._header_end, *self.encode("\n\n")]
