"""The sampler against a naive one written out below: no cache, no batch, a forward pass per token, plain Python.

Models are random. So that they reset now and then, a row of their head is raised, or a token that
greedy decoding is about to say is declared to be [RESET] (or a stop id): no training is needed.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from models import GEMMA, LLAMA, network_of, prone_to, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from backtrack import generate as module
from backtrack.generate import (
    Done,
    Options,
    Record,
    Reset,
    Rows,
    Token,
    entries_in_use,
    feed,
    generate,
    one_answer,
    pick,
    stream,
)
from model import InputError, KVCache, Transformer

V, RESET, STOP = 61, 7, 11
SIZES = {"vocab_size": V, "num_hidden_layers": 3, "head_dim": 10, "tie_word_embeddings": False}
# Layers 0 and 2 of Gemma are local, and most prompts below are longer than their window.
MODELS = {"llama": LLAMA | SIZES, "gemma": GEMMA | SIZES | {"sliding_window": 8}}
TIED = {name: fields | {"tie_word_embeddings": True} for name, fields in MODELS.items()}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return network_of(TIED[request.param], seed=0, scale=0.4)


@pytest.fixture(scope="module", params=list(MODELS))
def wavering(request):
    """A model that says RESET about once in ten tokens, and STOP now and then."""
    return prone_to(RESET, network_of(MODELS[request.param], scale=0.4))


@pytest.fixture(autouse=True)
def nothing_goes_on_for_ever(monkeypatch):
    """A model that is allowed to take every answer back would: that fails rather than hangs."""
    calls, forward = itertools.count(), Transformer.forward

    def counted(*args, **options):
        assert next(calls) < 5000, "the sampler does not come to an end"
        return forward(*args, **options)

    monkeypatch.setattr(Transformer, "forward", counted)


def random_prompts(count, seed=0, low=1, high=30):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(low, high))] for _ in range(count)]


class Naive:
    """Greedy, straight from the definitions. Says of every step what the model has read by then."""

    def __init__(
        self,
        model,
        prompt,
        *,
        reset_id,
        stop_ids,
        max_new_tokens,
        max_resets=1,
        on_reset="truncate",
        bias=0.0,
        prefill=(),
    ):
        context, attempt, sampled = [*prompt, *prefill], list(prefill), 0
        self.discarded, self.contexts, self.logits, self.reason = [], [], [], None
        while self.reason is None:
            with torch.no_grad():
                logits = model(torch.tensor([context]))[0, -1]
            self.contexts.append(list(context))
            self.logits.append(logits.clone())
            if reset_id is not None:
                logits[reset_id] += bias if len(self.discarded) < max_resets else -torch.inf
            token = int(logits.argmax())
            if token == reset_id:
                self.discarded.append(attempt)
                if on_reset == "truncate":
                    context = [*prompt, *[reset_id] * len(self.discarded)]
                else:
                    context = [*context, reset_id]
                attempt, sampled = [], 0
            elif token in stop_ids:
                self.reason = "stop"
            else:
                context.append(token)
                attempt.append(token)
                sampled += 1
                if sampled == max_new_tokens:
                    self.reason = "length"
        self.answer, self.steps = attempt, len(self.contexts)


def said_at(model, prompt, position, prefill=()):
    """The token that greedy decoding says at this position."""
    options = {"reset_id": None, "stop_ids": (), "max_new_tokens": position + 1}
    return Naive(model, prompt, prefill=prefill, **options).answer[-1]


def same(generation, naive):
    assert generation.tokens == naive.answer
    assert generation.discarded == naive.discarded
    assert generation.resets == len(naive.discarded)
    assert generation.finish_reason == naive.reason
    assert generation.steps == naive.steps


def outcome(generation):
    """All that does not depend on the clock."""
    g = generation
    return g.tokens, g.discarded, g.resets, g.finish_reason, g.steps


# ── The method: one prompt ────────────────────────────────────────────────────────────────────────

ONE = {"reset_id": RESET, "stop_ids": (STOP,), "max_new_tokens": 12}


def test_one_answer_is_what_the_naive_sampler_says(wavering):
    """Resets at any position or none, answers that stop, at once or later, or fill their length."""
    kinds = set()
    for prompt in random_prompts(24):
        naive = Naive(wavering, prompt, **ONE)
        answer, discarded = one_answer(wavering, prompt, **ONE)
        assert answer == naive.answer
        assert discarded == (naive.discarded or [[]])[0]
        kinds.add((len(naive.discarded), bool(discarded), naive.reason))
    assert {(0, False, "stop"), (0, False, "length"), (1, True, "length")} <= kinds
    assert (1, False, "length") in kinds  # taken back before anything was said
    assert "stop" in {reason for resets, _, reason in kinds if resets}


def test_one_answer_resets_once(wavering):
    """Some of these would take a second answer back as well. Each attempt has the whole length."""
    twice = whole = 0
    for prompt in random_prompts(24, seed=2):
        [freer] = generate(wavering, [prompt], max_resets=2, **ONE)
        answer, discarded = one_answer(wavering, prompt, **ONE)
        assert RESET not in answer and RESET not in discarded
        if freer.resets == 2:
            second = freer.discarded[1]
            assert discarded == freer.discarded[0] and answer[: len(second)] == second
            assert len(answer) > len(second)  # it went on instead
            twice += 1
            whole += len(discarded) > 0 and len(answer) == 12
    assert twice >= 3 and whole >= 1


def test_one_answer_reads_each_token_once_and_goes_back_to_the_prompt(wavering):
    """What goes through the network, and behind how many entries it is written."""
    prompts = random_prompts(12, seed=3)
    naives = [Naive(wavering, prompt, **ONE) for prompt in prompts]
    assert sum(len(naive.discarded) for naive in naives) >= 3
    found = []

    def log(module, arguments, logits):
        tokens, cache = arguments
        [length], [ids] = cache.lengths.tolist(), tokens.tolist()
        found.append((length - len(ids), ids))  # by now they count

    hook = wavering.register_forward_hook(log)
    for prompt, naive in zip(prompts, naives, strict=True):
        found.clear()
        one_answer(wavering, prompt, **ONE)
        later = [(len(context) - 1, context[-1:]) for context in naive.contexts[1:]]
        assert found == [(0, prompt), *later]
    hook.remove()


# ── A batch is many of them ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(2))
def test_generate_says_what_one_answer_says(wavering, seed):
    """40 prompts of 1 to 30 tokens in one batch; many of them reset, each when it likes."""
    prompts = random_prompts(40, seed=seed)
    done = generate(wavering, prompts, **ONE)
    for prompt, g in zip(prompts, done, strict=True):
        answer, discarded = one_answer(wavering, prompt, **ONE)
        assert g.tokens == answer
        assert g.discarded == ([discarded] if g.resets else [])
        assert discarded == [] or g.resets == 1
    taken_back = [len(g.discarded[0]) for g in done if g.resets]
    assert 10 <= len(taken_back) <= 30  # some rows reset, others do not,
    assert len(set(taken_back)) >= 4  # at several positions,
    assert len({len(p) for p, g in zip(prompts, done, strict=True) if g.resets}) >= 6
    assert {g.finish_reason for g in done if g.resets} == {"stop", "length"}


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("max_resets", [0, 1, 2, 5])
def test_against_the_naive_sampler(wavering, on_reset, max_resets):
    """Ragged batches, some rows prefilled, in which rows reset once or more and some stop early."""
    resets, prefilled = set(), 0
    options = {**ONE, "max_resets": max_resets, "on_reset": on_reset}
    for seed in range(2):
        prompts = random_prompts(9, seed=seed, high=20)
        prefill = [p[:4] if i % 3 == 1 else [] for i, p in enumerate(random_prompts(9, 100 + seed))]
        prefill = [[t for t in p if t not in (RESET, STOP)] for p in prefill]
        done = generate(wavering, prompts, prefill=prefill, **options)
        for prompt, forced, g in zip(prompts, prefill, done, strict=True):
            same(g, Naive(wavering, prompt, prefill=forced, **options))
            resets.add(g.resets)
            prefilled += bool(forced and g.resets)
    assert min(resets) == 0 and max(resets) == max_resets
    assert prefilled or max_resets == 0


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_a_batchs_retries_are_fresh_runs_on_what_the_retry_sees(wavering, on_reset):
    """prompt ⊕ [RESET] if the cache is cut, prompt ⊕ discarded ⊕ [RESET] if it is kept."""
    prompts = random_prompts(24, seed=5)
    options = {**ONE, "on_reset": on_reset}
    done = generate(wavering, prompts, **options)
    retries, expected = [], []
    for prompt, g in zip(prompts, done, strict=True):
        if g.resets:
            kept = g.discarded[0] if on_reset == "keep" else []
            retries.append([*prompt, *kept, RESET])
            expected.append((g.tokens, g.finish_reason, g.steps - len(g.discarded[0]) - 1))
    assert len(retries) >= 8
    # One reset was allowed and is spent: in the fresh run [RESET] is masked.
    fresh = generate(wavering, retries, **options | {"max_resets": 0})
    assert [(g.tokens, g.finish_reason, g.steps) for g in fresh] == expected
    alone = [generate(wavering, [retry], **options | {"max_resets": 0})[0] for retry in retries]
    assert [outcome(g) for g in alone] == [outcome(g) for g in fresh]


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("position", [0, 1, 7])
def test_retry_equals_a_fresh_run(model, on_reset, position):
    """Whatever greedy decoding says at this position becomes [RESET]."""
    options = {"stop_ids": (), "max_new_tokens": 12, "on_reset": on_reset}
    for prompt in random_prompts(3, seed=position, low=3):
        reset_id = said_at(model, prompt, position)
        [g] = generate(model, [prompt], reset_id=reset_id, **options)
        assert g.resets == 1
        prefix = g.discarded[0]
        assert reset_id not in prefix
        retry = prompt + [reset_id] if on_reset == "truncate" else prompt + prefix + [reset_id]
        [fresh] = generate(model, [retry], reset_id=reset_id, max_resets=0, **options)
        assert g.tokens == fresh.tokens and len(g.tokens) == 12
        assert g.steps == len(prefix) + 1 + 12


def test_two_resets_in_a_row_keep_the_resets_before(model):
    """With a bias that forces [RESET], the retries see x ⊕ [RESET], then x ⊕ [RESET] ⊕ [RESET]."""
    [prompt] = random_prompts(1, seed=5, low=12)
    options = {"reset_id": 3, "stop_ids": (), "max_new_tokens": 10}
    [g] = generate(model, [prompt], max_resets=2, reset_bias=1e4, **options)
    assert g.discarded == [[], []] and g.resets == 2 and g.steps == 12
    [fresh] = generate(model, [prompt + [3, 3]], max_resets=0, **options)
    assert g.tokens == fresh.tokens


def test_prefill_belongs_to_the_answer(model):
    [prompt], [forced] = random_prompts(1, seed=6, low=5), random_prompts(1, seed=7, low=5, high=5)
    options = {"stop_ids": (), "max_new_tokens": 6}
    [kept] = generate(model, [prompt], reset_id=None, prefill=[forced], **options)
    assert kept.tokens[:5] == forced and len(kept.tokens) == 5 + 6 and kept.steps == 6
    reset_id = said_at(model, prompt, 2, forced)
    reset_id = next(t for t in [reset_id, *range(V)] if t not in forced)
    options["reset_id"] = reset_id
    [g] = generate(model, [prompt], prefill=[forced], reset_bias=1e4, **options)
    assert g.discarded == [forced]
    [fresh] = generate(model, [prompt + [reset_id]], max_resets=0, **options)
    assert g.tokens == fresh.tokens


def test_reset_id_none_is_an_ordinary_sampler(model):
    prompts = random_prompts(3, seed=8)
    options = {"reset_id": None, "stop_ids": (), "max_new_tokens": 10}
    plain = generate(model, prompts, reset_bias=1e4, **options)
    assert all(g.resets == 0 and len(g.tokens) == 10 for g in plain)
    for prompt, g in zip(prompts, plain, strict=True):
        same(g, Naive(model, prompt, **options))


def test_reset_bias_moves_the_first_reset(model):
    """A bias of -1e9 never resets, 1e9 resets at once, the naive sampler agrees in between."""
    prompts = random_prompts(5, seed=9)
    options = {"reset_id": 7, "stop_ids": (), "max_new_tokens": 12}
    rates = []
    for bias in (-1e9, 0.0, 2.0, 5.0, 1e9):
        done = generate(model, prompts, reset_bias=bias, **options)
        for prompt, g in zip(prompts, done, strict=True):
            same(g, Naive(model, prompt, bias=bias, **options))
        rates.append(sum(g.resets for g in done))
    assert rates[0] == 0 and rates[-1] == 5 and rates == sorted(rates)


# ── Events ────────────────────────────────────────────────────────────────────────────────────────


def test_events_tell_the_same_story(wavering):
    prompts = random_prompts(9, seed=10)
    prefill = [[], [1, 2], [], [5], [], [], [], [8], []]
    options = {**ONE, "max_resets": 2, "prefill": prefill}
    shown, discarded, done = [[] for _ in prompts], [[] for _ in prompts], {}
    for event in stream(wavering, prompts, **options):
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
    assert sum(len(d) for d in discarded) > 3
    for row, g in enumerate(generate(wavering, prompts, **options)):
        told = shown[row], discarded[row]
        assert told == (done[row].tokens, done[row].discarded) == (g.tokens, g.discarded)
        assert 0 < g.first_token_s <= g.total_s


def test_times_are_those_of_the_surviving_attempt(model, monkeypatch):
    """By a clock that ticks once a step. The token behind a discarded attempt had to wait for it."""
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    [prompt] = random_prompts(1, seed=11, low=8)
    reset_id = said_at(model, prompt, 9)
    options = {"stop_ids": (), "max_new_tokens": 12}
    [g] = generate(model, [prompt], reset_id=reset_id, **options)
    assert g.resets == 1
    before = len(g.discarded[0]) + 1
    assert (g.first_token_s, g.total_s) == (before + 1, before + 12)
    [plain] = generate(model, [prompt], reset_id=None, **options)
    assert (plain.first_token_s, plain.total_s) == (1, 12)
    # An answer that stops at once is complete when it does.
    stop = {said_at(model, prompt, 0)}
    [empty] = generate(model, [prompt], reset_id=None, stop_ids=stop, max_new_tokens=3)
    assert empty.tokens == [] and (empty.first_token_s, empty.total_s) == (1, 1)


def test_stepping_leaves_the_callers_inference_mode_alone(wavering):
    """Between two events the caller may compute with gradients, whatever the sampler is at."""
    prompts = random_prompts(4, seed=12)
    weight, count = torch.ones(2, requires_grad=True), 0
    for _ in stream(wavering, prompts, prefill=[[1], [], [2, 3], []], **ONE):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        [gradient] = torch.autograd.grad((weight * weight).sum(), weight)
        assert gradient.tolist() == [2.0, 2.0]
        count += 1
    assert count > 4 * 5
    one_answer(wavering, prompts[0], **ONE)
    assert not torch.is_inference_mode_enabled()


# ── Watching ──────────────────────────────────────────────────────────────────────────────────────


def watched(model, prompts, **options):
    """(lengths, logits, visible) before each pick, as lists; and the outcome of every row."""
    seen = []

    def watch(logits, cache):
        seen.append((cache.lengths.tolist(), logits.clone(), cache.visible))

    return seen, generate(model, prompts, watch=watch, **options)


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_lengths_count_valid_entries_at_every_step(wavering, on_reset):
    """In a batch of one and in a ragged one: as many entries as the naive sampler has tokens."""
    prompts = random_prompts(10, seed=13)
    options = {**ONE, "max_resets": 2, "on_reset": on_reset}
    naives = [Naive(wavering, prompt, **options) for prompt in prompts]
    assert sum(len(naive.discarded) for naive in naives) >= 4
    for prompt, naive in zip(prompts, naives, strict=True):
        seen, _ = watched(wavering, [prompt], **options)
        assert [lengths for lengths, _, _ in seen] == [[len(c)] for c in naive.contexts]
    seen, _ = watched(wavering, prompts, **options)
    assert len(seen) == max(naive.steps for naive in naives)
    for step, (lengths, _, _) in enumerate(seen):  # rows that are done are gone
        expected = [len(naive.contexts[step]) for naive in naives if step < naive.steps]
        assert sorted(lengths) == sorted(expected)


def test_attention_looks_no_farther_than_the_longest_row(wavering):
    prompts = random_prompts(10, seed=13)
    for on_reset in ("truncate", "keep"):
        seen, done = watched(wavering, prompts, **ONE, on_reset=on_reset)
        assert sum(g.resets for g in done) >= 3
        assert all(visible == max(lengths) for lengths, _, visible in seen)
        assert len({visible for _, _, visible in seen}) > 5


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_watch_sees_what_the_model_says_before_bias_and_mask(wavering, on_reset):
    """Logits as of a full forward pass over what the row has read, [RESET] like any other."""
    options = {**ONE, "on_reset": on_reset}
    resets = 0
    for prompt in random_prompts(6, seed=14):
        seen, [g] = watched(wavering, [prompt], reset_bias=3.0, **options)
        naive = Naive(wavering, prompt, bias=3.0, **options)
        assert len(seen) == g.steps == naive.steps
        for (_, logits, _), expected in zip(seen, naive.logits, strict=True):
            assert logits.shape == (1, V)
            assert logits[0, RESET].isfinite()  # also once it is masked
            torch.testing.assert_close(logits[0], expected, atol=2e-4, rtol=0)
        resets += g.resets
    assert resets >= 4


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_watching_changes_nothing(wavering, temperature):
    options = {**ONE, "temperature": temperature, "reset_bias": 1.0, "max_resets": 2, "seed": 3}
    prompts = random_prompts(8, seed=15)
    seen, done = watched(wavering, prompts, **options)
    assert [outcome(g) for g in done] == [
        outcome(g) for g in generate(wavering, prompts, **options)
    ]
    assert len(seen) == max(g.steps for g in done) and any(g.resets for g in done)


# ── Sampling ──────────────────────────────────────────────────────────────────────────────────────


def test_samples_follow_the_distribution(model):
    """First tokens of 1,500 rows against softmax(logits / temperature), with top-p: chi-square."""
    [prompt] = random_prompts(1, seed=12, low=6)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1].double()
    n = 1500
    for temperature, top_p in ((2.0, 1.0), (4.0, 1.0), (3.0, 0.7)):
        probs = torch.softmax(logits / temperature, dim=-1)
        if top_p < 1:  # by hand: add tokens, most likely first, until their mass reaches top_p
            nucleus, mass = [], 0.0
            for token in probs.argsort(descending=True).tolist():
                if mass >= top_p:
                    break
                nucleus.append(token)
                mass += probs[token].item()
            kept = [p if t in nucleus else 0.0 for t, p in enumerate(probs.tolist())]
            probs = torch.tensor(kept) / mass
        options = {"max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
        done = generate(model, [prompt] * n, reset_id=None, stop_ids=(), **options)
        tokens = torch.tensor([g.tokens[0] for g in done])
        counts = torch.bincount(tokens, minlength=V).double()
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
        assert df >= 5
        assert chi2 < df + 4.5 * (2 * df) ** 0.5 + 10  # far in the tail: about 1 in 10^5


def test_a_difference_in_the_last_bit_rarely_changes_the_token():
    """Two tokens of nearly the same probability change places, as they do from batch size to batch
    size: only a u next to a border may pick another token. In the order of probabilities every u
    between the two would."""
    rows = Rows(torch.zeros(1000), torch.zeros(1000))
    options, u = Options(None, [], 9, 1.0, 0.9), torch.linspace(0, 0.999, 1000)[:, None]
    logits = torch.full((1000, V), -9.0)
    logits[:, [50, 3, 40, 20]] = torch.tensor([1.0, 0.5, 0.5, -2.5])
    picked = []
    for more in (1e-6, -1e-6):
        logits[:, 40] += more
        picked.append(pick(logits.clone(), rows, u, options)[0])
    assert (picked[0] != picked[1]).sum() <= 3
    assert set(picked[0].tolist()) == {3, 40, 50}  # 20 is outside the nucleus


@pytest.mark.parametrize("dtype, most", [(torch.float32, 0), (torch.bfloat16, 8)])
def test_samples_at_top_p_hardly_depend_on_the_batch_size(dtype, most):
    """In fp32 they do not; in bf16 the logits' last bits move, and with them one token in hundreds."""
    model = prone_to(RESET, network_of(MODELS["llama"], scale=0.4)).to(dtype)
    prompts = random_prompts(40, seed=3)
    options = {**ONE, "temperature": 1.0, "top_p": 0.9, "seed": 1}
    whole = generate(model, prompts, **options)
    for size in (1, 7):
        cut = generate(model, prompts, batch_size=size, **options)
        assert sum(a.tokens != b.tokens for a, b in zip(whole, cut, strict=True)) <= most


