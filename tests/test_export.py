"""What a saved directory tells those who do not have this code: transformers, and servers that know nothing of [RESET].

The oracles are transformers' tokenizers and its generate().
"""

import json

import pytest
import torch
from models import LLAMA, network_of, prone_to, random_ids
from test_tokenizer import chats, directories

from backtrack.generate import generate
from model import load_model, load_tokenizer, save_model
from model.checkpoint import write_model

transformers = pytest.importorskip("transformers")
assert directories  # a fixture

NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
# What Llama 3.1's published template does besides: https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct
DATED = "{% set date_string = '26 Jul 2024' %}{{ '<|start_header_id|>system<|end_header_id|>' + date_string }}"


@pytest.fixture
def source(directories, tmp_path):
    """A Llama-3 base: its tokenizer has no chat template."""
    (tmp_path / "tokenizer.json").write_bytes((directories / "llama-json" / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return tmp_path


def saved(source, model=None):
    tok = load_tokenizer(source)
    model = network_of(LLAMA, vocab_size=tok.vocab_size) if model is None else model
    save_model(model, source / "saved", tokenizer=tok)
    return source / "saved"


# ── The chat template ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_that_writes_the_date_is_replaced_for_chats_were_trained_without(source):
    (source / "tokenizer_config.json").write_text(json.dumps(NAMES | {"chat_template": DATED}))
    directory = saved(source)
    tok, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for chat in chats(system=True):
        for flag in (True, False):
            ids = theirs.apply_chat_template(chat, add_generation_prompt=flag, return_dict=False)
            assert ids == tok.render(chat, add_generation_prompt=flag), chat


# ── Where servers stop ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sources_generation_config_is_merged(source):
    """Its settings stay; its ids where answers end stay, if they are special; [RESET] is one more, and the last."""
    tok = load_tokenizer(source)
    eom, text = tok.bos_id + 8, 65
    before = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [eom, tok.eos_id, text]}
    (source / "generation_config.json").write_text(json.dumps(before))
    directory = saved(source)
    after = json.loads((directory / "generation_config.json").read_text())
    stops = [*tok.stop_ids, eom, tok.reset_id]
    assert after == before | {"bos_token_id": tok.bos_id, "eos_token_id": stops}
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == stops
    again = load_tokenizer(directory)
    assert again.stop_ids == tok.stop_ids and again.reset_id == tok.reset_id  # ours: [RESET] ends nothing
    save_model(load_model(directory), source / "twice", tokenizer=again)
    assert (source / "twice" / "generation_config.json").read_bytes() == (
        directory / "generation_config.json"
    ).read_bytes()


def test_a_model_that_was_never_taught_to_reset_does_not_stop_there(source):
    tok = load_tokenizer(source)
    (source / "new").mkdir()
    write_model(network_of(LLAMA, vocab_size=tok.vocab_size), source / "new", tok)
    assert json.loads((source / "new" / "generation_config.json").read_text())["eos_token_id"] == [*tok.stop_ids]


@torch.no_grad()
def test_generate_of_transformers_stops_where_ours_resets(source):
    tok = load_tokenizer(source)
    directory = saved(source, prone_to(tok.reset_id, network_of(LLAMA, vocab_size=tok.vocab_size), times=4.0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours, tok = load_model(directory), load_tokenizer(directory)
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=40)
    prompts = random_ids(*range(3, 15), vocab=tok.vocab_size)
    answers = generate(ours, prompts, **options)
    assert 3 < sum(answer.resets for answer in answers) < len(answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        [ids] = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False).tolist()
        said = ids[len(prompt) :]
        if answer.resets:
            assert said == [*answer.discarded[0], tok.reset_id]
        else:
            assert said[: len(answer.tokens)] == answer.tokens


# ── Resets in transformers ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wavering(directories, tmp_path_factory):
    """A directory whose model says [RESET] now and then, and stops now and then."""
    source = tmp_path_factory.mktemp("wavering")
    (source / "tokenizer.json").write_bytes((directories / "llama-json" / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps(NAMES))
    tok = load_tokenizer(source)
    model = prone_to(tok.reset_id, network_of(LLAMA, vocab_size=tok.vocab_size), times=4.0)
    return saved(source, prone_to(tok.eos_id, model, times=3.0))


@pytest.mark.parametrize("options", [{}, {"max_resets": 0}, {"reset_bias": 3.0, "max_resets": 2}])
@torch.no_grad()
def test_custom_generate_resets_as_ours_does(wavering, options):
    """A batch of padded prompts, some with a forced beginning."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(wavering, dtype=torch.float32)
    ours, tok = load_model(wavering), load_tokenizer(wavering)
    prompts = random_ids(*range(3, 19), vocab=tok.vocab_size - 256)
    width, pad = max(map(len, prompts)), tok.text_end_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    for forced in (0, 2):
        out = theirs.generate(
            ids,
            attention_mask=mask,
            custom_generate=str(wavering),
            trust_remote_code=True,
            max_new_tokens=30,
            do_sample=False,
            forced=forced,
            **options,
        )
        bare = [p[: len(p) - forced] for p in prompts]
        prefill = [p[len(p) - forced :] for p in prompts]
        expected = generate(
            ours, bare, prefill=prefill, reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=30, **options
        )
        for row, (p, g) in enumerate(zip(bare, expected, strict=True)):
            answer = out[row, width - forced :].tolist()
            end = next((i for i, id in enumerate(answer) if id in tok.stop_ids), len(answer))
            assert answer[:end] == g.tokens, (p, g)
            assert out[row, width - forced - len(p) : width - forced].tolist() == p
        resets = {g.resets for g in expected}
        assert resets == {0} if options == {"max_resets": 0} else len(resets) > 1


@torch.no_grad()
def test_custom_generate_loaded_with_the_model_and_sampling(wavering):
    """Loaded with trust_remote_code, model.generate itself is ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(wavering, trust_remote_code=True, dtype=torch.float32)
    tok = load_tokenizer(wavering)
    ids = torch.tensor(random_ids(9, vocab=tok.vocab_size - 256))
    torch.manual_seed(0)
    out = model.generate(input_ids=ids, do_sample=True, num_return_sequences=40, max_new_tokens=30, max_resets=3)
    assert len(out) == 40 and tok.reset_id not in out.tolist()[0] and len({tuple(row) for row in out.tolist()}) > 30
    assert not (out == tok.reset_id).any()
    for wrong in ({"num_beams": 2}, {"streamer": object()}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="leave"):
            model.generate(ids, max_new_tokens=5, **wrong)
