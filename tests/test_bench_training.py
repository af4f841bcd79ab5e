"""What the training benchmark counts and compares, on rows that are counted by hand. No timing is asserted anywhere."""

import json
import math

import pytest
import torch
from command import command
from models import FAMILIES, LLAMA, network_of
from samples import BEGIN, EOT, HEADER, HEADER_END, RESET, llama_tokenizer, row_of, write

from backtrack.bench import training as bench_training
from backtrack.bench.training import Plain, both_ways, computed_tokens, plain_loss, step_speed, tree_loss
from backtrack.rows import Row, load_rows

KINDS = ("sft, one k", "sft, every k", "dpo")
V = 512  # the tokenizer's


@pytest.fixture
def tok():
    """Ids are bytes; eos is EOT."""
    return llama_tokenizer()


@pytest.fixture(params=list(FAMILIES))
def model(request):
    return network_of(FAMILIES[request.param], vocab_size=V)


def rows_of(*answers):
    """Prompts of 3 tokens."""
    return [Row([1, 2, 3], list(good.encode()), list(bad.encode()), True) for good, bad in answers]


# y− of one token, so that k is 1 and nothing is drawn; y+ of one token as well, for DPO's other prefix.
SHORT = rows_of(("n", "y"), ("m", "z"), ("o", "y"), ("p", "q"))


# ── Both ways to write a row ─────────────────────────────────────────────────────────────────────────────────────────


def test_sequences_of_a_row(tok):
    x, n, y = [1, 2, 3], *b"ny"
    _, plain = both_ways("sft, one k", SHORT[0], 0, tok)
    assert plain == [
        Plain([*x, n, EOT], 3, 0.5),
        Plain([*x, y, RESET, n, EOT], 4, 0.5),
    ]
    assert both_ways("sft, every k", SHORT[0], 0, tok)[1] == plain
    _, plain = both_ways("dpo", SHORT[0], 0, tok)
    pairs = [tuple(plain[i : i + 2]) for i in range(0, len(plain), 2)]
    elicit = Plain([*x, y, RESET, n, EOT], 3, 1.0), Plain([*x, y, EOT], 3, -1.0)
    discourage = Plain([*x, n, EOT], 3, 1.0), Plain([*x, n, RESET, y, EOT], 3, -1.0)
    assert sorted(pairs, key=str) == sorted([elicit, discourage], key=str)


def test_prefixes_are_drawn_for_each_row(tok):
    """Of y− in supervised training and, independently, of y+ in DPO; the same whenever the row is asked for."""
    [row] = rows_of(("abcdefghij", "ABCDEFGHIJ"))
    cuts = set()
    for index in range(40):
        tree, plain = both_ways("dpo", row, index, tok)
        again, same = both_ways("dpo", row, index, tok)
        assert (tree, plain) == (again, same)
        [a, b] = (s.tokens.index(RESET) - 3 for s in plain if RESET in s.tokens)
        assert 1 <= a <= 10 and 1 <= b <= 10
        cuts.add((a, b))
    assert len(cuts) > 15 and any(a != b for a, b in cuts)


# ── The two sides are one sum ────────────────────────────────────────────────────────────────────────────────────────

LONGER = rows_of(("no way", "yes, of course"), ("I will not say", "sure"), ("n", "y"), ("abcabc", "abdabd"))


@torch.no_grad()
def by_hand(model, sequences):
    """Σ weight · log π, a forward pass for each target."""
    total = 0.0
    for s in sequences:
        for t in range(s.loss_from, len(s.tokens)):
            log_p = model(torch.tensor([s.tokens[:t]]))[0, -1].double().log_softmax(dim=-1)
            total += s.weight * log_p[s.tokens[t]].item()
    return total


@pytest.mark.parametrize("kind", ["sft, one k", "dpo"])
def test_trees_and_plain_sequences_have_one_loss_and_one_gradient(model, tok, kind):
    trees, plain = [], []
    for index, row in enumerate(LONGER):
        tree, sequences = both_ways(kind, row, index, tok)
        trees.append(tree)
        plain += sequences
    losses = tree_loss(model, trees), plain_loss(model, plain)
    expected = by_hand(model, plain)
    assert abs(expected) > 10
    assert [loss.item() for loss in losses] == [pytest.approx(expected, rel=1e-4, abs=1e-3)] * 2
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_every_k_is_the_mean_over_k(model, tok):
    """Σ over all [RESET] targets is what one drawn k has in expectation."""
    [row] = rows_of(("no", "yes, of course"))
    tree, plain = both_ways("sft, every k", row, 0, tok)
    answer, back = plain
    begun = back.tokens[: back.loss_from]  # x ⊕ prefix_k
    tail = Plain(back.tokens, back.loss_from + 1, 0.5)  # y+ eos behind the [RESET] that was drawn
    n = len(row.rejected)
    resets = [Plain([1, 2, 3, *row.rejected[:j], RESET], 3 + j, 0.5 / n) for j in range(1, n + 1)]
    assert begun[:3] == [1, 2, 3] and begun[3:] == row.rejected[: len(begun) - 3]
    expected = by_hand(model, [answer, tail, *resets])
    assert tree_loss(model, [tree]).item() == pytest.approx(expected, rel=1e-4)


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_computed_tokens_by_hand(tok):
    """Every row is x1 x2 x3, one y−, one y+: the last token of a sequence is never read.

    sft   x n eos | x y R n eos: 4 and 6 tokens read, padded to 6 each.
          The tree: x (3), n, y, R, n below R: 7.
    dpo   x y R n eos, x y eos, x n eos, x n R y eos: four sequences of at most 6.
          The tree: x (3), y, R, n, and n, R, y: 9.
    """
    for kind, separate, tree in (("sft, one k", 12, 7), ("sft, every k", 12, 7), ("dpo", 24, 9)):
        for accumulate in (1, 2):
            found = computed_tokens(kind, SHORT, tok, accumulate)
            size = 2 if kind == "dpo" else 4
            assert found == {
                "name": f"{kind}, micro-batches of {size}, {accumulate} a step",
                "separate": separate,
                "trees": tree,
                "without_padding": tree,
            }


