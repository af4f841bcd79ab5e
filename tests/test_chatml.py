"""ChatML and byte-level BPE with single digits (SmolLM2), against tokenizers and transformers.

The vocabularies are small and trained in vocabularies.py. tests/real/ asks the same of SmolLM2's own.
"""

import json
import random

import pytest
from vocabularies import CHATML_NAMES, MISSING, NASTY, TEXT, check_ids, fuzz_texts, trained

from model import InputError, load_tokenizer
from model.tokenizers.chatml import ChatMLTokenizer
from model.tokenizers.llama3 import Llama3Tokenizer

transformers = pytest.importorskip("transformers")

END_OF_TEXT, START, END, EMPTY_OUTPUT, REPO_NAME = range(5)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# As published with SmolLM2-Instruct.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN_TEMPLATE
INSTRUCT = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def with_shuffled_ids(spec):
    """The same tokens and merges under other ids, which then say nothing about the merges."""
    ids = list(range(len(spec["model"]["vocab"])))
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"] = {text: ids[i] for text, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = ids[token["id"]]


def write(directory, spec, config=INSTRUCT, template=TEMPLATE):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    if config is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def edited(spec, change):
    spec = json.loads(json.dumps(spec))
    change(spec)
    return spec


@pytest.fixture(scope="module")
def spec():
    return trained(MISSING)


@pytest.fixture(scope="module", params=["missing bytes", "shuffled ids"])
def directory(request, tmp_path_factory, spec):
    made = {"missing bytes": spec, "shuffled ids": edited(trained(), with_shuffled_ids)}
    return write(tmp_path_factory.mktemp("chatml"), made[request.param])


@pytest.fixture(scope="module")
def tok(directory):
    return load_tokenizer(directory)


def theirs(directory, chat, prompt=True):
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    return oracle.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


TEXTS = [*NASTY, TEXT, *fuzz_texts(400)]


def test_ids_are_those_of_tokenizers(directory):
    check_ids(directory, TEXTS)


def test_ids_of_gpt2_without_digits(spec, tmp_path):
    """The same without the Digits step: digits stay together, with the space before them."""
    gpt2 = edited(spec, lambda s: s.update(pre_tokenizer=s["pre_tokenizer"]["pretokenizers"][1]))
    check_ids(write(tmp_path, gpt2), TEXTS)


def test_missing_bytes_are_dropped_from_their_word(spec, tmp_path):
    tok = load_tokenizer(write(tmp_path, spec))
    assert tok.encode("!\x04!") == tok.encode("!!") and len(tok.encode("!!")) == 1
    assert tok.decode(tok.encode("a\x04b c\x13\x06")) == "ab c"
    assert tok.encode("\x04") == tok.encode("\x04\x13") == []
    assert tok.encode("a \x04b") == [*tok.encode("a"), *tok.encode(" "), *tok.encode("b")]
    # The first byte of four is missing; what is left is no UTF-8.
    assert tok.decode(tok.encode("a\U00040000b")) == "a\ufffd\ufffd\ufffdb"
    huge = "\x04" * 500_000 + "word 1 " * 50_000
    assert tok.decode(tok.encode(huge)) == huge.replace("\x04", "")


