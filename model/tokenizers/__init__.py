"""Text to token ids and back, and chats to token ids.

    tok = load_tokenizer("Meta-Llama-3-8B-Instruct")     # any Hugging Face model directory
    ids = tok.render([{"role": "user", "content": "Hi"}])
    text = tok.decode(tok.encode("plain text"))

A tokenizer is two things: a way to cut text into ids, and a way to write chats.

    text    byte_level.py    pairs of bytes are merged          Llama-3, SmolLM2, Qwen
            pieces.py        Google's SentencePiece library     Gemma, Llama-2, Mistral, the toy
    chats   llama3.py        <|start_header_id|>user<|end_header_id|> …
            chatml.py        <|im_start|>user …                 SmolLM2, Qwen2.5, Qwen3
            gemma.py         <start_of_turn>user …              Gemma-2, Gemma-3, the toy
            inst.py          [INST] … [/INST]                   Llama-2, Mistral

base.py has what all of them share: encode, decode, save, and the ids by name; templates.py knows
the published Jinja templates by their text.
Nothing here trains a tokenizer, downloads one, or looks for special tokens in text. An id such as
<|eot_id|> can only come from code: a user who could type [RESET] or a turn marker could rewrite the
conversation.
"""

import regex  # tiktoken brings it along

from model.errors import InputError
from model.tokenizers.base import Files
from model.tokenizers.byte_level import TIKTOKEN_LINE, read_byte_level, read_tiktoken
from model.tokenizers.chatml import ChatMLTokenizer
from model.tokenizers.gemma import GemmaTokenizer
from model.tokenizers.inst import inst_family
from model.tokenizers.llama3 import LLAMA3_SPECIAL, LLAMA3_SPLIT, Llama3Tokenizer
from model.tokenizers.pieces import Pieces, read_merges, read_sentencepiece

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
    way_out = "copy the checkpoint's tokenizer.json or tokenizer.model into it"
    raise InputError(f"{files.directory}: no tokenizer; {way_out}")


def _read_text(files, name):
    file, data = files.directory / name, files.data[name]
    if name == "tokenizer.json":
        return _read_json(file, files.json(name))
    if name == "tokenizer.model" and not TIKTOKEN_LINE.match(data):
        return read_sentencepiece(file, data)
    return read_tiktoken(file, data, LLAMA3_SPLIT, LLAMA3_SPECIAL)


def _read_json(file, spec):
    try:
        kind, cut = spec["model"]["type"], spec["pre_tokenizer"] or {}
        if kind == "BPE" and spec["model"].get("byte_fallback"):
            return read_merges(file, spec)
        steps = cut.get("pretokenizers", [cut])
        if kind == "BPE" and any(step.get("type") == "ByteLevel" for step in steps):
            return read_byte_level(file, spec)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, regex.error) as error:
        what = f"damaged or unknown layout ({error!r})"
        raise InputError(f"{file}: {what}; download the file again") from None
    known = "neither byte-level BPE nor SentencePiece's BPE, which alone are known here"
    way_out = "if the checkpoint has a tokenizer.model, put it next to it"
    raise InputError(f"{file}: a {kind} tokenizer, {known}; {way_out}")


def _family(files, text):
    """Whose chats these are: the special tokens say so."""
    special, template = text.special, files.chat_template or ""
    if isinstance(text, Pieces):
        is_inst = {"<s>", "</s>"} <= special.keys() and "<start_of_turn>" not in special
        return inst_family(files, text) if is_inst and text.begins_with_space else GemmaTokenizer
    if not {"<|im_start|>", "<|im_end|>"} <= special.keys():
        return Llama3Tokenizer
    # Some have ChatML's tokens beside Llama-3's and write their chats as Llama-3 does.
    headers = "<|start_header_id|>" in special and "<|start_header_id|>" in template
    return Llama3Tokenizer if headers and "<|im_start|>" not in template else ChatMLTokenizer
