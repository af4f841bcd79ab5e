"""SentencePiece: text to ids and back, for Gemma, Llama 2, Mistral and the toy. Google's library does it.

    pieces = read_sentencepiece(file, data)      # a tokenizer.model
    pieces = read_merges(file, spec)             # a tokenizer.json of the same kind
    text = pieces.decode(pieces.encode("plain text"))

A piece is a run of characters, in which "▁" stands for a space. Of all neighbours, the two that make
the piece with the highest score are joined first. A character without a piece becomes its bytes.
"""

import re
import struct

import sentencepiece

from model.errors import InputError

# SentencePiece finds *user-defined* pieces in plain text, and Gemma's markers are user-defined: a
# user could type a turn. Gemma's newline runs and HTML tags are user-defined too, and they are
# text. Only the names tell the two apart.
MARKERS = (
    r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|reset"
    r"|start_of_image|end_of_image|image_soft_token)>|\[@BOS@\]|\[multimodal\]"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|control_\d+)\]"  # Mistral's
)
# A piece in the model file: protobuf fields 1 (name: tag, length, bytes), 2 (score: a float) and 3
# (type; 4 is user-defined). github.com/google/sentencepiece, src/sentencepiece_model.proto
USER_DEFINED = re.compile(rb"(\n.(?:" + MARKERS.encode() + rb")(?:\x15.{4})?\x18)\x04", re.DOTALL)


class Pieces:
    def __init__(self, file, sp: sentencepiece.SentencePieceProcessor, prefix: str | None = None):
        """prefix: a space that the library does not put before a text itself, "always" or "unless
        there is one".
        """
        self.file, self._sp, self._prefix = file, sp, prefix
        self.size = sp.vocab_size()
        ids = list(range(self.size))
        self.pieces: list[str] = sp.id_to_piece(ids)
        self.special_ids = frozenset(i for i in ids if sp.is_control(i) or sp.is_unknown(i))
        self.special = {self.pieces[i]: i for i in sorted(self.special_ids)}
        self.unknown_id = sp.unk_id()
        # Llama 2's does: so a word is the same piece at the start of a text and within it.
        begin = "".join(sp.encode("a", out_type=str))
        self.begins_with_space = prefix is not None or begin.startswith("▁")
        # What a template must write behind a special token, so that a space comes out.
        self.lead = " " if prefix == "unless there is one" else ""
        if sum(sp.is_byte(ids)) != 256:
            why = "no byte pieces, so not every text can be encoded"
            raise InputError(f"{file}: {why}; use the tokenizer of a Gemma or Llama 2 checkpoint")

    def encode(self, text: str) -> list[int]:
        if text and (self._prefix == "always" or (self._prefix and text[0] not in " ▁")):
            text = "▁" + text
        return self._sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        text = self._sp.decode(ids)
        return text.removeprefix(" ") if self._prefix else text

    def encode_after_space(self, text: str) -> list[int]:
        """The ids of " text" within a longer text, where no other space is put before it."""
        if self._prefix:
            return self._sp.encode("▁" + text)
        return self._sp.encode(text) if text else self._sp.piece_to_id(["▁"])


def read_sentencepiece(file, data: bytes) -> Pieces:
    """A tokenizer.model. The markers become control pieces (type 3), which are never found in text.

    Cutting the text at each marker would not do: normalisation may make one of other characters
    (＜ becomes <).
    """
    return Pieces(file, _load(file, USER_DEFINED.sub(b"\\g<1>\x03", data)))


def _load(file, model: bytes) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(model)
        sp.id_to_piece(list(range(sp.vocab_size())))
    except (RuntimeError, ValueError):
        what = "neither a tiktoken file nor a SentencePiece model"
        raise InputError(f"{file}: {what}; download it again") from None
    return sp


# ── tokenizer.json ────────────────────────────────────────────────────────────────────────────────

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece's types; user-defined is 4
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
INSTEAD = "put the checkpoint's tokenizer.model next to it"
PREPEND = {"type": "Prepend", "prepend": "▁"}


