"""Text to token ids and back, and chats to token ids.

    tok = load_tokenizer("Meta-Llama-3-8B-Instruct")     # any Hugging Face model directory
    ids = tok.render([{"role": "user", "content": "Hi"}])
    text = tok.decode(tok.encode("plain text"))

Which class that makes depends on the files:

    Llama3Tokenizer           bpe.py             <|start_header_id|>user<|end_header_id|> …
    ChatMLTokenizer           bpe.py             <|im_start|>user …             SmolLM2
    SentencePieceTokenizer    Google's library   <start_of_turn>user …          Gemma, the toy
    Llama2Tokenizer           Google's library   [INST] … [/INST]               Llama 2

They have the same methods, and share nothing but bpe.py and the functions at the end of this file:

    encode(text)        plain text only: whatever it contains, no special id comes out, and no BOS
    decode(ids)         special ids come out as nothing, invalid UTF-8 as U+FFFD
    render(messages)    a chat as the published template has it, BOS once, special ids put in as ids
    save(directory)     the files that were read, byte for byte
    bos_id              the checkpoint's BOS. In SmolLM2's chats that is <|im_start|>
    eos_id              ends an answer
    text_start_id       stands before a plain text, text_end_id behind it
    stop_ids            where a sampler stops: eos_id, text_end_id, and what the checkpoint names besides
    reset_id            the backtracking token [RESET]: a spare special id, which no text can spell
    turn_end            closes an assistant's turn: eos_id, and what the template puts around it
    template_ids        special ids that render() uses, and reset_id; a base has not trained them
    special_ids         all of them
    special_tokens      {name: id} of those that have a name, for code that renders a template
    chat_template       the checkpoint's own Jinja template, unrendered; render() does not use it
    jinja               a Jinja template that writes chats as render() does, for those who have only
                        that: the checkpoint's own, or one of those below where it has none

It will not train a tokenizer, download one, or parse special tokens out of text: an id such as
<|eot_id|> can only come from code. That is the point, since a user who could type [RESET] or a turn
marker could rewrite the conversation.
"""

import re
from pathlib import Path

import sentencepiece

from model.bpe import TIKTOKEN_LINE, read_json, read_tiktoken, read_tokenizer_json
from model.errors import InputError, refuse_pointer

# What a checkpoint may carry, and save() passes on. Only tokenizer.*, tokenizer_config.json, the
# chat template and where generation stops are read here; transformers wants the rest.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "original/tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def load_tokenizer(path):
    """The tokenizer of a Hugging Face model directory; which kind it is shows in the files."""
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(
            f"{path}: no such directory; download the model, then name the directory it is in"
        )
    present = [name for name in FILES if (directory / name).is_file()]
    for name in present:
        refuse_pointer(directory / name)
    files = {name: (directory / name).read_bytes() for name in present}
    # tokenizer.model first: Gemma has a tokenizer.json as well, of a kind that only its
    # SentencePiece file explains. Then tokenizer.json, which is what transformers reads; original/
    # has the same vocabulary, as Meta ships it.
    if "tokenizer.model" in files and not TIKTOKEN_LINE.match(files["tokenizer.model"]):
        sp = _sentencepiece(directory / "tokenizer.model", files["tokenizer.model"])
        kind = Llama2Tokenizer if _is_llama2(sp) else SentencePieceTokenizer
        return kind(directory, files, sp)
    for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        if name in files:
            return _byte_level_tokenizer(directory, files, name)
    raise InputError(
        f"{directory}: no tokenizer; copy tokenizer.json (Llama-3, SmolLM2) or tokenizer.model"
        " (Llama-2, Llama-3, Gemma) into it"
    )


def _byte_level_tokenizer(directory, files, name):
    """Llama-3's or ChatML's, whichever markers of turns the vocabulary has."""
    file = directory / name
    if name == "tokenizer.json":
        bpe, special = read_tokenizer_json(file, files[name])
    else:
        bpe, special = read_tiktoken(file, files[name], LLAMA3_SPLIT, LLAMA3_SPECIAL)
    chatml = set(CHATML_SPECIAL) <= special.keys()
    template = _chat_template(directory, files) or ""
    headers = "<|start_header_id|>"
    if headers in special and headers in template and CHATML_SPECIAL[0] not in template:
        chatml = False  # it has ChatML's tokens, and its chats are Llama-3's all the same
    kind = ChatMLTokenizer if chatml else Llama3Tokenizer
    return kind(directory, files, file, bpe, special)


# ── Llama-3 ───────────────────────────────────────────────────────────────────────────────────────

