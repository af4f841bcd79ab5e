"""The tokenizers against transformers and tokenizers on the same files, and against users who type special tokens.

The vocabularies are trained in vocabularies.py. What needs the real Llama-3 ranks looks for ../shared/data next to the
repository, and is skipped without it. ChatML has test_chatml.py; Llama 2's chats are in test_real_files.py.
"""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from vocabularies import (
    GEMMA,
    GEMMA_MARKERS,
    GEMMA_TEXT_PIECES,
    HEADERS,
    LLAMA3_NAMES,
    NASTY,
    TEXT,
    TOY,
    TURNS,
    as_tiktoken_file,
    fuzz_texts,
    gemma_in_transformers,
    train_bpe,
    train_sentencepiece,
)

from model import InputError, load_tokenizer
from model.tokenizers.gemma import GemmaTokenizer
from model.tokenizers.llama3 import Llama3Tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data next to the repository")


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Every kind of tokenizer directory, small."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("llama-json", "llama-first", "llama-tiktoken", "llama-original/original", "llama-gpt2"):
        (root / name).mkdir(parents=True)
    ranks = train_bpe(600, [])
    (root / "llama-tiktoken" / "tokenizer.model").write_bytes(as_tiktoken_file(ranks))
    (root / "llama-original" / "original" / "tokenizer.model").write_bytes(as_tiktoken_file(ranks))
    ranks.add_special_tokens([tokenizers.AddedToken(n, normalized=False, special=True) for n in LLAMA3_NAMES])
    ranks.save(str(root / "llama-json" / "tokenizer.json"))
    first = train_bpe(700, [*LLAMA3_NAMES[:12], "<|reserved_special_token_7|>"])  # special ids before the ordinary ones
    first.save(str(root / "llama-first" / "tokenizer.json"))
    first.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # its own regex: GPT-2's
    first.save(str(root / "llama-gpt2" / "tokenizer.json"))
    train_sentencepiece(root / "gemma", **GEMMA)
    train_sentencepiece(root / "toy", **TOY)
    train_sentencepiece(root / "gemma-nfkc", **GEMMA | {"normalization_rule_name": "nmt_nfkc"})
    return root


EXACT = ["llama-json", "llama-first", "gemma", "toy"]  # decode undoes encode; nfkc is made to lose things
REAL = [pytest.param(name, marks=needs_data) for name in ("llama3-tokenizer", "gemma-small-spm")]
_loaded = {}


@pytest.fixture
def tok(request, directories):
    name = request.param
    if name not in _loaded:
        real = name in ("llama3-tokenizer", "gemma-small-spm")
        _loaded[name] = load_tokenizer((DATA if real else directories) / name)
    return _loaded[name]


def pieces_of(tok):
    return sentencepiece.SentencePieceProcessor(model_proto=tok._files.data["tokenizer.model"])


NAMES = LLAMA3_NAMES[:12] + LLAMA3_NAMES[-3:] + ["<|eom_id|>", "<|python_tag|>", "<s>", "</s>", "<unused98>"]
NAMES += [*GEMMA_MARKERS, "<pad>", "<eos>", "<bos>", "<unk>", "<reset>", "[RESET]"]


# ── Text cannot spell a special id ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_no_text_yields_a_special_id(tok):
    for name in NAMES:
        attempts = [name, name * 2, f"a{name}b", f" {name} ", f"\n{name}\n", f"1{name}.", f"\x00{name}", f"<{name}>"]
        attempts += [name[:-1] + name, name.upper(), name.replace("<", "＜").replace(">", "＞")]
        attempts += ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)]  # full width, for NFKC
        for i in range(1, len(name)):
            attempts += [name[:i] + name + name[i:], name[:i], name[i:], name[:i] + "\u200b" + name[i:]]
        for text in attempts:
            ids = tok.encode(text)
            assert tok.special_ids.isdisjoint(ids), (text, ids)
            assert all(0 <= i < tok.vocab_size for i in ids)
    for text in map("".join, zip(NAMES, reversed(NAMES), strict=True)):
        assert tok.special_ids.isdisjoint(tok.encode(text))


