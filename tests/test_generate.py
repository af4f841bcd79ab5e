"""The sampler against a naive one written out below: no cache, no batch, one full forward per token, plain Python.

Models are random; a token that greedy decoding is about to say is declared to be [RESET] (or a stop id), so resets
happen in the middle of answers without any training.
"""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backtrack import generate as generate_module
from backtrack.generate import Done, Reset, Rows, Sampler, Token, advance, choose, generate, stream
from model import InputError, KVCache, ModelConfig, Transformer

V = 61


def random_model(family="llama", seed=0):
    config = ModelConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
        **(
            {}
            if family == "llama"
            else dict(
                model_type="gemma2",
                hidden_act="gelu_pytorch_tanh",
                norm_plus_one=True,
                scale_embeddings=True,
                post_norms=True,
                query_pre_attn_scalar=8,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=10.0,
                sliding_window=8,  # shorter than the prompts below: resets happen past it
                local_layers=(True, False, True),
            )
        ),
    )
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.4, generator=generator)
    return model


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return random_model(request.param)


def random_prompts(count, seed=0, low=1, high=30):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(low, high))] for _ in range(count)]


@torch.no_grad()
def naive(
    model, prompt, *, reset_id, stop_ids, max_new_tokens, max_resets=1, on_reset="truncate", bias=0.0, prefill=()
):
    """Greedy, straight from the definitions: (surviving, discarded, finish_reason, steps)."""
    context, attempt, discarded, steps, sampled = [*prompt, *prefill], list(prefill), [], 0, 0
    while True:
        logits = model(torch.tensor([context]))[0, -1].clone()
        if reset_id is not None:
            logits[reset_id] += bias if len(discarded) < max_resets else -torch.inf
        token = int(logits.argmax())
        steps += 1
        if token == reset_id:
            discarded.append(attempt)
            context = [*prompt, *[reset_id] * len(discarded)] if on_reset == "truncate" else [*context, reset_id]
            attempt, sampled = [], 0
        elif token in stop_ids:
            return attempt, discarded, "stop", steps
        else:
            context.append(token)
            attempt.append(token)
            sampled += 1
            if sampled == max_new_tokens:
                return attempt, discarded, "length", steps


def said_at(model, prompt, position, prefill=()):
    """The token that greedy decoding says at this position."""
    return naive(model, prompt, reset_id=None, stop_ids=(), max_new_tokens=position + 1, prefill=prefill)[0][-1]


def same(generation, expected):
    surviving, discarded, finish_reason, steps = expected
    assert generation.tokens == surviving
    assert generation.discarded == discarded
    assert generation.resets == len(discarded)
    assert generation.finish_reason == finish_reason
    assert generation.steps == steps


# ── A reset row is a fresh run on what the retry sees ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_retry_equals_a_fresh_run(model, on_reset, position):
    for prompt in random_prompts(3, seed=position, low=3):
        reset_id = said_at(model, prompt, position)
        [g] = generate(model, [prompt], reset_id=reset_id, stop_ids=(), max_new_tokens=12, on_reset=on_reset)
        assert g.resets == 1
        prefix = g.discarded[0]
        assert reset_id not in prefix
        retry = prompt + [reset_id] if on_reset == "truncate" else prompt + prefix + [reset_id]
        # In the fresh run [RESET] is masked: one reset was allowed and is spent.
        [fresh] = generate(
            model, [retry], reset_id=reset_id, stop_ids=(), max_new_tokens=12, max_resets=0, on_reset=on_reset
        )
        assert g.tokens == fresh.tokens and len(g.tokens) == 12
        assert g.steps == len(prefix) + 1 + 12


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("max_resets", [0, 1, 2, 5])
def test_against_the_naive_sampler(model, on_reset, max_resets):
    """Ragged batches in which some rows reset, once or more, at any position, and some stop early."""
    resets = set()
    for seed in range(2):
        prompts = random_prompts(6, seed=seed, high=20)
        prefill = [p[:4] if i % 3 == 1 else [] for i, p in enumerate(random_prompts(6, seed=100 + seed))]
        reset_id = said_at(model, prompts[0], 4, prefill[0])
        stop_id = said_at(model, prompts[2], 7, prefill[2])
        prefill = [[t for t in p if t not in (reset_id, stop_id)] for p in prefill]
        if stop_id == reset_id:
            continue
        options = dict(reset_id=reset_id, max_new_tokens=12, max_resets=max_resets, on_reset=on_reset)
        done = generate(model, prompts, stop_ids=[stop_id], prefill=prefill, **options)
        for prompt, forced, g in zip(prompts, prefill, done, strict=True):
            same(g, naive(model, prompt, stop_ids=(stop_id,), prefill=forced, **options))
            assert g.resets <= max_resets
            resets.add(g.resets)
    assert len(resets) > 1 or max_resets == 0  # some rows of the batches did reset, others did not


