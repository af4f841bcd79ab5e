"""The cache against the same model without one: what a row has read is a list, and nothing else may matter.

`lengths` counts valid entries, always: a read adds what was read, truncate cuts back, and a row that
was cut back is as if it had never read more.
"""

import math
import random

import pytest
import torch
from models import GEMMA, LLAMA, network_of

from model import KVCache

CLOSE = 2e-4
V = 67
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {"vocab_size": V, "num_hidden_layers": 3, "head_dim": 16}
MODELS = {
    "llama": LLAMA | SIZES | {"rope_theta": 100.0, "rope_scaling": LLAMA_3},
    "gemma": GEMMA | SIZES | {"sliding_window": 11},  # in layers 0 and 2
    "gemma uncapped": GEMMA | SIZES | {"sliding_window": 11, "attn_logit_softcapping": None},
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return network_of(MODELS[request.param], seed=3, scale=0.4)


def random_tokens(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return (a - b).abs().max().item()


def read(model, cache, tokens):
    """Logits of tokens (B, T), which now count, in every row."""
    before = cache.lengths
    logits = model(tokens, cache)
    assert torch.equal(cache.lengths, before + tokens.shape[1])
    return logits


# ── Reading on ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "chunks", [[1] * 40, [9] + [1] * 31, [13, 1, 1, 14, 11], [39, 1], [40]], ids=len
)
@torch.no_grad()
def test_cached_equals_uncached(model, chunks):
    tokens = random_tokens(3, 40)
    cache = KVCache(model.config, 3, 64)
    assert cache.lengths.tolist() == [0] * 3
    logits = [read(model, cache, chunk) for chunk in tokens.split(chunks, dim=1)]
    assert distance(torch.cat(logits, dim=1), model(tokens)) < CLOSE
    assert cache.lengths.tolist() == [40] * 3


@torch.no_grad()
def test_hidden_states_are_read_as_logits_are(model):
    """Decoder, which attacks call by itself, counts what it reads as Transformer does."""
    tokens, cache = random_tokens(2, 9), KVCache(model.config, 2, 16)
    hidden = [model.model(chunk, cache) for chunk in tokens.split([5, 4], dim=1)]
    assert cache.lengths.tolist() == [9, 9]
    assert distance(torch.cat(hidden, dim=1), model.model(tokens)) < CLOSE


@torch.no_grad()
def test_a_full_cache_is_full(model):
    """A cache of 12 entries takes 12 tokens."""
    tokens, cache = random_tokens(1, 12), KVCache(model.config, 1, 12)
    logits = [read(model, cache, chunk) for chunk in tokens.split([10, 1, 1], dim=1)]
    assert distance(torch.cat(logits, dim=1), model(tokens)) < CLOSE


@torch.no_grad()
def test_at_with_a_cache(model):
    """The logits asked for, of rows padded on the right; what the others are does not matter."""
    tokens, lengths = random_tokens(3, 20, seed=1), [3, 20, 12]
    cache, whole = KVCache(model.config, 3, 24), KVCache(model.config, 3, 24)
    at = torch.tensor([n - 1 + 20 * row for row, n in enumerate(lengths)])
    logits = model(tokens, cache, at=at)
    assert logits.shape == (3, V) and cache.lengths.tolist() == [20] * 3
    full = read(model, whole, tokens)
    for row, n in enumerate(lengths):
        assert distance(logits[row], full[row, n - 1]) < CLOSE
        assert distance(logits[row], model(tokens[row : row + 1, :n])[0, -1]) < CLOSE


@torch.no_grad()
def test_ragged_rows_are_as_if_alone(model):
    """Rows of 3, 20 and 12 tokens padded on the right, then stepped together.

    With other padding: the same bits.
    """
    lengths, steps = [3, 20, 12], 15
    texts = [random_tokens(n + steps, seed=n) for n in lengths]
    alone = [model(text[None])[0] for text in texts]
    results = []
    for seed in (0, 1):
        padded = random_tokens(3, 20, seed=seed)
        for row, text in enumerate(texts):
            padded[row, : lengths[row]] = text[: lengths[row]]
        cache = KVCache(model.config, 3, 48)
        logits = read(model, cache, padded)
        cache.truncate(torch.tensor(lengths))
        got = [[*logits[row, :n]] for row, n in enumerate(lengths)]
        for step in range(steps):
            next_tokens = [text[n + step] for text, n in zip(texts, lengths, strict=True)]
            logits = read(model, cache, torch.stack(next_tokens)[:, None])
            for row in range(3):
                got[row].append(logits[row, 0])
        assert cache.lengths.tolist() == [n + steps for n in lengths]
        results.append([torch.stack(rows) for rows in got])
        for row, (logits, expected) in enumerate(zip(results[-1], alone, strict=True)):
            assert distance(logits, expected) < CLOSE, row
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ── Taking back ───────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_truncate_then_rewrite_equals_fresh(model):
    """Each row is cut back to its own length, one to nothing, and reads on: as if never more."""
    kept = [0, 5, 21, 30]
    first, second = random_tokens(4, 30, seed=4), random_tokens(4, 14, seed=5)
    cache = KVCache(model.config, 4, 48)
    read(model, cache, first)
    cache.truncate(torch.tensor(kept))
    assert cache.lengths.tolist() == kept
    logits = [read(model, cache, second[:, :3])]
    logits += [read(model, cache, t) for t in second[:, 3:].split(1, dim=1)]
    logits = torch.cat(logits, dim=1)
    for row, n in enumerate(kept):
        fresh = model(torch.cat((first[row, :n], second[row]))[None])[0, n:]
        assert distance(logits[row], fresh) < CLOSE
    assert cache.lengths.tolist() == [n + 14 for n in kept]


@torch.no_grad()
def test_truncate_never_lengthens_a_row(model):
    cache = KVCache(model.config, 3, 16)
    read(model, cache, random_tokens(3, 5))
    cache.truncate(torch.tensor([5, 6, 4]))
    assert cache.lengths.tolist() == [5, 5, 4]


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_any_history_of_reads_cuts_and_departures(model, seed):
    """Rows read chunks, are cut back anywhere, each by itself, and leave; lists tell what remains."""
    rng = random.Random(seed)
    read_by = [[] for _ in range(5)]
    cache = KVCache(model.config, 5, 60)
    cuts = 0
    for _ in range(30):
        longest = max(map(len, read_by))
        T = min(rng.choice((1, 1, 1, 2, 7)), 60 - longest)
        if T > 0:
            tokens = random_tokens(len(read_by), T, seed=rng.randrange(10**6))
            if rng.random() < 0.5:
                cache.visible = rng.randint(longest + T, 60)
            logits = read(model, cache, tokens)
            cache.visible = 60
            for row, ids in zip(read_by, tokens.tolist(), strict=True):
                row += ids
            for row, ids in enumerate(read_by):
                expected = model(torch.tensor([ids]))[0, -T:]
                assert distance(logits[row], expected) < CLOSE
        if T < 1 or rng.random() < 0.4:
            keep = [rng.choice((len(ids), rng.randint(0, len(ids)))) for ids in read_by]
            cuts += sum(n < len(ids) for n, ids in zip(keep, read_by, strict=True))
            cache.truncate(torch.tensor(keep))
            read_by = [ids[:n] for n, ids in zip(keep, read_by, strict=True)]
        if len(read_by) > 2 and rng.random() < 0.1:
            gone = rng.randrange(len(read_by))
            order = list(range(len(read_by) - 1))
            if gone < len(order):
                order[gone] = len(read_by) - 1
            cache.keep_rows(order)
            read_by = [read_by[row] for row in order]
        assert cache.lengths.tolist() == [len(ids) for ids in read_by]
    assert cuts > 10 and len(read_by) < 5


@torch.no_grad()
def test_stale_entries_change_nothing(model):
    """Whatever finite numbers lie at and beyond a row's length: not one bit of the logits moves."""
    kept, tokens = [2, 17, 9], random_tokens(3, 8, seed=6)
    results = []
    for garbage in (0.0, 1e30):
        cache = KVCache(model.config, 3, 40)
        read(model, cache, random_tokens(3, 17, seed=7))
        cache.truncate(torch.tensor(kept))
        for tensor in cache.k + cache.v:
            for row, n in enumerate(kept):
                tensor[row, :, n:] = garbage
        parts = [read(model, cache, t) for t in tokens.split([5, 1, 1, 1], dim=1)]
        results.append(torch.cat(parts, dim=1))
        for tensor in cache.k + cache.v:  # it is still there, behind the 8 that were read
            behind = [tensor[row, :, n + 8 :] for row, n in enumerate(kept)]
            assert all((entries == garbage).all() for entries in behind)
    assert results[0].isfinite().all() and torch.equal(*results)


def test_cache_starts_at_zero(model):
    """Masked entries weigh 0, and 0 · NaN would be NaN. Here torch fills what is uninitialised."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(4).isnan().all()
        cache = KVCache(model.config, 2, 24)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    assert not any(tensor.any() for tensor in cache.k + cache.v)
    with torch.no_grad():
        logits = [read(model, cache, t) for t in random_tokens(2, 10).split([8, 1, 1], dim=1)]
    assert all(part.isfinite().all() for part in logits)


# ── What attention looks at ───────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_attention_looks_at_the_visible_part_only(model):
    """`visible` spares attention the empty tail and changes nothing; behind it may even be NaN."""
    tokens, lengths = random_tokens(2, 30, seed=8), [10, 16]
    cache, spared = KVCache(model.config, 2, 200), KVCache(model.config, 2, 200)
    for c in (cache, spared):
        read(model, c, tokens[:, :16])
        c.truncate(torch.tensor(lengths))
    for step in range(10):
        spared.visible = 17 + step
        token = torch.stack([tokens[row, n + step] for row, n in enumerate(lengths)])[:, None]
        for tensor in spared.k + spared.v:
            tensor[:, :, spared.visible :] = math.nan
        assert distance(read(model, spared, token), read(model, cache, token)) < CLOSE
        for tensor in spared.k + spared.v:
            tensor[:, :, spared.visible :] = 0.0  # as a cache has it: soon one more is visible
    k, v = spared.write(
        0, *(t[0][:, :, :1] for t in (spared.k, spared.v)), torch.tensor([[0], [0]])
    )
    K, hd = model.config.num_key_value_heads, model.config.head_dim
    assert k.shape == v.shape == (2, K, 26, hd)


# ── Rows that leave ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [[0, 3, 2], [3, 2], [0, 1, 2, 3], [2], [0]], ids=str)
@torch.no_grad()
def test_rows_that_stay_are_not_disturbed_by_rows_that_leave(model, order):
    lengths, tokens = [4, 19, 11, 16], random_tokens(4, 26, seed=9)
    cache = KVCache(model.config, 4, 40)
    read(model, cache, tokens[:, :19])
    cache.truncate(torch.tensor(lengths))
    cache.keep_rows(order)
    assert cache.lengths.tolist() == [lengths[old] for old in order]
    assert all(t.shape[0] == len(order) for t in cache.k + cache.v)
    more = random_tokens(len(order), 4, seed=10)
    logits = read(model, cache, more)
    for row, old in enumerate(order):
        alone = model(torch.cat((tokens[old, : lengths[old]], more[row]))[None])[0, -4:]
        assert distance(logits[row], alone) < CLOSE
