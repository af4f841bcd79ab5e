"""What the tokenizers of all families share. A family adds its ids and render().

Every tokenizer has

    encode(text)        ids of plain text: no special id whatever the text contains, and no BOS
    decode(ids)         special ids become nothing, invalid UTF-8 becomes U+FFFD
    render(messages)    a chat as the published template writes it, as ids, with BOS once
    save(directory)     writes the files that were read, byte for byte

    bos_id              the checkpoint's BOS. In SmolLM2's chats that is <|im_start|>
    eos_id              ends an answer
    text_start_id       stands before a plain text, text_end_id behind it
    stop_ids            where sampling stops: eos_id, text_end_id, and what the checkpoint adds
    reset_id            the backtracking token [RESET]: a spare special id, which no text can spell
    turn_end            ids that close an assistant's turn: eos_id, and what stands around it
    template_ids        special ids that render() uses, and reset_id; a base has not trained them
    special_ids         all of them
    special_tokens      {name: id} of those that have a name
    vocab_size          ids are below this
    chat_template       the checkpoint's own Jinja template. render() does not run it
    jinja               a Jinja template that writes chats as render() does: exports carry it
"""

import sys
from pathlib import Path

from model.errors import InputError, read_json, refuse_pointer
from model.tokenizers.templates import whose

# A checkpoint may hold these, and save() passes them on. transformers reads more of them than we do.
NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "original/tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Files:
    """A checkpoint's files that say something about its tokenizer."""

    def __init__(self, path):
        self.directory = Path(path)
        if not self.directory.is_dir():
            raise InputError(
                f"{path}: no such directory; download the model, then name the directory it is in"
            )
        self.data = {}
        for name in (*NAMES, "config.json"):
            file = self.directory / name
            if file.is_file():
                refuse_pointer(file)
                self.data[name] = file.read_bytes()
        self.config = self.json("config.json")
        self.chat_template, self.template_file = self._chat_template()

    def json(self, name) -> dict:
        """The JSON object in the file of that name, or {} if there is no such file."""
        return read_json(self.directory / name) if name in self.data else {}

    def named_token(self, key) -> str | None:
        """bos_token and the like in tokenizer_config.json: a string, or an object around one."""
        value = self.json("tokenizer_config.json").get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _chat_template(self) -> tuple[str | None, Path]:
        """The checkpoint's template, and the file it is in."""
        file = self.directory / "chat_template.jinja"
        if file.name in self.data:
            try:
                return self.data[file.name].decode("utf-8"), file
            except UnicodeDecodeError:
                raise InputError(f"{file}: not UTF-8 text; download the file again") from None
        template = self.json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several: transformers takes the one named "default"
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        template = template if isinstance(template, str) else None
        return template, self.directory / "tokenizer_config.json"


