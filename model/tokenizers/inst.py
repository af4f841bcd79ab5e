"""Llama 2's and Mistral's chats. Both write [INST] around the user's text.

    Llama 2       <s>[INST] Hi [/INST] Hello </s><s>[INST] …
    Mistral v1    <s>[INST] Hi [/INST] Hello</s>[INST] …        7B v0.1 and v0.2
    Mistral v3    <s>[INST] Hi[/INST] Hello</s>[INST] …         7B v0.3: here [INST] is one special id

Where [INST] is text, a user could type it. Such a message is refused, as in Meta's own code
(github.com/meta-llama/llama, llama/generation.py).
"""

import re

from model.errors import InputError
from model.tokenizers.base import Tokenizer, valid
from model.tokenizers.gemma import ALTERNATE

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
LLAMA2_JINJA = (
    "{% set system, turns = '', messages %}"
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ bos_token + LEAD + '[INST] '"
    " + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _mistral_jinja(is_v3: bool, lead: str) -> str:
    """As github.com/mistralai/mistral-common writes chats: the published templates differ from
    release to release in spaces. v3 puts the system text into the last user turn.
    """
    begin = f"'[INST]{lead}'" if is_v3 else f"'{lead}[INST] '"
    end = "'[/INST]'" if is_v3 else "' [/INST]'"
    answer = repr(lead) if is_v3 else "' '"
    here = "loop.index0 == (turns | length - 1) // 2 * 2" if is_v3 else "loop.first"
    return (
        "{{ bos_token }}{% set system, turns = '', messages %}"
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set system = messages[0]['content'] + '\n\n' %}{% endif %}"
        "{% for message in turns %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
        "{{ " + begin + " + (system if " + here + " else '') + message['content'] + " + end + " }}"
        "{% else %}{{ " + answer + " + message['content'] | trim + eos_token }}{% endif %}"
        "{% endfor %}"
    )


def inst_family(files, text) -> type[Tokenizer]:
    """The template tells Mistral from Llama 2 or, where there is none, config.json."""
    if "[INST]" in text.special:
        return MistralTokenizer
    if files.chat_template is None:
        is_mistral = files.config.get("model_type") == "mistral"
    else:
        is_mistral = "[INST]" in files.chat_template and "<<SYS>>" not in files.chat_template
    return MistralTokenizer if is_mistral else Llama2Tokenizer


class InstTokenizer(Tokenizer):
    """Llama 2 and Mistral v1 have no spare special token: there [RESET] is <unk>, unless config.json
    names another one as reset_token_id. Text never makes <unk>, for every byte has a piece, so its
    row is untrained. reset_token_id may also be a row that was added behind the pieces.
    """

    marker = "[INST]"

    def __init__(self, files, text, jinja):
        super().__init__(files, text, jinja)
        reset, rows = files.config.get("reset_token_id"), files.config.get("vocab_size")
        if type(reset) is int and type(rows) is int and text.size <= reset < rows:
            self.vocab_size = reset + 1
            self.special_ids |= {*range(text.size, self.vocab_size)}
        self.bos_id = self.text_start_id = text.special["<s>"]
        self.eos_id = self.text_end_id = text.special["</s>"]
        self._set_stop_ids(ignored={self.bos_id})
        # Mistral v3 has some hundred control tokens that were kept for later.
        control = [i for name, i in text.special.items() if re.fullmatch(r"\[control_\d+\]", name)]
        markers = {i for name, i in text.special.items() if name in ("[INST]", "[/INST]")}
        self._set_reset_id({self.bos_id, *markers}, max(control, default=text.unknown_id))
        self.template_ids = sorted({*markers, self.reset_id})

    def _refuse_tags(self, turns, tags) -> None:
        for role, content in turns:
            if tag := next((tag for tag in tags if tag in content), None):
                raise InputError(f"the {role}'s message has {tag} in it, which marks turns here")


class Llama2Tokenizer(InstTokenizer):
    family = "Llama 2"

    def __init__(self, files, text):
        super().__init__(files, text, LLAMA2_JINJA.replace("LEAD", repr(text.lead)))
        space = [i for i, piece in enumerate(text.pieces) if piece == "▁"]
        self.turn_end = [*space, self.eos_id]  # the template has a space before </s>

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Llama 2's template. BOS begins every pair of turns, so continues changes nothing. The
        system turn stands inside the first user turn. "[/INST]" opens the assistant's turn.
        """
        turns, ids, system = self._turns(messages), [], ""
        self._refuse_tags(turns, LLAMA2_TAGS)
        if turns[0][0] == "system" and len(turns) > 1:
            system = f"<<SYS>>\n{turns.pop(0)[1]}\n<</SYS>>\n\n"
        self._check_order(turns)
        for role, content in turns:
            if role == "user":
                text = f"[INST] {(system + content).strip()} [/INST]"
                ids += [self.bos_id, *self.encode(text)]
                system = ""
            elif content := content.strip():
                ids += self.encode(content) + self.turn_end
            else:  # the spaces before and behind an empty answer meet
                ids += [*self.encode(" "), self.eos_id]
        return ids


class MistralTokenizer(InstTokenizer):
    def __init__(self, files, text):
        self._is_v3 = "[INST]" in text.special
        self.family = "Mistral v3" if self._is_v3 else "Mistral v1"
        super().__init__(files, text, jinja := _mistral_jinja(self._is_v3, text.lead))
        self.jinja = jinja  # the checkpoint's own may put other spaces than render() does
        self.turn_end = [self.eos_id]

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Mistral's template. "[/INST]" opens the assistant's turn.

        continues: the messages continue a chat, so BOS is left out.
        """
        turns, ids = self._turns(messages), [] if continues else [self.bos_id]
        system = turns.pop(0)[1] + "\n\n" if turns[0][0] == "system" else ""
        self._check_order(turns)
        if not self._is_v3:
            self._refuse_tags([("system", system), *turns], LLAMA2_TAGS[:2])
        with_system = (len(turns) - 1) // 2 * 2 if self._is_v3 else 0
        for position, (role, content) in enumerate(turns):
            content = system + content if position == with_system else content
            if role == "assistant":
                ids += self.encode(content.strip()) + self.turn_end
            elif self._is_v3:
                begin, end = self.special_tokens["[INST]"], self.special_tokens["[/INST]"]
                ids += [begin, *self._text.encode_after_space(valid(content)), end]
            else:
                ids += self.encode(f"[INST] {content} [/INST]")
        return ids