# A tiktoken file holds neither the regex that cuts text into words nor the special tokens;
# tokenizer.json does. Published in github.com/meta-llama/llama3, llama/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Counted from the end of the ordinary ids. The names of the reserved ones between these differ from
# release to release; the last has another number in 3.1, but the same id.
LLAMA3_SPECIAL = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eot_id|>": 9,
    "<|reserved_special_token_250|>": 255,
}
LLAMA3_JINJA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class Llama3Tokenizer:
    def __init__(self, directory, files, file, bpe, special):
        if bpe.missing_bytes:
            raise InputError(
                f"{file}: lacks single bytes, so some text cannot be encoded; download it again"
            )
        for token in LLAMA3_SPECIAL:
            if token not in special and "reserved" not in token:
                raise InputError(
                    f"{file}: no special token {token}, so not a Llama-3 tokenizer (nor one with"
                    " ChatML's tokens); use one that is"
                )
        self._bpe, self._files = bpe, files
        self.chat_template = own = _chat_template(directory, files)
        # 3.1's and 3.2's write the date, which render() leaves out.
        self.jinja = LLAMA3_JINJA if own is None or "date_string" in own else own
        self.vocab_size = max(*bpe.ids, *special.values()) + 1
        self.special_ids = frozenset(range(self.vocab_size)) - bpe.ids
        self.special_tokens: dict[str, int] = special
        self.bos_id = self.text_start_id = special["<|begin_of_text|>"]
        self.eos_id, self.text_end_id = special["<|eot_id|>"], special["<|end_of_text|>"]
        self._header = special["<|start_header_id|>"]
        self._header_end = special["<|end_header_id|>"]
        self.turn_end = [self.eos_id]
        end_of_message = self.bos_id + 8  # <|eom_id|>: a call of a tool follows, which we have not
        self.stop_ids = _stop_ids(directory, files, self, ignored={self.bos_id, end_of_message})

        used = {self.bos_id, self._header, self._header_end, *self.stop_ids}
        reserved = {
            i for token, i in special.items() if token.startswith("<|reserved_special_token_")
        }
        default = max(reserved or {*special.values()} - used, default=None)
        self.reset_id = _reset_id(directory, self, used, default)
        template_ids = {self.bos_id, self._header, self._header_end, self.eos_id, self.reset_id}
        self.template_ids = sorted(template_ids)

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(_valid(text))

    def decode(self, ids) -> str:
        return self._bpe.decode(_ordinary(ids, self))

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Llama-3's template; 3.1 and 3.2 write a date into the system turn besides, which we leave
        out. These messages continue a chat: then what begins one is left out, here BOS.
        """
        _check_template(self, "<|start_header_id|>")
        ids = [] if continues else [self.bos_id]
        for role, content in _checked(messages):
            ids += self._open(role) + self.encode(content.strip()) + self.turn_end
        return ids + self._open("assistant") if add_generation_prompt else ids

    def _open(self, role):
        return [self._header, *self.encode(role), self._header_end, *self.encode("\n\n")]

    def save(self, directory):
        _write(self._files, directory)


# ── ChatML: SmolLM2 ───────────────────────────────────────────────────────────────────────────────

CHATML_SPECIAL = ("<|im_start|>", "<|im_end|>")
# SmolLM2-Instruct's template begins a chat with this unless the chat has a system turn.
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML_JINJA = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatMLTokenizer:
    """Bytes that the vocabulary lacks are dropped from text, as by Hugging Face's tokenizers."""

    def __init__(self, directory, files, file, bpe, special):
        ends = [name for name in ("<|endoftext|>", "<|end_of_text|>") if name in special]
        if not ends:
            raise InputError(
                f"{file}: no special token <|endoftext|>, so not SmolLM2's; use a tokenizer.json"
                " that has one"
            )
        self._bpe, self._files = bpe, files
        self.chat_template = _chat_template(directory, files)
        self.jinja = CHATML_JINJA if self.chat_template is None else self.chat_template
        self.vocab_size = max(*bpe.ids, *special.values()) + 1
        self.special_ids = frozenset(range(self.vocab_size)) - bpe.ids
        self.special_tokens: dict[str, int] = special
        self._start, self.eos_id = special["<|im_start|>"], special["<|im_end|>"]
        self.text_end_id = special[ends[0]]
        self.turn_end = [self.eos_id, *self.encode("\n")]
        self.stop_ids = _stop_ids(directory, files, self, ignored={self._start})
        # SmolLM2-Instruct calls <|im_start|> its BOS, and no other precedes it. Plain texts never
        # began with it: they were parted by <|endoftext|>, which is the base model's BOS.
        name = _named_token(directory, files, "bos_token")
        self.bos_id = special.get(name, self._start)
        self.text_start_id = self.text_end_id if self.bos_id == self._start else self.bos_id

        used = {self._start, self.bos_id, *self.stop_ids}
        default = max({*special.values()} - used, default=None)
        self.reset_id = _reset_id(directory, self, used, special.get("<empty_output>", default))
        self.template_ids = sorted({self._start, self.eos_id, self.reset_id})

    def encode(self, text: str) -> list[int]:
        return self._bpe.encode(_valid(text))

    def decode(self, ids) -> str:
        return self._bpe.decode(_ordinary(ids, self))

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """These messages continue a chat: then what begins one is left out, here a system turn.
        Unlike Llama-3's and Gemma's, this template leaves white space around contents.
        """
        _check_template(self, "<|im_start|>")
        turns = _checked(messages)
        ids = []
        if not continues:
            turns = self._with_system_turn(turns)
            if "bos_token" in (self.chat_template or ""):  # not in SmolLM2's
                ids.append(self.bos_id)
        for role, content in turns:
            ids += [self._start, *self.encode(f"{role}\n{content}"), *self.turn_end]
        return ids + [self._start, *self.encode("assistant\n")] if add_generation_prompt else ids

    def _with_system_turn(self, turns):
        """As the checkpoint's own template does; one that has none gets SmolLM2's."""
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

    def save(self, directory):
        _write(self._files, directory)


