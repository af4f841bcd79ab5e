"""Small vocabularies, trained here, and texts that are hard to cut; for any test to import.

They are trained by tokenizers and sentencepiece, which are also the oracles for the ids.
"""

import base64
import io
import json
import random

import pytest
import sentencepiece

from model import load_tokenizer
from model.tokenizers.llama3 import LLAMA3_SPLIT

TEXT = (
    "The farmer counted the sheep before the rain began!! And then    he wrote 1,204 or 1,240.\n"
    "They won't agree on whether it's 25; she says that she'll count again.\n\n"
    "\tdef count(sheep):\n\t\treturn sum(1 for s in sheep if s.is_here)  # and the others?\n"
    "Größe, façade, naïve: words from elsewhere keep their marks, as do 東京, Москва and 🐑🐑.\n"
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
    "user\nHow many sheep are there?\nassistant\nThey are  17, \n\n 8.   # !! ?? ...  2024 ½ ٣\n"
    "<|user|> <s> [INST] <<SYS>> the rain [/INST] <</SYS>>\n"
)
NASTY = [
    *("", " ", "\n", "  ", "\n\n", "\r\n\r\n", " \n \n\n  x", "\t\ttabs\t", "   three   ", "trailing  "),
    *("I'm you'LL we've it'S ‘’ 'ſ 'K", "0 12 345 6789 ٣٤٥ ½", "  1", "a  12 b", "x \n 1 ", "1's 2'll"),
    *("9½٣④ 五", "\u00a01", "\u2028 1", "\u30001\u3000", "\x1d1", " \x1c 1", "\x85\x851"),
    *(
        "e\u0301 é \ufb01 ① ＜",
        "a\u0323\u0307 \u1112\u1161\u11ab",
        "👩‍👩‍👧‍👦 🏳️‍🌈🐑1",
        "\u200b\u200d\ufeff",
        "\ufeffbom first",
    ),
    *("\x00nul\x00", "\x1c\x1d\x85\xa0\u2028\u3000", "\uffff\U0010ffff\ue000 \u2047 ⁇", "\x7f\x01\x02"),
    *("!\x04!", "!!", "a\x04b", "\x04", "\x04\x06", " \x04 a", "'\x04s", "?\x13?\x06.", "\x04" * 50 + "!" * 50),
    *("\U00040000", "a\U00040000b", "\U000c0000 \U000fffff", "é\U00080000"),
    *("<0x0A><0xFF> <unk> <s>", "[RESET] [reset] <reset> RESET", "<|im_start|>system\nHi<|im_end|>"),
    *("a" * 300 + "ab" * 100 + "!" * 200 + "1" * 100 + " " * 100, "東京都に住んでいます。Москва، العربية हिन्दी"),
    "if (a<b && c>d) { <|x|> }\n\n\n\n</table>",
]


def fuzz_texts(count, seed=0):
    """Random strings, in which white space, digits, control characters and rare ones meet often; without ▁, which
    SentencePiece takes for a space."""
    rng = random.Random(seed)
    ranges = [(9, 13), (32, 32), (32, 126), (48, 57), (0, 31), (33, 47), (97, 122), (0x80, 0x2FF), (0x300, 0x36F)]
    ranges += [(0x2000, 0x206F), (0x660, 0x669), (0x3040, 0xD7FF), (0x1F300, 0x1F6FF), (0xE000, 0x10FFFF)]
    for _ in range(count):
        chars = [chr(rng.randint(*rng.choice(ranges))) * rng.choice((1, 1, 1, 2, 3)) for _ in range(rng.randint(0, 30))]
        yield "".join(chars).replace("▁", "_")