def test_computed_tokens_count_padding(tok, monkeypatch):
    """Answers of 1 and of 5 tokens: side by side the short ones are padded, sorted first they are not."""
    short, long = rows_of(("n", "y"), ("nopqr", "y"))
    rows = [short, long, short, long, long, short, long, short]
    # Read by themselves: short ones 4 and 6 tokens, long ones 8 and 10. Trees of 7, and of 3 + 5 + 1 + 1 + 5 = 15.
    one_by_one = computed_tokens("sft, one k", rows, tok, 1)
    assert one_by_one["separate"] == 2 * 10
    assert one_by_one["without_padding"] == (7 + 15) / 2
    # Two of each in a micro-batch. A lane may be 22 wide: two lanes of 15 + 7, and nothing is padded.
    assert one_by_one["trees"] == 2 * 22 / 4
    # Without lanes four trees would be four times the longest, unless a step is sorted first.
    monkeypatch.setattr("backtrack.examples.share_lanes", lambda lengths: [[i] for i in range(len(lengths))])
    assert computed_tokens("sft, one k", rows, tok, 1)["trees"] == 15
    assert computed_tokens("sft, one k", rows, tok, 2)["trees"] == (7 + 15) / 2


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reports_what_it_measured(tok, kind):
    rows = [row for row in LONGER for _ in range(3)]
    found = step_speed(kind, network_of(LLAMA, vocab_size=V), rows, tok, steps=2)
    assert found["name"].startswith(kind)
    assert found["rows_per_s"] / found["separate_rows_per_s"] == pytest.approx(found["ratio"])
    assert found["range"][0] <= found["range"][1]
    assert all(math.isfinite(v) and v > 0 for k, v in found.items() if k.endswith(("_s", "ratio")))


@pytest.mark.parametrize("kind", ["sft, one k", "dpo"])
def test_sides_that_disagree_end_the_benchmark(tok, kind, monkeypatch):
    def without_eos(model, sequences):
        return plain_loss(model, [Plain(s.tokens[:-1], s.loss_from, s.weight) for s in sequences])

    monkeypatch.setattr(bench_training, "plain_loss", without_eos)
    with pytest.raises(AssertionError):
        step_speed(kind, network_of(LLAMA, vocab_size=V), LONGER, tok, steps=1)


def test_same_loss_with_another_gradient_ends_it_too(tok, monkeypatch):
    def detached(model, sequences):
        loss = plain_loss(model, sequences)
        return loss.detach() + 0.5 * (loss - loss.detach())

    monkeypatch.setattr(bench_training, "plain_loss", detached)
    with pytest.raises(AssertionError):
        step_speed("dpo", network_of(LLAMA, vocab_size=V), LONGER, tok, steps=1)


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def place(tmp_path, tok):
    rows = [row_of(f"Say {i}", "no" * (i % 3 + 1), "yes" * (i % 4 + 1), unsafe=i % 5 > 0) for i in range(40)]
    write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "tokenizer").mkdir()
    tok.save(tmp_path / "tokenizer")
    return tmp_path


def words(place, *more):
    return ("--rows", place / "rows.jsonl", "--tokenizer", place / "tokenizer", *more)


def test_the_whole_command(place, tok, monkeypatch):
    monkeypatch.setattr(bench_training, "LLAMA_125M", network_of(LLAMA).config)
    out = place / "deep" / "bench.json"
    printed, _ = command(bench_training.main, *words(place, "--steps", 1, "--out", out))
    report = json.loads(out.read_text())
    rows = [row for row in load_rows([str(place / "rows.jsonl")], tok, 2048) if row.unsafe]
    assert report["rows"] == len(rows) == 32 and printed.startswith("32 rows\n")
    assert rows[0].prompt[:2] == [BEGIN, HEADER] and HEADER_END in rows[0].prompt
    assert {"command", "commit", "machine", "threads"} < set(report)
    assert [r["name"] for r in report["cost"]] == [
        f"{kind}, micro-batches of {size}, {n} a step"
        for kind, size in zip(KINDS, (4, 4, 2), strict=True)
        for n in (1, 32)
    ]
    for r in report["cost"]:
        assert r["without_padding"] <= r["trees"] < r["separate"]
        cells = [f"{r[key]:.0f}" for key in ("separate", "trees", "without_padding")]
        [line] = [line for line in printed.splitlines() if line.startswith(r["name"] + " ")]
        assert line.split()[-3:] == cells
    assert [r["name"].split(", micro")[0] for r in report["speed"]] == list(KINDS)


def test_too_few_rows(place):
    _, said = command(bench_training.main, *words(place), "--steps", 12, code=2)
    assert said == "error: 32 rows with an unsafe answer, 52 are needed; lower --steps\n"