def test_a_row_depends_on_seed_and_index_only(model):
    prompts = random_prompts(5, seed=13)
    options = {"reset_id": 3, "stop_ids": (4,), "max_new_tokens": 25}
    options |= {"temperature": 1.3, "top_p": 0.95, "max_resets": 2}
    together = generate(model, prompts, seed=7, **options)
    others = [random_prompts(1, seed=50 + i)[0] for i in range(5)]
    for row in range(5):
        batch = [*others[:row], prompts[row], *others[row + 1 :][: 2 if row % 2 else 0]]
        alone = generate(model, batch, seed=7, **options)[row]
        assert outcome(alone) == outcome(together[row])
    assert generate(model, prompts, seed=8, **options)[0].tokens != together[0].tokens
    twins = generate(model, [prompts[0]] * 2, seed=7, **options)
    assert twins[0].tokens != twins[1].tokens  # the same prompt in two rows: two samples


def test_how_a_list_is_cut_into_batches_changes_nothing(model):
    """With sample_ids a row keeps its random numbers, whatever its batch and its place in it."""
    prompts = random_prompts(7, seed=14)
    prompts[5] = prompts[2]
    options = {"reset_id": 3, "stop_ids": (4,), "max_new_tokens": 20, "temperature": 1.3}
    options |= {"max_resets": 2, "reset_bias": 1.0, "seed": 7}
    whole = generate(model, prompts, **options)
    assert any(g.resets for g in whole)
    orders = ((range(7), 3), (range(6, -1, -1), 2), ((3, 5, 2, 0, 6, 1, 4), 4), (range(7), 1))
    for order, size in orders:
        order = list(order)
        for batch in (order[i : i + size] for i in range(0, 7, size)):
            cut = generate(model, [prompts[i] for i in batch], sample_ids=batch, **options)
            for i, g in zip(batch, cut, strict=True):
                assert outcome(g) == outcome(whole[i])
    # One number, one sample; another number, another. They may be any, and as large as one likes.
    same = generate(model, [prompts[2]] * 4, sample_ids=[2, 2, 5, 10**12], **options)
    assert same[0].tokens == same[1].tokens == whole[2].tokens
    assert same[2].tokens == whole[5].tokens
    assert len({tuple(g.tokens) for g in same}) == 3


