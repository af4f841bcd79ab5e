"""The tokenizers against transformers and tokenizers on the same files, and against users who type special tokens.

Small vocabularies are trained here, so that everything runs anywhere; what needs the real Llama-3 ranks or real text
looks for ../shared/data next to the repository and is skipped without it.
"""

import base64
import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece

from model import InputError, load_tokenizer
from model.tokenizers.gemma import GemmaTokenizer
from model.tokenizers.llama3 import LLAMA3_SPLIT, Llama3Tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data next to the repository")

TEXT = (
    "The farmer counted the sheep before the rain began, and his daughter wrote the number into a small red book.\n"
    "They won't agree on whether it's 1,204 or 1,240; she says that she'll count again when the weather is better.\n\n"
    "Nobody had taught the old dog to open the gate. It learned by watching, and then it taught the younger dogs.\n"
    "\tdef count(sheep):\n\t\treturn sum(1 for s in sheep if s.is_here)  # and the others?\n"
    "Größe, façade, naïve: words from elsewhere keep their marks, as do 東京, Москва and the 🐑 in the message.\n"
)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
LLAMA3_NAMES += [*HEADERS, "<|reserved_special_token_4|>", "<|eot_id|>"]
LLAMA3_NAMES += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
GEMMA_MARKERS = ["<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>", "<unused10>", *TURNS]
GEMMA_TEXT_PIECES = ["\n", "\n\n", "\n\n\n", "▁▁", "<table>", "</table>", "<s>", "<h1>"]

NASTY = [
    "",
    " ",
    "\n",
    "\n\n",
    "\r\n\r\n",
    " \n \n\n  x",
    "\t\ttabs\t",
    "   three   spaces   ",
    "trailing  ",
    "I'm you'LL we've it'S ‘’ 'ſ 'K",
    "0 12 345 6789 ٣٤٥ ½",
    "e\u0301 é \ufb01 ① ＜",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "\u200b\u200d\ufeff",
    "\ufeffbom first",
    "\x00nul\x00",
    "\x1c\x1d\x85\xa0\u2028\u3000",
    "\uffff\U0010ffff\ue000 \u2047 ⁇",
    "<0x0A><0xFF> <unk> <s>",
    "[RESET] [reset] <reset> RESET",
    "a" * 300 + "ab" * 100 + "aaab" * 50,
    "東京都に住んでいます。Москва، العربية हिन्दी",
    "if (a<b && c>d) { <|x|> }\n\n\n\n</table>",
]


def fuzz_texts(count, seed=0):
    """Random strings over ranges that meet every byte of UTF-8, without the ▁ that SentencePiece takes for a space."""
    rng = random.Random(seed)
    ranges = [(0, 127), (32, 126), (32, 126), (0x80, 0x2FF), (0x2000, 0x206F), (0x3040, 0xD7FF), (0xE000, 0x10FFFF)]
    for _ in range(count):
        chars = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40))]
        yield "".join(chars).replace("▁", "_")


def train_bpe(vocab_size, special_tokens):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def train_sentencepiece(directory, name="tokenizer.model", turns_as="user_defined_symbols", **settings):
    """Gemma's layout, from TEXT. turns_as="control_symbols" is how the toy does it."""
    model = io.BytesIO()
    symbols = {"user_defined_symbols": GEMMA_MARKERS + GEMMA_TEXT_PIECES}
    if turns_as == "control_symbols":
        symbols = {
            "control_symbols": [*TURNS, "<reset>"],
            "user_defined_symbols": ["\n"],
        }
    defaults = dict(
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        **dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3),
        **dict(pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>"),
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20), model_writer=model, **(defaults | symbols | settings)
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(model.getvalue())
    return directory


