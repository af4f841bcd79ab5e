"""Text to token ids and back, and chats to token ids, for Llama-3 (tiktoken) and Gemma or the toy (SentencePiece).

    tok = load_tokenizer("Meta-Llama-3-8B-Instruct")     # any Hugging Face model directory on this disk
    ids = tok.render([{"role": "user", "content": "Hi"}])  # <|begin_of_text|> … assistant header, as token ids
    text = tok.decode(tok.encode("plain text"))

Two classes with the same methods and nothing shared but the functions at the end of this file:

    encode(text)        plain text only: whatever it contains, no special id comes out, and no BOS is added
    decode(ids)         special ids render as nothing, invalid UTF-8 as U+FFFD
    render(messages)    a chat as the published template has it, BOS once, special ids inserted as ids
    save(directory)     the files that were read, byte for byte
    bos_id, stop_ids    the ids that begin a text and end an answer
    reset_id            the backtracking token [RESET]: a spare special id, so that no text can spell it
    turn_end            closes an assistant's turn; a model must generate the first of these ids
    template_ids        special ids that render() uses, and reset_id: untrained rows in a base model, BOS apart
    special_ids         all of them
    special_tokens      {name: id} of those that have a name, for code that renders a template; encode() knows none
    chat_template       the checkpoint's own Jinja template, unrendered; render() does not use it

It will not train a tokenizer, download one, or parse special tokens out of text: an id such as <|eot_id|> can only come
from code. That is the point, since a user who could type [RESET] or a turn marker could rewrite the conversation.
"""

import base64
import json
import re
from pathlib import Path

import sentencepiece
import tiktoken

from model.errors import InputError

# What a checkpoint may carry, and save() passes on. Only tokenizer.* and the chat template are read here; transformers
# wants the rest.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "original/tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def load_tokenizer(path):
    """The tokenizer of a Hugging Face model directory; which kind it is shows in the files."""
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"{path}: no such directory; download the model, then name the directory it is in")
    files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    # tokenizer.model first: Gemma has a tokenizer.json as well, of a kind that only its SentencePiece file explains.
    # Then tokenizer.json, which is what transformers reads; original/ has the same vocabulary, as Meta ships it.
    if "tokenizer.model" in files and not TIKTOKEN_LINE.match(files["tokenizer.model"]):
        return SentencePieceTokenizer(directory, files)
    for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        if name in files:
            return Llama3Tokenizer(directory, files, name)
    raise InputError(
        f"{directory}: no tokenizer; copy tokenizer.json (Llama-3) or tokenizer.model (Llama-3, Gemma) into it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Llama-3: byte-level BPE

TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\r?(?:\n|$)")
# How text is cut into words before BPE. A tiktoken file does not hold it; tokenizer.json does. Published in
# github.com/meta-llama/llama3, llama/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the step "ByteLevel" of a tokenizer.json means when it names no regex of its own (tokenizers by GPT-2's recipe).
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Ids of the special tokens, counted from the end of the ordinary ones. The names of the reserved ones between these
# differ from release to release; the last has another number in 3.1, but the same id.
LLAMA3_SPECIAL = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eot_id|>": 9,
    "<|reserved_special_token_250|>": 255,
}


class Llama3Tokenizer:
    def __init__(self, directory, files, name):
        file = directory / name
        read = _read_tokenizer_json if name == "tokenizer.json" else _read_tiktoken
        ranks, special, split = read(file, files[name])
        if any(bytes([b]) not in ranks for b in range(256)):
            raise InputError(f"{file}: lacks single bytes, so some text cannot be encoded; download it again")
        for token in LLAMA3_SPECIAL:
            if token not in special and "reserved" not in token:
                raise InputError(f"{file}: no special token {token}, so not a Llama-3 tokenizer; use one that is")
        if not set(special.values()).isdisjoint(ranks.values()):
            raise InputError(f"{file}: an ordinary token and a special one share an id; download it again")
        try:  # tiktoken is not told of the special tokens at all: it cannot parse what it does not know
            self._bpe = tiktoken.Encoding("llama3", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise InputError(f"{file}: tiktoken rejects its split regex ({error}); download it again") from None

        self._files, self.chat_template = files, _chat_template(directory, files)
        self.vocab_size = max(*ranks.values(), *special.values()) + 1
        self.special_ids = frozenset(range(self.vocab_size)).difference(ranks.values())
        self.special_tokens: dict[str, int] = special
        self.bos_id = special["<|begin_of_text|>"]
        self._header, self._header_end = special["<|start_header_id|>"], special["<|end_header_id|>"]
        self.turn_end = [special["<|eot_id|>"]]
        self.stop_ids = (special["<|end_of_text|>"], special["<|eot_id|>"])
        used = {self.bos_id, self._header, self._header_end, *self.stop_ids}
        reserved = {i for token, i in special.items() if token.startswith("<|reserved_special_token_")}
        self.reset_id = _reset_id(directory, self, used, max(reserved or {*special.values()} - used, default=None))
        self.template_ids = sorted({self.bos_id, self._header, self._header_end, *self.turn_end, self.reset_id})

    def encode(self, text: str) -> list[int]:
        ids, text = [], _valid(text)
        # tiktoken overflows its stack on a million spaces. Like Meta's own tokenizer, cut the text every 400,000
        # characters and within runs of more than 25,000 (non-)spaces.
        for start in range(0, len(text), 400_000):
            part, begin = text[start : start + 400_000], 0
            for run in re.finditer(r"\s+|\S+", part) if len(part) > 25_000 else ():
                for cut in range(run.start() + 25_000, run.end(), 25_000):
                    ids += self._bpe.encode(part[begin:cut], allowed_special=set(), disallowed_special=())
                    begin = cut
            ids += self._bpe.encode(part[begin:], allowed_special=set(), disallowed_special=())
        return ids

    def decode(self, ids) -> str:
        return self._bpe.decode_bytes(_ordinary(ids, self)).decode("utf-8", errors="replace")

    def render(self, messages, add_generation_prompt=True) -> list[int]:
        """Llama-3's template; 3.1 and 3.2 write a date into the system turn besides, which we leave out."""
        ids = [self.bos_id]
        for role, content in _checked(messages):
            ids += self._open(role) + self.encode(content) + self.turn_end
        return ids + self._open("assistant") if add_generation_prompt else ids

    def _open(self, role):
        return [self._header, *self.encode(role), self._header_end, *self.encode("\n\n")]

    def save(self, directory):
        _write(self._files, directory)


def _read_tiktoken(file, data):
    """Lines of `base64 rank`. Returns ranks {bytes: id}, special tokens {name: id} and the split regex."""
    ranks, number = {}, 0
    for number, line in enumerate(data.splitlines(), start=1):
        match = TIKTOKEN_LINE.fullmatch(line)
        try:
            ranks[base64.b64decode(match[1], validate=True)] = int(match[2])
        except (TypeError, ValueError):
            raise InputError(f"{file}: line {number} is not `base64 rank`; download the file again") from None
    if sorted(ranks.values()) != list(range(number)):
        raise InputError(f"{file}: its ranks are not 0, 1, 2, …; download the file again")
    return ranks, {name: number + offset for name, offset in LLAMA3_SPECIAL.items()}, LLAMA3_SPLIT


def _read_tokenizer_json(file, data):
    """Byte-level BPE as Hugging Face writes it. Returns the same as _read_tiktoken.

    tiktoken knows no merges: it joins the adjacent pair whose union has the lowest id. That is the same algorithm if
    ids follow the order of the merges, as they do in every vocabulary that BPE training wrote.
    """
    spec = _read_json(file, data)
    try:
        model, steps = spec["model"], spec["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        if model["type"] != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
            raise InputError(f"{file}: not a byte-level BPE; put the checkpoint's tokenizer.model next to it")
        splits, plain = [], not spec.get("normalizer")
        for step in steps:
            if step["type"] == "Split":
                splits.append(step["pattern"]["Regex"])
                plain &= step["behavior"] == "Isolated" and not step.get("invert")
            elif step["type"] == "ByteLevel":
                splits += [GPT2_SPLIT] if step.get("use_regex", True) else []
                plain &= not step.get("add_prefix_space", True)
            else:
                plain = False
        if not plain or len(splits) != 1:
            raise InputError(f"{file}: not Llama-3's way to split text; use the tokenizer.json of a Llama-3 checkpoint")

        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ranks = {bytes(BYTES[c] for c in text): i for text, i in model["vocab"].items() if text not in special}
        last = -1
        for merge in model["merges"]:  # "a b" in older files, ["a", "b"] in newer ones
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merged = model["vocab"][left + right]
            if merged < last:
                raise InputError(f"{file}: merge {left} {right} is out of the order of ids; use a Llama-3 checkpoint's")
            last = merged
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: damaged or unknown layout ({error!r}); download the file again") from None
    return ranks, special, splits[0]


def _byte_alphabet():
    """Byte-level BPE writes each byte as a printable character: itself if Latin-1 prints it, else one from Ā on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_alphabet()


# ---------------------------------------------------------------------------------------------------------------------
# Gemma and the toy: SentencePiece

# SentencePiece finds *user-defined* pieces in plain text, and Gemma's markers are that: a user could type a turn. They
# look no different from Gemma's newline runs and HTML tags, which are text, so the markers are known by name.
MARKERS = r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|reset)>|\[@BOS@\]"
# A piece in the model file: protobuf fields 1 (name: tag, length, bytes), 2 (score: a float) and 3 (type; 4 is
# user-defined). github.com/google/sentencepiece, src/sentencepiece_model.proto
USER_DEFINED = re.compile(rb"(\n.(?:" + MARKERS.encode() + rb")(?:\x15.{4})?\x18)\x04", re.DOTALL)


class SentencePieceTokenizer:
    def __init__(self, directory, files):
        file = directory / "tokenizer.model"
        # Retype the markers in memory from user-defined to control (3), which SentencePiece never finds in text. To cut
        # the text at each marker would not do: it misses those that normalisation makes of other characters (＜ to <).
        data = USER_DEFINED.sub(b"\\g<1>\x03", files["tokenizer.model"])
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(data)
            pieces = self._sp.id_to_piece(list(range(self._sp.vocab_size())))
        except (RuntimeError, ValueError):
            raise InputError(
                f"{file}: neither a tiktoken file nor a SentencePiece model; download the file again"
            ) from None
        self.vocab_size = len(pieces)
        self.special_ids = frozenset(
            i for i in range(self.vocab_size) if self._sp.is_control(i) or self._sp.is_unknown(i)
        )
        self.special_tokens = special = {pieces[i]: i for i in self.special_ids}
        for name in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"):
            if name not in special:
                raise InputError(f"{file}: no special piece {name}, so not Gemma's layout; use a Gemma tokenizer.model")
        for piece in pieces:
            if re.fullmatch(MARKERS, piece) and piece not in special:
                raise InputError(f"{file}: text can spell the piece {piece}; use a Gemma tokenizer.model")
        if sum(self._sp.is_byte(list(range(self.vocab_size)))) != 256:
            raise InputError(f"{file}: no byte pieces, so not every text can be encoded; use a Gemma tokenizer.model")

        self._files, self.chat_template = files, _chat_template(directory, files)
        self.bos_id, self._turn = special["<bos>"], special["<start_of_turn>"]
        self.turn_end = [special["<end_of_turn>"], *self.encode("\n")]
        self.stop_ids = (special["<eos>"], special["<end_of_turn>"])
        # <reset> is the toy's own; <pad> serves small models that have no spare piece (a padded position has no loss)
        default = next((special[name] for name in ("<reset>", "<unused0>", "<pad>") if name in special), None)
        self.reset_id = _reset_id(directory, self, {self.bos_id, self._turn, *self.stop_ids}, default)
        self.template_ids = sorted({self.bos_id, self._turn, self.turn_end[0], self.reset_id})

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(_valid(text))

    def decode(self, ids) -> str:
        return self._sp.decode(_ordinary(ids, self))

    def render(self, messages, add_generation_prompt=True) -> list[int]:
        """Gemma's template: no system turn, and user and assistant take turns."""
        ids = [self.bos_id]
        for position, (role, content) in enumerate(_checked(messages)):
            if role == "system":
                raise InputError("Gemma's chat format has no system role; put its text into the first user message")
            if role != ("user", "assistant")[position % 2]:
                raise InputError(f"message {position} is the {role}'s; Gemma's chats go user, assistant, user, …")
            ids += self._open(role) + self.encode(content) + self.turn_end
        return ids + self._open("assistant") if add_generation_prompt else ids

    def _open(self, role):
        return [self._turn, *self.encode("model\n" if role == "assistant" else "user\n")]

    def save(self, directory):
        _write(self._files, directory)


# ---------------------------------------------------------------------------------------------------------------------
# Both


def _valid(text):
    """Half a surrogate pair has no UTF-8: it becomes U+FFFD, and two halves become their character, as in tiktoken."""
    if not isinstance(text, str):
        raise InputError(f"text to encode must be a string, not {type(text).__name__}")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ordinary(ids, tok):
    """The ids that stand for text. An id that does not exist is an error, not a silent gap."""
    ids = [int(i) for i in ids]
    if wrong := [i for i in ids if not 0 <= i < tok.vocab_size]:
        raise InputError(f"token id {wrong[0]} is outside the tokenizer's {tok.vocab_size} ids; is it another model's?")
    return [i for i in ids if i not in tok.special_ids]


def _checked(messages):
    """(role, stripped content) of each message. Roles are three known words, so that none can smuggle text in."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("a chat must be a list of messages with at least one in it")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f'message {position} must look like {{"role": "user", "content": "…"}}')
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(f"message {position} has role {message['role']!r}; it must be system, user or assistant")
        if not isinstance(message["content"], str):
            raise InputError(f"message {position} has content that is a {type(message['content']).__name__}, not text")
    return [(message["role"], message["content"].strip()) for message in messages]


def _reset_id(directory, tok, used, default):
    """config.json's reset_token_id, which training writes, or else the default."""
    file = directory / "config.json"
    reset = _read_json(file, file.read_bytes()).get("reset_token_id") if file.is_file() else None
    if reset is None and default is None:
        raise InputError(f"{directory}: no spare special token for [RESET]; name one as reset_token_id in config.json")
    if reset is None:
        return default
    if type(reset) is not int or not 0 <= reset < tok.vocab_size:
        raise InputError(f"{file}: reset_token_id is {reset!r}; it must be an id below {tok.vocab_size}")
    if reset not in tok.special_ids or reset in used:
        raise InputError(f"{file}: reset_token_id {reset} is not a spare special token; try {default}")
    return reset


def _chat_template(directory, files):
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{directory / 'chat_template.jinja'}: not UTF-8 text; download the file again") from None
    name = "tokenizer_config.json"
    template = _read_json(directory / name, files[name]).get("chat_template") if name in files else None
    if isinstance(template, list):  # several, by name: the one that transformers takes unasked
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(file, data):
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object; download the file again")
    return value


def _write(files, directory):
    for name, data in files.items():
        target = Path(directory) / name
        if target.is_file() and target.read_bytes() == data:
            continue  # saving where it came from: those files may be read-only
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