def read_merges(file, spec: dict) -> Pieces:
    """A tokenizer.json with BPE over "▁" and byte_fallback, as made from a tokenizer.model.

    It is made into a SentencePiece model again. Its merges become scores: the earlier the merge, the
    higher the score of the piece. Raises KeyError and the like where its layout is damaged.
    """
    model = spec["model"]
    unknown = model.get("unk_token") or "<unk>"
    special, user_defined = {unknown}, set()
    pieces = {i: piece for piece, i in model["vocab"].items()}
    for token in spec["added_tokens"]:
        pieces[token["id"]] = name = token["content"]
        is_text = not token.get("special") and not re.fullmatch(MARKERS, name)
        (user_defined if is_text else special).add(name)
    rank = _ranks(file, model["merges"], special | user_defined)
    rows = []
    for i in range(max(pieces) + 1):
        piece = pieces.get(i, f"<no piece {i}>")
        score = 0.0
        if piece == unknown:
            kind = UNKNOWN
        elif piece in special or i not in pieces:
            kind = CONTROL
        elif piece in user_defined:
            kind = 4
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            kind = BYTE
        elif piece == "\t" and "<0x09>" not in model["vocab"]:
            piece, kind = "<0x09>", BYTE  # Gemma's: so runs of tabs can be merges
        elif len(piece) == 1 or piece in rank:
            kind, score = NORMAL, -float(rank.get(piece, 0))
        else:
            what = f"no merge makes the piece {piece}: its merges are incomplete"
            raise InputError(f"{file}: {what}; {INSTEAD}")
        rows.append((piece.encode(), score, kind))
    return Pieces(file, _load(file, _proto(rows)), _prefix(file, spec))


def _ranks(file, merges: list, others: set[str]) -> dict[str, int]:
    """{piece: its place in the order of merging}. All ways to make a piece must stand together."""
    rank, last = {}, None
    for merge in merges:  # "a b" in older files, ["a", "b"] in newer ones
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece in others:
            continue  # SentencePiece cuts these out before it merges
        if piece != last and piece in rank:
            what = f"the merges that make {piece} stand apart, which SentencePiece cannot do"
            raise InputError(f"{file}: {what}; {INSTEAD}")
        rank.setdefault(piece, len(rank))
        last = piece
    return rank


def _prefix(file, spec: dict) -> str | None:
    """Whether a space is put before a text, see Pieces. Other ways to change text are refused."""
    normalizer, cut = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    if cut and cut["type"] == "Split" and steps:
        cut = None  # Gemma's cuts at spaces, and there are none left
    if not cut and steps == [PREPEND, REPLACE]:
        return "always"
    if not cut and steps == [REPLACE]:
        return None
    if cut and cut["type"] == "Metaspace" and not steps and cut.get("split") is False:
        scheme = cut.get("prepend_scheme", "always")
        return None if scheme == "never" else "unless there is one"
    raise InputError(f"{file}: cuts text in a way not known here; {INSTEAD}")


def _proto(rows: list[tuple[bytes, float, int]]) -> bytes:
    """SentencePiece's ModelProto: pieces (field 1), how it was trained (2), how text changes (3)."""
    out = []
    for piece, score, kind in rows:
        body = b"\n" + _length(piece) + piece + b"\x15" + struct.pack("<f", score)
        body += bytes([0x18, kind])
        out.append(b"\n" + _length(body) + body)
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type (3): BPE; byte_fallback (35)
    # identity: no prefix (3), white space stays (4), spaces become ▁ (5)
    normalizer = b"\n\x08identity" + b"\x18\x00\x20\x00\x28\x01"
    out += [b"\x12", _length(trainer), trainer, b"\x1a", _length(normalizer), normalizer]
    return b"".join(out)


def _length(data: bytes) -> bytes:
    """The length of data as a varint."""
    n, out = len(data), []
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])
