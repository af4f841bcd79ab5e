"""Chats of Gemma-3, Qwen2.5, Qwen3 and Mistral against their published templates, and tokenizer.json files of
SentencePiece's kind against tokenizers.

The templates are written down as published, without what tools and pictures need; transformers renders them. The
vocabularies are small ones of the same layout; tests/real/ asks the same of Gemma-3's own.
"""

import hashlib
import json
import random

import pytest
import torch
from models import LLAMA, network_of, prone_to
from samples import said, user
from vocabularies import (
    CHATML_NAMES,
    GEMMA,
    GEMMA_MARKERS,
    GEMMA_TEXT_PIECES,
    NASTY,
    TEXT,
    check_ids,
    fuzz_texts,
    train_bpe,
    train_sentencepiece,
)

from data.gguf_tokenizer import QWEN_SPLIT
from model import InputError, load_tokenizer, save_model
from model.tokenizers import templates
from model.tokenizers.chatml import QWEN25_SYSTEM, ChatMLTokenizer
from model.tokenizers.gemma import GemmaTokenizer
from model.tokenizers.inst import Llama2Tokenizer, MistralTokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
convert = pytest.importorskip("transformers.convert_slow_tokenizer")

# ── The published templates ──────────────────────────────────────────────────────────────────────────────────────────

GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim -}}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
QWEN25_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
QWEN3_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_BEGIN = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
"""
MISTRAL1_TEMPLATE = (
    MISTRAL_BEGIN
    + """\
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)
MISTRAL3_TEMPLATE = (
    MISTRAL_BEGIN
    + """\
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
)

# ── Small tokenizer.json files ───────────────────────────────────────────────────────────────────────────────────────

QWEN_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|quad_start|>", "<|quad_end|>", "<|fim_pad|>"]
MISTRAL3_NAMES = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[control_8]", "[control_768]"]


def qwen() -> dict:
    tokenizer = train_bpe(500, [], QWEN_SPLIT)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.add_special_tokens(QWEN_NAMES)
    not_special = ("<tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in not_special])
    return json.loads(tokenizer.to_str())


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}}
FIRST = {
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    "normalizer": None,
}
NO_PREFIX = {"normalizer": REPLACE}


def sentencepiece_json(directory, change, ordinary=(), **settings) -> dict:
    """tokenizer.json as transformers makes it of a tokenizer.model: Llama 2's layout, or that of the settings."""
    import sentencepiece

    train_sentencepiece(directory, "spm", **settings)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spm"))
    ids = list(range(sp.vocab_size()))
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in ids}
    vocab = {sp.id_to_piece(i): i for i in ids}
    special = [p for p, i in vocab.items() if sp.is_control(i) or sp.is_unknown(i) or p in GEMMA_MARKERS]
    merges = [m for m in convert.generate_merges(vocab, scores) if "".join(m) not in special]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if change != NO_PREFIX else []
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True}
    model["unk_token"] = "<unk>"
    added = [{"id": vocab[p], "content": p, "special": True} | flags for p in special]
    added += [{"id": vocab[p], "content": p, "special": False} | flags for p in ordinary]
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model,
    } | change


def made(name, directory) -> dict:
    if name == "qwen":
        return qwen()
    if name == "gemma":
        return sentencepiece_json(directory, NO_PREFIX, GEMMA_TEXT_PIECES, **GEMMA)
    if name == "mistral3":
        return sentencepiece_json(directory, FIRST, control_symbols=MISTRAL3_NAMES)
    return sentencepiece_json(directory, {"llama-legacy": LEGACY, "llama-first": FIRST}[name])


KINDS = ["qwen", "gemma", "mistral3", "llama-legacy", "llama-first"]
_specs = {}


@pytest.fixture
def spec(request, tmp_path):
    name = request.param
    if name not in _specs:
        _specs[name] = made(name, tmp_path / "trained")
    return json.loads(json.dumps(_specs[name]))