def test_long_answers_draw_fresh_numbers():
    """Random numbers come in blocks of 256 steps: none is used again, none is lost at the border."""
    model = network_of(TIED["llama"], seed=0, scale=0.4, max_position_embeddings=2048)
    [prompt] = random_ids(2, vocab=V)
    options = {"reset_id": None, "stop_ids": (), "temperature": 3.0, "seed": 1}
    [long] = generate(model, [prompt], max_new_tokens=520, **options)
    assert long.tokens[:256] != long.tokens[256:512]
    [short] = generate(model, [prompt], max_new_tokens=270, **options)
    assert long.tokens[:270] == short.tokens


@pytest.mark.parametrize("on_reset, temperature", [("truncate", 0.0), ("keep", 1.0)])
def test_batches_one_after_another_give_the_same_answers(wavering, on_reset, temperature):
    """16 prompts, at most 3 rows: token for token what all get in one batch, and events name the row."""
    prompts, prefill = random_prompts(16, seed=30), [[] for _ in range(16)]
    for row in (1, 9, 15):
        prefill[row] = [1, 2, 3]
    options = {**ONE, "on_reset": on_reset, "temperature": temperature, "max_resets": 2, "seed": 5}
    at_once = generate(wavering, prompts, prefill=prefill, **options)
    seen, done = watched(wavering, prompts, prefill=prefill, batch_size=3, **options)
    assert [outcome(g) for g in done] == [outcome(g) for g in at_once]
    assert {g.resets for g in done} >= {0, 1} and len({g.steps for g in done}) > 5
    assert max(len(lengths) for lengths, _, _ in seen) == 3
    shown = [[] for _ in prompts]
    for event in stream(wavering, prompts, prefill=prefill, batch_size=3, **options):
        if isinstance(event, Token):
            shown[event.row].append(event.id)
        elif isinstance(event, Reset):
            shown[event.row].clear()
    assert shown == [g.tokens for g in done]


