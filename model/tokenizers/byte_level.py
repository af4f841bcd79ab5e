"""Byte-level BPE: text to token ids and back, for Llama-3, SmolLM2 and Qwen.

    bpe = read_byte_level(file, spec)       # a tokenizer.json
    bpe = read_tiktoken(file, data, split, special)
    text = bpe.decode(bpe.encode("plain text"))

A regex cuts the text into words, and each word into bytes: every byte is a token. Of all pairs of
neighbours, the pair that training merged first becomes one token, and so on, until training merged
none of the pairs that are left. tiktoken does that.

tiktoken knows no pairs. It gives every token a rank, and joins the neighbours that make the token of
the lowest rank. The result is the same if every token is made of earlier ones, as BPE training
writes vocabularies; others are refused. A rank is the order of merging and need not be the id.
"""

import base64
import re
import unicodedata

import regex  # tiktoken brings it along
import tiktoken

from model.errors import InputError

# How GPT-2 cuts text into words: what the pre-tokenizer ByteLevel does unless told otherwise.
# https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first makes each digit a word. GPT-2's regex then sees the text between two digits alone,
# and takes all the white space at its end. Tried on every code point: ids equal those of tokenizers
# 0.23, except for 13 digits that are new in Unicode 17.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\r?(?:\n|$)")


class BytePairEncoding:
    def __init__(
        self, file, tokens: dict[bytes, int], split: str, special: dict[str, int], composes=False
    ):
        """tokens: {bytes: id} in the order of merging. special: {name: id}; they are not tokens.
        composes: text becomes NFC first (Qwen): e and ◌́ become é.
        """
        self.file, self.special, self._composes = file, special, composes
        ranks = {token: rank for rank, token in enumerate(tokens)}
        # tiktoken is not told of the special tokens, so it cannot find them in text.
        self._tiktoken = tiktoken.Encoding(
            "bpe", pat_str=split, mergeable_ranks=ranks, special_tokens={}
        )
        self._id_of_rank = list(tokens.values())
        self._bytes_of_id = {i: token for token, i in tokens.items()}
        self._words = regex.compile(split)
        self.size = max(*tokens.values(), *special.values()) + 1
        self.special_ids = frozenset(range(self.size)) - frozenset(tokens.values())
        self.missing_bytes = bytes(b for b in range(256) if bytes([b]) not in tokens)

    def encode(self, text: str) -> list[int]:
        ids = []
        text = unicodedata.normalize("NFC", text) if self._composes else text
        for part in short_parts(text):
            data = part.encode("utf-8")
            if len(data.translate(None, self.missing_bytes)) == len(data):
                ranks = self._tiktoken.encode(part, allowed_special=set(), disallowed_special=())
            else:
                ranks = self._without_missing_bytes(part)
            ids += [self._id_of_rank[rank] for rank in ranks]
        return ids

    def _without_missing_bytes(self, text: str) -> list[int]:
        """SmolLM2 lacks 21 bytes. Hugging Face's tokenizers drops them from each word, so what stood
        on both sides may merge: "!\\x04!" becomes the token of "!!". tiktoken would panic.
        """
        ranks = []
        for word in self._words.finditer(text):
            known = word.group().encode("utf-8").translate(None, self.missing_bytes)
            if known:
                ranks += self._tiktoken._encode_single_piece(known)
        return ranks

    def decode(self, ids) -> str:
        return b"".join(self._bytes_of_id[i] for i in ids).decode("utf-8", errors="replace")


def short_parts(text: str):
    """tiktoken overflows its stack on a million spaces. So cut the text, as Meta's own tokenizer
    does, every 400,000 characters and in runs of more than 25,000 spaces or other characters.
    """
    for start in range(0, len(text), 400_000):
        part, begin = text[start : start + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part) if len(part) > 25_000 else ():
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


# ── The two kinds of files ────────────────────────────────────────────────────────────────────────


def read_tiktoken(file, data: bytes, split: str, special: dict[str, int]):
    """Meta's file: lines of `base64 rank`. special: {name: id counted from the last rank}."""
    tokens, number = {}, 0
    for number, line in enumerate(data.splitlines(), start=1):
        match = TIKTOKEN_LINE.fullmatch(line)
        try:
            tokens[base64.b64decode(match[1], validate=True)] = int(match[2])
        except (TypeError, ValueError):
            what = f"line {number} is not `base64 rank`"
            raise InputError(f"{file}: {what}; download the file again") from None
    if not tokens or sorted(tokens.values()) != list(range(number)):
        raise InputError(f"{file}: its ranks are not 0, 1, 2, …; download the file again")
    tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    special = {name: number + i for name, i in special.items()}
    return BytePairEncoding(file, tokens, split, special)


def read_byte_level(file, spec: dict) -> BytePairEncoding:
    """Hugging Face's tokenizer.json. Raises KeyError and the like where its layout is damaged."""
    steps = spec["pre_tokenizer"] or {}
    split = split_regex(steps.get("pretokenizers", [steps]))
    normalizer = spec.get("normalizer")
    if split is None or (normalizer and normalizer != {"type": "NFC"}):
        known = "use a Llama-3, SmolLM2 or Qwen checkpoint's"
        raise InputError(f"{file}: cuts text in a way not known here; {known}")
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = in_order_of_merging(file, spec["model"], special)
    if not set(special.values()).isdisjoint(tokens.values()):
        raise InputError(
            f"{file}: an ordinary token and a special one share an id; download it again"
        )
    return BytePairEncoding(file, tokens, split, special, composes=bool(normalizer))


def split_regex(steps: list[dict]) -> str | None:
    """The one regex that cuts text as these pre-tokenizers do; None if they are others."""
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    gpt2 = last.get("use_regex", True)
    match before:
        case [] if gpt2:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True}] if gpt2:
            return DIGITS_SPLIT
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": split}} as step]:
            return split if not gpt2 and not step.get("invert") else None
    return None


def in_order_of_merging(file, model: dict, special: dict[str, int]) -> dict[bytes, int]:
    """{bytes: id}: the single bytes, then what each merge makes of two earlier tokens."""
    vocab = {text: i for text, i in model["vocab"].items() if text not in special}
    tokens = {to_bytes(text): i for text, i in vocab.items() if len(text) == 1}
    for merge in model["merges"]:  # "a b" in older files, ["a", "b"] in newer ones
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parts = to_bytes(left), to_bytes(right)
        i = vocab[left + right]
        # Llama-3 lists every way to make a token, some of later tokens: the earliest way counts.
        if parts[0] in tokens and parts[1] in tokens:
            tokens.setdefault(parts[0] + parts[1], i)
    for text in vocab:
        if to_bytes(text) not in tokens:
            why = "its merges are out of order or incomplete"
            raise InputError(f"{file}: no merge makes the token {text} of earlier ones: {why}")
    return tokens


def byte_alphabet() -> dict[str, int]:
    """A tokenizer.json writes each byte as a printable character: itself if Latin-1 prints it, else
    one from Ā on.
    """
    printable = [*range(ord("!"), ord("~") + 1)]
    printable += [*range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_alphabet()


def to_bytes(text: str) -> bytes:
    return bytes(BYTES[c] for c in text)
