"""Every family against transformers (eager attention, same files), and a tree of tokens against each branch by itself.

Checkpoints are random, tiny and written by transformers. Their weights are large, so that attention is far from
uniform, and every setting in them bites: switching it off in a copy of the model moves the logits by DIFFERENT or
more, where agreement means CLOSE. The cache has more tests in method/test_cache.py.
"""

import dataclasses
import functools
import json
import random

import models
import pytest
import torch
import torch.nn.functional as F
from models import network_of, randomize

import model.transformer as transformer_module
from model import InputError, KVCache, ModelConfig, Transformer, load_model, save_model
from model.linear import Linear
from model.transformer import RMSNorm, attend

CLOSE = 1e-4
DIFFERENT = 0.05
V = 67

SIZES = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=72,
    num_attention_heads=6,
    head_dim=16,  # not 48 / 6
    max_position_embeddings=512,
    rms_norm_eps=0.02,  # large enough to see
    rope_theta=500.0,
)
LLAMA = models.LLAMA | SIZES | dict(num_hidden_layers=3, tie_word_embeddings=False)
GEMMA = models.GEMMA | SIZES | dict(num_hidden_layers=4)
GEMMA |= dict(query_pre_attn_scalar=5, attn_logit_softcapping=8.0, final_logit_softcapping=4.0, sliding_window=11)
GEMMA3 = models.GEMMA3 | SIZES | dict(num_hidden_layers=7, sliding_window_pattern=6, rope_local_base_freq=100.0)
GEMMA3 |= dict(query_pre_attn_scalar=5, sliding_window=11)


def stretched(factor):
    """Llama 3.1's scaling with an original context of 32. Of the 8 pairs some are left alone, some blended."""
    bounds = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    return dict(rope_type="llama3", rope_theta=100.0, factor=factor) | bounds


SMALL_HEADS = dict(head_dim=8)  # Qwen2 has no head_dim of its own
CASES = {
    "llama": LLAMA,
    "llama-tied": LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=3),
    "llama-3.1": LLAMA | dict(rope_parameters=stretched(8.0)),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=11),
    "mistral-global": LLAMA | dict(model_type="mistral", sliding_window=None, tie_word_embeddings=True),
    "qwen2": LLAMA | SMALL_HEADS | dict(model_type="qwen2"),
    "qwen2-window": LLAMA
    | SMALL_HEADS
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": LLAMA | dict(model_type="qwen3", tie_word_embeddings=True),
    "gemma2": GEMMA,
    "gemma2-caps": GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),  # the published caps
    "gemma2-layers": GEMMA | dict(layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2),
    "gemma3": GEMMA3,  # layer 5 of 0 … 6 is global
    "gemma3-untied": GEMMA3
    | dict(tie_word_embeddings=False, num_hidden_layers=4, sliding_window_pattern=2)
    | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),  # as from 4B on
}
ONE_EACH = ["llama-3.1", "mistral", "qwen2-window", "qwen3", "gemma2", "gemma3", "gemma3-untied"]
LENGTH = 90  # beyond the windows of 11 and Llama 3.1's original context of 32


def transformers_model(directory, fields):
    """A random model of transformers, saved to `directory`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    spread = 0.9 if fields.get("final_logit_softcapping") == 30.0 else 0.3  # so as to exceed even the published caps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, spread * (1.5 if "q_proj" in name or "k_proj" in name else 1.0), generator=generator)
            elif name.endswith("bias"):
                p.normal_(0.0, 1.0, generator=generator)
            else:  # norms: gains around 1, whatever the family stores, and 2 where Gemma norms what a block adds
                gain = 2.0 if "post_" in name else 1.0
                p.normal_(gain - fields["model_type"].startswith("gemma"), 0.3, generator=generator)
    theirs.save_pretrained(directory)
    return theirs


def variant(ours, **changes):
    """The same weights under another configuration."""
    model = Transformer(dataclasses.replace(ours.config, **changes)).eval()
    model.load_state_dict(ours.state_dict(), strict=False)  # without post norms or biases theirs stay behind
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return (a.float() - b.float()).abs().max().item()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> (directory, transformers' model, ours), each made once."""

    @functools.cache
    def get(name):
        directory = tmp_path_factory.mktemp(name)
        return directory, transformers_model(directory, CASES[name]), load_model(directory)

    return get