# ── The step itself ───────────────────────────────────────────────────────────────────────────────


class NoSync(TorchDispatchMode):
    """Raises on every operation that would make the host wait for the device."""

    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = any(name == w or name.startswith(w + "_") for w in self.waiting)
        assert not waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decode_step_never_waits_for_the_device(model, temperature, on_reset):
    B = 4
    cache = KVCache(model.config, B, 40)
    options = Options(3, [1], 9, temperature, 0.9, reset_bias=0.5, on_reset=on_reset)
    with torch.no_grad():
        logits = model(torch.tensor(random_ids(*[6] * B, vocab=V)), cache)[:, -1]
        logits[:, 3] = torch.tensor([-1e9, 1e9, -1e9, -1e9])  # one row resets
        rows = Rows(torch.full((B,), 6), torch.zeros(B, dtype=torch.int64))
        u = torch.tensor([[0.1], [0.4], [0.7], [0.99]])
        with NoSync():
            token, _ = pick(logits, rows, u, options)
            feed(model, token, rows, cache, options)
        assert rows.resets.tolist() == [0, 1, 0, 0]
        with pytest.raises(AssertionError, match="waits"), NoSync():
            token.sum().item()


def test_finished_rows_are_not_computed(model, monkeypatch):
    """The rows that go through the network add up to the tokens that had to be fed, no more."""
    prompts = random_prompts(8, seed=15)
    stop_ids = {said_at(model, p, 2 + i) for i, p in enumerate(prompts)}
    widths, forward = [], model.forward

    def logged(tokens, cache, at=None):
        widths.append(tokens.shape[0])
        return forward(tokens, cache, at=at)

    monkeypatch.setattr(model, "forward", logged)
    done = generate(model, prompts, reset_id=None, stop_ids=stop_ids, max_new_tokens=20)
    assert len({g.steps for g in done}) > 2
    assert widths[0] == 8  # all prompts in one go
    assert sum(widths[1:]) == sum(g.steps - 1 for g in done)  # a row's last token is never fed


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
def test_the_cache_holds_what_is_promised_and_no_more(wavering, on_reset, monkeypatch):
    """truncate: room for one attempt, whatever is discarded; keep: for all. No write beyond it."""
    made, top = [], []

    class Watched(KVCache):
        def __init__(self, config, batch_size, capacity, *args):
            super().__init__(config, batch_size, capacity, *args)
            made.append(capacity)

        def write(self, layer, k, v, positions):
            top.append(int(positions.max()))
            assert positions.max() < self.visible <= self.capacity
            return super().write(layer, k, v, positions)

    monkeypatch.setattr(module, "KVCache", Watched)
    prompts = random_prompts(30, seed=16, low=10, high=10)
    options = {"max_new_tokens": 7, "max_resets": 3, "on_reset": on_reset, "prefill": [[1, 2]] * 30}
    done = generate(wavering, prompts, reset_id=RESET, stop_ids=(), **options)
    assert max(g.resets for g in done) == 3
    attempts = 7 if on_reset == "truncate" else 4 * 7
    assert made == [10 + 3 + 2 + attempts]
    assert max(top) < made[0]