def test_no_text_yields_a_special_id(directory, tok):
    vocab = json.loads((directory / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert tok.special_ids == {vocab[name] for name in CHATML_NAMES}
    for text in ("".join(CHATML_NAMES), " ".join(CHATML_NAMES), "<|im_\x04start|>", "<|im_end|>\n" * 3, *vocab):
        ids = tok.encode(text)
        assert tok.special_ids.isdisjoint(ids), text
        assert tok.decode(ids) == text.replace("\x04", "" if tok._text.missing_bytes else "\x04")
    ids = tok.render(turns("a<|im_end|>\n<|im_start|>assistant\nSure<empty_output>"))
    assert ids.count(tok.eos_id) == 2 and tok.reset_id not in ids  # system turn, user turn
    assert tok.decode([*sorted(tok.special_ids), *tok.encode("sheep"), tok.eos_id]) == "sheep"


# ── Chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    chat = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + chat


CHATS = [
    turns("Hi"),
    turns("Hi", system="Be short."),
    turns("How many sheep?", "There are 17.", "And now?"),
    turns("How many sheep?", "There are 17.", system=""),
    turns("  spaces around \n", "\n\n", "12", "  1", system=" \n x"),
    turns("", "", "🐑\x04 !\x04!"),
    [{"role": "assistant", "content": "I begin."}, {"role": "system", "content": "late"}],
]


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_chats_are_the_template(directory, tmp_path, template, capsys):
    write(tmp_path, json.loads((directory / "tokenizer.json").read_bytes()), template=template)
    tok = load_tokenizer(tmp_path)
    for chat in CHATS:
        for prompt in (True, False):
            assert tok.render(chat, add_generation_prompt=prompt) == theirs(tmp_path, chat, prompt), chat
    assert ("not a chat template" in capsys.readouterr().err) == (template == PLAIN_TEMPLATE)  # SmolLM2's is known


def test_without_a_template_smollm2s_system_turn_comes_first(spec, tmp_path):
    """In what is rendered, and in the template that exports carry."""
    with_template = load_tokenizer(write(tmp_path / "with", spec))
    without = load_tokenizer(write(tmp_path / "without", spec, template=None))
    write(tmp_path / "export", spec, template=without.jinja)
    for chat in CHATS:
        assert without.render(chat) == with_template.render(chat) == theirs(tmp_path / "export", chat)


def test_prompt_answer_and_turn_end_are_the_chat(tok):
    """What sample.py builds turn by turn is what the template makes of the whole chat."""
    whole = tok.render(turns("Hi", "Hello 1.", "How many?", "17", "Bye"))
    ids = tok.render(turns("Hi")) + tok.encode("Hello 1.") + tok.turn_end
    ids += tok.render(turns("How many?"), continues=True) + tok.encode("17") + tok.turn_end
    assert ids + tok.render(turns("Bye"), continues=True) == whole


def test_a_template_with_bos(spec, tmp_path):
    write(tmp_path, spec, INSTRUCT | {"bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}, WITH_BOS)
    tok = load_tokenizer(tmp_path)
    assert all(tok.render(chat) == theirs(tmp_path, chat) for chat in CHATS)
    assert tok.render(turns("Hi"))[0] == tok.bos_id == END_OF_TEXT
    assert tok.render(turns("Hi"), continues=True)[0] == START


def test_an_unknown_default_system_turn_is_an_error(spec, tmp_path):
    other = TEMPLATE.replace(SYSTEM, "You are somebody else.")
    tok = load_tokenizer(write(tmp_path, spec, template=other))
    with pytest.raises(InputError, match="begin the chat with a system message"):
        tok.render(turns("Hi"))
    assert tok.render(turns("Hi", system="x")) and tok.render(turns("Hi"), continues=True)


def llama3_with_chatml(spec):
    """Llama-3's way to cut text, its special tokens and ChatML's."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eot_id|>", "<|reserved_special_token_250|>", "<|im_start|>", "<|im_end|>"]
    size = len(spec["model"]["vocab"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [{"id": size + i, "content": name, "special": True} | flags for i, name in enumerate(names)]
    pattern = {"Regex": r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = spec["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": False}
    spec["pre_tokenizer"]["pretokenizers"] = [split, byte_level]


def test_llama3_with_chatml_is_chatml(tmp_path):
    spec = edited(trained(special=[]), llama3_with_chatml)
    write(tmp_path, spec, {"bos_token": "<|begin_of_text|>"}, WITH_BOS)
    tok = load_tokenizer(tmp_path)
    assert isinstance(tok, ChatMLTokenizer)
    assert all(tok.render(chat) == theirs(tmp_path, chat) for chat in CHATS)
    names = {i: name for name, i in tok.special_tokens.items()}
    assert names[tok.text_end_id] == "<|end_of_text|>" and names[tok.eos_id] == "<|im_end|>"
    assert names[tok.bos_id] == names[tok.text_start_id] == "<|begin_of_text|>"


def test_a_foreign_template_is_not_rendered_with_our_headers(spec, tmp_path):
    headers = "{% for m in messages %}<|start_header_id|>{{ m.role }}{% endfor %}"
    chatml = load_tokenizer(write(tmp_path / "chatml", spec, template=headers))
    without = edited(trained(special=[]), llama3_with_chatml)
    without["added_tokens"] = without["added_tokens"][:6]
    llama = load_tokenizer(write(tmp_path / "llama", without, template=PLAIN_TEMPLATE))
    assert isinstance(llama, Llama3Tokenizer)
    for tok, marker in ((chatml, "<|im_start|>"), (llama, "<|start_header_id|>")):
        with pytest.raises(InputError, match=r"chat template has no .*" + marker.strip("<|>")):
            tok.render(turns("Hi"))
        assert tok.decode(tok.encode("Hi")) == "Hi"


# ── Ids and files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_named_ids(spec, tmp_path):
    tok = load_tokenizer(write(tmp_path, spec))
    assert (tok.bos_id, tok.eos_id, tok.text_end_id) == (START, END, END_OF_TEXT)
    assert tok.text_start_id == END_OF_TEXT  # <|im_start|> never stood before a plain text
    assert tok.stop_ids == (END_OF_TEXT, END) and tok.turn_end == [END, *tok.encode("\n")]
    assert tok.reset_id == EMPTY_OUTPUT and tok.template_ids == [START, END, EMPTY_OUTPUT]
    assert tok.special_tokens == {name: i for i, name in enumerate(CHATML_NAMES)}
    assert tok.vocab_size == len(spec["model"]["vocab"]) and tok.chat_template == TEMPLATE
    assert load_tokenizer(write(tmp_path, spec, {"bos_token": ["x"]})).bos_id == START
    base = load_tokenizer(write(tmp_path / "base", spec, {"bos_token": "<|endoftext|>"}))
    assert base.bos_id == base.text_start_id == END_OF_TEXT
    assert base.render(turns("Hi"))[0] == START


def test_reset_id(spec, tmp_path):
    def without_empty_output(spec):
        spec["added_tokens"].pop(EMPTY_OUTPUT)
        del spec["model"]["vocab"]["<empty_output>"]

    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, edited(spec, without_empty_output))
    assert load_tokenizer(tmp_path).reset_id == REPO_NAME


def pre_tokenizers(change):
    return lambda spec: change(spec["pre_tokenizer"]["pretokenizers"])


def without_end_of_text(spec):
    spec["added_tokens"][0]["content"] = "<end>"
    spec["model"]["vocab"]["<end>"] = spec["model"]["vocab"].pop("<|endoftext|>")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pre_tokenizers(lambda steps: steps[0].update(individual_digits=False)), "cuts text in a way not known"),
        (lambda spec: spec["model"]["vocab"].update(qqqq=1000), "no merge makes the token .* order"),
        (without_end_of_text, r"no special token <\|endoftext\|>"),
    ],
)
def test_what_is_not_known_is_refused(spec, tmp_path, change, words):
    with pytest.raises(InputError, match=r"tokenizer\.json: " + words):
        load_tokenizer(write(tmp_path, edited(spec, change)))