def check_ids(directory, texts):
    """The ids of each text are those of tokenizers on the same file, and so is what comes back of them."""
    tokenizers = pytest.importorskip("tokenizers")
    tok, spec = load_tokenizer(directory), json.loads((directory / "tokenizer.json").read_bytes())
    # Without its special tokens, which it would find in text; those that are text stay.
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in tok.special_tokens]
    oracle = tokenizers.Tokenizer.from_str(json.dumps(spec))
    texts = [*texts, *tok.special_tokens]
    for text, encoding in zip(texts, oracle.encode_batch(texts, add_special_tokens=False), strict=True):
        assert tok.encode(text) == encoding.ids, repr(text)
        assert tok.decode(encoding.ids) == oracle.decode(encoding.ids), repr(text)
        assert tok.special_ids.isdisjoint(encoding.ids)


# ── Byte-level ───────────────────────────────────────────────────────────────────────────────────────────────────────

HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
LLAMA3_NAMES += [*HEADERS, "<|reserved_special_token_4|>", "<|eot_id|>"]
LLAMA3_NAMES += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
CHATML_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>", "<repo_name>"]
MISSING = bytes([0x04, 0x06, 0x13, 0xC0, 0xC1, 0xF1, 0xF2, 0xF5, 0xFF])


def byte_characters():
    """{byte: the character that stands for it}: transformers' table."""
    return pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()


def train_bpe(vocab_size, special_tokens, split=LLAMA3_SPLIT, missing=b""):
    """split: a regex, or None for SmolLM2's way: single digits, then GPT-2's regex."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    first = pre.Digits(individual_digits=True) if split is None else pre.Split(tokenizers.Regex(split), "isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre.Sequence([first, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=[char for byte, char in byte_characters().items() if byte not in missing],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def trained(missing=b"", special=CHATML_NAMES, size=420):
    """A tokenizer.json laid out as SmolLM2's, as a dict."""
    return json.loads(train_bpe(size, special, None, missing).to_str())


def as_tiktoken_file(tokenizer):
    """The ranks of a trained BPE as Meta would ship them."""
    byte_of = {char: byte for byte, char in byte_characters().items()}
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)) + f" {rank}".encode() for token, rank in vocab]
    return b"\n".join(lines) + b"\n"


# ── SentencePiece ────────────────────────────────────────────────────────────────────────────────────────────────────

TURNS = ["<start_of_turn>", "<end_of_turn>"]
GEMMA_MARKERS = ["<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>", "<unused10>", *TURNS]
GEMMA_TEXT_PIECES = ["\n", "\n\n", "\n\n\n", "▁▁", "<table>", "</table>", "<s>", "<h1>"]
GEMMA = {
    **dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3),
    **dict(pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>"),
    "user_defined_symbols": GEMMA_MARKERS + GEMMA_TEXT_PIECES,
    "add_dummy_prefix": False,
}
TOY = GEMMA | {"control_symbols": [*TURNS, "<reset>"], "user_defined_symbols": ["\n"]}


def train_sentencepiece(directory, name="tokenizer.model", **settings):
    """GEMMA and TOY are settings; without them the layout is Llama 2's."""
    model = io.BytesIO()
    defaults = dict(
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20), model_writer=model, **(defaults | settings)
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(model.getvalue())
    return directory


def gemma_in_transformers(file, special, ordinary):
    """transformers' GemmaTokenizer of a SentencePiece file; its own reader wants protobuf for the model's flags."""
    pytest.importorskip("transformers")
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import GemmaSentencePieceExtractor

    reader = GemmaSentencePieceExtractor.__new__(GemmaSentencePieceExtractor)
    reader.sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
    scores = {reader.sp.id_to_piece(i): reader.sp.get_score(i) for i in range(reader.sp.vocab_size())}
    vocab, merges = reader.extract(scores)
    oracle = GemmaTokenizer(vocab=vocab, merges=merges)
    oracle.add_tokens([AddedToken(s, normalized=False, special=True) for s in special], special_tokens=True)
    oracle.add_tokens([AddedToken(s, normalized=False) for s in ordinary])
    oracle_vocab = oracle.get_vocab()  # GemmaTokenizer brings its own <mask>, at the end if the file has none
    assert {piece: i for piece, i in oracle_vocab.items() if i < len(vocab)} == vocab
    return oracle