# ── With a host that lags behind, as on CUDA ──────────────────────────────────────────────────────


class OnCuda(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


def test_a_finished_row_that_is_computed_on_stays_in_its_cache(model):
    """The host reads a step late; what such a row says meanwhile goes to its own last entry."""
    cache = KVCache(model.config, 2, capacity=8)
    cache.lengths = torch.tensor([6, 3])
    rows = Rows(torch.tensor([6, 3]), torch.zeros(2, dtype=torch.int64))
    options, lengths = Options(3, [], 9), []
    for token in (
        [4, 4],
        [4, 3],
        [4, 4],
        [3, 4],
        [3, 4],
        [3, 4],
    ):  # the last 2 resets: one too many
        with torch.no_grad():
            feed(model, torch.tensor(token).as_subclass(OnCuda), rows, cache, options)
        lengths.append(cache.lengths.tolist())
    assert lengths == [[7, 4], [8, 4], [8, 5], [7, 6], [8, 7], [8, 8]]


@pytest.mark.parametrize("name", MODELS)
def test_a_lagging_host_tells_the_same(name, monkeypatch):
    """A device that says it is CUDA: tokens are read a step late, finished rows leave by halves.

    Prompts are so long that attention soon has to look beyond its first block of 256.
    """
    model = network_of(MODELS[name], scale=0.4, max_position_embeddings=512)
    prone_to(RESET, model)
    prompts = random_prompts(16, seed=26, low=240, high=252)
    stop_ids = {said_at(model, p, 4 + 2 * i) for i, p in enumerate(prompts[:9])} - {RESET}
    options = {"reset_id": RESET, "stop_ids": stop_ids, "max_new_tokens": 30, "max_resets": 2}
    expected = generate(model, prompts, **options)
    assert sum(g.finish_reason == "stop" for g in expected) >= 4
    assert sum(g.resets for g in expected) >= 5

    class Cuda(str):
        type = "cuda"

    monkeypatch.setattr(Transformer, "device", Cuda("cpu"))
    fed, looked, forward = [], [], model.forward

    def as_on_cuda(tokens, cache, at=None):
        fed.append(len(tokens))
        if at is None:  # a decode step; rows that are done stay in their cache as they do there
            cache.truncate(cache.lengths.clamp(max=cache.capacity - 1))
            looked.append(cache.visible)
            assert cache.lengths.max() < cache.visible
        return forward(tokens, cache, at=at)

    monkeypatch.setattr(model, "forward", as_on_cuda)
    done = generate(model, prompts, **options)
    assert [outcome(g) for g in done] == [outcome(g) for g in expected]
    steps = max(g.steps for g in expected)
    assert len(fed) == 1 + steps  # the prompts, and one step past the end of the last row
    assert all(b == a or 2 * b <= a for a, b in itertools.pairwise(fed)) and len(set(fed)) > 2
    capacity = max(map(len, prompts)) + 2 + 30
    assert set(looked) == {256, capacity} and looked[0] == 256


@pytest.mark.parametrize("lag", [0, 1])
def test_how_far_attention_looks(model, lag):
    """Without lag as far as the longest row; with it one farther, in blocks of 256."""
    cache = KVCache(model.config, 2, 700)
    rows = [Record(0, [1], [], entries=5), Record(1, [1], [], entries=9)]
    for entries in (9, 254, 255, 256, 257, 511, 512, 600, 699, 700):
        rows[1].entries = entries
        expected = entries
        if lag:
            expected = next(n for n in (256, 512, 700) if n >= min(entries + 1, 700))
        assert entries_in_use(rows, cache, lag) == expected
        assert entries_in_use(rows[::-1], cache, lag) == expected
    assert entries_in_use(rows[:1], cache, lag) == (256 if lag else 5)


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1] * 300]), "prompt 0 is too long: 300 tokens"),
        (dict(prompts=[[1] * 230], max_new_tokens=30), "too long: 230 tokens, and 261"),
        (dict(prompts=[[1] * 200], max_new_tokens=30, on_reset="keep"), "too long"),
        (dict(prompts=[[V]]), "outside the model's vocabulary"),
        (dict(prompts=[[-1]]), "outside the model's vocabulary"),
        (dict(prefill=[[V]]), "outside the model's vocabulary"),
        (dict(reset_id=V), "outside the model's vocabulary"),
        (dict(stop_ids=(V,)), "outside the model's vocabulary"),
        (dict(stop_ids=(3,)), "also a stop id"),
        (dict(prefill=[[3]]), "prefill 0 contains"),
        (dict(prefill=[[4]]), "prefill 0 contains"),
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
        (dict(hold_back=-1), "hold_back"),
        (dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_bad_input_is_named(model, change, message):
    good = {"prompts": [[1, 2]], "reset_id": 3, "stop_ids": (4,), "max_new_tokens": 5}
    if change.get("on_reset") == "keep":  # one attempt would fit; two do not
        fits = {**good, **change, "on_reset": "truncate"}
        generate(model, fits.pop("prompts"), **fits)
    options = {**good, **change}
    with pytest.raises(InputError, match=message):
        stream(model, options.pop("prompts"), **options)  # at the call, not at the first event


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value, temperature):
    model = network_of(TIED["llama"])
    with torch.no_grad():
        model.lm_head.weight[5] = value
    options = {"reset_id": 3, "stop_ids": (4,), "max_new_tokens": 5, "temperature": temperature}
    with pytest.raises(InputError, match="row 0: logits are not finite"):
        generate(model, [[1, 2]], **options)


