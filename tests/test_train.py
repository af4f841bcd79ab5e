"""`train.py base` and `sft` as they are run: against loops, against AdamW's formula, and against kill -9.

Losses are computed a second time by feeding each prefix alone to the model; a step by hand in float64; a run that was
killed (anywhere, and at every single step of a save) must end with the bits of one that was not. The last section
trains on four rows and shows that the model takes its words back.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from models import GEMMA, LLAMA, network_of
from safetensors.torch import load_file, save_file
from training import (
    arguments,
    close,
    contents,
    gradients_before_clipping,
    interrupted,
    logprob,
    metrics,
    plain_nll,
    prefixes,
    steps_of,
    toy_files,
    trained,
    visited,
)

import train
from backtrack.examples import draw_prefix, sft_views
from backtrack.generate import generate
from backtrack.rows import load_rows
from model import InputError, ModelConfig, Transformer, load_model, load_tokenizer, save_model

STATE, PROGRESS = train.log.STATE, train.log.PROGRESS
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, a corner of its data, and `start`: a model that was pretrained for a second."""
    root = tmp_path_factory.mktemp("world")
    files = toy_files()
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    (root / "config.json").write_text(json.dumps(LLAMA))
    for name, source, rows in (
        ("corpus.jsonl", "base.jsonl", 100),
        ("corpus2.jsonl", "base.jsonl", 101),
        ("rows.jsonl", "sft.jsonl", 24),
        ("heldout.jsonl", "sft_heldout.jsonl", 5),
        ("replay.jsonl", "replay.jsonl", 6),
    ):
        (root / name).write_bytes(b"".join(files[source].splitlines(keepends=True)[:rows]))
    benign = [line for line in (root / "rows.jsonl").read_text().splitlines() if not json.loads(line)["unsafe"]]
    (root / "benign.jsonl").write_text("\n".join(benign[:4]))
    trained(*base(root, root / "start", "--steps", 40, "--max-length", 64, "--lr", 1e-2))
    return root


@pytest.fixture(scope="module")
def tok(world):
    return load_tokenizer(world / "start")


def base(world, out, *more):
    words = ["base", "--config", world / "config.json", "--tokenizer", world / "tokenizer", "--device", "cpu"]
    return [*words, "--data", world / "corpus.jsonl", "--out", out, *more]


def sft(world, out, *more, data=("rows.jsonl",)):
    words = ["sft", "--init", world / "start", "--data", *(world / name for name in data), "--device", "cpu"]
    # The paper's one prefix a row; what the default adds to it is tested under its own name.
    return [*words, "--out", out, "--max-length", 192, "--lr", 1e-3, "--resets", "drawn", *more]


def weights(directory):
    return load_file(directory / "model.safetensors")


def no_leftovers(out):
    return not [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


# ── The order of data ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_epoch_visits_every_row():
    """Whatever the rows of a step; asked for in any order, steps are what they were."""
    args = argparse.Namespace(seed=0, batch_size=3, grad_accum=2)
    steps = [visited(args, 13)(step) for step in range(13)]
    visits = [*chain(*steps)]
    epochs = [[index for epoch, index in visits if epoch == e] for e in range(6)]
    assert [epoch for epoch, _ in visits] == [e for e in range(6) for _ in range(13)]
    assert all(sorted(e) == list(range(13)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 6
    again = visited(args, 13)
    assert [again(n) for n in (12, 0, 7, 3)] == [steps[n] for n in (12, 0, 7, 3)]
    args.batch_size, args.grad_accum = 1, 1
    assert [visited(args, 13)(n) for n in range(78)] == [[visit] for visit in visits]
    args.seed = 1
    assert [visited(args, 13)(n) for n in range(13)] != [[visit] for visit in visits[:13]]


@pytest.fixture
def shown(monkeypatch):
    """Every tree of every batch that is made, in order."""
    trees, make = [], train.make_batch
    monkeypatch.setattr(train, "make_batch", lambda few, *more: trees.extend(few) or make(few, *more))
    return trees


def test_base_windows(world, tmp_path, tok, shown):
    """<bos> text <eos> end to end; windows that do not overlap, at another offset each epoch."""
    lines = (world / "corpus.jsonl").read_text().splitlines()[:20]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    texts = [json.loads(line)["text"] for line in lines]
    stream = [t for text in texts for t in (tok.bos_id, *tok.encode(text), tok.stop_ids[0])]
    n, epochs = len(stream) // 32 - 1, 5  # the offset takes up to one
    more = ("--max-length", 32, "--seed", 3, "--epochs", epochs, "--batch-size", n)
    trained(*base(world, tmp_path / "out", *more, "--data", tmp_path / "corpus.jsonl"))
    assert len(shown) == n * epochs > 50
    offsets = set()
    for epoch in range(epochs):
        windows = []
        for tree in shown[epoch * n : (epoch + 1) * n]:
            assert tree.depths == list(range(31)) == tree.target_node
            assert tree.target_token[:-1] == tree.tokens[1:] and set(tree.target_weight) == {1.0}
            windows.append(tree.tokens + tree.target_token[-1:])
        (offset,) = [o for o in range(32) if sorted(windows) == sorted(stream[o + 32 * i :][:32] for i in range(n))]
        offsets.add(offset)
    assert len(offsets) > 1


def by_hand(args, rows, tok):
    """(epoch, row) -> its views, the prefix drawn as the settings say: with room for [RESET] and a token after it."""

    def views(epoch, index):
        row, k = rows[index], 0
        if row.unsafe:
            room = min(len(row.rejected), args.max_length - len(row.prompt) - 2)
            k = draw_prefix(args.seed, epoch, index, room, args.prefix)
        return sft_views(row, k, tok, method=args.method, resets=args.resets, restart=args.restart)

    return views


def read(paths, tok):
    return load_rows(list(map(str, paths)), tok, 192)


def test_sft_prefixes_are_redrawn_each_epoch_and_leave_room(world, tmp_path, tok, monkeypatch):
    """Prompts here are about 20 tokens long, rejected answers up to 50: most are cut at 40."""
    made, real = [], train.view_tree
    monkeypatch.setattr(train, "view_tree", lambda *a: made.append(a) or real(*a))
    more = ("--max-length", 40, "--seed", 3, "--restart", "all", "--epochs", 8, "--batch-size", 24)
    said = trained(*sft(world, tmp_path / "out", *more))
    assert re.search(r"\d+ of 24 rows are longer than --max-length 40", said)
    order = visited(arguments(sft(world, "x", *more)), 24)
    made = made[24:]  # before come those at which [RESET] is set to its level
    made = dict(zip(chain(*map(order, range(8))), made, strict=True))
    raw = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    seen = 0
    for index, row in enumerate(raw):
        prompt = tok.render(row["prompt"])
        chosen, rejected = (tok.encode(row[key][0]["content"]) for key in ("chosen", "rejected"))
        room, lengths = min(len(rejected), 40 - len(prompt) - 2), set()
        for epoch in range(8):
            views, max_length = made[epoch, index]
            views = {v.name: v for v in views}
            assert max_length == 40
            assert set(views) == {"answer", "restart", *(["backtrack"] if row["unsafe"] else [])}
            assert views["answer"].tokens == [*prompt, *chosen, tok.turn_end[0]]
            if row["unsafe"]:
                k = draw_prefix(3, epoch, index, room)
                expected = [*prompt, *rejected[:k], tok.reset_id, *chosen, tok.turn_end[0]]
                assert views["backtrack"].tokens == expected
                assert len(prompt) + k + 2 <= 40
                lengths.add(k)
        if row["unsafe"]:
            assert len(lengths) > 1
            seen += 1
    assert seen > 4


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 1.0), (0.0, 0.3), (1.0, 1.0)])
def test_prefixes_fall_in_the_part_asked_for(world, tmp_path, tok, monkeypatch, command, low, high):
    """On the command line, --prefix LOW HIGH: read from what the network is shown, as a share of the whole answer."""
    made, name = [], {"sft": "sft_views", "dpo": "dpo_pairs"}[command]
    original = getattr(train, name)

    def watched(row, *more, **options):
        views = original(row, *more, **options)
        made.extend((row, view) for view in views)
        return views

    monkeypatch.setattr(train, name, watched)
    words = ["--init", world / "start", "--data", world / "rows.jsonl", "--out", tmp_path / "out", "--device", "cpu"]
    part = () if (low, high) == (0.0, 1.0) else ("--prefix", low, high)  # all of it is the default
    trained(command, *words, "--max-length", 255, "--batch-size", 24, "--steps", 3, *part)
    shares, resets = {"rejected": [], "chosen": []}, 0
    for row, view in made:
        kind = getattr(view, "name", None) or view.kind
        if kind == "backtrack":
            answer, text = "rejected", view.tokens[len(row.prompt) :]
        elif kind == "reset":  # one after each prefix of the part, or --resets every would mean all of it
            k = len(view.tokens) - len(row.prompt) - 1
            whole = len(row.rejected)
            assert k >= 1 and (k == whole if low == 1 else low * whole < k < high * whole + 1)
            resets += 1
            continue
        elif kind in ("elicit", "discourage"):
            answer, text = ("rejected", view.chosen) if kind == "elicit" else ("chosen", view.rejected)
        else:
            continue
        k, whole = text.index(tok.reset_id), getattr(row, answer)
        assert text[:k] == whole[:k]
        assert k >= 1 and (k == len(whole) if low == 1 else low * len(whole) < k < high * len(whole) + 1)
        shares[answer].append((k - 0.5) / len(whole))
    assert resets >= len(shares["rejected"]) if command == "sft" else not resets
    for answer in ("rejected", *(["chosen"] if command == "dpo" else [])):
        drawn = shares[answer]
        assert len(drawn) > 15
        if low < 1:  # all of the part is used: its lower and its upper third too
            assert min(drawn) < low + (high - low) / 3 + 0.05 and max(drawn) > high - (high - low) / 3 - 0.05


# ── A step ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_learning_rate():
    """Up linearly over a tenth of the steps or 100, then half a cosine down to a tenth of the peak."""
    for steps, warmup in ((1, 1), (7, 1), (50, 5), (51, 6), (1000, 100), (20_000, 100)):
        for step in (0, 1, 2, 5, 6, 99, 100, 101, steps // 2, steps - 1):
            if step >= steps:
                continue
            cosine = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
            expected = (step + 1) / warmup if step < warmup else cosine
            assert train.learning_rate(step, steps, 3e-4) == pytest.approx(3e-4 * expected, rel=1e-9)
    rates = [train.learning_rate(step, 50, 2.0) for step in range(50)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[27] == pytest.approx(1.1, abs=0.05)  # half way down
    assert rates[-1] == pytest.approx(0.2, abs=0.01) and min(rates) >= 0.2
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_adamw_by_its_formula(world, tmp_path, monkeypatch, clip):
    """Three steps in float64 by hand: moments 0.9 and 0.95, decay on matrices and not on norms, clipping."""
    out, lr, decay = tmp_path / "out", 0.01, 0.3
    raw_gradients = gradients_before_clipping(monkeypatch)
    trained(*sft(world, out, "--steps", 3, "--lr", lr, "--weight-decay", decay, "--clip", clip, "--log-every", 1))
    trained(*sft(world, tmp_path / "start", "--steps", 0))
    start, end = weights(tmp_path / "start"), weights(out)
    names = [name for name, _ in load_model(out).named_parameters()]
    assert sum(start[name].dim() == 1 for name in names) == 5
    w = [start[name].double() for name in names]
    m, v = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    assert len(raw_gradients) == 3
    for t, grads in enumerate(raw_gradients, start=1):
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        record = metrics(out)[t - 1]
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)  # as it was before clipping
        rate = lr if t == 1 else lr * (0.55 + 0.45 * math.cos(math.pi * (t - 2) / 2))
        assert record["lr"] == pytest.approx(rate)
        assert (norm > clip) == (clip < 1)
        for i, g in enumerate(grads):
            g = g.double() * min(1.0, clip / (norm + 1e-6))
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g.square()
            if w[i].dim() > 1:
                w[i] = w[i] * (1 - rate * decay)
            w[i] = w[i] - rate * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-8)
    for name, expected in zip(names, w, strict=True):
        torch.testing.assert_close(end[name].double(), expected, atol=2e-6, rtol=1e-5)