# ── Gemma and the toy: SentencePiece ──────────────────────────────────────────────────────────────

# SentencePiece finds *user-defined* pieces in plain text, and Gemma's markers are that: a user
# could type a turn. They look no different from Gemma's newline runs and HTML tags, which are text,
# so the markers are known by name.
MARKERS = r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|reset)>|\[@BOS@\]"
# A piece in the model file: protobuf fields 1 (name: tag, length, bytes), 2 (score: a float) and 3
# (type; 4 is user-defined). github.com/google/sentencepiece, src/sentencepiece_model.proto
USER_DEFINED = re.compile(rb"(\n.(?:" + MARKERS.encode() + rb")(?:\x15.{4})?\x18)\x04", re.DOTALL)
ALTERNATE = (  # what the published templates of Gemma and Llama 2 do about other orders
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must go user, assistant, user, …') }}{% endif %}"
)
GEMMA_JINJA = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{{ '<start_of_turn>'"
    " + ('model' if message['role'] == 'assistant' else 'user') + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _sentencepiece(file, data: bytes):
    # Retype the markers in memory from user-defined to control (3), which SentencePiece never
    # finds in text. To cut the text at each marker would not do: it misses those that
    # normalisation makes of other characters (＜ to <).
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(USER_DEFINED.sub(b"\\g<1>\x03", data))
        sp.id_to_piece(list(range(sp.vocab_size())))
    except (RuntimeError, ValueError):
        raise InputError(
            f"{file}: neither a tiktoken file nor a SentencePiece model; download it again"
        ) from None
    return sp


class SentencePieceTokenizer:
    def __init__(self, directory, files, sp):
        file = directory / "tokenizer.model"
        self._sp = sp
        pieces = sp.id_to_piece(list(range(sp.vocab_size())))
        self.vocab_size = len(pieces)
        self.special_ids = frozenset(
            i for i in range(self.vocab_size) if self._sp.is_control(i) or self._sp.is_unknown(i)
        )
        self.special_tokens = special = {pieces[i]: i for i in self.special_ids}
        for name in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"):
            if name not in special:
                raise InputError(
                    f"{file}: no special piece {name}, so not Gemma's layout, and not Llama 2's"
                    " either; no other is known here: use a Gemma or Llama 2 checkpoint"
                )
        for piece in pieces:
            if re.fullmatch(MARKERS, piece) and piece not in special:
                raise InputError(
                    f"{file}: text can spell the piece {piece}; use a Gemma tokenizer.model"
                )
        if sum(self._sp.is_byte(list(range(self.vocab_size)))) != 256:
            raise InputError(
                f"{file}: no byte pieces, so not every text can be encoded;"
                " use a Gemma tokenizer.model"
            )

        self._files, self.chat_template = files, _chat_template(directory, files)
        self.jinja = GEMMA_JINJA if self.chat_template is None else self.chat_template
        self.bos_id = self.text_start_id = special["<bos>"]
        self._turn = special["<start_of_turn>"]
        self.eos_id, self.text_end_id = special["<end_of_turn>"], special["<eos>"]
        self.turn_end = [self.eos_id, *self.encode("\n")]
        self.stop_ids = _stop_ids(
            directory, files, self, ignored={self.bos_id, special.get("<pad>")}
        )
        # <reset> is the toy's own. <pad> serves small models that have no spare piece: a padded
        # position has no loss.
        default = next(
            (special[name] for name in ("<reset>", "<unused0>", "<pad>") if name in special), None
        )
        self.reset_id = _reset_id(
            directory, self, {self.bos_id, self._turn, *self.stop_ids}, default
        )
        self.template_ids = sorted({self.bos_id, self._turn, self.eos_id, self.reset_id})

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(_valid(text))

    def decode(self, ids) -> str:
        return self._sp.decode(_ordinary(ids, self))

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Gemma's template: no system turn, and user and assistant take turns. These messages
        continue a chat: then what begins one is left out, here BOS.
        """
        _check_template(self, "<start_of_turn>")
        ids = [] if continues else [self.bos_id]
        for position, (role, content) in enumerate(_checked(messages)):
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

    def save(self, directory):
        _write(self._files, directory)


# ── Llama 2: SentencePiece, and turns that are marked with text ───────────────────────────────────

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
LLAMA2_JINJA = (
    "{% set system, turns = '', messages %}"
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim"
    " + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def _is_llama2(sp) -> bool:
    """<s> and </s>, and a text begins with a space: so its words look the same at the start."""
    ends = [sp.piece_to_id(name) for name in ("<s>", "</s>")]
    return (
        all(sp.is_control(i) for i in ends)
        and not sp.is_control(sp.piece_to_id("<start_of_turn>"))
        and "".join(sp.encode("a", out_type=str)).startswith("▁")
    )


class Llama2Tokenizer:
    """The pieces [INST] and the like are text, which a user could type: such a message is refused,
    as in Meta's own code (github.com/meta-llama/llama, llama/generation.py).

    There is no spare special token. [RESET] is <unk> unless config.json names another one as
    reset_token_id: with byte pieces no text makes <unk>, so its row was never trained. It may be a
    row that was added behind the pieces, too.
    """

    def __init__(self, directory, files, sp):
        file = directory / "tokenizer.model"
        self._sp, self._files = sp, files
        ids = list(range(sp.vocab_size()))
        if sum(sp.is_byte(ids)) != 256:
            raise InputError(
                f"{file}: no byte pieces, so not every text can be encoded; use Llama 2's"
            )
        self.chat_template = _chat_template(directory, files)
        self.jinja = LLAMA2_JINJA if self.chat_template is None else self.chat_template
        self.vocab_size = _with_added_reset(directory, len(ids))
        added = range(len(ids), self.vocab_size)
        special = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
        self.special_ids = frozenset([*special, *added])
        self.special_tokens = {sp.id_to_piece(i): i for i in special}
        self.bos_id = self.text_start_id = sp.piece_to_id("<s>")
        self.eos_id = self.text_end_id = sp.piece_to_id("</s>")
        self.stop_ids = _stop_ids(directory, files, self, ignored={self.bos_id})
        # The template has a space before </s>.
        space = sp.piece_to_id("▁")
        self.turn_end = [self.eos_id] if sp.is_unknown(space) else [space, self.eos_id]
        self.reset_id = _reset_id(directory, self, {self.bos_id, *self.stop_ids}, sp.unk_id())
        self.template_ids = [self.reset_id]

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(_valid(text))

    def decode(self, ids) -> str:
        return self._sp.decode(_ordinary(ids, self))

    def render(self, messages, add_generation_prompt=True, continues=False) -> list[int]:
        """Llama 2's template: every pair of turns begins with BOS; the system turn, if there is
        one, stands within the first user turn. "[/INST]" opens the assistant's.
        """
        _check_template(self, "[INST]")
        turns, ids = _checked(messages), []
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

    def save(self, directory):
        _write(self._files, directory)


def _with_added_reset(directory, size: int) -> int:
    """`size`, or more if reset_token_id of config.json is a row of the model behind the pieces."""
    config = _config(directory)
    reset, rows = config.get("reset_token_id"), config.get("vocab_size")
    added = type(reset) is int and type(rows) is int and size <= reset < rows
    return reset + 1 if added else size


# ── All of them ───────────────────────────────────────────────────────────────────────────────────


def _valid(text):
    """Half a surrogate pair has no UTF-8: it becomes U+FFFD. Two halves become their character, as
    in tiktoken.
    """
    if not isinstance(text, str):
        raise InputError(f"text to encode must be a string, not {type(text).__name__}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ordinary(ids, tok):
    """The ids that stand for text. An id that does not exist is an error, not a silent gap."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < tok.vocab_size]:
        raise InputError(
            f"token id {wrong[0]} is outside the tokenizer's {tok.vocab_size} ids;"
            " is it another model's?"
        )
    return [i for i in ids if i not in tok.special_ids]


def _checked(messages):
    """(role, content) of each message. Roles are three known words: none can smuggle text in."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("a chat must be a list of messages with at least one in it")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(
                f'message {position} must look like {{"role": "user", "content": "…"}}'
            )
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(
                f"message {position} has role {message['role']!r};"
                " it must be system, user or assistant"
            )
        if not isinstance(message["content"], str):
            raise InputError(
                f"message {position} has content that is a {type(message['content']).__name__},"
                " not text"
            )
    return [(message["role"], message["content"]) for message in messages]


def _stop_ids(directory, files, tok, ignored) -> tuple[int, ...]:
    """Where an answer ends: as the template has it, and at what the checkpoint names besides.

    One that ends answers elsewhere only was trained on other turns: _check_template() says so.
    """
    ours = tuple(dict.fromkeys((tok.text_end_id, tok.eos_id)))
    tok.foreign = None
    config = _config(directory)
    name = "generation_config.json"  # counts, if it says anything
    named = _config(directory, name).get("eos_token_id")
    if named is None:
        name, named = "config.json", config.get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    ignored = [*ignored, config.get("reset_token_id")]  # a server may have to stop at [RESET]
    # Ids of ordinary text end nothing: they are defaults that nobody looked at.
    special = [i for i in named if type(i) is int and (i in tok.special_ids or i >= tok.vocab_size)]
    others = tuple(i for i in special if i not in ours and i not in ignored)
    if others and tok.eos_id not in special:
        tok.foreign = f"its {name} ends answers with {', '.join(map(str, others))}"
    eos = _named_token(directory, files, "eos_token")
    if eos is not None and eos not in tok.special_tokens:
        tok.foreign = tok.foreign or f"its tokenizer_config.json ends answers with {eos}"
    return ours + tuple(i for i in others if i < tok.vocab_size)


def _config(directory, name="config.json") -> dict:
    file = directory / name
    return read_json(file, file.read_bytes()) if file.is_file() else {}


def _check_template(tok, marker):
    """A checkpoint that was trained on other turns than ours would only seem to be a bad model."""
    if tok.chat_template is None and tok.foreign:
        raise InputError(
            f"this checkpoint's chats are not written as known here: {tok.foreign}, not with"
            f" {tok.eos_id}; use a Llama, SmolLM2 or Gemma checkpoint, or mend eos_token_id"
        )
    if tok.chat_template is not None and marker not in tok.chat_template:
        raise InputError(
            f"this checkpoint's chat template has no {marker}, so its chats are not written as"
            " known here; use a Llama, SmolLM2 or Gemma checkpoint, or mend chat_template.jinja"
        )


def _reset_id(directory, tok, used, default):
    """config.json's reset_token_id, which training writes, or else the default."""
    file = directory / "config.json"
    reset = _config(directory).get("reset_token_id")
    if reset is None and default is None:
        raise InputError(
            f"{directory}: no spare special token for [RESET];"
            " name one as reset_token_id in config.json"
        )
    if reset is None:
        return default
    if type(reset) is not int or not 0 <= reset < tok.vocab_size:
        raise InputError(
            f"{file}: reset_token_id is {reset!r}; it must be an id below {tok.vocab_size}"
        )
    if reset not in tok.special_ids or reset in used:
        raise InputError(
            f"{file}: reset_token_id {reset} is not a spare special token; try {default}"
        )
    return reset


def _chat_template(directory, files):
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(
                f"{directory / 'chat_template.jinja'}: not UTF-8 text; download the file again"
            ) from None
    name = "tokenizer_config.json"
    template = (
        read_json(directory / name, files[name]).get("chat_template") if name in files else None
    )
    if isinstance(template, list):  # several, by name: the one that transformers takes unasked
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _named_token(directory, files, key):
    """bos_token and the like in tokenizer_config.json: a string, or an object around one."""
    name = "tokenizer_config.json"
    value = read_json(directory / name, files[name]).get(key) if name in files else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _write(files, directory):
    for name, data in files.items():
        target = Path(directory) / name
        if target.is_file() and target.read_bytes() == data:
            continue  # saving where it came from: those files may be read-only
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