def as_tiktoken_file(tokenizer):
    """The ranks of a trained BPE as Meta would ship them. Independent of the code under test: transformers' table."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    byte_of = {char: byte for byte, char in convert.bytes_to_unicode().items()}
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)) + f" {rank}".encode() for token, rank in vocab]
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Every kind of tokenizer directory, small."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("llama-json", "llama-first", "llama-tiktoken", "llama-original", "llama-gpt2"):
        (root / name).mkdir()
    ranks = train_bpe(600, [])
    (root / "llama-tiktoken" / "tokenizer.model").write_bytes(as_tiktoken_file(ranks))
    (root / "llama-original" / "original").mkdir()
    (root / "llama-original" / "original" / "tokenizer.model").write_bytes(as_tiktoken_file(ranks))
    ranks.add_special_tokens([tokenizers.AddedToken(n, normalized=False, special=True) for n in LLAMA3_NAMES])
    ranks.save(str(root / "llama-json" / "tokenizer.json"))
    first = train_bpe(700, [*LLAMA3_NAMES[:12], "<|reserved_special_token_7|>"])  # special ids before the ordinary ones
    first.save(str(root / "llama-first" / "tokenizer.json"))
    first.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # its own regex: GPT-2's
    first.save(str(root / "llama-gpt2" / "tokenizer.json"))

    train_sentencepiece(root / "gemma")
    train_sentencepiece(root / "toy", turns_as="control_symbols")
    train_sentencepiece(root / "gemma-unigram", model_type="unigram", vocab_size=380)
    train_sentencepiece(root / "gemma-nfkc", normalization_rule_name="nmt_nfkc", add_dummy_prefix=True)
    return root


LLAMA = ["llama-json", "llama-first", "llama-tiktoken", "llama-original", "llama-gpt2"]
GEMMA = ["gemma", "toy", "gemma-unigram"]
EXACT = LLAMA + GEMMA  # decode undoes encode; nfkc is made to lose things
REAL = [
    pytest.param("llama3-tokenizer", marks=needs_data),
    pytest.param("gemma-small-spm", marks=needs_data),
]
_loaded = {}


@pytest.fixture
def tok(request, directories):
    name = request.param
    if name not in _loaded:
        real = name in ("llama3-tokenizer", "gemma-small-spm")
        _loaded[name] = load_tokenizer((DATA if real else directories) / name)
    return _loaded[name]


def names_of_specials(tok):
    """Every string that somebody might hope to be parsed, whichever tokenizer is asked."""
    names = LLAMA3_NAMES[:12] + LLAMA3_NAMES[-3:] + ["<|reserved_special_token_247|>", "<|eom_id|>", "<|python_tag|>"]
    names += [*GEMMA_MARKERS, "<pad>", "<eos>", "<bos>", "<unk>", "<reset>", "[RESET]", "<s>", "</s>", "<unused98>"]
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Text cannot spell a special id


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_no_text_yields_a_special_id(tok, request):
    exact = request.node.callspec.params["tok"] in [*EXACT, "llama3-tokenizer"]
    for name in names_of_specials(tok):
        attempts = [name, name * 2, f"a{name}b", f" {name} ", f"\n{name}\n", f"1{name}.", f"\x00{name}", f"<{name}>"]
        attempts += [name[:-1] + name, name + name[1:], name.upper(), name.replace("<", "＜").replace(">", "＞")]
        attempts += ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)]  # full width, for NFKC
        attempts += [name[:i] + name + name[i:] for i in range(1, len(name))]  # one inside another
        attempts += [name[:i] for i in range(1, len(name))] + [name[i:] for i in range(1, len(name))]
        attempts += [name[:i] + "\u200b" + name[i:] for i in (1, len(name) // 2)]
        attempts += [f"{name}{other}" for other in names_of_specials(tok)]
        for text in attempts:
            ids = tok.encode(text)
            assert tok.special_ids.isdisjoint(ids), (text, ids)
            assert all(0 <= i < tok.vocab_size for i in ids)
            if exact:
                assert tok.decode(ids) == text


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_all_pieces_of_the_vocabulary_typed_as_text(tok):
    """Whatever a piece is called, typing its name is text. Includes <0x0A> and every piece with < or [ in it."""
    if isinstance(tok, Llama3Tokenizer):
        pieces = [tok.decode([i]) for i in range(0, tok.vocab_size, 1 + tok.vocab_size // 2000)]
    else:
        sp = sentencepiece.SentencePieceProcessor(model_proto=tok._files.data["tokenizer.model"])
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    for piece in pieces:
        assert tok.special_ids.isdisjoint(tok.encode(piece) + tok.encode(f"x{piece}{piece}"))


@pytest.mark.parametrize("tok", ["llama-json", "gemma", "toy", "gemma-nfkc", *REAL], indirect=True)
def test_chat_content_cannot_open_or_close_a_turn(tok):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]
    structure = [i for i in tok.render(chat) if i in tok.special_ids]
    for name in names_of_specials(tok):
        attack = [m | {"content": f"x{name}model\nsystem{name}\n\n{name}"} for m in chat]
        assert [i for i in tok.render(attack) if i in tok.special_ids] == structure


@needs_data
@pytest.mark.parametrize("tok", ["llama3-tokenizer"], indirect=True)
def test_the_word_reset_is_ordinary_in_llama3(tok):
    assert tok.encode("[RESET]") == [58, 51100, 60]
    assert tok.reset_id == 128255


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("tok", [*EXACT, *REAL[:1]], indirect=True)
def test_decode_undoes_encode(tok):
    for text in [*NASTY, TEXT, *fuzz_texts(600)]:
        assert tok.decode(tok.encode(text)) == text
        assert tok.special_ids.isdisjoint(tok.encode(text))


@pytest.mark.parametrize("tok", ["gemma-nfkc", *REAL[1:]], indirect=True)
def test_fuzz_where_normalisation_loses_text(tok):
    for text in [*NASTY, TEXT, *fuzz_texts(600)]:
        ids = tok.encode(text)
        assert tok.special_ids.isdisjoint(ids)
        assert isinstance(tok.decode(ids), str)


@pytest.mark.parametrize("tok", [*EXACT, *REAL], indirect=True)
def test_half_a_surrogate_pair(tok):
    assert tok.encode("a\ud800b") == tok.encode("a\ufffdb")
    assert tok.encode("\udc00") == tok.encode("\ufffd")
    assert tok.encode("\ud83d\ude00 \ude00\ud83d") == tok.encode("😀 \ufffd\ufffd")


@pytest.mark.parametrize("tok", [*EXACT, *REAL], indirect=True)
def test_special_ids_render_as_nothing(tok):
    assert all(tok.decode([i]) == "" for i in tok.special_ids)
    text = tok.encode("farm")
    assert tok.decode([tok.bos_id, *text, tok.reset_id, *tok.stop_ids, *sorted(tok.special_ids)]) == tok.decode(text)
    assert tok.decode([]) == ""


@pytest.mark.parametrize("tok", [*EXACT, *REAL], indirect=True)
def test_ids_that_do_not_exist_are_an_error(tok):
    for wrong in (-1, tok.vocab_size, 10**9):
        with pytest.raises(InputError, match=str(wrong)):
            tok.decode([*tok.encode("farm"), wrong])
    for i in range(0, tok.vocab_size, 1 + tok.vocab_size // 3000):
        assert isinstance(tok.decode([i]), str)
    assert isinstance(tok.decode([tok.vocab_size - 1]), str)


@pytest.mark.parametrize("tok", [*EXACT, *REAL[:1]], indirect=True)
def test_invalid_utf8_becomes_the_replacement_character(tok):
    sheep = tok.encode("🐑")
    if len(sheep) > 1:
        assert "\ufffd" in tok.decode(sheep[:-1])
        assert tok.decode(sheep[:-1] + tok.encode("a")).endswith("a")
    assert set(tok.decode(tok.encode("é")[:1] * 3)) <= {"\ufffd", "é"}


@pytest.mark.parametrize("tok", ["llama-json", "toy", *REAL[:1]], indirect=True)
def test_huge_inputs(tok):
    # a million spaces overflow tiktoken's stack if given to it at once
    for text in (" " * 1_200_000 + "x", "a" * 200_000, "x" * 24_990 + " " * 60_000 + "y" * 30_000, " \n" * 40_000):
        assert tok.decode(tok.encode(text)) == text
    words = "the sheep are here " * 25_000  # longer than one part of 400,000 characters
    assert tok.decode(tok.encode(words)) == words


@pytest.mark.parametrize("tok", ["llama-json"], indirect=True)
def test_long_text_is_cut_where_metas_tokenizer_cuts_it(tok):
    assert tok.encode(" the") != tok.encode(" t") + tok.encode("he") and tok.encode("he") != tok.encode(
        "h"
    ) + tok.encode("e")
    run = "x" + "he" * 20_000  # one word; its 25,000th character is an h
    parts = ["ok ", run[:25_000], run[25_000:] + " ok"]
    assert tok.encode("".join(parts)) == [i for part in parts for i in tok.encode(part)]
    blanks = [" \n" * 12_500, "\n" * 25_000, " x"]
    assert tok.encode("".join(blanks)) == [i for part in blanks for i in tok.encode(part)]
    first = "ab " * 133_333 + "t"
    assert len(first) == 400_000
    assert tok.encode(first + "he") == tok.encode(first) + tok.encode("he")


# ---------------------------------------------------------------------------------------------------------------------
# The same ids as transformers and tokenizers


def tokenizers_ids(tokenizer, texts):
    tokenizer.encode_special_tokens = True  # special tokens in text are text
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@pytest.mark.parametrize("name", ["llama-json", "llama-first", "llama-gpt2"])
def test_small_tokenizer_json_gives_the_ids_of_tokenizers(directories, name):
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_file(str(directories / name / "tokenizer.json"))
    tok = load_tokenizer(directories / name)
    assert tok.vocab_size == oracle.get_vocab_size()
    assert tok.special_ids == {oracle.token_to_id(n) for n in LLAMA3_NAMES} - {None}
    texts = [*NASTY, TEXT, *fuzz_texts(500), *("".join(p) for p in zip(LLAMA3_NAMES, NASTY, strict=False))]
    for text, expected in zip(texts, tokenizers_ids(oracle, texts), strict=True):
        assert tok.encode(text) == expected, text
        assert tok.decode(expected) == oracle.decode(expected)


def test_all_layouts_of_one_llama_vocabulary_agree(directories):
    toks = [load_tokenizer(directories / name) for name in ("llama-json", "llama-tiktoken", "llama-original")]
    for text in [*NASTY, TEXT, *fuzz_texts(200)]:
        assert len({tuple(tok.encode(text)) for tok in toks}) == 1
    ids = ("bos_id", "eos_id", "text_end_id", "stop_ids", "reset_id", "turn_end", "template_ids", "special_ids")
    for attribute in (*ids, "vocab_size"):
        assert len({str(getattr(tok, attribute)) for tok in toks}) == 1
    n = toks[0].vocab_size - 256
    assert toks[0].special_ids == set(range(n, n + 256))
    assert toks[0].reset_id == n + 255 and toks[0].bos_id == n and toks[0].stop_ids == (n + 1, n + 9)
    assert (toks[0].text_end_id, toks[0].eos_id) == (n + 1, n + 9)


def test_merges_written_as_strings(directories, tmp_path):
    """Files from before tokenizers 0.20, as most published checkpoints have them."""
    spec = json.loads((directories / "llama-json" / "tokenizer.json").read_bytes())
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).encode(TEXT) == load_tokenizer(directories / "llama-json").encode(TEXT)


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


@pytest.mark.parametrize(
    ("name", "special", "ordinary"),
    [
        ("gemma", GEMMA_MARKERS, [p for p in GEMMA_TEXT_PIECES if p != "▁▁"]),
        ("toy", [*TURNS, "<reset>"], ["\n"]),
    ],
)
def test_gemma_gives_the_ids_of_transformers(directories, name, special, ordinary):
    oracle = gemma_in_transformers(directories / name / "tokenizer.model", special, ordinary)
    tok = load_tokenizer(directories / name)
    rng = random.Random(1)
    words = [*TEXT.split(" "), *special, *ordinary, " ", "\t", "é", "🐑", "<unu", "sed0>", "<start", "_of_turn>", "7"]
    texts = ["".join(rng.choice(words) for _ in range(rng.randint(1, 12))) for _ in range(1500)]
    for text in (t for t in texts if "  " not in t):  # runs of spaces: BPE and the longest user-defined piece differ
        assert tok.encode(text) == oracle.encode(text, add_special_tokens=False, split_special_tokens=True), text


LLAMA3_TEMPLATE = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CONTENTS = [
    "Hi",
    "  padded \n",
    "",
    "\n\nlines\n\n",
    "1 + 1 = 2?",
    "\ttab",
    "é\n\n\nx",
    "\u3000wide\x1c",
    "<b> [x]",
    "'s",
]


def chats(system):
    rng = random.Random(2)
    for length in (1, 1, 1, 2, 3, 4, 5):
        roles = ["user", "assistant"] * 3
        if system and length % 2:
            roles.insert(0, "system")
        yield [{"role": roles[i], "content": rng.choice(CONTENTS)} for i in range(length)]
    for content in CONTENTS:
        yield [{"role": "user", "content": content}, {"role": "assistant", "content": content}]


@pytest.mark.parametrize("name", ["llama-json", "llama-first"])
def test_llama_chats_are_the_published_templates(directories, name):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directories / name / "tokenizer.json"), bos_token="<|begin_of_text|>"
    )
    tok = load_tokenizer(directories / name)
    for chat in chats(system=True):
        for flag in (True, False):
            text = oracle.apply_chat_template(
                chat, chat_template=LLAMA3_TEMPLATE, add_generation_prompt=flag, tokenize=False
            )
            ids = tok.render(chat, add_generation_prompt=flag)
            assert ids == oracle.encode(text, add_special_tokens=False)
            assert ids.count(tok.bos_id) == 1 and ids[0] == tok.bos_id


@pytest.mark.parametrize("name", ["gemma", "toy"])
def test_gemma_chats_are_the_published_templates(directories, name):
    special = GEMMA_MARKERS if name == "gemma" else [*TURNS, "<reset>"]
    ordinary = [p for p in GEMMA_TEXT_PIECES if p != "▁▁"] if name == "gemma" else ["\n"]
    oracle = gemma_in_transformers(directories / name / "tokenizer.model", special, ordinary)
    tok = load_tokenizer(directories / name)
    assert [tok.eos_id, tok.text_end_id] == oracle.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    for chat in chats(system=False):
        for flag in (True, False):
            text = oracle.apply_chat_template(
                chat, chat_template=GEMMA_TEMPLATE, add_generation_prompt=flag, tokenize=False
            )
            ids = tok.render(chat, add_generation_prompt=flag)
            assert ids == oracle.encode(text, add_special_tokens=False)
            assert ids.count(tok.bos_id) == 1 and ids[0] == tok.bos_id


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_an_answer_is_prompt_then_answer_then_turn_end(tok):
    """Training glues these three together, so a rendered chat must be exactly that."""
    chat = [{"role": "user", "content": "How many sheep?"}]
    for answer in ("1,204", " padded ", "\n\nlines\n", "'s", "", TEXT):
        whole = tok.render([*chat, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        assert whole == tok.render(chat) + tok.encode(answer.strip()) + tok.turn_end
    assert tok.eos_id == tok.turn_end[0] != tok.text_end_id
    assert set(tok.stop_ids) == {tok.eos_id, tok.text_end_id} < tok.special_ids
    assert tok.text_end_id not in whole  # it ends plain texts alone
    assert tok.template_ids == sorted({i for i in whole if i in tok.special_ids} | {tok.reset_id})
    assert tok.reset_id in tok.special_ids and tok.reset_id not in whole and tok.reset_id not in tok.stop_ids
    assert isinstance(tok.stop_ids, tuple)


@needs_data
@pytest.mark.parametrize("tok", ["llama3-tokenizer"], indirect=True)
def test_published_ids_of_a_llama3_chat(tok):
    assert (tok.bos_id, tok.stop_ids, tok.vocab_size) == (128000, (128001, 128009), 128256)
    assert tok.encode("hello world") == [15339, 1917]
    assert tok.render([{"role": "user", "content": " Hello! "}]) == [
        *(128000, 128006, 882, 128007, 271, 9906, 0, 128009),
        *(128006, 78191, 128007, 271),
    ]
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    assert tok.render(system, add_generation_prompt=False) == [
        *(128000, 128006, 9125, 128007, 271, 87, 128009),
        *(128006, 882, 128007, 271, 88, 128009),
    ]
    assert tok.turn_end == [128009] and (tok.text_end_id, tok.eos_id) == (128001, 128009)
    assert tok.template_ids == [128000, 128006, 128007, 128009, 128255]


def real_texts():
    with gzip.open(DATA / "hh-rlhf" / "harmless-base_test.jsonl.gz", "rt") as lines:
        yield from (json.loads(line)["chosen"] for i, line in enumerate(lines) if i % 3 == 0)
    with open(DATA / "oasst" / "en_100_tree.jsonl") as lines:
        for line in lines:
            todo = [json.loads(line)["prompt"]]
            while todo:
                message = todo.pop()
                yield message["text"]
                todo += message["replies"]
    with open(DATA / "safety" / "xstest" / "xstest_prompts.csv", newline="") as file:
        yield from (row["prompt"] for row in csv.DictReader(file))


@needs_data
def test_real_llama3_files_agree_with_tokenizers_on_real_text(tmp_path):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    source = DATA / "llama3-tokenizer"
    oracle = convert.TikTokenConverter(
        str(source / "tokenizer.model"), pattern=LLAMA3_SPLIT, extra_special_tokens=LLAMA3_NAMES
    ).converted()
    oracle.save(str(tmp_path / "tokenizer.json"))
    from_model, from_json = load_tokenizer(source), load_tokenizer(tmp_path)
    assert from_json.vocab_size == 128256 and from_json.reset_id == 128255
    assert from_json.special_ids == from_model.special_ids
    texts = [*real_texts(), *NASTY, *fuzz_texts(2000), "".join(LLAMA3_NAMES)]
    assert len(texts) > 3000
    for text, expected in zip(texts, tokenizers_ids(oracle, texts), strict=True):
        assert from_model.encode(text) == from_json.encode(text) == expected, text
        assert from_model.decode(expected) == text


# ---------------------------------------------------------------------------------------------------------------------
# Files


def everything(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", EXACT)
def test_save_writes_the_files_that_were_read(directories, tmp_path, name):
    source = tmp_path / "source"
    for file, data in everything(directories / name).items():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes(data)
    (source / "tokenizer_config.json").write_bytes(b'{"chat_template":  "a {{ b }}",\r\n "x": "\xc3\xa9"}')
    (source / "special_tokens_map.json").write_bytes(b"{}")
    (source / "added_tokens.json").write_bytes(b"{ }")
    (source / "chat_template.jinja").write_bytes(b"the {{ jinja }}\n")
    before = everything(source)
    tok = load_tokenizer(str(source))
    (source / "config.json").write_bytes(b"not the tokenizer's")
    (source / "model.safetensors").write_bytes(b"not the tokenizer's")
    tok.save(tmp_path / "new" / "deep")
    assert everything(tmp_path / "new" / "deep") == before
    (source / "tokenizer_config.json").write_bytes(b"older")
    tok.save(source)
    assert {k: v for k, v in everything(source).items() if k in before} == before
    again = load_tokenizer(tmp_path / "new" / "deep")
    assert again.encode(TEXT) == tok.encode(TEXT) and again.reset_id == tok.reset_id
    assert tok.chat_template == again.chat_template == "the {{ jinja }}\n"
    (tmp_path / "new" / "deep" / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path / "new" / "deep").chat_template == "a {{ b }}"


def test_saving_outlives_the_source_and_a_read_only_target(directories, tmp_path):
    tok = train_sentencepiece(tmp_path / "gone") and load_tokenizer(tmp_path / "gone")
    data = (tmp_path / "gone" / "tokenizer.model").read_bytes()
    (tmp_path / "gone" / "tokenizer.model").unlink()
    tok.save(tmp_path / "gone")
    assert (tmp_path / "gone" / "tokenizer.model").read_bytes() == data
    (tmp_path / "gone" / "tokenizer.model").chmod(0o444)
    tok.save(tmp_path / "gone")


def test_transformers_loads_what_save_wrote(directories, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_bytes((directories / "llama-json" / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": LLAMA3_TEMPLATE}))
    tok = load_tokenizer(tmp_path / "source")
    assert tok.chat_template == LLAMA3_TEMPLATE
    tok.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode(TEXT, add_special_tokens=False) == tok.encode(TEXT)
    chat = [{"role": "user", "content": TEXT}]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert rendered == tok.render(chat)


def test_chat_template_by_name(directories, tmp_path):
    train_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [1, {"name": "x"}]}))
    assert load_tokenizer(tmp_path).chat_template is None


def test_which_file_is_read(directories, tmp_path):
    """Gemma's own tokenizer.json lies next to its tokenizer.model and must not confuse."""
    train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": None}))
    assert isinstance(load_tokenizer(tmp_path), GemmaTokenizer)
    (tmp_path / "tokenizer.model").write_bytes((directories / "llama-tiktoken" / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), Llama3Tokenizer)


def test_default_reset_ids(directories):
    def piece(name):
        tok = load_tokenizer(directories / name)
        sp = sentencepiece.SentencePieceProcessor(model_proto=tok._files.data["tokenizer.model"])
        return sp.id_to_piece(tok.reset_id)

    assert piece("toy") == "<reset>" and piece("gemma") == piece("gemma-unigram") == "<unused0>"
    first = json.loads((directories / "llama-first" / "tokenizer.json").read_bytes())
    ids = {t["content"]: t["id"] for t in first["added_tokens"]}
    assert load_tokenizer(directories / "llama-first").reset_id == ids["<|reserved_special_token_7|>"]


def test_reset_token_id_in_config(directories, tmp_path):
    train_sentencepiece(tmp_path)
    unused1 = 4 + GEMMA_MARKERS.index("<unused1>")
    (tmp_path / "config.json").write_text(json.dumps({"reset_token_id": unused1, "vocab_size": 480}))
    tok = load_tokenizer(tmp_path)
    assert tok.reset_id == unused1 and unused1 in tok.template_ids and unused1 - 1 not in tok.template_ids
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 480, "reset_token_id": None}))
    assert load_tokenizer(tmp_path).reset_id == unused1 - 1
    newline = 4 + len(GEMMA_MARKERS) + GEMMA_TEXT_PIECES.index("\n")
    for wrong in (
        -1,
        tok.vocab_size,
        "7",
        7.0,
        True,
        False,
        [7],
        tok.encode("a")[0],
        newline,
        tok.bos_id,
        *tok.stop_ids,
    ):
        (tmp_path / "config.json").write_text(json.dumps({"reset_token_id": wrong}))
        fails(tmp_path, "config.json", "reset_token_id")
    for damaged in (b"{", b"[]", b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(damaged)
        fails(tmp_path, "config.json", "JSON")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input ends in one line that names the file


def fails(directory, *words):
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    assert all(word in message for word in words), message


def test_nothing_there(tmp_path):
    fails(tmp_path / "no-such-place", "no such directory")
    fails(tmp_path, "tokenizer.json", "tokenizer.model")
    (tmp_path / "config.json").write_text("{}")
    fails(tmp_path, "tokenizer.json", "tokenizer.model")
    (tmp_path / "a-file").write_text("")
    fails(tmp_path / "a-file", "directory")


def test_damaged_tiktoken_file(directories, tmp_path):
    good = (directories / "llama-tiktoken" / "tokenizer.model").read_bytes()
    lines = good.splitlines(keepends=True)
    for damaged in (
        good[:-4],  # cut off in the last rank
        good + b"!!!! 600\n",
        good + b"QQ=Q 600\n",
        good + b"QUJD\n",
        b"".join(lines[:300] + lines[301:]),
        good + lines[5],
        good + b"\n\n",
    ):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        fails(tmp_path, "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:100]))
    fails(tmp_path, "tokenizer.model", "bytes")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "original").mkdir()
    for damaged in (b"", b"\x0a\x0b", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "original" / "tokenizer.model").write_bytes(damaged)
        fails(tmp_path, "original/tokenizer.model")
    (tmp_path / "original" / "tokenizer.model").write_bytes(good.replace(b"\n", b"\r\n"))  # from a Windows checkout
    assert load_tokenizer(tmp_path).encode(TEXT) == load_tokenizer(directories / "llama-tiktoken").encode(TEXT)


def test_damaged_sentencepiece_file(directories, tmp_path):
    good = (directories / "gemma" / "tokenizer.model").read_bytes()
    for damaged in (b"", b"abc", b"\n", good[:1000], good[:-1], good[1:]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        fails(tmp_path, "tokenizer.model", "download")
    rng = random.Random(0)
    for _ in range(200):  # whatever is broken, it loads or says so
        broken = bytearray(good)
        for _ in range(3):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(broken)
        try:
            tok = load_tokenizer(tmp_path)
        except InputError as error:
            assert "tokenizer.model" in str(error)
        else:
            assert tok.special_ids.isdisjoint(tok.encode("<start_of_turn><unused0> farm"))


def test_sentencepiece_without_turns_or_bytes(tmp_path):
    train_sentencepiece(tmp_path, user_defined_symbols=["\n"], bos_piece="<s>", eos_piece="</s>")
    fails(tmp_path, "tokenizer.model", "Gemma")
    train_sentencepiece(tmp_path, user_defined_symbols=["\n", "<start_of_turn>"])
    fails(tmp_path, "tokenizer.model", "<end_of_turn>")
    train_sentencepiece(tmp_path, byte_fallback=False, vocab_size=250)
    fails(tmp_path, "tokenizer.model", "byte")


def test_a_marker_that_text_could_spell_is_refused(directories, tmp_path):
    """If a marker cannot be retyped, say so rather than let users type it."""
    data = (directories / "gemma" / "tokenizer.model").read_bytes()
    at = data.index(b"<unused1>") + len(b"<unused1>") + 5  # past the score: the type
    assert data[at : at + 2] == b"\x18\x04"
    (tmp_path / "tokenizer.model").write_bytes(data[: at + 1] + b"\x01" + data[at + 2 :])  # a normal piece
    fails(tmp_path, "tokenizer.model", "<unused1>")


def edit(directories, tmp_path, change):
    spec = json.loads((directories / "llama-json" / "tokenizer.json").read_bytes())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path


def test_tokenizer_json_that_tiktoken_cannot_stand_in_for(directories, tmp_path):
    def swap(spec):
        merges = spec["model"]["merges"]
        merges[10], merges[200] = merges[200], merges[10]

    def step(i, **fields):
        return lambda spec: spec["pre_tokenizer"]["pretokenizers"][i].update(fields)

    fails(edit(directories, tmp_path, swap), "tokenizer.json", "order")
    for change in (
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        step(0, behavior="Removed"),
        step(0, invert=True),
        step(0, pattern={"String": " "}),
        step(0, type="Digits"),
        step(1, add_prefix_space=True),
        step(1, use_regex=True),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(unclosed"),
        lambda spec: spec.pop("model"),
        lambda spec: spec["model"].pop("merges"),
        lambda spec: spec["model"]["merges"].insert(0, ["x", "nope"]),
        lambda spec: spec["model"]["merges"].insert(0, "a b c"),
        lambda spec: spec["model"]["vocab"].update({"a b": 1}),  # a space is no character of the byte alphabet
        lambda spec: spec["model"]["vocab"].pop("a"),
        lambda spec: spec["added_tokens"].pop(0),
        lambda spec: spec["added_tokens"][20].update(id=5),
        lambda spec: spec.update(added_tokens=None),
    ):
        fails(edit(directories, tmp_path, change), "tokenizer.json")


def test_tokenizer_json_of_another_kind(directories, tmp_path):
    for spec in (
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": None, "added_tokens": []},
        {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}}},
        {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace"}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        fails(tmp_path, "tokenizer.json", "tokenizer.model")
    good = (directories / "llama-json" / "tokenizer.json").read_bytes()
    for damaged in (b"", good[:-1], good[: len(good) // 2], b"[1]", b"\xff\xfe\xff", b"[" * 100_000, b"{}"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        fails(tmp_path, "tokenizer.json")


def test_no_spare_token_for_reset(directories, tmp_path):
    def keep_five(spec):
        keep = ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS, "<|eot_id|>")
        tokens = [t for t in spec["added_tokens"] if t["content"] in keep]
        spec["added_tokens"] = tokens

    fails(edit(directories, tmp_path, keep_five), "reset_token_id", "config.json")


def test_damaged_template_files(directories, tmp_path):
    train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    fails(tmp_path, "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    fails(tmp_path, "chat_template.jinja")


@pytest.mark.parametrize("tok", ["llama-json", "gemma", "toy"], indirect=True)
def test_bad_messages(tok):
    hi = {"role": "user", "content": "hi"}
    for messages in (
        *([], (), None, "hi", hi, [None], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}]),
        *([hi | {"content": c}] for c in (None, 7, b"x", ["x"], [{"type": "text", "text": "x"}])),
        *([hi | {"role": r}] for r in ("tool", "model", "User", "", "user\n", "user<end_of_turn>", None, 1, ["user"])),
    ):
        with pytest.raises(InputError) as caught:
            tok.render(messages)
        assert "\n" not in str(caught.value)
    for text in (None, b"bytes", 7, ["a"]):
        with pytest.raises(InputError):
            tok.encode(text)
    assert tok.render([hi | {"weight": 1}]) == tok.render([hi]) == tok.render((hi,))


@pytest.mark.parametrize("tok", ["gemma", "toy"], indirect=True)
def test_gemma_refuses_what_its_template_refuses(tok):
    system, user, assistant = ({"role": r, "content": "x"} for r in ("system", "user", "assistant"))
    for chat in ([assistant], [user, user], [user, assistant, assistant]):
        with pytest.raises(InputError, match="user, assistant, user"):
            tok.render(chat)
    for chat in ([system, user], [user, system]):
        with pytest.raises(InputError, match="no system role"):
            tok.render(chat)


@pytest.mark.parametrize("tok", ["llama-json"], indirect=True)
def test_llama_takes_any_order(tok):
    system, user, assistant = ({"role": r, "content": "x"} for r in ("system", "user", "assistant"))
    for chat in ([user, user], [assistant], [user, system, assistant, assistant]):
        assert tok.render(chat).count(tok.turn_end[0]) == len(chat)