# ── Logits, against transformers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(checkpoints, name):
    _, theirs, ours = checkpoints(name)
    tokens = random_tokens(2, LENGTH)
    expected = theirs(tokens).logits
    logits = ours(tokens)
    assert logits.shape == (2, LENGTH, V) and logits.dtype == torch.float32
    assert distance(logits, expected) < CLOSE
    assert distance(ours(tokens[:, :1]), expected[:, :1]) < CLOSE  # a single token takes another path
    assert expected.std() > 1.0  # far above CLOSE, and no two positions alike
    assert torch.pdist(expected[0]).min() > 1.0


OFF = [
    ("llama", dict(rope_theta=10000.0)),
    ("llama", dict(hidden_act="gelu_pytorch_tanh")),
    ("llama-3.1", dict(rope_scaling=None)),
    ("mistral", dict(sliding_window=12)),
    ("qwen2", dict(qkv_bias=False)),
    ("qwen2-window", dict(local_layers=(True, True, True))),
    ("qwen3", dict(qk_norm=False)),
    ("gemma3", dict(qk_norm=False)),
    ("gemma3", dict(rope_local_theta=None)),
    ("gemma3", dict(local_layers=(True,) * 7)),
    ("gemma3-untied", dict(rope_scaling=None)),
    ("gemma2", dict(attn_logit_softcapping=None)),
    ("gemma2", dict(final_logit_softcapping=None)),
    ("gemma2-caps", dict(attn_logit_softcapping=None)),
    ("gemma2-caps", dict(final_logit_softcapping=None)),
    ("gemma2", dict(sliding_window=12)),
    ("gemma2", dict(local_layers=(False, True, False, True))),
    ("gemma2", dict(query_pre_attn_scalar=None)),
    ("gemma2", dict(norm_plus_one=False)),
    ("gemma2", dict(scale_embeddings=False)),
    ("gemma2", dict(post_norms=False)),
]


@pytest.mark.parametrize("name", dict(OFF))
@torch.no_grad()
def test_every_setting_bites(checkpoints, name):
    """So that the agreement above says something about each of them."""
    ours, tokens = checkpoints(name)[2], random_tokens(2, LENGTH)
    logits = ours(tokens)
    assert torch.equal(variant(ours)(tokens), logits)  # the copy itself changes nothing
    for changes in (changes for other, changes in OFF if other == name):
        assert distance(variant(ours, **changes)(tokens), logits) > DIFFERENT, changes


@pytest.mark.parametrize("name", [*ONE_EACH, "mistral-global", "gemma2-layers"])
@torch.no_grad()
def test_both_dialects_of_config_json(checkpoints, tmp_path, name):
    """transformers 5 writes `rope_parameters` and `layer_types`; we write the older words besides, as published files
    have them. Each way the numbers are the same, and transformers reads ours."""
    transformers = pytest.importorskip("transformers")
    directory, theirs, ours = checkpoints(name)
    assert "rope_parameters" in json.loads((directory / "config.json").read_text())
    save_model(ours, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" not in raw and ModelConfig.from_hf(raw) == ours.config
    if name != "gemma2-layers":  # which has no older words
        assert ModelConfig.from_hf({k: v for k, v in raw.items() if k != "layer_types"}) == ours.config
    if raw["rope_scaling"]:  # which could also say "type"
        raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")
        assert ModelConfig.from_hf(raw) == ours.config
    tokens = random_tokens(1, LENGTH)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_sparse_configs_mean_what_transformers_takes_them_to_mean(checkpoints, tmp_path, name):
    """Early files leave fields out: Llama 1 and 2 all that grouped heads brought, Gemma-2 its layer types."""
    transformers = pytest.importorskip("transformers")
    directory, ours = tmp_path / "full", None
    directory.mkdir()
    transformers_model(directory, CASES[name] | dict(head_dim=8, num_key_value_heads=6))
    raw = json.loads((directory / "config.json").read_text())
    optional = ["rope_parameters", "tie_word_embeddings", "attention_bias", "use_cache"]
    optional += ["num_key_value_heads", "head_dim", "mlp_bias", "hidden_act"] if name != "gemma2" else ["layer_types"]
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in optional}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    ours = load_model(directory)
    tokens = random_tokens(1, LENGTH)
    assert distance(ours(tokens), theirs(tokens).logits) < CLOSE
    assert ours.config.rope_theta == 10000.0