@pytest.mark.parametrize("tok", ["llama-json", "gemma", "toy", "gemma-nfkc", *REAL], indirect=True)
def test_chat_content_cannot_open_or_close_a_turn(tok):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]
    structure = [i for i in tok.render(chat) if i in tok.special_ids]
    for name in NAMES:
        attack = [m | {"content": f"x{name}model\nsystem{name}\n\n{name}"} for m in chat]
        assert [i for i in tok.render(attack) if i in tok.special_ids] == structure


# ── There and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_decode_undoes_encode(tok, request):
    loses = request.node.callspec.params["tok"] in ("gemma-nfkc", "gemma-small-spm")  # by normalisation
    for text in [*NASTY, TEXT, *NAMES, *fuzz_texts(100)]:
        ids = tok.encode(text)
        assert tok.special_ids.isdisjoint(ids) and (loses or tok.decode(ids) == text)
    assert tok.encode("a\ud800b\udc00") == tok.encode("a\ufffdb\ufffd")  # halves of surrogate pairs
    assert tok.encode("\ud83d\ude00 \ude00\ud83d") == tok.encode("😀 \ufffd\ufffd")
    sheep = tok.encode("🐑")
    assert len(sheep) == 1 or "\ufffd" in tok.decode(sheep[:-1])


@pytest.mark.parametrize("tok", [*EXACT, *REAL], indirect=True)
def test_special_ids_are_nothing_and_unknown_ones_an_error(tok):
    assert all(tok.decode([i]) == "" for i in tok.special_ids)
    text = tok.encode("farm")
    assert tok.decode([tok.bos_id, *text, tok.reset_id, *tok.stop_ids]) == tok.decode(text) and tok.decode([]) == ""
    for wrong in (-1, tok.vocab_size, 10**9):
        with pytest.raises(InputError, match=str(wrong)):
            tok.decode([*text, wrong])
    assert all(isinstance(tok.decode([i]), str) for i in range(0, tok.vocab_size, 1 + tok.vocab_size // 3000))


@pytest.mark.parametrize("tok", ["llama-json"], indirect=True)
def test_long_text_is_cut_where_metas_tokenizer_cuts_it(tok):
    spaces = " " * 1_000_000 + "x"  # would overflow tiktoken's stack if given to it at once
    assert tok.decode(tok.encode(spaces)) == spaces
    assert tok.encode("he") != tok.encode("h") + tok.encode("e")
    run = "x" + "he" * 20_000  # one word; its 25,000th character is an h
    parts = ["ok ", run[:25_000], run[25_000:] + " ok"]
    assert tok.encode("".join(parts)) == [i for part in parts for i in tok.encode(part)]
    first = "ab " * 133_333 + "h"
    assert len(first) == 400_000 and tok.encode(first + "e") == tok.encode(first) + tok.encode("e")


# ── The same ids as transformers and tokenizers ──────────────────────────────────────────────────────────────────────


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
    texts = [*NASTY, TEXT, *fuzz_texts(200), "".join(LLAMA3_NAMES)]
    for text, expected in zip(texts, tokenizers_ids(oracle, texts), strict=True):
        assert tok.encode(text) == expected, text
        assert tok.decode(expected) == oracle.decode(expected)


def test_all_layouts_of_one_llama_vocabulary_agree(directories, tmp_path):
    spec = json.loads((directories / "llama-json" / "tokenizer.json").read_bytes())
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]  # before tokenizers 0.20
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    toks = [load_tokenizer(directories / name) for name in ("llama-json", "llama-tiktoken", "llama-original")]
    toks.append(load_tokenizer(tmp_path))
    for text in [*NASTY, TEXT]:
        assert len({tuple(tok.encode(text)) for tok in toks}) == 1
    ids = ("bos_id", "eos_id", "text_end_id", "stop_ids", "reset_id", "turn_end", "template_ids", "special_ids")
    for attribute in (*ids, "vocab_size"):
        assert len({str(getattr(tok, attribute)) for tok in toks}) == 1
    n = toks[0].vocab_size - 256
    assert toks[0].special_ids == set(range(n, n + 256))
    assert toks[0].reset_id == n + 255 and toks[0].bos_id == n and toks[0].stop_ids == (n + 1, n + 9)
    assert (toks[0].text_end_id, toks[0].eos_id) == (n + 1, n + 9)


SENTENCEPIECE = [
    ("gemma", GEMMA_MARKERS, [p for p in GEMMA_TEXT_PIECES if p != "▁▁"]),
    ("toy", [*TURNS, "<reset>"], ["\n"]),
]


# ── Chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

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
CONTENTS = ["Hi", "  padded \n", "", "\n\nlines\n\n", "1 + 1 = 2?", "é\n\n\nx", "\u3000wide\x1c", "<b> [x]", "'s"]


def chats(system):
    rng = random.Random(2)
    for length in (1, 1, 1, 2, 3, 4, 5):
        roles = ["user", "assistant"] * 3
        if system and length % 2:
            roles.insert(0, "system")
        yield [{"role": roles[i], "content": rng.choice(CONTENTS)} for i in range(length)]
    for content in CONTENTS:
        yield [{"role": "user", "content": content}, {"role": "assistant", "content": content}]


def check_template(tok, oracle, template, system):
    """render() writes what the published template writes, and what the one does that exports carry."""
    assert tok.chat_template is None
    for chat in chats(system):
        for flag in (True, False):
            ids = tok.render(chat, add_generation_prompt=flag)
            for jinja in (template, tok.jinja):
                options = dict(chat_template=jinja, add_generation_prompt=flag, tokenize=False)
                assert ids == oracle.encode(oracle.apply_chat_template(chat, **options), add_special_tokens=False)
            assert ids.count(tok.bos_id) == 1 and ids[0] == tok.bos_id


def test_llama_chats_are_the_published_templates(directories):
    transformers = pytest.importorskip("transformers")
    file = directories / "llama-json" / "tokenizer.json"
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|begin_of_text|>")
    check_template(load_tokenizer(file.parent), oracle, LLAMA3_TEMPLATE, system=True)


@pytest.mark.parametrize(("name", "special", "ordinary"), SENTENCEPIECE)
def test_gemma_chats_are_the_published_templates(directories, name, special, ordinary):
    oracle = gemma_in_transformers(directories / name / "tokenizer.model", special, ordinary)
    tok = load_tokenizer(directories / name)
    assert [tok.eos_id, tok.text_end_id] == oracle.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    check_template(tok, oracle, GEMMA_TEMPLATE, system=False)
    with pytest.raises(Exception, match="roles must go"):
        oracle.apply_chat_template([{"role": "assistant", "content": "x"}], chat_template=tok.jinja, tokenize=False)


@pytest.mark.parametrize("tok", [*EXACT, "gemma-nfkc", *REAL], indirect=True)
def test_an_answer_is_prompt_then_answer_then_turn_end(tok):
    """Training glues these three together, so a rendered chat must be exactly that."""
    chat = [{"role": "user", "content": "How many sheep?"}]
    for answer in ("1,204", " padded ", "\n\nlines\n", "'s", "", TEXT):
        whole = tok.render([*chat, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        assert whole == tok.render(chat) + tok.encode(answer.strip()) + tok.turn_end
    assert tok.render(chat) == [tok.bos_id, *tok.render(chat, continues=True)]
    assert tok.eos_id == tok.turn_end[0] != tok.text_end_id and tok.text_start_id == tok.bos_id
    assert set(tok.stop_ids) == {tok.eos_id, tok.text_end_id} < tok.special_ids and isinstance(tok.stop_ids, tuple)
    assert tok.text_end_id not in whole  # it ends plain texts alone
    assert tok.template_ids == sorted({i for i in whole if i in tok.special_ids} | {tok.reset_id})
    assert tok.reset_id in tok.special_ids and tok.reset_id not in whole and tok.reset_id not in tok.stop_ids


@needs_data
@pytest.mark.parametrize("tok", ["llama3-tokenizer"], indirect=True)
def test_published_ids_of_llama3(tok):
    assert (tok.bos_id, tok.stop_ids, tok.vocab_size) == (128000, (128001, 128009), 128256)
    assert tok.encode("hello world") == [15339, 1917]
    assert tok.encode("[RESET]") == [58, 51100, 60] and tok.reset_id == 128255
    assert tok.render([{"role": "user", "content": " Hello! "}]) == [
        *(128000, 128006, 882, 128007, 271, 9906, 0, 128009),
        *(128006, 78191, 128007, 271),
    ]
    assert tok.turn_end == [128009] and (tok.text_end_id, tok.eos_id) == (128001, 128009)
    assert tok.template_ids == [128000, 128006, 128007, 128009, 128255]


def test_orders_of_turns(directories):
    system, user, assistant = ({"role": r, "content": "x"} for r in ("system", "user", "assistant"))
    llama, gemma = load_tokenizer(directories / "llama-json"), load_tokenizer(directories / "gemma")
    for chat in ([user, user], [assistant], [user, system, assistant, assistant]):
        assert llama.render(chat).count(llama.turn_end[0]) == len(chat)
    for chat in ([assistant], [user, user], [user, assistant, assistant]):
        with pytest.raises(InputError, match="user, assistant, user"):
            gemma.render(chat)
    with pytest.raises(InputError, match="no system role"):
        gemma.render([user, system])


@pytest.mark.parametrize("tok", ["llama-json", "toy"], indirect=True)
def test_bad_messages(tok):
    hi = {"role": "user", "content": "hi"}
    for messages in (
        *([], None, "hi", hi, [None], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}]),
        *([hi | {"content": c}] for c in (None, 7, b"x", ["x"], [{"type": "text", "text": "x"}])),
        *([hi | {"role": r}] for r in ("tool", "model", "User", "", "user\n", "user<end_of_turn>", None, 1, ["user"])),
    ):
        with pytest.raises(InputError, match=r"^[^\n]+$"):
            tok.render(messages)
    for text in (None, b"bytes", 7, ["a"]):
        with pytest.raises(InputError):
            tok.encode(text)
    assert tok.render([hi | {"weight": 1}]) == tok.render([hi]) == tok.render((hi,))


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def everything(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["llama-original", "gemma"])
def test_save_writes_the_files_that_were_read(directories, tmp_path, name):
    source, new = tmp_path / "source", tmp_path / "new" / "deep"
    load_tokenizer(directories / name).save(source)
    (source / "tokenizer_config.json").write_bytes(b'{"chat_template":  "a {{ b }}",\r\n "x": "\xc3\xa9"}')
    (source / "special_tokens_map.json").write_bytes(b"{}")
    (source / "chat_template.jinja").write_bytes(b"the {{ jinja }}\n")
    before = everything(source)
    (source / "model.safetensors").write_bytes(b"not the tokenizer's")
    tok = load_tokenizer(str(source))
    tok.save(new)
    assert everything(new) == before
    (source / "tokenizer_config.json").write_bytes(b"older")
    (source / "special_tokens_map.json").chmod(0o444)  # the same already: not written
    tok.save(source)
    assert {k: v for k, v in everything(source).items() if k in before} == before
    assert tok.chat_template == load_tokenizer(new).chat_template == "the {{ jinja }}\n"
    (new / "chat_template.jinja").unlink()
    assert load_tokenizer(new).chat_template == "a {{ b }}"
    templates = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (new / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load_tokenizer(new).chat_template == "D"


def test_which_file_is_read(directories, tmp_path):
    """Gemma's own tokenizer.json lies next to its tokenizer.model and must not confuse."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "pre_tokenizer": None}))
    (tmp_path / "tokenizer.model").write_bytes((directories / "gemma" / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), GemmaTokenizer)
    (tmp_path / "tokenizer.model").write_bytes((directories / "llama-tiktoken" / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), Llama3Tokenizer)


def test_reset_ids(directories, tmp_path):
    toy, gemma = load_tokenizer(directories / "toy"), load_tokenizer(directories / "gemma")
    assert pieces_of(toy).id_to_piece(toy.reset_id) == "<reset>"
    unused0, unused1 = (4 + GEMMA_MARKERS.index(name) for name in ("<unused0>", "<unused1>"))
    assert gemma.reset_id == unused0
    first = load_tokenizer(directories / "llama-first")
    assert first.reset_id == first.special_tokens["<|reserved_special_token_7|>"]

    gemma.save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"reset_token_id": unused1, "vocab_size": 480}))
    tok = load_tokenizer(tmp_path)
    assert tok.reset_id == unused1 and unused1 in tok.template_ids and unused0 not in tok.template_ids
    config.write_text(json.dumps({"vocab_size": 480, "reset_token_id": None}))
    assert load_tokenizer(tmp_path).reset_id == unused0
    newline = 4 + len(GEMMA_MARKERS) + GEMMA_TEXT_PIECES.index("\n")
    values = (-1, tok.vocab_size, "7", 7.0, True, [7], tok.encode("a")[0], newline, tok.bos_id, *tok.stop_ids)
    for wrong in values:
        config.write_text(json.dumps({"reset_token_id": wrong}))
        fails(tmp_path, "config.json", "reset_token_id")
    for damaged in (b"{", b"[]", b"\xff\xfe", b""):
        config.write_bytes(damaged)
        fails(tmp_path, "config.json", "JSON")


# ── Bad input ends in one line that names the file ───────────────────────────────────────────────────────────────────


def fails(directory, *words):
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    assert all(word in message for word in words), message


def test_nothing_there(tmp_path):
    fails(tmp_path / "no-such-place", "no such directory")
    (tmp_path / "config.json").write_text("{}")
    fails(tmp_path, "tokenizer.json", "tokenizer.model")
    fails(tmp_path / "config.json", "directory")


def test_damaged_tiktoken_file(directories, tmp_path):
    good = (directories / "llama-tiktoken" / "tokenizer.model").read_bytes()
    lines = good.splitlines(keepends=True)
    file = tmp_path / "tokenizer.model"
    gap, twice, short = lines[:300] + lines[301:], [*lines, lines[5]], [good[:-4]]
    for damaged in (short, gap, twice, [good, b"!!!! 600\n"], [good, b"QUJD\n"], [good, b"\n\n"]):
        file.write_bytes(b"".join(damaged))
        fails(tmp_path, "tokenizer.model")
    file.write_bytes(b"".join(lines[:100]))
    fails(tmp_path, "tokenizer.model", "bytes")
    file.write_bytes(good.replace(b"\n", b"\r\n"))  # from a Windows checkout
    assert load_tokenizer(tmp_path).encode(TEXT) == load_tokenizer(directories / "llama-tiktoken").encode(TEXT)


def test_damaged_sentencepiece_file(directories, tmp_path):
    good = (directories / "gemma" / "tokenizer.model").read_bytes()
    for damaged in (b"", b"abc", good[:1000], good[:-1], good[1:]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        fails(tmp_path, "tokenizer.model", "download")


def test_sentencepiece_without_turns_or_bytes(directories, tmp_path):
    train_sentencepiece(tmp_path, **GEMMA | {"user_defined_symbols": ["\n", "<start_of_turn>"]})
    fails(tmp_path, "tokenizer.model", "<end_of_turn>")
    train_sentencepiece(tmp_path, **GEMMA | {"byte_fallback": False, "vocab_size": 250})
    fails(tmp_path, "tokenizer.model", "byte")
    # A marker that text could spell: a normal piece, which cannot be retyped.
    data = (directories / "gemma" / "tokenizer.model").read_bytes()
    at = data.index(b"<unused1>") + len(b"<unused1>") + 5  # past the score: the type
    assert data[at : at + 2] == b"\x18\x04"
    (tmp_path / "tokenizer.model").write_bytes(data[: at + 1] + b"\x01" + data[at + 2 :])
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
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        *(step(0, behavior="Removed"), step(0, invert=True), step(0, pattern={"String": " "}), step(0, type="Digits")),
        *(step(1, add_prefix_space=True), step(1, use_regex=True)),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(unclosed"),
        lambda spec: spec["model"].pop("merges"),
        lambda spec: spec["model"]["merges"].insert(0, ["x", "nope"]),
        lambda spec: spec["model"]["vocab"].update({"a b": 1}),  # a space is no character of the byte alphabet
        lambda spec: spec["model"]["vocab"].pop("a"),
        lambda spec: spec["added_tokens"].pop(0),
        lambda spec: spec["added_tokens"][20].update(id=5),
    ):
        fails(edit(directories, tmp_path, change), "tokenizer.json")

    def keep_five(spec):
        keep = ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS, "<|eot_id|>")
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in keep]

    fails(edit(directories, tmp_path, keep_five), "reset_token_id", "config.json")


def test_damaged_json_files(directories, tmp_path):
    good = (directories / "llama-json" / "tokenizer.json").read_bytes()
    for damaged in (b"", good[:-1], b"[1]", b"\xff\xfe\xff", b"[" * 100_000, b"{}"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        fails(tmp_path, "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(good)
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    fails(tmp_path, "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    fails(tmp_path, "chat_template.jinja")
