"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json; gguf.py calls it.

    write_tokenizer(file, metadata, directory)

GGUF has two kinds. "gpt2" is byte-level BPE: tokens and merges, and the name of the way to cut text. "llama" is
SentencePiece's BPE: pieces and scores, from which the merges follow.
"""

import json
from pathlib import Path

from model import InputError
from model.tokenizers.llama3 import LLAMA3_SPLIT

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's types of tokens

QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit by itself
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split_by(regex: str) -> list[dict]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, BYTE_LEVEL | {"use_regex": False}]


# llama.cpp's names: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp
PRE_TOKENIZERS = {
    "smollm": [DIGITS, BYTE_LEVEL],
    "gpt-2": [BYTE_LEVEL],
    "llama-bpe": split_by(LLAMA3_SPLIT),
    "qwen2": split_by(QWEN_SPLIT),
}


def write_tokenizer(file: Path, metadata: dict, directory: Path) -> None:
    def of(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens, types = of("tokens"), of("token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
        raise InputError(f"{file}: no tokenizer, or half of one; download the file again")
    tokens = [*tokens]
    kind, pre = of("model"), of("pre")
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        spec = byte_level(tokens, types, of("merges", []), pre)
    elif kind == "llama" and len(of("scores", [])) == len(tokens):
        spec = sentencepiece(tokens, types, of("scores"), of("add_space_prefix", True))
    else:
        known = f"only SentencePiece's BPE and byte-level BPE cut as by {', '.join(PRE_TOKENIZERS)} are known"
        found = f"its tokenizer is {kind!r} with pre-tokenizer {pre!r}"
        raise InputError(f"{file}: {found}; {known}: use the published safetensors and tokenizer.json")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": i, "content": token, "special": types[i] == CONTROL} | plain
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: of(f"{key}_token_id") for name, key in names.items()}
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    if of("add_bos_token", False) and "bos_token" in named:
        spec["post_processor"] = begin_with(named["bos_token"], ids["bos"])
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0"} | spec, ensure_ascii=False), "utf-8")
    config = {
        # The class that takes tokenizer.json as it is. Others of transformers 5 cut text their way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, "utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, "utf-8")


def byte_level(tokens: list[str], types: list[int], merges: list[str], pre: str) -> dict:
    vocab = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, CONTROL)}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre == "llama-bpe"},
    }


def sentencepiece(tokens: list[str], types: list[int], scores: list[float], prefix: bool) -> dict:
    """prefix: a text begins with a space, as in Llama 2, not in Gemma."""
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:  # llama.cpp writes these with spaces
            tokens[i] = tokens[i].replace(" ", "▁")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>" if "<unk>" in tokens[:10] else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
            "merges": merges_of(tokens, types, scores),
        },
    }


def merges_of(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a piece of two others, the piece with the highest score first.

    User-defined pieces, such as Gemma's runs of spaces, come before all others and the longest of them first:
    SentencePiece cuts them out before it merges. No merge makes a control token.
    """
    score_of = {}
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            score_of[token] = score if kind == NORMAL else 1.0
    merges = []
    for token, score in score_of.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                merges.append((-score, -cut, cut - len(token), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in merges]


def begin_with(name: str, id: int) -> dict:
    """What puts BOS in front of a text when transformers is asked for it."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }
