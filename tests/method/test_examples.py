"""Rows to sequences, weights and losses: against sequences written out by hand.

What a model is taught is decided here and nowhere else: which tokens it is shown, and on which of them loss falls.
"""

import argparse
import dataclasses
import itertools
import math
import random
from collections import Counter

import pytest
from samples import (
    BEGIN,
    END_OF_TEXT,
    EOT,
    HEADER,
    HEADER_END,
    RESET,
    TOKENIZERS,
    UNSAFE,
    llama_tokenizer,
    row_of,
    said,
    toy_pieces,
    toy_tokenizer,
    user,
)

from backtrack.examples import Pair, View, dpo_pairs, draw_prefix, sft_views
from backtrack.rows import Row, encode_row


@pytest.fixture(params=list(TOKENIZERS))
def tok(request):
    return TOKENIZERS[request.param]()


# ── The views of supervised training ──────────────────────────────────────────────────────────────

# How much a target counts. A safe row counts once; an unsafe one twice, for its answer and for the way back.
HALF, QUARTER = 0.5, 0.25


def test_views_of_llama_by_hand():
    llama = llama_tokenizer()
    x = [BEGIN, HEADER, *b"user", HEADER_END, *b"\n\nHi", EOT]
    x += [HEADER, *b"assistant", HEADER_END, *b"\n\n"]
    row = encode_row(UNSAFE, llama)
    assert row == Row(prompt=x, chosen=[*b"no"], rejected=[*b"yes"], unsafe=True)
    n = len(x)
    answer = View("answer", [*x, *b"no", EOT], n, HALF)
    restart = View("restart", [*x, RESET, *b"no", EOT], n + 1, QUARTER)
    assert sft_views(row, 2, llama, resets="drawn", restart="all") == [
        answer,
        View("backtrack", [*x, *b"ye", RESET, *b"no", EOT], n + 2, HALF),
        restart,
    ]
    # Every reset: [RESET] after y, ye and yes, together as much as one target; y+ after the drawn one alone.
    assert sft_views(row, 2, llama, resets="every", restart="all") == [
        answer,
        View("backtrack", [*x, *b"ye", RESET, *b"no", EOT], n + 3, HALF),
        View("reset", [*x, *b"y", RESET], n + 1, HALF / 3),
        View("reset", [*x, *b"ye", RESET], n + 2, HALF / 3),
        View("reset", [*x, *b"yes", RESET], n + 3, HALF / 3),
        restart,
    ]
    heavy = sft_views(row, 2, llama, resets="every", reset_weight=4.0)
    assert [v.weight for v in heavy] == [HALF, HALF, *[4 * HALF / 3] * 3]
    assert sft_views(row, 2, llama, resets="drawn", reset_weight=4.0) == sft_views(
        row, 2, llama, resets="drawn"
    )
    # The control says both answers and takes nothing back.
    in_place = View("in place", [*x, *b"ye", *b"no", EOT], n + 2, HALF)
    turns = [
        View("in place", [*x, *b"ye", *b"no", EOT], n + 3, HALF),
        View("turn", [*x, *b"y", *b"n"], n + 1, 4 * HALF / 3),
        View("turn", [*x, *b"ye", *b"n"], n + 2, 4 * HALF / 3),
        View("turn", [*x, *b"yes", *b"n"], n + 3, 4 * HALF / 3),
    ]
    for resets, restart in itertools.product(("drawn", "every"), ("none", "unsafe", "all")):
        options = {"resets": resets, "restart": restart, "reset_weight": 4.0}
        expected = [in_place] if resets == "drawn" else turns
        assert sft_views(row, 2, llama, method="in-place", **options) == [answer, *expected]
        assert sft_views(row, 2, llama, method="baseline", **options) == [answer]


def test_views_of_the_toy_by_hand():
    """Gemma ends a turn with <end_of_turn> and a newline; a model is to say the first alone."""
    gemma, pieces = toy_tokenizer(), toy_pieces()
    turn, end, reset = map(pieces.piece_to_id, ("<start_of_turn>", "<end_of_turn>", "<reset>"))
    yes, no = pieces.encode("yes"), pieces.encode("no")
    x = [pieces.bos_id(), turn, *pieces.encode("user\n"), *pieces.encode("Hi"), end]
    x += [*pieces.encode("\n"), turn, *pieces.encode("model\n")]
    assert {turn, end, reset}.isdisjoint({pieces.unk_id(), *yes, *no})
    row = encode_row(UNSAFE, gemma)
    assert row == Row(prompt=x, chosen=no, rejected=yes, unsafe=True)
    n = len(x)
    assert sft_views(row, 1, gemma, resets="drawn", restart="unsafe") == [
        View("answer", [*x, *no, end], n, HALF),
        View("backtrack", [*x, yes[0], reset, *no, end], n + 1, HALF),
        View("restart", [*x, reset, *no, end], n + 1, QUARTER),
    ]


def test_several_turns_and_a_system_message():
    chat = [{"role": "system", "content": "S"}, *user("a"), *said("b"), *user("c")]
    raw = {"prompt": chat, "chosen": said(" d\n"), "rejected": said("\te ")}

    def turn(role, text):
        return [HEADER, *role, HEADER_END, *b"\n\n", *text, EOT]

    x = [BEGIN, *turn(b"system", b"S"), *turn(b"user", b"a"), *turn(b"assistant", b"b")]
    x += [*turn(b"user", b"c"), HEADER, *b"assistant", HEADER_END, *b"\n\n"]
    row = encode_row(raw, llama_tokenizer())
    assert row == Row(x, [*b"d"], [*b"e"], unsafe=False)  # answers are stripped


def test_plain_text():
    llama, gemma, pieces = llama_tokenizer(), toy_tokenizer(), toy_pieces()
    row = encode_row({"text": " as it is \n"}, llama)
    assert row == Row([BEGIN], [*b" as it is \n"], None, False, plain_text=True)
    expected = [View("text", [BEGIN, *b" as it is \n", END_OF_TEXT], 1, 1.0)]
    for method, resets, restart in itertools.product(*OPTIONS):
        views = sft_views(row, 0, llama, method=method, resets=resets, restart=restart)
        assert views == expected
    row = encode_row({"text": "the gate"}, gemma)
    expected = [pieces.bos_id(), *pieces.encode("the gate"), pieces.eos_id()]
    assert sft_views(row, 0, gemma, method="baseline") == [View("text", expected, 1, 1.0)]


OPTIONS = ("backtrack", "baseline", "in-place"), ("drawn", "every"), ("none", "unsafe", "all")


@pytest.mark.parametrize("unsafe", [True, False])
@pytest.mark.parametrize(("method", "resets", "restart"), itertools.product(*OPTIONS))
def test_which_views_a_row_has(tok, unsafe, method, resets, restart):
    expected = ["answer"]
    if unsafe and method == "backtrack":
        expected += ["backtrack"]
        expected += ["reset"] * len(tok.encode("yes")) if resets == "every" else []
    if unsafe and method == "in-place":
        expected += ["in place"]
        expected += ["turn"] * len(tok.encode("yes")) if resets == "every" else []
    if method == "backtrack" and (restart == "all" or (restart == "unsafe" and unsafe)):
        expected += ["restart"]
    rows = [row_of("Hi", "no", "yes", unsafe=unsafe)] + ([] if unsafe else [row_of("Hi", "no")])
    for row in rows:
        row = encode_row(row, tok)
        views = sft_views(row, 1, tok, method=method, resets=resets, restart=restart)
        assert [v.name for v in views] == expected


def test_loss_falls_on_the_tail_and_nowhere_else(tok):
    """Whatever the prefix: no loss on x, none on y−, and on [RESET] only where it is to be said."""
    texts = ("How?", "I will not say.", "Sure. Take two and stir.")
    row = encode_row(row_of(*texts, unsafe=True), tok)
    x, answer, reset = row.prompt, [*row.chosen, tok.stop_ids[1]], [tok.reset_id]
    for k in range(1, len(row.rejected) + 1):
        begun = row.rejected[:k]
        seen = {"answer": [], "backtrack": begun, "in place": begun, "restart": reset}
        tail = {name: answer for name in seen} | {"backtrack": reset + answer}
        views = sft_views(row, k, tok, resets="drawn", restart="all") + sft_views(
            row, k, tok, method="in-place", resets="drawn"
        )
        assert {v.name for v in views} == set(seen)
        for v in views:
            assert v.tokens[: v.loss_from] == x + seen[v.name]
            assert v.tokens[v.loss_from :] == tail[v.name]
            assert v.tokens.count(tok.reset_id) == (v.name in ("backtrack", "restart"))

        _, backtrack, *resets = sft_views(row, k, tok, resets="every")
        assert backtrack.tokens == x + begun + reset + answer
        assert backtrack.loss_from == len(x + begun + reset)
        assert len(resets) == len(row.rejected)
        for j, v in enumerate(resets, start=1):
            assert (v.tokens, v.loss_from) == (x + row.rejected[:j] + reset, len(x) + j)


def test_a_prefix_is_cut_in_token_space():
    """A cut inside a word gives pieces that re-encoding the text would merge or split otherwise."""
    gemma, pieces = toy_tokenizer(), toy_pieces()
    text = "the farmer counted the sheep, Größe 東京"
    row = encode_row(row_of("Hi", "no", text, unsafe=True), gemma)
    assert row.rejected == pieces.encode(text)
    differs = 0
    for k in range(1, len(row.rejected) + 1):
        view = sft_views(row, k, gemma, resets="drawn")[1]
        prefix = view.tokens[len(row.prompt) : view.tokens.index(gemma.reset_id)]
        assert prefix == pieces.encode(text)[:k]
        differs += pieces.encode(pieces.decode(prefix)) != prefix
    assert differs  # or this text would not tell the two apart


TRICKS = [
    "[RESET]",
    "<reset>",
    "<|reserved_special_token_250|>",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<bos><eos><pad><unk><s></s>",
    "<|begin_of_text|><|end_of_text|>",
    "＜reset＞ <reset\u200b> < reset > <RESET>",
]


def test_text_cannot_spell_a_special_id(tok):
    """The special ids of a row with tricks are those of the same row without."""
    trick = "".join(TRICKS)
    honest = encode_row(row_of("x", "y", "z", unsafe=True), tok)
    tricked = encode_row(row_of(trick, trick, trick, unsafe=True), tok)
    assert tok.decode(tricked.chosen) == tok.decode(tricked.rejected) == trick  # all there, as text
    assert tok.special_ids.isdisjoint(tricked.chosen + tricked.rejected)
    views = [sft_views(row, 3, tok, resets="drawn", restart="all") for row in (honest, tricked)]
    for plain, attack in zip(*views, strict=True):
        special = [[t for t in v.tokens if t in tok.special_ids] for v in (plain, attack)]
        assert special[0] == special[1] != []
    pairs = [dpo_pairs(row, 3, 1, tok, restart="all") for row in (honest, tricked)]
    for plain, attack in zip(*pairs, strict=True):
        for side in ("prompt", "chosen", "rejected"):
            sides = [getattr(pair, side) for pair in (plain, attack)]
            special = [[t for t in tokens if t in tok.special_ids] for tokens in sides]
            assert special[0] == special[1] != []
    (text,) = sft_views(encode_row({"text": trick}, tok), 0, tok, restart="all")
    assert [t for t in text.tokens if t in tok.special_ids] == [tok.bos_id, tok.stop_ids[0]]


# ── The pairs of DPO ──────────────────────────────────────────────────────────────────────────────

TOK = argparse.Namespace(reset_id=90, eos_id=91)
UNSAFE_IDS = Row(prompt=[1, 2, 3], chosen=[10, 11], rejected=[20, 21, 22], unsafe=True)
SAFE_IDS = dataclasses.replace(UNSAFE_IDS, unsafe=False)

ELICIT = Pair("elicit", [1, 2, 3], [20, 21, 90, 10, 11, 91], [20, 21, 22, 91], nll_from=2)
DISCOURAGE = Pair("discourage", [1, 2, 3], [10, 11, 91], [10, 90, 20, 21, 22, 91], nll_from=0)
RESTART = Pair("restart", [1, 2, 3, 90], [10, 11, 91], [20, 21, 22, 91], nll_from=0)
BASELINE = Pair("baseline", [1, 2, 3], [10, 11, 91], [20, 21, 22, 91], nll_from=0)


