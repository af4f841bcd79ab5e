"""SmolLM2-135M-Instruct itself, in the directory that data/smollm2.py writes, against transformers
and tokenizers on the same directory.

    make test-real        # or: SMOLLM2=DIR python -m pytest -m real

The directory is runs/smollm2 unless SMOLLM2 names another; without it the tests are skipped.
"""

import json
import random

import pytest
import torch
from real import CLOSE, conversations, model_in, some_texts
from samples import user
from vocabularies import check_ids

from backtrack.generate import generate
from model import load_model, load_tokenizer, save_model

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

DIRECTORY, pytestmark = model_in("SMOLLM2", "runs/smollm2", "python -m data.smollm2 --out runs/smollm2")


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return load_model(DIRECTORY)


@pytest.fixture(scope="module")
def their_model():
    return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tok():
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


# ── The network ───────────────────────────────────────────────────────────────────────────────────


def test_all_logits_are_those_of_transformers(model, their_model, tok):
    prompts = [
        tok.render(user("What is the capital of France?")),
        tok.render(user("Write a poem about the sea and a 12 year old dog.")),
        tok.encode("The quick brown fox jumps over the lazy dog. " * 20),
        random.Random(0).choices(range(tok.vocab_size), k=300),
    ]
    for ids in prompts:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ours, theirs = model(tokens), their_model(tokens).logits
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)


def test_greedy_text_is_that_of_transformers(model, their_model, tok):
    prompt = tok.render(user("Tell me a long story about a lighthouse."))
    [answer] = generate(model, [prompt], reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=100)
    theirs = their_model.generate(
        torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=[*tok.stop_ids]
    )
    assert len(answer.tokens) == 100 and answer.resets == 0
    assert prompt + answer.tokens == theirs[0].tolist()


def test_it_knows_the_capital_of_france(model, tok):
    prompt = tok.render(user("What is the capital of France?"))
    options = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "max_new_tokens": 20}
    [answer] = generate(model, [prompt], **options)
    assert tok.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


def test_what_save_model_writes_loads_in_transformers(model, their_model, tok, tmp_path):
    save_model(model, tmp_path, tokenizer=tok)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, ours), theirs in zip(again.named_parameters(), their_model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = user("How many  12 sheep?")
    ids = their_tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tok.render(chat) == load_tokenizer(tmp_path).render(chat)
    # Servers stop at these, and at BOS nothing changes: it is the published one.
    assert again.generation_config.eos_token_id == [*tok.stop_ids, tok.reset_id]
    assert again.config.bos_token_id == tok.bos_id == their_tok.bos_token_id
    assert load_model(tmp_path).config.reset_token_id == tok.reset_id


def test_a_bf16_directory_as_published_loads_the_same_way(their_model, tmp_path):
    """Tied and in bf16, as transformers writes it, which is how SmolLM2 was published."""
    transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ours = dict(load_model(tmp_path).named_parameters())
    for name, weight in their_model.named_parameters():
        assert torch.equal(ours[name], weight.to(torch.bfloat16).float()), name


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


def test_ids_are_those_of_tokenizers():
    check_ids(DIRECTORY, some_texts())


def test_the_text_of_a_token_is_that_token(tok):
    """tiktoken merges by rank, tokenizers by the list of merges: the same if this holds."""
    spec = json.loads((DIRECTORY / "tokenizer.json").read_bytes())
    words = {"pre_tokenizer": None, "decoder": None, "added_tokens": []}
    oracle = tokenizers.Tokenizer.from_str(json.dumps(spec | words))
    vocab = {text: i for text, i in spec["model"]["vocab"].items() if i not in tok.special_ids}
    for (text, i), encoding in zip(vocab.items(), oracle.encode_batch(list(vocab)), strict=True):
        assert encoding.ids == [i], text


def test_21_bytes_are_missing(tok):
    missing = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")
    assert tok._text.missing_bytes == missing
    assert tok.encode("!\x04!") == tok.encode("!!") and tok.encode("\x1d") == []


# ── Chats ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompt", [True, False])
def test_20_chats_are_the_template(tok, their_tok, prompt):
    for chat in conversations():
        theirs = their_tok.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert tok.render(chat, add_generation_prompt=prompt) == theirs, chat


def test_named_ids(tok, their_tok):
    names = their_tok.convert_ids_to_tokens
    assert names([tok.bos_id, tok.eos_id, tok.text_end_id, tok.text_start_id, tok.reset_id]) == [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|endoftext|>",
        "<empty_output>",
    ]
    assert tok.special_ids == set(range(17)) and tok.vocab_size == 49_152
    assert tok.template_ids == [1, 2, 16]


# ── Rows that were never trained ──────────────────────────────────────────────────────────────────


def test_spare_rows_lie_in_one_place(model, tok):
    """DESIGN's numbers, which tell an untrained row from a trained one."""
    rows = model.model.embed_tokens.weight.detach()
    distance = (rows - rows[tok.reset_id]).norm(dim=1)
    special = {name: distance[i].item() for name, i in tok.special_tokens.items()}
    trained = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
    trained += ["<filename>"]
    for name, d in special.items():
        assert (d > 0.39) if name in trained else (d < 0.0085), name
    assert special["<|im_start|>"] == pytest.approx(0.395, abs=0.001)
    assert special["<|im_end|>"] == pytest.approx(0.463, abs=0.001)
    ordinary = distance[len(special) :]
    assert 2.4 < ordinary.quantile(0.01) < ordinary.quantile(0.99) < 4.2
