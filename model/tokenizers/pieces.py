"""SentencePiece: text to ids and back, for Gemma, Llama 2 and the toy. Google's library does it.

pieces = read_sentencepiece(file, data)      # a tokenizer.model
text = pieces.decode(pieces.encode("plain text"))
"""

import re

import sentencepiece

from model.errors import InputError

# SentencePiece finds *user-defined* pieces in plain text, and Gemma's markers are user-defined: a
# user could type a turn. Gemma's newline runs and HTML tags are user-defined too, and they are
# text. Only the names tell the two apart.
MARKERS = r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|start_of_turn|end_of_turn|reset)>|\[@BOS@\]"
# A piece in the model file: protobuf fields 1 (name: tag, length, bytes), 2 (score: a float) and 3
# (type; 4 is user-defined). github.com/google/sentencepiece, src/sentencepiece_model.proto
USER_DEFINED = re.compile(rb"(\n.(?:" + MARKERS.encode() + rb")(?:\x15.{4})?\x18)\x04", re.DOTALL)


class Pieces:
    def __init__(self, file, sp: sentencepiece.SentencePieceProcessor):
        self.file, self._sp = file, sp
        self.size = sp.vocab_size()
        ids = list(range(self.size))
        self.pieces: list[str] = sp.id_to_piece(ids)
        self.special_ids = frozenset(i for i in ids if sp.is_control(i) or sp.is_unknown(i))
        self.special = {self.pieces[i]: i for i in sorted(self.special_ids)}
        self.unknown_id = sp.unk_id()
        # Llama 2's does: so a word is the same piece at the start of a text and within it.
        self.begins_with_space = "".join(sp.encode("a", out_type=str)).startswith("▁")
        if sum(sp.is_byte(ids)) != 256:
            raise InputError(
                f"{file}: no byte pieces, so not every text can be encoded; use the tokenizer of a"
                " Gemma or Llama 2 checkpoint"
            )

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)


def read_sentencepiece(file, data: bytes) -> Pieces:
    """A tokenizer.model.

    The markers become control pieces (type 3) in memory, which SentencePiece never finds in text.
    Cutting the text at each marker would not do: normalisation may make one of other characters
    (＜ becomes <).
    """
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(USER_DEFINED.sub(b"\\g<1>\x03", data))
        sp.id_to_piece(list(range(sp.vocab_size())))
    except (RuntimeError, ValueError):
        raise InputError(
            f"{file}: neither a tiktoken file nor a SentencePiece model; download it again"
        ) from None
    return Pieces(file, sp)