def test_two_resets_in_a_row_keep_the_resets_before(model):
    """With a bias that forces [RESET], the retries see x ⊕ [RESET] and then x ⊕ [RESET] ⊕ [RESET]."""
    [prompt] = random_prompts(1, seed=5, low=12)
    options = dict(reset_id=3, stop_ids=(), max_new_tokens=10)
    [g] = generate(model, [prompt], max_resets=2, reset_bias=1e4, **options)
    assert g.discarded == [[], []] and g.resets == 2 and g.steps == 12
    [fresh] = generate(model, [prompt + [3, 3]], max_resets=0, **options)
    assert g.tokens == fresh.tokens


def test_prefill_belongs_to_the_answer(model):
    [prompt], [forced] = random_prompts(1, seed=6, low=5), random_prompts(1, seed=7, low=5, high=5)
    options = dict(stop_ids=(), max_new_tokens=6)
    [kept] = generate(model, [prompt], reset_id=None, prefill=[forced], **options)
    assert kept.tokens[:5] == forced and len(kept.tokens) == 5 + 6 and kept.steps == 6
    reset_id = said_at(model, prompt, 2, forced)
    reset_id = next(t for t in [reset_id, *range(V)] if t not in forced)
    [g] = generate(model, [prompt], reset_id=reset_id, prefill=[forced], reset_bias=1e4, **options)
    assert g.discarded == [forced]
    assert g.tokens == generate(model, [prompt + [reset_id]], reset_id=reset_id, max_resets=0, **options)[0].tokens


def test_reset_id_none_is_an_ordinary_sampler(model):
    prompts = random_prompts(3, seed=8)
    token = said_at(model, prompts[0], 3)
    plain = generate(model, prompts, reset_id=None, stop_ids=(), max_new_tokens=10, reset_bias=1e4)
    assert token in plain[0].tokens and all(g.resets == 0 and len(g.tokens) == 10 for g in plain)
    for prompt, g in zip(prompts, plain, strict=True):
        same(g, naive(model, prompt, reset_id=None, stop_ids=(), max_new_tokens=10))


def test_reset_bias_moves_the_first_reset(model):
    """A bias of -inf never resets, a huge one resets at once, the naive sampler agrees in between."""
    prompts = random_prompts(5, seed=9)
    rates = []
    for bias in (-1e9, 0.0, 2.0, 5.0, 1e9):
        done = generate(model, prompts, reset_id=7, stop_ids=(), max_new_tokens=12, reset_bias=bias)
        for prompt, g in zip(prompts, done, strict=True):
            same(g, naive(model, prompt, reset_id=7, stop_ids=(), max_new_tokens=12, bias=bias))
        rates.append(sum(g.resets for g in done))
    assert rates[0] == 0 and rates[-1] == 5 and rates == sorted(rates)


# ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_tell_the_same_story(model):
    prompts = random_prompts(5, seed=10)
    prefill = [[], [1, 2], [], [5], []]
    reset_id = next(t for t in (said_at(model, prompts[0], k) for k in range(3, 20)) if t not in (1, 2, 5))
    options = dict(reset_id=reset_id, stop_ids=(), max_new_tokens=15, max_resets=2, prefill=prefill)
    shown, discarded, done = [[] for _ in prompts], [[] for _ in prompts], {}
    for event in stream(model, prompts, **options):
        assert event.row not in done  # nothing after Done
        if isinstance(event, Token):
            shown[event.row].append(event.id)
        elif isinstance(event, Reset):
            # Whoever shows tokens as they come has shown exactly what is now to be erased.
            assert event.discarded == shown[event.row]
            discarded[event.row].append(event.discarded)
            shown[event.row] = []
        elif isinstance(event, Done):
            done[event.row] = event.generation
    assert sum(len(d) for d in discarded) > 0
    for row, g in enumerate(generate(model, prompts, **options)):
        assert (shown[row], discarded[row]) == (done[row].tokens, done[row].discarded) == (g.tokens, g.discarded)
        assert 0 < g.first_token_s <= g.total_s


def test_first_token_time_is_that_of_the_surviving_attempt(model):
    [prompt] = random_prompts(1, seed=11, low=8)
    reset_id = said_at(model, prompt, 9)
    seen = {}
    events = stream(model, [prompt], reset_id=reset_id, stop_ids=(), max_new_tokens=12)
    for n, event in enumerate(events):
        seen[n] = event
    [g] = [e.generation for e in seen.values() if isinstance(e, Done)]
    [plain] = generate(model, [prompt], reset_id=None, stop_ids=(), max_new_tokens=12)
    assert g.resets == 1
    assert g.first_token_s > plain.first_token_s  # it had to wait for the discarded attempt


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_follow_the_distribution(model):
    """First tokens of 1,500 rows against softmax(logits / temperature), restricted by top-p: chi-square."""
    [prompt] = random_prompts(1, seed=12, low=6)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1].double()
    n = 1500
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.5, 0.7)):
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p < 1:  # by hand: add tokens, most likely first, until their mass reaches top_p
            nucleus, mass = [], 0.0
            for token in probs.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                nucleus.append(token)
                mass += probs[token].item()
            probs = torch.tensor([p if t in nucleus else 0.0 for t, p in enumerate(probs.tolist())]) / mass
        options = dict(reset_id=None, stop_ids=(), max_new_tokens=1, temperature=temperature, top_p=top_p)
        tokens = [g.tokens[0] for g in generate(model, [prompt] * n, **options)]
        counts = torch.bincount(torch.tensor(tokens), minlength=V).double()
        assert counts[probs == 0].sum() == 0
        expected = probs[probs > 0].double() * n
        order = expected.argsort()
        # Pool rare tokens until every cell expects 5 or more.
        cells, cell = [], [0.0, 0.0]
        for i in order.tolist():
            cell = [cell[0] + expected[i].item(), cell[1] + counts[probs > 0][i].item()]
            if cell[0] >= 5:
                cells.append(cell)
                cell = [0.0, 0.0]
        cells[-1] = [cells[-1][0] + cell[0], cells[-1][1] + cell[1]]
        chi2 = sum((c - e) ** 2 / e for e, c in cells)
        df = len(cells) - 1
        assert df >= 3
        assert chi2 < df + 4.5 * (2 * df) ** 0.5 + 10  # far in the tail: about 1 in 10^5


def test_a_row_depends_on_seed_and_index_only(model):
    prompts = random_prompts(5, seed=13)
    options = dict(reset_id=3, stop_ids=(4,), max_new_tokens=25, temperature=1.3, top_p=0.95, max_resets=2)
    together = generate(model, prompts, seed=7, **options)
    others = [random_prompts(1, seed=50 + i)[0] for i in range(5)]
    for row in range(5):
        batch = [*others[:row], prompts[row], *others[row + 1 :][: 2 if row % 2 else 0]]
        alone = generate(model, batch, seed=7, **options)[row]
        assert (alone.tokens, alone.discarded) == (together[row].tokens, together[row].discarded)
    assert generate(model, prompts, seed=8, **options)[0].tokens != together[0].tokens
    twins = generate(model, [prompts[0]] * 2, seed=7, **options)
    assert twins[0].tokens != twins[1].tokens  # the same prompt in two rows: two samples