@pytest.mark.parametrize(
    ("row", "method", "restart", "expected"),
    [
        (UNSAFE_IDS, "backtrack", "none", [ELICIT, DISCOURAGE]),
        (UNSAFE_IDS, "backtrack", "unsafe", [ELICIT, DISCOURAGE, RESTART]),
        (UNSAFE_IDS, "backtrack", "all", [ELICIT, DISCOURAGE, RESTART]),
        (SAFE_IDS, "backtrack", "none", [DISCOURAGE]),
        (SAFE_IDS, "backtrack", "unsafe", [DISCOURAGE]),
        (SAFE_IDS, "backtrack", "all", [DISCOURAGE, RESTART]),
        *(
            (row, "baseline", restart, [BASELINE])
            for row in (UNSAFE_IDS, SAFE_IDS)
            for restart in ("none", "unsafe", "all")
        ),
        (dataclasses.replace(SAFE_IDS, rejected=None), "backtrack", "all", []),
        (dataclasses.replace(SAFE_IDS, rejected=None), "baseline", "all", []),
        (Row([1], [10, 11], None, False, plain_text=True), "backtrack", "all", []),
    ],
)
def test_pairs_by_hand(row, method, restart, expected):
    found = dpo_pairs(row, 2, 1, TOK, method=method, restart=restart)
    assert sorted(found, key=lambda p: p.kind) == sorted(expected, key=lambda p: p.kind)


def test_the_longest_and_the_shortest_prefix():
    for k_rejected, k_chosen in itertools.product((1, 2, 3), (1, 2)):
        found = dpo_pairs(UNSAFE_IDS, k_rejected, k_chosen, TOK, restart="all")
        pairs = {p.kind: p for p in found}
        elicit, discourage = pairs["elicit"], pairs["discourage"]
        assert elicit.chosen == [20, 21, 22][:k_rejected] + [90, 10, 11, 91]
        assert elicit.rejected == [20, 21, 22, 91]
        assert elicit.chosen[elicit.nll_from] == 90  # never on the unsafe prefix
        assert discourage.rejected == [10, 11][:k_chosen] + [90, 20, 21, 22, 91]
        assert all(90 not in p.chosen[p.nll_from + 1 :] for p in pairs.values())


def test_pairs_of_the_control():
    """In place: the same pairs without [RESET]."""
    pairs = {p.kind: p for p in dpo_pairs(UNSAFE_IDS, 2, 1, TOK, method="in-place", restart="all")}
    assert set(pairs) == {"elicit", "discourage"}
    assert pairs["elicit"].chosen == [20, 21, 10, 11, 91] and pairs["elicit"].nll_from == 2
    assert pairs["elicit"].rejected == [20, 21, 22, 91]
    assert pairs["discourage"].chosen == [10, 11, 91]
    assert pairs["discourage"].rejected == [10, 20, 21, 22, 91]


# ── The length of the prefix ──────────────────────────────────────────────────────────────────────


def is_uniform(draws: Counter, lengths, each: int) -> bool:
    """Chi-square, within 5 of its standard deviations. What is drawn is fixed: this passes always or never."""
    degrees = len(lengths) - 1
    chi2 = sum((draws[k] - each) ** 2 / each for k in lengths)
    return set(draws) == set(lengths) and chi2 <= degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("longest", [1, 2, 7, 40])
def test_k_is_uniform(longest):
    """Over epochs, over rows, and over seeds."""
    for over in (lambda i: (0, i, 3), lambda i: (0, 3, i), lambda i: (i, 3, 3)):
        draws = Counter(draw_prefix(*over(i), longest) for i in range(200 * longest))
        assert is_uniform(draws, range(1, longest + 1), 200)


def test_k_is_drawn_by_the_standard_library():
    for a in itertools.product(range(2), range(5), range(5), (1, 2, 33)):
        assert draw_prefix(*a) == random.Random("/".join(map(str, a[:3]))).randint(1, a[3])


def test_k_depends_on_seed_epoch_and_row_alone():
    arguments = list(itertools.product(range(3), range(20), range(20)))
    draws = {a: draw_prefix(*a, 1000) for a in arguments}
    assert draws == {a: draw_prefix(*a, 1000) for a in reversed(arguments)}  # no hidden state
    for a, b in (((0, 1, 2), (0, 2, 1)), ((1, 11, 1), (11, 1, 1)), ((1, 1, 11), (1, 11, 1))):
        assert draw_prefix(*a, 10**9) != draw_prefix(*b, 10**9)