@pytest.mark.parametrize("name", ["llama-3.1", "gemma3"])
@torch.no_grad()
def test_bfloat16(checkpoints, name):
    """In bf16 we differ from transformers less than transformers differs from itself in fp32."""
    transformers = pytest.importorskip("transformers")
    directory, exact, _ = checkpoints(name)
    options = dict(dtype=torch.bfloat16, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    ours = load_model(directory, dtype=torch.bfloat16)
    tokens = random_tokens(2, LENGTH, seed=1)
    logits, rounded, expected = ours(tokens), theirs(tokens).logits.float(), exact(tokens).logits
    assert logits.dtype == torch.float32
    noise = (rounded - expected).pow(2).mean().sqrt()
    assert 0 < noise < 0.2 * expected.std()
    assert (logits - rounded).pow(2).mean().sqrt() < noise
    assert (logits - expected).pow(2).mean().sqrt() < 1.2 * noise


@torch.no_grad()
def test_gemma_embedding_scale_is_rounded_to_the_models_dtype():
    """At this width rounding sqrt(D) is visible in bf16. The first block gets what test_bfloat16 compares."""
    model = network_of(GEMMA, hidden_size=78, num_hidden_layers=1).to(torch.bfloat16)
    entered = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(torch.arange(V)[None])
    embedded = model.model.embed_tokens(torch.arange(V)[None])
    assert torch.equal(entered[0], embedded * torch.tensor(78**0.5).bfloat16())
    assert not torch.equal(entered[0], embedded * 78**0.5)


@pytest.mark.parametrize("name", ONE_EACH)
def test_gradients_equal_those_of_transformers(checkpoints, name):
    _, theirs, ours = checkpoints(name)
    tokens = random_tokens(2, 40, seed=2).clamp(min=1)  # transformers trains no embedding of Gemma's padding, 0
    grads = []
    for model in (theirs, ours):
        model.zero_grad()
        logits = model(tokens) if model is ours else model(tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for parameter, expected in grads[0].items():
        assert expected.abs().max() > 0, parameter
        assert distance(grads[1][parameter], expected) < 1e-3 * expected.abs().max(), parameter


# ── Where tokens stand, whom they see, whose logits are wanted ────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=ONE_EACH)
def model(request):
    return network_of(CASES[request.param], seed=3, scale=0.3)


@torch.no_grad()
def test_reading_on_and_taking_back_equal_a_fresh_run(model):
    """In pieces, each row cut back to a length of its own, far beyond the window or to nothing; then read on."""
    first, second = random_tokens(3, 40, seed=4), random_tokens(3, 20, seed=5)
    cache, kept = KVCache(model.config, 3, 70), [0, 21, 37]
    logits = [model(piece, cache) for piece in first.split([25, 1, 1, 13], dim=1)]
    assert distance(torch.cat(logits, dim=1), model(first)) < CLOSE
    cache.truncate(torch.tensor(kept))
    logits = torch.cat([model(piece, cache) for piece in second.split([3, 1, 16], dim=1)], dim=1)
    for row, n in enumerate(kept):
        fresh = model(torch.cat((first[row, :n], second[row]))[None])[0, n:]
        assert distance(logits[row], fresh) < CLOSE


def causal(B, T):
    return torch.ones(B, T, T, dtype=torch.bool).tril()


def random_tree(nodes, rng):
    """parents[i] of node i, or None: long chains with branches, so that depths exceed Gemma's window."""
    parents = [None]
    for i in range(1, nodes):
        parents.append(i - 1 if rng.random() < 0.8 else rng.randrange(i))
    return parents


@torch.no_grad()
def test_a_node_says_what_its_branch_says_by_itself(model, seed=0):
    """Two trees of 70 nodes in any order, not even parents first, and a padded place that only sees itself."""
    rng = random.Random(seed)
    tokens, positions = random_tokens(2, 71, seed=seed), torch.zeros(2, 71, dtype=torch.int64)
    visible, branches = torch.eye(71, dtype=torch.bool).repeat(2, 1, 1), []
    for b in range(2):
        place = rng.sample(range(70), 70)  # of each node in its row
        branch = []
        for node, parent in enumerate(random_tree(70, rng)):
            branch.append([*(() if parent is None else branch[parent]), node])
            positions[b, place[node]] = len(branch[node]) - 1
            visible[b, place[node], [place[n] for n in branch[node]]] = True
        branches += [(b, [place[n] for n in nodes]) for nodes in branch]
    logits = model(tokens, positions=positions, visible=visible)
    assert logits.shape == (2, 71, V) and logits.isfinite().all()
    lengths = set()
    for b, places in branches:
        alone = model(tokens[b, places][None])[0, -1]
        assert distance(logits[b, places[-1]], alone) < CLOSE
        lengths.add(len(places))
    assert max(lengths) > 15  # far beyond the window of 11
    assert len(lengths) < 70  # there were branches


def test_some_logits_and_their_gradients_are_those_of_all(model):
    tokens = random_tokens(2, 12, seed=3)
    assert model(tokens, at=torch.tensor([], dtype=torch.int64)).shape == (0, V)
    at, found = torch.tensor([20, 3, 11, 11]), []
    for logits in (model(tokens, at=at), model(tokens).flatten(0, 1)[at]):
        assert logits.shape == (4, V) and logits.dtype == torch.float32
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        assert distance(a, b) <= 1e-4 * b.abs().max()


@torch.no_grad()
def test_plain_causal_attention_builds_no_mask(monkeypatch):
    """Whether or not it stands in a cache or a tree is all that decides: positions and `at` do not."""
    seen = []
    monkeypatch.setattr(
        transformer_module, "attend", lambda q, k, v, mask, *more: seen.append(mask) or attend(q, k, v, mask, *more)
    )
    llama, tokens = network_of(CASES["llama"]), random_tokens(2, 9)
    llama(tokens)
    llama(tokens, positions=torch.arange(9).repeat(2, 1), at=torch.tensor([4]))
    assert seen == [None] * 6
    llama(tokens, visible=causal(2, 9))
    llama(tokens, KVCache(llama.config, 2, 9))
    assert len(seen) == 12 and all(mask is not None for mask in seen[6:])


@pytest.mark.parametrize("has_mask", [True, False])
def test_attention_in_bfloat16_is_about_as_exact_as_the_fused_kernel(has_mask, T=50, scale=0.4):
    """On a CPU attention in bf16 builds its scores: its errors against fp32 are at most twice the fused kernel's."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, T, 8), (3, 2, T, 8), (3, 2, T, 8)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes)
    visible = causal(3, T)
    visible[:, T // 2 :, 5:15] = False  # a branch that the rest does not see
    mask = transformer_module.as_mask(~(visible if has_mask else causal(3, T))[:, None], torch.float32)

    def with_gradients(attention, dtype):
        y = attention(*(x.to(dtype) for x in (q, k, v)))
        return [x.float() for x in (y, *torch.autograd.grad(y.float().square().sum(), (q, k, v)))]

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), scale=scale, enable_gqa=True)

    exact, kernel = with_gradients(fused, torch.float32), with_gradients(fused, torch.bfloat16)
    found = with_gradients(lambda q, k, v: attend(q, k, v, mask if has_mask else None, scale, None), torch.bfloat16)
    for a, b, c in zip(found, kernel, exact, strict=True):
        assert 0 < (a - c).norm() < 2 * (b - c).norm() and not torch.equal(a, b)


# ── Parts, in closed form ────────────────────────────────────────────────────────────────────────────────────────────


def test_rms_norm():
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.bfloat16)
    root = 12.5**0.5
    # Llama rounds x̂ and then multiplies, Gemma multiplies by 1 + w and then rounds.
    w = torch.tensor([0.3, 0.7], dtype=torch.bfloat16)
    exact = torch.tensor([3.0 / root, 4.0 / root])
    for plus_one, expected in ((False, exact.bfloat16() * w), (True, (exact * (1 + w.float())).bfloat16())):
        norm = RMSNorm(2, eps=0.0, plus_one=plus_one)
        assert torch.equal(norm.weight, torch.zeros(2) if plus_one else torch.ones(2))
        norm.weight.data = w
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(norm(x), expected.expand(2, 2))


@pytest.mark.parametrize("n_in, n_out, blocks, bias", [(64, 48, 1, True), (256, 2048, 8, True), (300, 1201, 1, False)])
def test_linear_in_blocks(monkeypatch, n_in, n_out, blocks, bias):
    """Up to 32 rows in fp32 take a path of their own on a CPU; the values are the same, in training too."""
    linear, bmm, calls = randomize(Linear(n_in, n_out, bias), scale=0.05), torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *a: calls.append(a[1].shape) or bmm(*a))
    assert linear.blocks == blocks and (linear.bias is not None) == bias
    for shape in ((n_in,), (1, 1, n_in), (8, 1, n_in), (2, 16, n_in), (33, n_in), (2, 17, n_in)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), requires_grad=True)
        calls.clear()
        y = linear(x)
        few = x.numel() // n_in <= 32
        assert calls == ([(blocks, n_in, n_out // blocks)] if blocks > 1 and few else [])
        expected = F.linear(x, linear.weight, linear.bias)
        assert y.shape == expected.shape and distance(y, expected) < 1e-4
        gradients = torch.autograd.grad(y.square().sum(), (x, linear.weight))
        expected = torch.autograd.grad(expected.square().sum(), (x, linear.weight))
        assert all(distance(a, b) < 1e-5 * b.abs().max() + 1e-5 for a, b in zip(gradients, expected, strict=True))
    calls.clear()
    linear.bfloat16()(torch.ones(1, n_in, dtype=torch.bfloat16))
    assert calls == []


def test_fresh_weights_are_repeatable_and_small():
    for name, p in Transformer(ModelConfig.from_hf(models.QWEN2)).named_parameters():  # gains of 1 and no biases
        assert p.dim() == 2 or (p == ("bias" not in name)).all(), name
    config = ModelConfig.from_hf(LLAMA | dict(vocab_size=300, hidden_size=96))
    a, b = Transformer(config), Transformer(config)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert a.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for part in (a.model.layers[1].mlp.down_proj, a.model.layers[1].self_attn.o_proj):
        assert part.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    a.init_weights(seed=1)
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)


# ── Configurations that are refused ──────────────────────────────────────────────────────────────────────────────────


def scaled(**changes):
    return dict(rope_parameters=stretched(8.0) | changes)


REFUSED = [
    (LLAMA, dict(model_type="mixtral"), "mixtral"),
    (LLAMA, dict(attention_bias=True), "attention_bias"),
    (LLAMA, dict(hidden_act="gelu"), "hidden_act"),
    (LLAMA, dict(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    (LLAMA, dict(num_key_value_heads=4), "num_key_value_heads"),
    (LLAMA, dict(vocab_size=float("inf")), "vocab_size"),
    (LLAMA, dict(tie_word_embeddings="false"), "tie_word_embeddings"),
    (LLAMA, dict(reset_token_id=V), "reset_token_id"),
    (LLAMA, dict(rope_parameters=None, rope_theta=-1.0), "rope_theta"),
    (LLAMA, dict(rope_parameters=None, rope_scaling="llama3"), "rope_scaling"),
    (LLAMA, dict(rope_parameters=None, rope_scaling={"type": "linear"}), "factor"),
    (LLAMA, dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_parameters"),
    (LLAMA, scaled(rope_type="yarn"), "yarn"),
    *((LLAMA, scaled(**{name: None}), name) for name in stretched(8.0) if name not in ("rope_type", "rope_theta")),
    (LLAMA, scaled(high_freq_factor=1.0), "high_freq_factor"),
    (CASES["mistral"], dict(layer_types=["full_attention"] * 3), "layer_types"),
    (CASES["qwen2"], dict(layer_types=["sliding_attention"] * 3), "sliding_window"),
    (CASES["qwen2-window"], dict(max_window_layers="28"), "max_window_layers"),
    (GEMMA, dict(hidden_activation="gelu"), "hidden_activation"),
    (GEMMA, dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (GEMMA, dict(query_pre_attn_scalar=None), "query_pre_attn_scalar"),
    (GEMMA3, dict(rope_parameters={"rope_theta": 1e6}), "rope_parameters"),
    (GEMMA3, dict(sliding_window_pattern=-6), "sliding_window_pattern"),
]


@pytest.mark.parametrize("fields, changes, name", REFUSED, ids=str)
def test_unsupported_settings_are_errors_that_name_them(fields, changes, name):
    ModelConfig.from_hf(fields)
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(fields | changes)
    assert name in str(error.value) and "\n" not in str(error.value)