def test_no_prompts_is_no_answers(model):
    assert generate(model, [], reset_id=3, stop_ids=(4,), max_new_tokens=5) == []


# ── Held back ─────────────────────────────────────────────────────────────────────────────────────


def released(events, n, prefill):
    """What is shown in the end and of each attempt taken back, from the definition: the i-th token
    of an attempt is shown if n more were sampled before its reset; at the end all are."""
    shown = {row: [] for row in range(len(prefill))}
    for row, forced in enumerate(prefill):
        attempt, first = [], len(forced)
        for event in (event for event in events if event.row == row):
            if isinstance(event, Token):
                attempt.append(event.id)
            elif isinstance(event, Reset):
                sampled = len(attempt) - first
                count = sum(sampled - max(0, i + 1 - first) >= n for i in range(len(attempt)))
                shown[row].append(attempt[:count])
                attempt, first = [], 0
            else:
                shown[row].append(attempt)
    return shown


@pytest.mark.parametrize("n", [0, 1, 3, 8, 100])
def test_a_token_is_shown_once_n_more_were_sampled_without_a_reset(wavering, n):
    prompts, prefill = random_prompts(5), [[], [1, 2, 3], [4], [], [5, 6, 8, 9, 10, 12]]
    options = dict(reset_id=RESET, stop_ids=[STOP], max_new_tokens=20, max_resets=3)
    events = list(stream(wavering, prompts, prefill=prefill, **options))
    late = list(stream(wavering, prompts, prefill=prefill, hold_back=n, **options))
    shown, now = {row: [] for row in range(5)}, {row: [] for row in range(5)}
    for event in late:
        if isinstance(event, Token):
            now[event.row].append(event.id)
        else:
            shown[event.row].append(now[event.row])
            now[event.row] = []
    assert shown == released(events, n, prefill)
    ends = [event for event in events if not isinstance(event, Token)]
    late_ends = [event for event in late if not isinstance(event, Token)]
    assert [(e.row, type(e)) for e in late_ends] == [(e.row, type(e)) for e in ends]
    for event, other in zip(ends, late_ends, strict=True):  # a Reset still says all that it took
        if isinstance(event, Reset):
            assert event.discarded == other.discarded
        else:
            assert event.generation.tokens == other.generation.tokens == shown[event.row][-1]
    assert any(isinstance(event, Reset) for event in events)


def test_a_token_is_not_held_longer_than_promised(wavering):
    """When the stream hands out a token, exactly n more of its row have been sampled."""
    sampled, n = [], 4

    def watch(logits, cache):
        sampled.append(len(sampled))

    options = dict(reset_id=None, stop_ids=[], max_new_tokens=12, watch=watch, hold_back=n)
    steps = [len(sampled) for e in stream(wavering, [[1, 2]], **options) if isinstance(e, Token)]
    assert steps == [*range(n + 1, 13), *[12] * n]