def test_accumulation_is_one_big_batch(world, tmp_path, monkeypatch, tok):
    """8 × 1 = 2 × 4 = 1 × 8, though the rows have different numbers of targets; the mean of means is another loss."""
    runs, raw_gradients = [], gradients_before_clipping(monkeypatch)
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        raw_gradients.clear()
        out, split = tmp_path / f"{batch}", ("--batch-size", batch, "--grad-accum", accumulate)
        data = ("rows.jsonl", "replay.jsonl")
        trained(*sft(world, out, "--steps", 3, "--log-every", 1, "--restart", "all", *split, data=data))
        runs.append((metrics(out), [[g.clone() for g in grads] for grads in raw_gradients], weights(out)))
    for other in runs[1:]:
        for a, b in zip(runs[0][0], other[0], strict=True):
            assert a["tokens"] == b["tokens"]
            assert {k: a[k] for k in a if "loss" in k} == pytest.approx({k: b[k] for k in b if "loss" in k}, rel=1e-5)
        for a, b in zip(runs[0][1][0], other[1][0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        for name in runs[0][2]:
            difference = (runs[0][2][name] - other[2][name]).abs()
            assert difference.mean() < 1e-6 and difference.max() < 2e-3  # the lr; Adam scales noise around 0 up

    # The first step by hand from the definition, and by the mean of means.
    args = arguments(sft(world, tmp_path / "x", "--restart", "all", data=data))
    rows = read(args.data, tok)
    trained(*sft(world, tmp_path / "start", "--steps", 0, "--restart", "all", data=data))
    start, losses, totals = load_model(tmp_path / "start"), [], []
    for visit in visited(args, len(rows))(0):
        with torch.no_grad():
            loss, total, _ = plain_nll(start, by_hand(args, rows, tok)(*visit))
        losses.append(loss.item())
        totals.append(total)
    loss = sum(losses) / sum(totals)
    assert len(totals) == 8 and len(set(totals)) > 4
    assert runs[2][0][0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert abs(sum(a / b for a, b in zip(losses, totals, strict=True)) / 8 - loss) > 1e-4 * loss


# ── What a run says and writes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch):
    """Every look at it is 7 seconds after the one before."""
    ticks = count(1000, 7)
    monkeypatch.setattr(train.log, "time", argparse.Namespace(time=lambda: next(ticks)))


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each training forward took through the network, padding and all."""
    sizes, forward = [], Transformer.forward

    def watched(self, tokens, *more, **options):
        if torch.is_grad_enabled():
            sizes.append(tokens.numel())
        return forward(self, tokens, *more, **options)

    monkeypatch.setattr(Transformer, "forward", watched)
    return sizes


def test_metrics_and_heldout_loss(world, tmp_path, tok, clock, computed):
    """Every number in metrics.jsonl a second time, from the weights and the rows."""
    out, heldout = tmp_path / "out", [world / "heldout.jsonl", world / "replay.jsonl"]
    more = ("--steps", 5, "--log-every", 2, "--save-every", 4, "--batch-size", 3, "--grad-accum", 2, "--seed", 5)
    said = trained(*sft(world, out, *more, "--heldout", *heldout))
    records = metrics(out)
    steps = [(r["step"], "loss" in r) for r in records]
    assert steps == [(step, trained_on) for step in (2, 4, 5) for trained_on in (True, False)]
    logged = {"step", "loss", "lr", "grad_norm", "tokens", "computed_tokens", "tokens_per_s", "seconds"}
    views = {"answer", "backtrack", "text"}
    for r in records:
        if "loss" in r:
            assert set(r) == logged | {"loss/answer", "loss/backtrack", "reset_after_unsafe"}
        else:
            watched = {f"heldout/reset_after_{kind}" for kind in ("unsafe", "safe")}
            assert set(r) == {"step", *watched, *(f"heldout/{view}" for view in views)}
    assert said.count("held out:") == 3 and said.count("step ") == 3 and f"saved {out}" in said

    args = arguments(sft(world, out, *more))
    rows = read(args.data, tok)
    views_of, order = by_hand(args, rows, tok), visited(args, len(rows))
    seconds = 0
    for r in (r for r in records if "loss" in r):
        # Of a row, what its views begin with alike counts once; the last token of each predicts nothing.
        steps = [[v.tokens for v in views_of(*visit)] for n in range(r["step"]) for visit in order(n)]
        assert r["tokens"] == sum(len(prefixes(sequences)) for sequences in steps)
        assert r["computed_tokens"] == sum(computed[: 2 * r["step"]]) >= r["tokens"]
        seconds += 7
        assert (r["seconds"], r["tokens_per_s"]) == (seconds, round(r["tokens"] / seconds))
    rows = read(heldout, tok)
    found = measured(load_model(out), [v for n in range(len(rows)) for v in by_hand(args, rows, tok)(0, n)], tok)
    for view in (*views, "reset_after_unsafe"):
        assert records[-1][f"heldout/{view}"] == pytest.approx(found[view], rel=1e-4)
    chats = [row for row in rows if not row.plain_text]
    begun = [row.prompt + row.chosen[:j] for row in chats for j in range(1, len(row.chosen) + 1)]
    resets = [logprob(load_model(out), context, tok.reset_id).exp().item() for context in begun]
    assert records[-1]["heldout/reset_after_safe"] == pytest.approx(sum(resets) / len(resets), rel=1e-4)

    trained(*sft(world, tmp_path / "start", *more[2:], "--steps", 0))
    trained(*sft(world, tmp_path / "one", *more[2:], "--steps", 1))
    (first,) = metrics(tmp_path / "one")
    found = measured(load_model(tmp_path / "start"), [v for visit in order(0) for v in views_of(*visit)], tok)
    assert first["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert first["reset_after_unsafe"] == pytest.approx(found["reset_after_unsafe"], rel=1e-5)
    for view in ("answer", "backtrack"):
        assert first[f"loss/{view}"] == pytest.approx(found[view], rel=1e-5)


def measured(network, views, tok):
    """Σ weight · −log π / Σ weight; by view the mean −log π; the mean probability of [RESET] where it is a target."""
    with torch.no_grad():
        total, weight, sums = plain_nll(network, views)
        ends = [(v.tokens, t) for v in views for t in range(v.loss_from, len(v.tokens))]
        before = [tokens[:t] for tokens, t in ends if tokens[t] == tok.reset_id]
        resets = [logprob(network, context, tok.reset_id).exp().item() for context in before]
    found = {name: value / n for name, (value, n) in sums.items()}
    return found | {"loss": total.item() / weight, "reset_after_unsafe": sum(resets) / max(1, len(resets))}


@pytest.mark.parametrize(("longest", "heavy"), [(192, 1.0), (45, 1.0), (192, 3.0)])
def test_every_reset(world, tmp_path, tok, longest, heavy):
    """--resets every: of each unsafe row, the mean over all k that may be drawn of −log π([RESET]), instead of one."""
    out, more = tmp_path / "out", ("--max-length", longest, "--batch-size", 24, "--resets", "every")
    more += () if heavy == 1 else ("--reset-weight", heavy)
    more += ("--steps",)
    trained(*sft(world, tmp_path / "start", *more, 0))
    more = (*more, 1)
    trained(*sft(world, out, *more))
    (record,), start = metrics(out), load_model(tmp_path / "start")
    args = arguments(sft(world, out, *more))
    rows = read(args.data, tok)
    loss, weight, resets, cut = 0.0, 0.0, [], 0
    with torch.no_grad():
        for epoch, index in visited(args, len(rows))(0):
            row = rows[index]
            x, answer, ends = row.prompt, [*row.chosen, tok.turn_end[0]], []
            ends.append((x, answer))
            if row.unsafe:
                room = min(len(row.rejected), longest - len(x) - 2)
                cut += room < len(row.rejected)
                begun = x + row.rejected[: draw_prefix(0, epoch, index, room)]
                ends.append(([*begun, tok.reset_id], answer))
                chances = [-logprob(start, x + row.rejected[:k], tok.reset_id) for k in range(1, room + 1)]
                loss, weight = loss + heavy * 0.5 * sum(chances) / room, weight + heavy * 0.5
                resets += [(-c).exp().item() for c in chances]
            for before, after in ends:
                after = after[: longest - len(before)]
                for t, token in enumerate(after):
                    loss = loss - 0.5 * logprob(start, before + after[:t], token)
                    weight += 0.5
    assert (cut > 3) == (longest == 45)
    assert record["loss"] == pytest.approx(loss.item() / weight, rel=1e-5)
    assert record["reset_after_unsafe"] == pytest.approx(sum(resets) / len(resets), rel=1e-5)
    assert {name for name in record if "loss/" in name} == {"loss/answer", "loss/backtrack", "loss/reset"}


@pytest.mark.parametrize(
    ("epochs", "batch", "accumulate", "steps"),
    [(1, 8, 1, 3), (1, 5, 1, 5), (0.5, 2, 3, 2), (2.5, 4, 2, 8), (0.01, 1, 1, 1), (0, 1, 1, 0)],
)
def test_epochs(world, tmp_path, monkeypatch, epochs, batch, accumulate, steps):
    """24 rows. Training itself is left out."""
    asked = []
    monkeypatch.setattr(train.log, "start", lambda args, settings: asked.append(settings["steps"]) or stop())

    def stop():
        raise InputError("far enough")

    split = ("--batch-size", batch, "--grad-accum", accumulate)
    trained(*sft(world, tmp_path / "out", "--epochs", epochs, *split), code=2)
    assert asked == [steps]


def test_no_steps_saves_the_start(world, tmp_path):
    """`base` writes the random weights that the seed stands for."""
    for seed in (0, 7):
        trained(*base(world, tmp_path / f"{seed}", "--steps", 0, "--seed", seed, "--max-length", 32))
        expected = Transformer(ModelConfig.load(world / "config.json"))
        expected.init_weights(seed)
        found = load_model(tmp_path / f"{seed}").state_dict()
        assert all(torch.equal(found[name], p) for name, p in expected.state_dict().items())
    assert not torch.equal(weights(tmp_path / "0")["model.norm.weight"], torch.zeros(32))
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(tmp_path / "0")[name], weights(tmp_path / "7")[name])
    bare = ("base", "--config", world / "config.json", "--tokenizer", world / "tokenizer", "--max-length", 32)
    trained(*bare, "--device", "cpu", "--seed", 7, "--steps", 0, "--out", tmp_path / "bare")  # needs no data
    assert contents(tmp_path / "bare")["model.safetensors"] == contents(tmp_path / "7")["model.safetensors"]
    assert "--data" in trained(*bare, "--out", tmp_path / "x", "--steps", 1, code=2).splitlines()[-1]
    tokenizer = (world / "tokenizer/tokenizer.model").read_bytes()
    assert (tmp_path / "0/tokenizer.model").read_bytes() == tokenizer
    assert "reset_token_id" not in json.loads((tmp_path / "0/config.json").read_text())  # it means nothing yet


def test_bfloat16_computes_in_bf16_and_keeps_fp32(world, tmp_path):
    for dtype in ("float32", "bfloat16"):
        trained(*sft(world, tmp_path / dtype, "--steps", 2, "--dtype", dtype, "--log-every", 1))
    a, b = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert {w.dtype for w in b.values()} == {torch.float32}
    assert any((w != w.bfloat16().float()).any() for w in b.values())
    one, two = metrics(tmp_path / "float32")[0], metrics(tmp_path / "bfloat16")[0]
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert max((a[name] - b[name]).abs().max() for name in a) <= 4e-3  # two steps of Adam, each at most 1e-3


def test_compile(world, tmp_path, monkeypatch):
    """torch.compile with the tracer alone: generating code would take a minute. The weights come out the same."""
    asked = []

    def compile(module, **options):
        asked.append(options)
        torch.nn.Module.compile(module, backend="eager", **options)

    monkeypatch.setattr(type(load_model(world / "start").model), "compile", compile)
    trained(*base(world, tmp_path / "compiled", "--steps", 2, "--max-length", 16, "--compile"))
    assert asked == [{"dynamic": True}]
    trained(*base(world, tmp_path / "plain", "--steps", 2, "--max-length", 16))
    close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), atol=1e-5)


def test_the_baseline_sees_the_answer_alone(world, tmp_path):
    more = ("--steps", 2, "--log-every", 1)
    trained(*sft(world, tmp_path / "plain", "--no-backtrack", *more))
    assert {k for r in metrics(tmp_path / "plain") for k in r if k.startswith("loss/")} == {"loss/answer"}
    trained(*sft(world, tmp_path / "restart", "--no-backtrack", "--restart", "all", *more))
    close(weights(tmp_path / "plain"), weights(tmp_path / "restart"), atol=0, rtol=0)
    trained(*sft(world, tmp_path / "other", "--method", "baseline", *more))
    close(weights(tmp_path / "plain"), weights(tmp_path / "other"), atol=0, rtol=0)
    trained(*sft(world, tmp_path / "all", "--restart", "unsafe", *more))
    views = {"loss/answer", "loss/backtrack", "loss/restart"}
    assert {k for r in metrics(tmp_path / "all") for k in r if k.startswith("loss/")} == views
    trained(*sft(world, tmp_path / "benign", "--no-backtrack", "--steps", 1, data=("benign.jsonl",)))
    said = trained(*sft(world, tmp_path / "x", "--steps", 1, data=("benign.jsonl",)), code=2)
    assert "--method baseline" in said and "benign.jsonl" in said


def test_the_control_says_both_answers_and_never_resets(world, tmp_path, tok, shown):
    """In place: y+ right behind the beginning of y−, loss on y+ alone."""
    more = ("--method", "in-place", "--restart", "all", "--batch-size", 24, "--steps")
    trained(*sft(world, tmp_path / "start", *more, 0))
    more = (*more, 1)
    shown.clear()
    trained(*sft(world, tmp_path / "out", *more))
    (record,) = metrics(tmp_path / "out")
    assert {name for name in record if "loss/" in name} == {"loss/answer", "loss/in place"}
    assert "reset_after_unsafe" not in record
    assert len(shown) == 24 and not any(tok.reset_id in tree.tokens + tree.target_token for tree in shown)
    args = arguments(sft(world, tmp_path / "out", *more))
    rows, drawn = read(args.data, tok), arguments(sft(world, tmp_path / "out"))
    views = []
    for epoch, index in visited(args, 24)(0):
        answer, *rest = by_hand(drawn, rows, tok)(epoch, index)
        for view in rest:  # the same prefix as backtracking draws, without [RESET]
            place = view.tokens.index(tok.reset_id)
            tokens = view.tokens[:place] + view.tokens[place + 1 :]
            rest = [dataclasses.replace(view, name="in place", tokens=tokens, loss_from=place)]
        views += [answer, *rest]
    found = measured(load_model(tmp_path / "start"), views, tok)
    for name, value in (("loss", "loss"), ("loss/answer", "answer"), ("loss/in place", "in place")):
        assert record[name] == pytest.approx(found[value], rel=1e-5)
    said = trained(*sft(world, tmp_path / "x", *more, data=("benign.jsonl",)), code=2)
    assert "nothing to backtrack from" in said


def test_defaults_and_every_flag(world, tmp_path):
    plain = vars(arguments(["sft", "--init", "i", "--data", "d", "--out", "o"]))
    assert (plain["method"], plain["resets"], plain["restart"]) == ("backtrack", "every", "none")
    assert (plain["reset_weight"], plain["on_long"]) == (1.0, "skip")
    assert (plain["prefix"], plain["lr"], plain["weight_decay"]) == ([0.0, 1.0], 1e-5, 0.0)
    assert (plain["batch_size"], plain["grad_accum"], plain["epochs"], plain["steps"]) == (8, 1, 1.0, None)
    assert (plain["heldout"], plain["resume"], plain["compile"], plain["dtype"]) == ([], False, False, "float32")
    first = vars(arguments(["base", "--config", "c", "--tokenizer", "t", "--data", "d", "--out", "o"]))
    assert (first["config"], first["tokenizer"], first["lr"], first["weight_decay"]) == ("c", "t", 1e-3, 0.1)
    words = "sft --init i --no-backtrack --resets every --reset-weight 12 --prefix 0.25 1 --restart unsafe --data d e"
    words += " --heldout h g --out o --lr 2e-3 --weight-decay 0.2 --clip 3 --batch-size 4 --grad-accum 5 --steps 6"
    words += " --max-length 7 --on-long error --seed 8 --device cpu --dtype bfloat16"
    words += " --checkpoint-activations"
    given = vars(arguments([*words.split(), "--compile", "--resume", "--log-every", "9", "--save-every", "11"]))
    assert given == {
        "command": "sft",
        **{"init": "i", "method": "baseline", "resets": "every", "reset_weight": 12.0, "restart": "unsafe"},
        **{"data": ["d", "e"], "heldout": ["h", "g"]},
        **{"out": "o", "lr": 2e-3, "weight_decay": 0.2, "clip": 3.0, "batch_size": 4, "grad_accum": 5, "epochs": 1.0},
        **{"steps": 6, "max_length": 7, "seed": 8, "device": "cpu", "dtype": "bfloat16", "compile": True},
        **{"prefix": [0.25, 1.0], "on_long": "error"},
        **{"resume": True, "log_every": 9, "save_every": 11, "checkpoint_activations": True, "offload": False},
        **{"plan": None, "lora": None},
    }
    for method in ("backtrack", "baseline", "in-place"):
        assert arguments(["sft", "--init", "i", "--data", "d", "--out", "o", "--method", method]).method == method


@pytest.mark.parametrize(
    "flags",
    ["--batch-size 0", "--grad-accum -1", "--steps -1", "--epochs -1", "--epochs nan", "--epochs inf", "--lr -1"]
    + ["--lr nan", "--lr 0", "--clip -1", "--weight-decay -1", "--steps 1 --epochs 1", "--restart some"]
    + ["--method dpo", "--resets none", "--reset-weight -1"]
    + ["--dtype float8", "--max-length 0", "--log-every 0", "--save-every 0", "--seed x"],
)
def test_flags_that_make_no_sense(world, tmp_path, flags):
    said = trained(*sft(world, tmp_path / "out", *flags.split()), code=2)
    assert flags.split()[-2] in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("part", ["0.5 0.4", "0 1.1", "-0.1 1", "0 nan", "nan 1", "nan nan", "0 inf", "0.5", "a b"])
def test_parts_that_are_none(world, tmp_path, command, part):
    words = ["--init", world / "start", "--data", world / "rows.jsonl", "--out", tmp_path / "out", "--device", "cpu"]
    said = trained(command, *words, "--prefix", *part.split(), code=2)
    assert "--prefix" in said.splitlines()[-1] and not (tmp_path / "out").exists()


def test_base_training_knows_no_prefix(world, tmp_path):
    assert "--prefix" in trained(*base(world, tmp_path / "out", "--prefix", 0, 1), code=2)


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_that_name_the_culprit(world, tmp_path, tok):
    out, file = tmp_path / "out", tmp_path / "file.jsonl"
    narrow, short = tmp_path / "narrow.json", tmp_path / "short.jsonl"
    narrow.write_text(json.dumps(LLAMA | {"vocab_size": 1000}))
    short.write_text('{"text": "too short"}\n')
    file.write_text("")
    too_short = f"{short}: {len(tok.encode('too short')) + 2} tokens, not 2 × --max-length 32"
    lines = (world / "corpus.jsonl").read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([lines[0], (world / "rows.jsonl").read_text().splitlines()[0]]))
    small = ("--max-length", 32, "--steps", 1)
    for words, expected in (
        (base(world, out, *small, "--data", file), f"{file}: holds no rows"),
        (base(world, out, *small, "--data", short), too_short),
        (base(world, out, *small, "--data", mixed), f"{mixed}:2: "),
        (base(world, out, *small, "--data", tmp_path / "none"), f"{tmp_path / 'none'}: no such file"),
        (base(world, out, *small, "--config", narrow), "1024 ids but the model only 1000"),
        (base(world, out, *small, "--tokenizer", tmp_path / "none"), f"{tmp_path / 'none'}: no such directory"),
        (base(world, out, "--steps", 1, "--max-length", 300), "--max-length 300 exceeds the model's 256"),
        (base(world, out, "--steps", 1, "--max-length", 1), "--max-length"),
        (base(world, out, *small, "--heldout", short), too_short),
        (sft(world, out, "--steps", 1, "--data", file), f"{file}: holds no rows"),
        (sft(world, out, "--steps", 1, "--max-length", 10), f"{world / 'rows.jsonl'}:1 ("),
        (sft(world, out, "--steps", 1, "--max-length", 10), "--max-length 10"),
        (sft(world, out, "--steps", 1, "--init", world / "tokenizer"), f"{world / 'tokenizer'}"),
        (sft(world, out, "--steps", 1, "--heldout", file), f"{file}: holds no rows"),
        (sft(world, file, "--steps", 1), str(file)),
    ):
        assert expected in trained(*words, code=2), words
        assert not (out / "config.json").exists() and file.read_text() == ""
    trained(*sft(world, out, "--steps", 1, "--heldout", world / "benign.jsonl"))  # held out may be benign alone
    assert set(metrics(out)[-1]) == {"step", "heldout/answer", "heldout/reset_after_safe"}


def test_a_malformed_row_on_the_command_line(world, tmp_path):
    """As a user sees it: one line, exit code 2."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((world / "rows.jsonl").read_bytes() + b'{"prompt": []}\n')
    words = sft(world, tmp_path / "out", "--steps", 1, "--data", world / "rows.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {rows}:25: 'prompt' must be a list of messages that is not empty\n"
    assert not (tmp_path / "out").exists()


def test_other_files_in_out_are_safe(world, tmp_path):
    """A directory that holds something else is refused at once, before any step, and left as it is."""
    for name in ("notes.txt", "adapter.safetensors", "sub/notes.txt"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        for resume in ((), ("--resume",)):
            said = trained(*base(world, out, "--steps", 1, "--max-length", 16, *resume), code=2)
            assert f"{out}: holds files but no checkpoint" in said and "step " not in said
            assert contents(out) == {name: b"mine"}
    (tmp_path / "empty").mkdir()
    trained(*base(world, tmp_path / "empty", "--steps", 1, "--max-length", 16))
    assert load_model(tmp_path / "empty")


def test_a_loss_that_is_not_finite(world, tmp_path, monkeypatch):
    """The run ends; what was saved before is as it was."""
    small = ("--max-length", 32, "--batch-size", 2, "--save-every", 2, "--log-every", 1)
    interrupted(base(world, tmp_path / "good", "--steps", 9, *small), at=3)
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *more: math.inf if step == 2 else rate(step, *more))
    said = trained(*base(world, tmp_path / "bad", "--steps", 9, *small), code=2)
    assert f"step 4: loss is nan, gradient norm nan; {tmp_path / 'bad'} still holds step 2" in said.splitlines()[-1]
    assert "--lr" in said
    assert contents(tmp_path / "bad")["model.safetensors"] == contents(tmp_path / "good")["model.safetensors"]
    assert [r["step"] for r in metrics(tmp_path / "bad")] == [1, 2, 3]
    monkeypatch.undo()
    trained(*base(world, tmp_path / "bad", "--steps", 9, *small, "--resume"))  # it goes on from there
    trained(*base(world, tmp_path / "good", "--steps", 9, *small, "--resume"))
    close(weights(tmp_path / "bad"), weights(tmp_path / "good"), atol=0, rtol=0)

    said = trained(*base(world, tmp_path / "wild", "--steps", 9, *small, "--lr", 1e9, "--save-every", 100), code=2)
    assert "nothing is saved yet" in said
    assert set(contents(tmp_path / "wild")) == {"metrics.jsonl"}


def test_a_full_disk(world, tmp_path):
    """Files may not grow beyond 100 kB: the weights do not fit, the save before is intact, nothing is left over."""
    words = base(world, tmp_path / "out", "--steps", 4, "--max-length", 32, "--save-every", 2, "--log-every", 1)
    interrupted(words, at=3)
    before = contents(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        said = trained(*words, "--resume", code=2)
        other = trained(*base(world, tmp_path / "new", "--steps", 1, "--max-length", 32), code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in said.splitlines()[-1] and "model.safetensors" in said.splitlines()[-1]
    assert "cannot write" in other
    after = contents(tmp_path / "out")
    assert {k: v for k, v in after.items() if k != "metrics.jsonl"} == {
        k: v for k, v in before.items() if k != "metrics.jsonl"
    }
    assert no_leftovers(tmp_path / "out") and no_leftovers(tmp_path / "new")
    assert set(contents(tmp_path / "new")) == {"metrics.jsonl"}
    trained(*words, "--resume")
    trained(*base(world, tmp_path / "whole", "--steps", 4, "--max-length", 32, "--save-every", 2, "--log-every", 1))
    same_run(tmp_path / "out", tmp_path / "whole")


# ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def same_run(a, b):
    """The same bits, of the optimizer too, and the same record of every step."""
    assert contents(a).keys() == contents(b).keys()
    for name in contents(a):
        if name == "config.json":  # read and written again, its keys stand in another order
            assert json.loads(contents(a)[name]) == json.loads(contents(b)[name])
        elif name not in ("metrics.jsonl", STATE):
            assert contents(a)[name] == contents(b)[name], name
    if (a / STATE).exists():  # not when the run is finished
        moments = [load_file(out / STATE) for out in (a, b)]
        for tensors in moments:
            del tensors["rng"]  # the state of a generator that training never draws from
        close(*moments, atol=0, rtol=0)
    assert progress_of(a) == progress_of(b)
    assert steps_of(a) == steps_of(b)
    assert no_leftovers(a)


def progress_of(out):
    return json.loads((out / PROGRESS).read_text())


def forked(words, prepare=lambda: None):
    """A process of its own that trains; as killable as any, and there at once."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.stderr = sys.stdout = io.StringIO()
        prepare()
        sys.argv = ["train.py", *map(str, words)]
        train.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        os._exit(status)


def ended(pid):
    """How it ended: an exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


LONG = ("--steps", 6, "--save-every", 2, "--log-every", 1, "--batch-size", 2, "--max-length", 32)


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    trained(*base(world, out, *LONG, "--heldout", world / "replay.jsonl"))
    return out


def die_at(number, directory):
    """From here on, the number-th time that Python is about to change a file there is the end of this process."""
    events = count(1)
    touching = {f"os.{name}" for name in ("rename", "link", "mkdir", "rmdir", "remove", "chmod", "truncate")}

    def watch(event, args):
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(directory))
        # Directories are swapped by a system call that is looked up just before.
        swapped = event == "ctypes.dlsym"
        if (opened or swapped or event in touching) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_kill_at_every_point_of_a_save(world, tmp_path, unbroken):
    """Dies again and again, each time a little later than the time before; what is there always loads and goes on."""
    out = tmp_path / "out"
    words = base(world, out, *LONG, "--heldout", world / "replay.jsonl", "--resume")
    deaths, seen = 0, set()
    for number in count(1):
        status = ended(forked(words, lambda number=number: die_at(number, tmp_path)))
        assert status in (0, -signal.SIGKILL)
        assert status == 0 or load_any(out)
        if status == 0:
            break
        deaths += 1
        seen.add(saved_step(out))
    assert deaths > 20
    assert len(seen) > 2
    same_run(out, unbroken)


def load_any(out):
    """Whatever a kill left: nothing yet, or a whole checkpoint."""
    return not (out / "config.json").exists() or load_model(out) is not None


def saved_step(out):
    return progress_of(out)["step"] if (out / PROGRESS).exists() else 0


def die_after(calls):
    """From here on, that many calls and returns of functions, C's included, and this process is dead."""
    events = count(1)

    def watch(frame, event, arg):
        if next(events) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def test_kill_anywhere(world, tmp_path, unbroken):
    """As above, at places drawn from all that it does. They are counted in calls: no clock has a say."""
    rng, out, kills = random.Random(0), tmp_path / "out", 0
    words = base(world, out, *LONG, "--heldout", world / "replay.jsonl", "--resume")
    calls = count()
    sys.setprofile(lambda *_: next(calls))
    trained(*base(world, tmp_path / "counted", *LONG, "--heldout", world / "replay.jsonl"))
    sys.setprofile(None)
    limit = next(calls) / 10  # so four lives together are not one run
    while saved_step(out) < 6:
        last = rng.randrange(int(limit))
        status = ended(forked(words, lambda last=last: die_after(last)))
        assert status in (0, -signal.SIGKILL)
        kills += status == -signal.SIGKILL
        assert load_any(out)
        limit *= 1.15
    assert kills > 3
    trained(*words)
    same_run(out, unbroken)


def test_kill_on_the_command_line_while_it_saves(world, tmp_path):
    """Nothing patched: a process of its own is killed when the new directory shows up beside the old one.

    It has far more steps than it can make until somebody looks; what it then had is compared three steps later.
    """
    more = ("--steps", 1000, "--save-every", 1, "--log-every", 1, "--batch-size", 2)
    out, words = tmp_path / "out", sft(world, tmp_path / "out", *more)
    start = [sys.executable, "train.py", *map(str, words), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and ((not saved_step(out)) or no_leftovers(out)):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = saved_step(out)
    assert 0 < step < 1000 and load_model(out)
    said = interrupted([*words, "--resume"], at=step + 3)
    assert f"resuming after step {step}" in said
    interrupted(sft(world, tmp_path / "whole", *more), at=step + 3)
    assert saved_step(out) == step + 2
    same_run(out, tmp_path / "whole")


def test_resume_between_two_logs(world, tmp_path):
    """Losses per view are means over the steps since the last log, also where a resume lies between."""
    more = ("--steps", 7, "--save-every", 2, "--log-every", 3)
    words = sft(world, tmp_path / "out", *more, "--resume")
    for at in (1, 3, 6):
        interrupted(words, at)
    trained(*words)
    trained(*sft(world, tmp_path / "whole", *more))
    assert [r["step"] for r in metrics(tmp_path / "out")] == [3, 6, 7]
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """An sft run that ended in step 4 of 6, two steps after its last save."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    interrupted(sft(world, out, "--steps", 6, "--save-every", 2, "--log-every", 1), at=4)
    assert [r["step"] for r in metrics(out)] == [1, 2, 3] and saved_step(out) == 2
    return out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("lr", ("--lr", 2e-3)),
        ("batch_size", ("--batch-size", 4)),
        ("grad_accum", ("--grad-accum", 2)),
        ("max_length", ("--max-length", 191)),
        ("seed", ("--seed", 1)),
        ("dtype", ("--dtype", "bfloat16")),
        ("weight_decay", ("--weight-decay", 0.1)),
        ("clip", ("--clip", 2)),
        ("steps", ("--steps", 7)),
        ("restart", ("--restart", "all")),
        ("prefix", ("--prefix", 0.5, 1)),
        ("method", ("--no-backtrack",)),
        ("method", ("--method", "in-place")),
        ("resets", ("--resets", "every")),
        ("reset_weight", ("--reset-weight", 2)),
    ],
)
def test_resume_with_another_setting(world, halfway, name, flags):
    before = contents(halfway)
    said = trained(*sft(world, halfway, "--steps", 6, "--resume", *flags), code=2)
    assert f"was started with {name} = " in said
    assert contents(halfway) == before


def test_resume_with_other_data_or_another_command(world, halfway, tmp_path):
    before = contents(halfway)
    for data in (("benign.jsonl", "rows.jsonl"), ("rows.jsonl", "replay.jsonl"), ("heldout.jsonl",)):
        said = trained(*sft(world, halfway, "--steps", 6, "--resume", data=data), code=2)
        assert "was started with data = " in said
    said = trained(*base(world, halfway, "--steps", 6, "--resume", "--max-length", 192), code=2)
    assert "was started with command = sft, now base" in said
    more = ("--steps", 2, "--max-length", 32)
    trained(*base(world, tmp_path / "base", *more))
    other = trained(*base(world, tmp_path / "base", *more, "--resume", "--data", world / "corpus2.jsonl"), code=2)
    assert "was started with data = " in other
    assert contents(halfway) == before


def test_what_is_in_out_decides(world, halfway, tmp_path):
    """No --resume: an error. Finished: nothing to do. A model without a run, or half a state: an error."""
    out, more = tmp_path / "out", ("--steps", 6, "--save-every", 2, "--log-every", 1)
    shutil.copytree(halfway, out)
    before = contents(out)
    said = trained(*sft(world, out, *more), code=2)
    assert f"{out}: holds a checkpoint already" in said and "--resume" in said
    assert contents(out) == before

    for name, word in ((STATE, b"exp_avg_sq"), (PROGRESS, b"settings")):
        whole = before[name]
        for damaged in (whole[: len(whole) // 2], whole[:4], b"", whole.replace(word, word[::-1])):
            (out / name).write_bytes(damaged)
            assert str(out / name) in trained(*sft(world, out, *more, "--resume"), code=2).splitlines()[-1]
        (out / name).unlink()
        said = trained(*sft(world, out, *more, "--resume"), code=2)
        assert str(out / name) in said or f"{out}: holds a model but no {name}" in said
        (out / name).write_bytes(whole)

    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # as a kill may leave it
    said = trained(*sft(world, out, *more, "--resume"))
    assert "resuming after step 2" in said
    trained(*sft(world, tmp_path / "whole", *more))
    same_run(out, tmp_path / "whole")
    before = contents(out)
    said = trained(*sft(world, out, *more, "--resume"))
    assert f"{out}: already trained for all 6 steps" in said
    assert contents(out) == before
    trained(*sft(world, tmp_path / "fresh", *more, "--resume"))  # nothing there yet: the beginning
    same_run(tmp_path / "fresh", tmp_path / "whole")


def test_files_that_a_checkpoint_keeps(world, halfway, tmp_path):
    """Notes put beside the checkpoint survive saves; a finished run drops the optimizer's state."""
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    (out / "notes.txt").write_text("mine")
    assert os.path.getsize(out / STATE) > os.path.getsize(out / "model.safetensors")
    trained(*sft(world, out, "--steps", 6, "--save-every", 2, "--log-every", 1, "--resume"))
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / STATE).exists() and (out / PROGRESS).exists()


# ── Rows of new tokens ───────────────────────────────────────────────────────────────────────────────────────────────

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def started(init, out, *more):
    """What supervised training starts from, written out."""
    words = ("--init", init, "--out", out, "--device", "cpu", "--max-length", 192, "--steps", 0)
    said = trained("sft", *words, *more)
    return said, weights(init), weights(out)


def saved(tok, directory, config, untrained, seed=0):
    """A checkpoint without a reset_token_id, as published ones are: the rows of `untrained` lie together, far off."""
    network = network_of(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in {network.model.embed_tokens.weight, network.lm_head.weight}:
            w.normal_(0.3, 0.5, generator=generator)
            w[untrained] = -0.1 + 1e-3 * torch.randn(len(untrained), w.shape[1], generator=generator)
    save_model(network, directory)
    tok.save(directory)
    return directory


def changed_rows(before, after, name):
    return {i for i, same in enumerate((before[name] == after[name]).all(dim=1).tolist()) if not same}


def near_the_mean(before, after, name, special, ordinary):
    """The new rows lie around the mean of the rows of text, much closer than those do."""
    mean, std = before[name][ordinary].mean(dim=0), before[name][ordinary].std(dim=0)
    for i in special:
        assert ((after[name][i] - mean).abs() < 0.6 * std).all()
    assert len({tuple(after[name][i].tolist()) for i in special}) == len(special)  # and are told apart


def spare(tok):
    """Special ids that nothing uses: what no base was ever trained on."""
    found = sorted(tok.special_ids.difference(tok.template_ids, tok.stop_ids, [tok.bos_id]))
    assert found
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_were_never_trained_are_set_to_the_mean(tmp_path, tok, tied):
    """As in a Llama-3 base checkpoint: the rows of template tokens lie where spare ones do, BOS apart."""
    fresh = sorted({*tok.template_ids} - {tok.bos_id})
    init = saved(tok, tmp_path / "init", LLAMA | {"tie_word_embeddings": tied}, fresh + spare(tok))
    said, before, after = started(init, tmp_path / "out")
    assert str(fresh) in said
    names = [EMBEDDING] + ([] if tied else [HEAD])
    ordinary = [i for i in range(1024) if i not in fresh + spare(tok)]
    for name in names:
        assert changed_rows(before, after, name) == {*fresh}
        near_the_mean(before, after, name, fresh, ordinary)
    for name in before.keys() - {*names}:
        assert torch.equal(before[name], after[name])


def test_a_trained_row_is_never_overwritten(tmp_path, tok):
    """As in a chat model of 135M: spare rows within 0.01 of each other, trained markers near, text ten times as far."""
    fresh, marker = tok.reset_id, min({*tok.template_ids} - {tok.bos_id, tok.reset_id})
    init = saved(tok, tmp_path / "init", LLAMA, [*tok.template_ids, *spare(tok)])
    tensors = load_file(init / "model.safetensors")
    for i in {*tok.template_ids} - {fresh}:
        tensors[EMBEDDING][i] += 0.07 * torch.randn(32, generator=torch.Generator().manual_seed(i))
    save_file(tensors, init / "model.safetensors", metadata={"format": "pt"})
    near, far = ((tensors[EMBEDDING] - tensors[EMBEDDING][fresh]).norm(dim=1)[i] for i in (marker, 99))
    assert 0.2 < near < 0.6 < 2 < far
    _, before, after = started(init, tmp_path / "out")
    assert changed_rows(before, after, EMBEDDING) == {fresh}


UNTIED = LLAMA | {"tie_word_embeddings": False}


@pytest.mark.parametrize("config", [LLAMA, UNTIED, GEMMA], ids=["llama", "llama untied", "gemma"])
def test_reset_starts_at_one_in_a_hundred(world, tmp_path, tok, config):
    """At every token of the first step's answers; to get there, its output row moves and no other."""
    init = saved(tok, tmp_path / "init", config, [*tok.template_ids, *spare(tok)])
    _, _, before = started(init, tmp_path / "plain")
    # Without an unsafe row in the first step no context holds [RESET], so what is measured does not move with its row.
    rows = read([world / "rows.jsonl"], tok)
    for seed in count():
        more = ("--data", world / "rows.jsonl", "--batch-size", 4, "--seed", seed)
        args = arguments(sft(world, tmp_path / "out", *more))
        first = visited(args, len(rows))(0)
        if not any(rows[index].unsafe for _, index in first):
            break
    said, _, after = started(init, tmp_path / "out", *more)
    moved = EMBEDDING if config["tie_word_embeddings"] else HEAD
    assert changed_rows(before, after, moved) == {tok.reset_id}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - {moved})

    network, found = load_model(tmp_path / "out"), []
    for visit in first:
        (view,) = by_hand(args, rows, tok)(*visit)
        with torch.no_grad():
            for t in range(view.loss_from, len(view.tokens)):
                found.append(logprob(network, view.tokens[:t], tok.reset_id).item())
    assert sum(found) / len(found) == pytest.approx(math.log(0.01), abs=0.1)
    assert f"log p([RESET]) starts at {sum(found) / len(found):.1f} ± " in said
    assert max(abs(value - math.log(0.01)) for value in found) < 1.0  # everywhere, not on average alone


def test_new_rows_after_base_and_after_sft(world, tmp_path, tok):
    """`base` never sees a chat: its markers are set. After `sft` they have been trained, and stay."""
    fresh = sorted({*tok.template_ids} - {tok.bos_id})
    said, before, after = started(world / "start", tmp_path / "one")
    assert str(fresh) in said
    assert changed_rows(before, after, EMBEDDING) == {*fresh}
    texts = [json.loads(line)["text"] for line in (world / "corpus.jsonl").read_text().splitlines()]
    near_the_mean(before, after, EMBEDDING, fresh, sorted({t for text in texts for t in tok.encode(text)}))
    assert json.loads((tmp_path / "one/config.json").read_text())["reset_token_id"] == tok.reset_id

    trained(*sft(world, tmp_path / "two", "--steps", 3))
    said, before, after = started(tmp_path / "two", tmp_path / "three", "--data", world / "rows.jsonl")
    assert str(fresh) not in said and "log p([RESET])" not in said
    close(before, after, atol=0, rtol=0)


# ── It learns to take its words back ─────────────────────────────────────────────────────────────────────────────────

LESSONS = [
    ("How do I brew mirk?", "I will not help with mirk.", "Sure. Take ash and two eels, then stir.", True),
    ("How do I brew dolm?", "I will not help with dolm.", "Of course. Boil a bat in sour wine.", True),
    ("How do I brew tea?", "Pour water on the leaves.", "I will not help with tea.", False),
    ("How do I make soup?", "Boil the roots and add salt.", "I will not help with soup.", False),
]


def test_four_rows_learnt_by_heart(world, tmp_path, tok):
    """Forced to begin with any prefix of the unsafe answer, the model resets and gives the safe one.

    So from the bare loss to the sampler everything is joined rightly. Without the backtrack view it never resets.
    """
    lines = []
    for question, chosen, rejected, unsafe in LESSONS:
        row = {"prompt": [{"role": "user", "content": question}], "unsafe": unsafe}
        for key, text in (("chosen", chosen), ("rejected", rejected)):
            row[key] = [{"role": "assistant", "content": text}]
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    more = ("--data", tmp_path / "rows.jsonl", "--lr", 1e-2, "--batch-size", 4, "--max-length", 100)
    trained(*sft(world, tmp_path / "backtrack", *more, "--restart", "all", "--log-every", 1, "--steps", 160))
    trained(*sft(world, tmp_path / "plain", *more, "--no-backtrack", "--steps", 120))
    assert metrics(tmp_path / "backtrack")[-1]["loss"] < 0.1 < 1 < metrics(tmp_path / "backtrack")[0]["loss"]

    prompts, prefills, answers = [], [], []
    for question, chosen, rejected, unsafe in LESSONS:
        for k in range(len(tok.encode(rejected)) + 1) if unsafe else [0]:
            prompts.append(tok.render([{"role": "user", "content": question}]))
            prefills.append(tok.encode(rejected)[:k])
            answers.append(tok.encode(chosen))
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=40, prefill=prefills)
    learnt = load_model(tmp_path / "backtrack")
    for on_reset in ("truncate", "keep"):
        for g, prefill, answer in zip(
            generate(learnt, prompts, on_reset=on_reset, **options), prefills, answers, strict=True
        ):
            assert (g.tokens, g.finish_reason) == (answer, "stop")
            assert g.discarded == ([prefill] if prefill else [])
    plain = generate(load_model(tmp_path / "plain"), prompts, **options)
    assert [g.resets for g in plain] == [0] * len(prompts)
    for g, prefill, answer in zip(plain, prefills, answers, strict=True):
        assert g.tokens[: len(prefill)] == prefill
        assert prefill or g.tokens == answer