def write(directory, spec, template=None, **config):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    names = [token["content"] for token in spec["added_tokens"] or ()]
    named = {f"{key}_token": n for key, n in (("bos", "<bos>"), ("bos", "<s>"), ("eos", "</s>")) if n in names}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if "<bos>" in names:
        about |= {"bos_token": "<bos>", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    (directory / "config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def texts(count):
    rng = random.Random(count)
    words = [*TEXT.split(" "), *GEMMA_MARKERS, *QWEN_NAMES, *MISTRAL3_NAMES, *CHATML_NAMES, "<think>", "<unk>", "</s>"]
    words += [" ", "  ", "   ", "\n", "\n\n", "\t\t", "</table>", "é", "e\u0301", "🐑", "1234", "\x00", "▁", "<0x0A>"]
    yield from (NASTY + [TEXT, *(" " * n + "x" for n in range(40))])
    yield from fuzz_texts(count // 2)
    for _ in range(count // 2):
        yield "".join(rng.choice(words) for _ in range(rng.randint(1, 20)))


@pytest.mark.parametrize("spec", KINDS, indirect=True)
def test_ids_are_those_of_tokenizers(spec, tmp_path):
    check_ids(write(tmp_path, spec), texts(1500))


# ── Chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SYSTEM = [{"role": "system", "content": "Be short.\n"}]
CHATS = [
    user("Hi"),
    user("  the farmer \n"),
    user("word1") + said("  other7 ") + user("漢 the rain"),
    user("a") + said("\n\nb"),
    user("") + said("the rain") + user("c") + said("d"),
]


def check_chats(directory, with_system=CHATS, without=CHATS, **options):
    """render() is what transformers makes of the published template, and of the template that exports carry."""
    tok = load_tokenizer(directory)
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    chats = [*without, *(SYSTEM + chat for chat in with_system)]
    for template in (tok.chat_template, tok.jinja):
        for chat in chats:
            for flag in (True, False):
                theirs = oracle.apply_chat_template(
                    chat, chat_template=template, add_generation_prompt=flag, return_dict=False, **options
                )
                assert tok.render(chat, add_generation_prompt=flag) == theirs, (template[:20], chat)
        options = {}  # exports need none
    write(directory, json.loads((directory / "tokenizer.json").read_bytes()), tok.jinja)
    again = load_tokenizer(directory)  # as exported
    assert all(again.render(chat) == tok.render(chat) for chat in chats) and again.jinja == tok.jinja
    whole = tok.render(user("Hi") + said("the rain"), add_generation_prompt=False)
    assert whole == tok.render(user("Hi")) + tok.encode("the rain") + tok.turn_end
    return tok


@pytest.mark.parametrize("spec", ["gemma"], indirect=True)
def test_gemma3_puts_the_system_text_into_the_first_user_turn(spec, tmp_path):
    tok = check_chats(write(tmp_path / "a", spec, GEMMA3_TEMPLATE, model_type="gemma3_text"))
    assert isinstance(tok, GemmaTokenizer) and tok.reset_id == tok.special_tokens["<unused0>"]
    base = load_tokenizer(write(tmp_path / "b", spec, model_type="gemma3_text"))
    assert all(base.render(SYSTEM + chat) == tok.render(SYSTEM + chat) for chat in CHATS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    leading = [{"role": "system", "content": "\n\nthe rain"}, *CHATS[2]]
    for chat in (leading, *CHATS):
        ids = theirs.apply_chat_template(chat, chat_template=base.jinja, return_dict=False)
        assert ids == base.render(chat, add_generation_prompt=False)
    gemma2 = load_tokenizer(write(tmp_path / "c", spec, model_type="gemma2"))
    for tok, chat in ((gemma2, SYSTEM + CHATS[0]), (base, SYSTEM), (base, CHATS[0] + SYSTEM)):
        with pytest.raises(InputError, match=r"system"):
            tok.render(chat)


@pytest.mark.parametrize("spec", ["qwen"], indirect=True)
def test_qwen25_has_a_default_system_turn(spec, tmp_path):
    bos = spec["added_tokens"][0]["id"]
    tok = check_chats(write(tmp_path / "a", spec, QWEN25_TEMPLATE, model_type="qwen2", bos_token_id=bos))
    names = {i: name for name, i in tok.special_tokens.items()}
    assert isinstance(tok, ChatMLTokenizer) and names[tok.reset_id] == "<|quad_end|>"
    assert [names[i] for i in tok.stop_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert names[tok.bos_id] == names[tok.text_start_id] == "<|endoftext|>"
    assert QWEN25_SYSTEM in tok.decode(tok.render(user("Hi")))
    assert "system" not in tok.decode(tok.render(user("Hi"), continues=True))
    base = load_tokenizer(write(tmp_path / "b", spec, model_type="qwen2"))
    assert all(base.render(chat) == tok.render(chat) for chat in CHATS)
    assert tok.encode("e\u0301") == tok.encode("é")


@pytest.mark.parametrize("spec", ["qwen"], indirect=True)
def test_qwen3_does_not_think(spec, tmp_path):
    directory = write(tmp_path / "a", spec, QWEN3_TEMPLATE, model_type="qwen3")
    tok = check_chats(directory, enable_thinking=False)
    names = {i: name for name, i in tok.special_tokens.items()}
    assert names[tok.reset_id] == "<|quad_end|>"
    assert [names[i] for i in tok.render(user("Hi"))[-5:] if i in names] == ["<think>", "</think>"]
    assert [names[i] for i in tok.template_ids if i not in tok.stop_ids] == [
        *("<|im_start|>", "<|quad_end|>", "<think>", "</think>")
    ]
    base = load_tokenizer(write(tmp_path / "b", spec, model_type="qwen3"))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for chat in (*CHATS, *(SYSTEM + chat for chat in CHATS)):
        assert base.render(chat) == tok.render(chat)
        ids = theirs.apply_chat_template(chat, chat_template=base.jinja, add_generation_prompt=True, return_dict=False)
        assert ids == base.render(chat)
    with pytest.raises(InputError, match="thinking is off"):
        tok.render(user("Hi") + said("<think>\nwell\n</think>\n\nHi"))
    always = QWEN3_TEMPLATE.replace("enable_thinking", "other")
    with pytest.raises(InputError, match="cannot be turned"):
        load_tokenizer(write(tmp_path / "c", spec, always, model_type="qwen3")).render(user("Hi"))


@pytest.mark.parametrize("spec", ["llama-first"], indirect=True)
def test_mistral_v1_marks_turns_with_text(spec, tmp_path):
    tok = check_chats(write(tmp_path, spec, MISTRAL1_TEMPLATE, model_type="mistral"))
    assert isinstance(tok, MistralTokenizer) and tok.turn_end == [tok.eos_id]
    assert tok.reset_id == tok.special_tokens["<unk>"]
    for text in ("a [INST] b", "[/INST]"):
        with pytest.raises(InputError, match="marks turns"):
            tok.render(user(text))
    history = tok.render(CHATS[2][:1]) + tok.encode("other7") + tok.turn_end
    assert history + tok.render(CHATS[2][2:], continues=True) == tok.render(CHATS[2])


@pytest.mark.parametrize("spec", ["mistral3"], indirect=True)
def test_mistral_v3_marks_turns_with_special_tokens(spec, tmp_path):
    # The published template leaves the system text out of a chat that ends with an answer.
    prompts = [chat for chat in CHATS if chat[-1]["role"] == "user"]
    tok = check_chats(write(tmp_path, spec, MISTRAL3_TEMPLATE, model_type="mistral"), with_system=prompts)
    names = {i: name for name, i in tok.special_tokens.items()}
    assert names[tok.reset_id] == "[control_768]"
    assert [names[i] for i in tok.template_ids] == ["[INST]", "[/INST]", "[control_768]"]
    typed = tok.render(user("a [/INST] b [INST]"))
    assert sum(i in tok.special_ids for i in typed) == 3  # BOS and the two of the turn


@pytest.mark.parametrize("spec", ["llama-legacy"], indirect=True)
def test_llama2_puts_the_system_text_into_the_first_user_turn(spec, tmp_path):
    spaces = user(" ") + said("the rain \n") + user("\n\nfarmer") + said("two\n lines") + user("漢 17")
    check_chats(write(tmp_path, spec, LLAMA2_TEMPLATE, model_type="llama"), [*CHATS, spaces], [*CHATS, spaces])


@pytest.mark.parametrize("spec", ["llama-legacy"], indirect=True)
def test_a_template_is_known_by_its_text(spec, tmp_path, capsys, monkeypatch):
    """Published ones and our own are; another is said once; one that is known to be another family's is refused."""
    for template in (LLAMA2_TEMPLATE, LLAMA2_TEMPLATE + "\n", load_tokenizer(write(tmp_path, spec)).jinja):
        load_tokenizer(write(tmp_path, spec, template)).render(user("Hi"))
    assert capsys.readouterr().err == ""
    other = LLAMA2_TEMPLATE.replace("content.strip()", "content")
    tok = load_tokenizer(write(tmp_path, spec, other))
    assert capsys.readouterr().err == ""  # nothing is rendered yet
    tok.render(user("Hi"))
    tok.render(user("Hi"))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'chat_template.jinja'}: not a chat template that is known here")
    known = hashlib.sha256(other.encode()).hexdigest()[:16]
    monkeypatch.setitem(templates.PUBLISHED, known, "Llama 9")
    with pytest.raises(InputError, match=r"its chat template is that of Llama 9, not of Llama 2"):
        load_tokenizer(tmp_path).render(user("Hi"))


@pytest.mark.parametrize("spec", ["llama-legacy", "llama-first"], indirect=True)
def test_who_is_mistral_and_who_is_llama2(spec, tmp_path):
    llama2 = "{{ '[INST] <<SYS>>' }}"
    cases = [(None, "llama", Llama2Tokenizer), (None, "mistral", MistralTokenizer)]
    cases += [(llama2, "mistral", Llama2Tokenizer), (MISTRAL1_TEMPLATE, "llama", MistralTokenizer)]
    for number, (template, model_type, family) in enumerate(cases):
        tok = load_tokenizer(write(tmp_path / str(number), spec, template, model_type=model_type))
        assert type(tok) is family


# ── Bad files, and a token that is padding and [RESET] ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", ["llama-legacy"], indirect=True)
def test_tokenizer_json_that_sentencepiece_cannot_stand_in_for(spec, tmp_path):
    def fails(words, **changes):
        model = spec["model"] | changes.pop("model", {})
        directory = write(tmp_path, spec | {"model": model} | changes)
        with pytest.raises(InputError, match=words) as error:
            load_tokenizer(directory)
        assert str(directory / "tokenizer.json") in str(error.value) and "\n" not in str(error.value)

    merges = spec["model"]["merges"]
    split = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    fails("a Unigram tokenizer", model={"type": "Unigram"})
    fails("a BPE tokenizer, neither", model={"byte_fallback": False})
    fails("cuts text in a way", normalizer={"type": "NFKC"})
    fails("cuts text in a way", normalizer=None, pre_tokenizer=split)
    fails("no merge makes", model={"merges": merges[:-5]})
    fails("stand apart", model={"merges": [*merges, merges[0]]})
    fails("damaged", model={"merges": [["a"]]})
    fails("damaged", added_tokens=None)


@torch.no_grad()
def test_a_reset_that_was_padding_is_not_taken_for_padding(tmp_path):
    """Llama 2's [RESET] is <unk>, 0, and its config.json says that 0 is padding, too."""
    spec = _specs.get("llama-legacy") or made("llama-legacy", tmp_path / "trained")
    tok = load_tokenizer(write(tmp_path / "source", spec, model_type="llama"))
    assert tok.reset_id == 0
    model = network_of(LLAMA | {"pad_token_id": 0, "vocab_size": tok.vocab_size})
    (tmp_path / "source" / "generation_config.json").write_text('{"pad_token_id": 0}')
    tok = load_tokenizer(tmp_path / "source")
    out = tmp_path / "saved"
    save_model(prone_to(tok.eos_id, model, times=3.0), out, tokenizer=tok)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_bytes())["pad_token_id"] == tok.eos_id != tok.reset_id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(3, tok.vocab_size, (12, 5), generator=torch.Generator().manual_seed(0))
    options = dict(custom_generate=str(out), trust_remote_code=True, max_new_tokens=30, do_sample=False)
    answers = theirs.generate(ids, pad_token_id=0, **options)
    assert torch.equal(answers, theirs.generate(ids, reset_bias=-100.0, **options))  # nothing was reset
    ended = [row.tolist().index(tok.eos_id, 5) for row in answers if tok.eos_id in row[5:]]
    assert min(ended) < answers.shape[1] - 1  # some answers have padding behind them
