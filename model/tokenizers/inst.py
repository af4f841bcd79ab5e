"""Llama 2's chats: <s>[INST] Hi [/INST] Hello </s> … Here turns are marked with text.

A user could type [INST]. Such a message is refused, as in Meta's own code
(github.com/meta-llama/llama, llama/generation.py).
"""

from model.errors import InputError
from model.tokenizers.base import Tokenizer
from model.tokenizers.gemma import ALTERNATE

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
JINJA = (
    "{% set system, turns = '', messages %}"
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim"
    " + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


class Llama2Tokenizer(Tokenizer):
    """There is no spare special token, so [RESET] is <unk>, unless config.json's reset_token_id
    names another: text never makes <unk>, for every byte has a piece, so its row is untrained.
    reset_token_id may also be a row of the model that was added behind the pieces.
    """

    marker = "[INST]"

    def __init__(self, files, text):
        super().__init__(files, text, JINJA)
        reset, rows = files.config.get("reset_token_id"), files.config.get("vocab_size")
        if type(reset) is int and type(rows) is int and text.size <= reset < rows:
            self.vocab_size = reset + 1
            self.special_ids |= {*range(text.size, self.vocab_size)}
        self.bos_id = self.text_start_id = text.special["<s>"]
        self.eos_id = self.text_end_id = text.special["</s>"]
        self._set_stop_ids(ignored={self.bos_id})
        space = [i for i, piece in enumerate(text.pieces) if piece == "▁"]
        self.turn_end = [*space, self.eos_id]  # the template has a space before </s>
        self._set_reset_id({self.bos_id}, default=text.unknown_id)
        self.template_ids = [self.reset_id]

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Llama 2's template. BOS begins every pair of turns, so continues changes nothing. The
        system turn stands inside the first user turn. "[/INST]" opens the assistant's turn.
        """
        turns, ids = self._turns(messages), []
        for role, content in turns:
            if tag := next((tag for tag in LLAMA2_TAGS if tag in content), None):
                raise InputError(
                    f"the {role}'s message has {tag} in it, which marks Llama 2's turns"
                )
        system = turns.pop(0)[1] if turns[0][0] == "system" and len(turns) > 1 else None
        for position, (role, content) in enumerate(turns):
            if role != ("user", "assistant")[position % 2]:
                raise InputError(
                    f"message {position} is the {role}'s; Llama 2's chats go system (or not), user,"
                    " assistant, user, …"
                )
            content = content.strip()
            if role == "assistant":
                ids += self.encode(content) + self.turn_end
                continue
            if position == 0 and system is not None:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
            ids += [self.bos_id, *self.encode(f"[INST] {content} [/INST]")]
        return ids