def test_how_a_list_is_cut_into_batches_changes_nothing(model):
    """With sample_ids a row keeps its random numbers, whatever its batch and its place in it."""
    prompts = random_prompts(7, seed=14)
    prompts[5] = prompts[2]
    options = dict(reset_id=3, stop_ids=(4,), max_new_tokens=20, temperature=1.3, max_resets=2, reset_bias=1.0, seed=7)
    whole = generate(model, prompts, **options)
    assert any(g.resets for g in whole)
    for order, size in ((range(7), 3), (range(6, -1, -1), 2), ((3, 5, 2, 0, 6, 1, 4), 4), (range(7), 1)):
        order = list(order)
        for batch in (order[i : i + size] for i in range(0, 7, size)):
            cut = generate(model, [prompts[i] for i in batch], sample_ids=batch, **options)
            for i, g in zip(batch, cut, strict=True):
                assert (g.tokens, g.discarded, g.steps) == (whole[i].tokens, whole[i].discarded, whole[i].steps)
    # One number, one sample; another number, another. They may be any, and as large as one likes.
    same = generate(model, [prompts[2]] * 4, sample_ids=[2, 2, 5, 10**12], **options)
    assert same[0].tokens == same[1].tokens == whole[2].tokens and same[2].tokens == whole[5].tokens
    assert len({tuple(g.tokens) for g in same}) == 3


def test_long_answers_draw_fresh_numbers():
    """Random numbers come in blocks of 256 steps: no repetition at the border, none lost when rows leave."""
    model = random_model()
    [prompt] = random_prompts(1, seed=14)
    prompt = prompt[:2]
    model.config.__dict__["max_position_embeddings"] = 2048
    options = dict(reset_id=None, stop_ids=(), temperature=3.0, seed=1)
    [long] = generate(model, [prompt], max_new_tokens=520, **options)
    assert long.tokens[:256] != long.tokens[256:512]
    [short] = generate(model, [prompt], max_new_tokens=270, **options)
    assert long.tokens[:270] == short.tokens


# ── The step itself ──────────────────────────────────────────────────────────────────────────────────────────────────


class NoSync(TorchDispatchMode):
    """Raises on every operation that would make the host wait for the device."""

    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == w or name.startswith(w + "_") for w in self.waiting), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decode_step_never_waits_for_the_device(model, temperature):
    B = 4
    cache = KVCache(model.config, B, 40)
    with torch.no_grad():
        logits = model(torch.randint(0, V, (B, 6)), cache)[:, -1]
        cache.truncate(torch.full((B,), 5))
        rows = Rows(torch.full((B,), 6), torch.zeros(B, dtype=torch.int64))
        sampler = Sampler(temperature, 0.9, 3, 0.5, 1, True, 9, [1])
        u = torch.rand(B, 1)
        with NoSync():
            token, _ = choose(logits, rows, u, sampler)
            advance(token, rows, cache, sampler)
            model(token[:, None], cache)
        with pytest.raises(AssertionError, match="waits"), NoSync():
            token.sum().item()


