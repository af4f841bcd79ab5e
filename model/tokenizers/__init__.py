"""Text to token ids and back, and chats to token ids.

    tok = load_tokenizer("Meta-Llama-3-8B-Instruct")     # any Hugging Face model directory
    ids = tok.render([{"role": "user", "content": "Hi"}])
    text = tok.decode(tok.encode("plain text"))

A tokenizer is two things: a way to cut text into ids, and a way to write chats.

    text    byte_level.py    pairs of bytes are merged          Llama-3, SmolLM2
            pieces.py        Google's SentencePiece library     Gemma, Llama-2, the toy
    chats   llama3.py        <|start_header_id|>user<|end_header_id|> …
            chatml.py        <|im_start|>user …                 SmolLM2
            gemma.py         <start_of_turn>user …              Gemma, the toy
            inst.py          [INST] … [/INST]                   Llama-2

base.py has what all of them share: encode, decode, save, and the ids by name.
Nothing here trains a tokenizer, downloads one, or looks for special tokens in text. An id such as
<|eot_id|> can only come from code: a user who could type [RESET] or a turn marker could rewrite the
conversation.
"""

from model.errors import InputError
from model.tokenizers.base import Files
from model.tokenizers.byte_level import TIKTOKEN_LINE, read_tiktoken, read_tokenizer_json
from model.tokenizers.chatml import ChatMLTokenizer
from model.tokenizers.gemma import GemmaTokenizer
from model.tokenizers.inst import Llama2Tokenizer
from model.tokenizers.llama3 import LLAMA3_SPECIAL, LLAMA3_SPLIT, Llama3Tokenizer
from model.tokenizers.pieces import Pieces, read_sentencepiece

__all__ = ["load_tokenizer"]


def load_tokenizer(path):
    """The tokenizer of a Hugging Face model directory. Raises InputError if none is known there."""
    files = Files(path)
    # tokenizer.model comes first: Gemma's tokenizer.json only repeats it. In original/ lies the
    # vocabulary as Meta ships it.
    for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        if name in files.data:
            text = _read_text(files, name)
            return _family(files, text)(files, text)
    raise InputError(
        f"{files.directory}: no tokenizer; copy tokenizer.json (Llama-3, SmolLM2) or"
        " tokenizer.model (Llama-2, Llama-3, Gemma) into it"
    )


def _read_text(files, name):
    file, data = files.directory / name, files.data[name]
    if name == "tokenizer.json":
        return read_tokenizer_json(file, data)
    if name == "tokenizer.model" and not TIKTOKEN_LINE.match(data):
        return read_sentencepiece(file, data)
    return read_tiktoken(file, data, LLAMA3_SPLIT, LLAMA3_SPECIAL)


def _family(files, text):
    """Whose chats these are: the special tokens say so."""
    special, template = text.special, files.chat_template or ""
    if isinstance(text, Pieces):
        is_llama2 = {"<s>", "</s>"} <= special.keys() and "<start_of_turn>" not in special
        return Llama2Tokenizer if is_llama2 and text.begins_with_space else GemmaTokenizer
    if not {"<|im_start|>", "<|im_end|>"} <= special.keys():
        return Llama3Tokenizer
    # Some have ChatML's tokens beside Llama-3's and write their chats as Llama-3 does.
    headers = "<|start_header_id|>" in special and "<|start_header_id|>" in template
    return Llama3Tokenizer if headers and "<|im_start|>" not in template else ChatMLTokenizer