class Tokenizer:
    family: str  # whose chats render() writes, by the names in templates.py
    marker: str  # begins a turn in the family's templates

    def __init__(self, files: Files, text, jinja: str):
        """text: from byte_level.py or pieces.py. jinja: for checkpoints without a template."""
        self._files, self._text = files, text
        self.vocab_size: int = text.size
        self.special_tokens: dict[str, int] = text.special
        self.special_ids: frozenset[int] = text.special_ids
        self.chat_template = template = files.chat_template
        self.jinja = jinja if template is None else template
        self._foreign = self._doubt = None  # why chats are refused; what is said before the first
        if template not in (None, jinja):
            known = whose(template)
            if self.marker not in template:
                self._foreign = f"its chat template has no {self.marker}"
            elif known is None:
                self._doubt = "not a chat template that is known here; chats are written as"
            elif known != self.family:
                self._foreign = f"its chat template is that of {known}, not of {self.family}"

    def encode(self, text: str) -> list[int]:
        return self._text.encode(valid(text))

    def decode(self, ids) -> str:
        """Without the special ones: they have no text."""
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            size = f"outside the tokenizer's {self.vocab_size} ids"
            raise InputError(f"token id {outside[0]} is {size}; is it another model's?")
        return self._text.decode([i for i in ids if i not in self.special_ids])

    def save(self, directory) -> None:
        for name in NAMES:
            target, data = Path(directory) / name, self._files.data.get(name)
            # Saved where it came from it is there already, and may be read-only.
            if data is not None and not (target.is_file() and target.read_bytes() == data):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)

    def _turns(self, messages) -> list[tuple[str, str]]:
        """Messages as (role, content), checked, if this checkpoint writes chats as we do."""
        if self._foreign:
            raise InputError(
                f"{self._files.directory}: its chats are not written as known here: {self._foreign};"
                " use a checkpoint of a family that is"
            )
        if self._doubt:
            print(f"{self._files.template_file}: {self._doubt} {self.family}'s", file=sys.stderr)
            self._doubt = None
        if not isinstance(messages, list | tuple) or not messages:
            raise InputError("a chat must be a list of one or more messages")
        for position, message in enumerate(messages):
            _check_message(position, message)
        return [(message["role"], message["content"]) for message in messages]

    def _check_order(self, turns: list[tuple[str, str]]) -> None:
        if not turns:
            raise InputError("a chat needs a user message behind the system message")
        for position, (role, _) in enumerate(turns):
            if role != ("user", "assistant")[position % 2]:
                order = f"{self.family}'s chats go user, assistant, user, …"
                raise InputError(f"turn {position} is the {role}'s; {order}")

    def _set_stop_ids(self, ignored: set[int]) -> None:
        """An answer ends where the template ends it, and at whatever the checkpoint names besides.

        A checkpoint without a template that names only other ids was trained on other chats.
        """
        ours = tuple(dict.fromkeys((self.text_end_id, self.eos_id)))
        name = "generation_config.json"  # counts before config.json
        named = self._files.json(name).get("eos_token_id")
        if named is None:
            name, named = "config.json", self._files.config.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        # Ids of ordinary text are defaults that nobody looked at: they end nothing. [RESET] is named
        # for servers, which stop there.
        ignored = [*ours, *ignored, self._files.config.get("reset_token_id")]
        others = [i for i in named if type(i) is int and i not in ignored]
        others = [i for i in others if i in self.special_ids or i >= self.vocab_size]
        self.stop_ids = (*ours, *(i for i in others if i < self.vocab_size))
        eos = self._files.named_token("eos_token")
        if self.chat_template is None and others and self.eos_id not in named:
            end = ", ".join(map(str, others))
            self._foreign = f"its {name} ends answers with {end}, not with {self.eos_id}"
        elif self.chat_template is None and eos is not None and eos not in self.special_tokens:
            self._foreign = f"its tokenizer_config.json ends answers with {eos}"

    def _set_reset_id(self, used: set[int], default: int | None) -> None:
        """config.json's reset_token_id, which training writes, or else the default."""
        file = self._files.directory / "config.json"
        reset = self._files.config.get("reset_token_id")
        if reset is not None:
            if type(reset) is not int or not 0 <= reset < self.vocab_size:
                must = f"it must be an id below {self.vocab_size}"
                raise InputError(f"{file}: reset_token_id is {reset!r}; {must}")
            if reset not in self.special_ids or reset in {*used, *self.stop_ids}:
                what = f"reset_token_id {reset} is not a spare special token; try {default}"
                raise InputError(f"{file}: {what}")
        elif default is None:
            what = "there is no spare special token for [RESET]; name one as reset_token_id"
            raise InputError(f"{file}: {what}")
        self.reset_id = default if reset is None else reset


def valid(text: str) -> str:
    """Half a surrogate pair has no UTF-8: it becomes U+FFFD. Two halves become their character."""
    if not isinstance(text, str):
        raise InputError(f"text to encode must be a string, not {type(text).__name__}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_message(position: int, message) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f'message {position} must look like {{"role": "user", "content": "…"}}')
    if message["role"] not in ("system", "user", "assistant"):
        raise InputError(
            f"message {position} has role {message['role']!r}; it must be system, user or assistant"
        )
    if not isinstance(message["content"], str):
        kind = type(message["content"]).__name__
        raise InputError(f"message {position} has content that is a {kind}, not text")