def test_finished_rows_are_not_computed(model, monkeypatch):
    """The rows that go through the network add up to the tokens that had to be fed, no more."""
    prompts = random_prompts(8, seed=15)
    stop_ids = {said_at(model, p, 2 + i) for i, p in enumerate(prompts)}
    widths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, cache: widths.append(len(tokens)) or forward(tokens, cache))
    done = generate(model, prompts, reset_id=None, stop_ids=stop_ids, max_new_tokens=20)
    assert len({g.steps for g in done}) > 2
    assert sum(widths) == sum(g.steps - 1 for g in done)  # the last token of a row is never fed


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_the_cache_holds_what_is_promised_and_no_more(model, on_reset, monkeypatch):
    """truncate: P + max_resets + prefill + max_new_tokens entries, whatever is discarded; and no write beyond."""
    made, top = [], []

    class Watched(KVCache):
        def __init__(self, config, batch_size, capacity, *args):
            super().__init__(config, batch_size, capacity, *args)
            made.append(capacity)

        def write(self, layer, k, v, positions):
            top.append(int(positions.max()))
            assert positions.max() < self.visible <= self.capacity
            return super().write(layer, k, v, positions)

    monkeypatch.setattr(generate_module, "KVCache", Watched)
    prompts, forced = random_prompts(1, seed=16, low=10, high=10), [[1, 2]]
    options = dict(stop_ids=(), max_new_tokens=7, max_resets=3, on_reset=on_reset, prefill=forced)
    reset_id = next(t for t in (said_at(model, prompts[0], k, forced[0]) for k in range(6, 0, -1)) if t not in (1, 2))
    [g] = generate(model, prompts, reset_id=reset_id, **options)
    assert g.resets >= 1
    assert made == [10 + 3 + 2 + 7] if on_reset == "truncate" else [10 + 3 + 2 + 4 * 7]
    assert max(top) < made[0]


def test_a_finished_row_that_is_computed_on_stays_in_its_cache(model):
    """On a GPU the host reads a step late; whatever such a row says meanwhile, it writes to its own last entry."""
    cache = KVCache(model.config, 2, capacity=8)
    cache.truncate(torch.tensor([5, 2]))
    rows = Rows(torch.tensor([6, 3]), torch.zeros(2, dtype=torch.int64))
    sampler = Sampler(0.0, 1.0, 3, 0.0, 1, True, 9, [])
    lengths = []
    for token in ([4, 4], [4, 3], [4, 4], [3, 4], [3, 4], [3, 4]):  # the last two resets are one too many
        advance(torch.tensor(token), rows, cache, sampler)
        lengths.append(cache.lengths.tolist())
    assert lengths == [[6, 3], [7, 3], [7, 4], [6, 5], [7, 6], [7, 7]]


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1] * 300]), "prompt 0 is too long: 300 tokens"),
        (dict(prompts=[[1] * 230], max_new_tokens=30), "too long: 230 tokens, and 261"),
        (dict(prompts=[[1] * 200], max_new_tokens=30, on_reset="keep"), "too long"),
        (dict(prompts=[[V]]), "outside the model's vocabulary"),
        (dict(prompts=[[-1]]), "outside the model's vocabulary"),
        (dict(reset_id=V), "outside the model's vocabulary"),
        (dict(stop_ids=(3,)), "also a stop id"),
        (dict(prefill=[[3]]), "prefill 0 contains"),
        (dict(prefill=[[], []]), "2 prefills for 1 prompts"),
        (dict(sample_ids=[]), "0 sample_ids for 1 prompts"),
        (dict(sample_ids=[1, 2]), "2 sample_ids for 1 prompts"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(max_resets=-1), "max_resets"),
        (dict(on_reset="forget"), "on_reset"),
    ],
)
def test_bad_input_is_named(model, change, message):
    if change.get("on_reset") == "keep":
        good = {**change, "on_reset": "truncate"}  # one attempt would fit; two do not
        generate(model, good.pop("prompts"), **{"reset_id": 3, "stop_ids": (4,), **good})
    options = {"prompts": [[1, 2]], "reset_id": 3, "stop_ids": (4,), "max_new_tokens": 5, **change}
    with pytest.raises(InputError, match=message):
        stream(model, options.pop("prompts"), **options)  # at the call, not at the first event


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value, temperature):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(InputError, match="row 0: logits are not finite"):
        generate(model, [[1, 2]], reset_id=3, stop_ids=(4,), max_new_tokens=5, temperature=temperature)


def test_no_prompts_is_no_answers(model):
    assert generate(model, [], reset_id=3, stop_ids=(4,), max_new_tokens=5) == []


def test_inference_mode_does_not_leak_to_the_caller(model):
    events = stream(model, [[1, 2]], reset_id=3, stop_ids=(4,), max_new_tokens=5)
    next(events)
    assert not torch.is_inference_mode_enabled()
