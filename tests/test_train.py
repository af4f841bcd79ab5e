"""`python -m data.base` and `train.py sft` as they are run: against loops, AdamW's formula, and kill -9.

Losses are computed a second time by plain.py, one target at a time; AdamW's steps by hand in float64; a run that was
killed, at any point of a save, must end with the bits of one that was not. The last test trains on four rows until the
model takes its words back.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
from functools import partial
from itertools import chain, count

import pytest
import torch
from models import LLAMA
from safetensors.torch import load_file
from samples import row_of, user, write
from training import (
    arguments,
    close,
    command_line,
    contents,
    gradients_before_clipping,
    interrupted,
    logprob,
    metrics,
    plain_nll,
    prefixes,
    sft_by_hand,
    steps_of,
    toy_files,
    toy_place,
    trained,
    visited,
)

import train
from backtrack.examples import draw_prefix
from backtrack.generate import generate
from backtrack.rows import load_rows
from backtrack.run import metrics as log
from backtrack.run.progress import PROGRESS, STATE
from backtrack.trees import view_tree
from model import ModelConfig, Transformer, load_model, load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, a corner of its data, and `start`: a model that was pretrained for a second."""
    root, files = toy_place(tmp_path_factory), toy_files()
    for name, source, rows in (
        ("corpus.jsonl", "base.jsonl", 100),
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
    """In another order each; a step is a function of its number alone, whatever was asked for before."""
    args = argparse.Namespace(seed=0, batch_size=3, grad_accum=2)
    steps = [visited(args, 13)(step) for step in range(13)]
    epochs = [[index for epoch, index in chain(*steps) if epoch == e] for e in range(6)]
    assert all(sorted(e) == list(range(13)) for e in epochs) and len({tuple(e) for e in epochs}) == 6
    again = visited(args, 13)
    assert [again(n) for n in (12, 0, 7, 3)] == [steps[n] for n in (12, 0, 7, 3)]
    args.seed = 1
    assert visited(args, 13)(0) != steps[0]


@pytest.fixture
def shown(monkeypatch):
    """Every tree of every batch that is made, in order."""
    trees, make = [], train.make_batch
    monkeypatch.setattr(train, "make_batch", lambda few, *more: trees.extend(few) or make(few, *more))
    return trees


def test_base_windows(world, tmp_path, tok, shown):
    """<bos> text <eos> end to end; windows that do not overlap, at another offset each epoch."""
    lines = (world / "corpus.jsonl").read_text().splitlines()[:20]
    write(tmp_path / "corpus.jsonl", *lines)
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


def test_every_step_shows_the_views_of_its_rows(world, tmp_path, tok, shown):
    """Prefixes are redrawn in each epoch and leave room: prompts have about 20 tokens, unsafe answers up to 50."""
    words = sft(world, tmp_path / "out", "--max-length", 40, "--seed", 3, "--restart", "all", "--epochs", 3)
    assert "rows have more than --max-length 40 tokens" in trained(*words)
    args, lengths = arguments(words), {}
    rows = load_rows(list(map(str, args.data)), tok, 40)
    expected = []
    for epoch, index in chain(*map(visited(args, 24), range(9))):
        views = sft_by_hand(args, rows, tok)(epoch, index)
        expected.append(view_tree(views, 40))
        for view in views:
            if view.name == "backtrack":
                k = view.tokens[len(rows[index].prompt) :].index(tok.reset_id)
                assert k == draw_prefix(3, epoch, index, min(len(rows[index].rejected), 38 - len(rows[index].prompt)))
                lengths.setdefault(index, set()).add(k)
    # Before step 1 come the trees at which [RESET] is set to its level; within a step they are sorted by length.
    assert sorted(map(repr, shown[8:])) == sorted(map(repr, expected))
    assert len(lengths) > 4 and max(map(len, lengths.values())) > 1


# ── A step ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_learning_rate():
    """Up linearly over a tenth of the steps, or 100, then half a cosine down to a tenth of the peak."""
    rates = [train.learning_rate(step, 50, 2.0) for step in range(50)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0]) and 0.2 <= rates[-1] < 0.21
    assert rates[5:] == pytest.approx([1.1 + 0.9 * math.cos(math.pi * (step - 5) / 45) for step in range(5, 50)])
    assert train.learning_rate(98, 20_000, 2.0) < train.learning_rate(99, 20_000, 2.0) == 2.0
    assert train.learning_rate(0, 1, 2.0) == 2.0


@pytest.mark.parametrize(("command", "clip", "decay"), [(base, 0.05, 0.1), (sft, 1e9, 0.0)])
def test_adamw_by_its_formula(world, tmp_path, monkeypatch, command, clip, decay):
    """Three steps in float64 by hand: moments 0.9 and 0.95, decay on matrices and not on norms, clipping."""
    monkeypatch.setattr(train, "CLIP", clip)
    lr, more = 0.01, ("--max-length", 96, "--log-every", 1, "--lr", 0.01)
    raw_gradients = gradients_before_clipping(monkeypatch)
    trained(*command(world, tmp_path / "out", "--steps", 3, *more))
    trained(*command(world, tmp_path / "start", "--steps", 0, *more))
    start, end = weights(tmp_path / "start"), weights(tmp_path / "out")
    names = [name for name, _ in load_model(tmp_path / "out").named_parameters()]
    w = [start[name].double() for name in names]
    m, v = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
    assert len(raw_gradients) == 3 and sum(x.dim() == 1 for x in w) == 5
    for t, (grads, record) in enumerate(zip(raw_gradients, metrics(tmp_path / "out"), strict=True), start=1):
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
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


def test_accumulation_is_one_big_batch(world, tmp_path, monkeypatch):
    """8 × 1 = 2 × 4 = 1 × 8, though the rows have different numbers of targets."""
    runs, raw_gradients, data = [], gradients_before_clipping(monkeypatch), ("rows.jsonl", "replay.jsonl")
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        raw_gradients.clear()
        out, split = tmp_path / f"{batch}", ("--batch-size", batch, "--grad-accum", accumulate)
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


# ── What a run says and writes ───────────────────────────────────────────────────────────────────────────────────────


def measured(network, views, tok):
    """Σ weight · −log π / Σ weight; by view the mean −log π; the mean probability of [RESET] where it is a target."""
    with torch.no_grad():
        total, weight, sums = plain_nll(network, views)
        ends = [(v.tokens, t) for v in views for t in range(v.loss_from, len(v.tokens))]
        before = [tokens[:t] for tokens, t in ends if tokens[t] == tok.reset_id]
        resets = [logprob(network, context, tok.reset_id).exp().item() for context in before]
    found = {name: value / n for name, (value, n) in sums.items()}
    return found | {"loss": total.item() / weight, "reset_after_unsafe": sum(resets) / max(1, len(resets))}


def test_metrics_and_heldout_loss(world, tmp_path, tok, monkeypatch):
    """Every number in metrics.jsonl a second time, from the weights and the rows."""
    ticks = count(1000, 7)  # every look at the clock is 7 seconds after the one before
    monkeypatch.setattr(log, "time", argparse.Namespace(time=lambda: next(ticks)))
    out, heldout = tmp_path / "out", [world / "heldout.jsonl", world / "replay.jsonl"]
    more = ("--steps", 5, "--save-every", 4, "--batch-size", 3, "--grad-accum", 2, "--seed", 5, "--log-every")
    said = trained(*sft(world, out, *more, 2, "--heldout", *heldout))
    steps = [(r["step"], "loss" in r) for r in metrics(out)]
    assert steps == [(step, is_training) for step in (2, 4, 5) for is_training in (True, False)]
    records, (*_, last) = metrics(out)[::2], metrics(out)
    assert said.count("held out:") == 3 and said.count("step ") == 3 and f"saved {out}" in said
    logged = {"step", "loss", "lr", "grad_norm", "tokens", "computed_tokens", "tokens_per_s", "seconds"}

    args = arguments(sft(world, out, *more, 2))
    rows = load_rows(list(map(str, args.data)), tok, 192)
    views_of, order = sft_by_hand(args, rows, tok), visited(args, len(rows))
    for n, r in enumerate(records, start=1):
        assert set(r) == logged | {"loss/answer", "loss/backtrack", "reset_after_unsafe"}
        # Of a row, what its views begin with alike counts once; the last token of each predicts nothing.
        steps = [[v.tokens for v in views_of(*visit)] for n in range(r["step"]) for visit in order(n)]
        assert r["tokens"] == sum(len(prefixes(sequences)) for sequences in steps)
        assert r["computed_tokens"] >= r["tokens"]  # what they are worth: test_trees.py
        assert (r["seconds"], r["tokens_per_s"]) == (7 * n, round(r["tokens"] / (7 * n)))
    trained(*sft(world, tmp_path / "each", *more, 1))  # a loss is the mean over the steps since the last line
    each = [r["loss"] for r in metrics(tmp_path / "each")]
    assert [r["loss"] for r in records] == pytest.approx([sum(each[:2]) / 2, sum(each[2:4]) / 2, each[4]])

    rows = load_rows(list(map(str, heldout)), tok, 192)
    views = [v for i in range(len(rows)) for v in sft_by_hand(args, rows, tok)(0, i)]
    found = measured(load_model(out), views, tok)
    names = ("answer", "backtrack", "text", "reset_after_unsafe")
    assert set(last) == {"step", "heldout/reset_after_safe", *(f"heldout/{name}" for name in names)}
    for name in names:
        assert last[f"heldout/{name}"] == pytest.approx(found[name], rel=1e-4)
    chats = [row for row in rows if not row.plain_text]
    begun = [row.prompt + row.chosen[:j] for row in chats for j in range(1, len(row.chosen) + 1)]
    resets = [logprob(load_model(out), context, tok.reset_id).exp().item() for context in begun]
    assert last["heldout/reset_after_safe"] == pytest.approx(sum(resets) / len(resets), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), {"answer", "backtrack"}),
        (("--restart", "unsafe"), {"answer", "backtrack", "restart"}),
        (("--no-backtrack", "--restart", "all"), {"answer"}),
        (("--method", "in-place", "--resets", "drawn", "--restart", "all"), {"answer", "in place"}),
        (("--method", "in-place", "--resets", "every", "--reset-weight", 3), {"answer", "in place", "turn"}),
        (("--resets", "every", "--reset-weight", 3, "--max-length", 45), {"answer", "backtrack", "reset"}),
    ],
)
def test_the_first_loss_by_hand(world, tmp_path, tok, shown, flags, names):
    """Of every method: which views there are, and the mean over their targets. Only backtracking shows [RESET]."""
    more = (*flags, "--batch-size", 24, "--steps")
    trained(*sft(world, tmp_path / "start", *more, 0))
    shown.clear()
    trained(*sft(world, tmp_path / "out", *more, 1))
    (record,), args = metrics(tmp_path / "out"), arguments(sft(world, "x", *more, 1))
    rows = load_rows(list(map(str, args.data)), tok, args.max_length)
    views = [v for visit in visited(args, 24)(0) for v in sft_by_hand(args, rows, tok)(*visit)]
    found = measured(load_model(tmp_path / "start"), views, tok)
    assert {name for name in record if "loss/" in name} == {f"loss/{name}" for name in names}
    for name in ("loss", *names):
        assert record[name if name == "loss" else f"loss/{name}"] == pytest.approx(found[name], rel=1e-5)
    says_reset = any(tok.reset_id in tree.tokens + tree.target_token for tree in shown)
    assert says_reset == ("reset_after_unsafe" in record) == ("backtrack" in names)


def test_no_steps_saves_the_start(world, tmp_path):
    """`base` writes the random weights that the seed stands for. It needs no data for it."""
    bare = ("base", "--config", world / "config.json", "--tokenizer", world / "tokenizer", "--device", "cpu")
    trained(*bare, "--seed", 7, "--steps", 0, "--out", tmp_path / "out")
    expected = Transformer(ModelConfig.load(world / "config.json"))
    expected.init_weights(7)
    close(load_model(tmp_path / "out").state_dict(), expected.state_dict(), atol=0, rtol=0)
    tokenizer = (world / "tokenizer/tokenizer.model").read_bytes()
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer
    assert "reset_token_id" not in json.loads((tmp_path / "out/config.json").read_text())  # it means nothing yet
    assert "--data" in trained(*bare, "--out", tmp_path / "x", "--steps", 1, code=2).splitlines()[-1]


def test_bfloat16_computes_in_bf16_and_keeps_fp32(world, tmp_path):
    for dtype in ("float32", "bfloat16"):
        trained(*sft(world, tmp_path / dtype, "--steps", 2, "--dtype", dtype, "--log-every", 1))
    a, b = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert {w.dtype for w in b.values()} == {torch.float32}
    assert any((w != w.bfloat16().float()).any() for w in b.values())
    one, two = metrics(tmp_path / "float32")[0], metrics(tmp_path / "bfloat16")[0]
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert max((a[name] - b[name]).abs().max() for name in a) <= 4e-3  # two steps of Adam, each at most 1e-3


def test_defaults_and_flags_that_make_no_sense(world, tmp_path):
    words = ["sft", "--init", "i", "--data", "d", "--out", "o"]
    plain = vars(arguments(words))
    expected = {"method": "backtrack", "resets": "every", "restart": "none", "reset_weight": 1.0, "lr": 1e-5}
    expected |= {"batch_size": 8, "grad_accum": 1, "epochs": 1.0, "max_length": 1024, "seed": 0, "dtype": "float32"}
    assert expected.items() <= plain.items()
    assert arguments([*words, "--no-backtrack"]).method == "baseline"
    for flags in ("--batch-size 0", "--steps -1", "--epochs inf", "--lr nan", "--steps 1 --epochs 1", "--method dpo"):
        said = trained(*sft(world, tmp_path / "out", *flags.split()), code=2)
        assert flags.split()[-2] in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_that_name_the_culprit(world, tmp_path, tok):
    out, empty, mixed = tmp_path / "out", tmp_path / "empty.jsonl", tmp_path / "mixed.jsonl"
    narrow, short, notes = tmp_path / "narrow.json", tmp_path / "short.jsonl", tmp_path / "other/notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    narrow.write_text(json.dumps(LLAMA | {"vocab_size": 1000}))
    write(short, {"text": "too short"})
    write(mixed, {"text": "t"}, row_of("a", "b"))
    empty.write_text("")
    too_short = f"{short}: {len(tok.encode('too short')) + 2} tokens, not 2 × --max-length 32"
    small, one = ("--max-length", 32, "--steps", 1), ("--steps", 1)
    for words, expected in (
        (base(world, out, *small, "--data", empty), f"{empty}: holds no rows"),
        (base(world, out, *small, "--data", short), too_short),
        (base(world, out, *small, "--heldout", short), too_short),
        (base(world, out, *small, "--data", mixed), f"{mixed}:2: "),
        (base(world, out, *small, "--config", narrow), "1024 ids but the model only 1000"),
        (base(world, out, *one, "--max-length", 300), "--max-length 300 exceeds the model's 256"),
        (base(world, out, *one, "--max-length", 1), "--max-length 1: "),
        (sft(world, out, *one, "--max-length", 10), f"{world / 'rows.jsonl'}: no row is left; raise --max-length"),
        (sft(world, out, *one, "--init", world / "tokenizer"), f"{world / 'tokenizer'}"),
        (sft(world, out, *one, "--heldout", empty), f"{empty}: holds no rows"),
        (sft(world, empty, *one), str(empty)),
        (sft(world, notes.parent, *one, "--resume"), f"{notes.parent}: holds files but no checkpoint"),
        (sft(world, out, *one, data=("benign.jsonl",)), 'benign.jsonl: no row says "unsafe": true'),
        (sft(world, out, *one, "--method", "in-place", data=("benign.jsonl",)), "or --method baseline"),
    ):
        assert expected in trained(*words, code=2).splitlines()[-1], words
        assert not (out / "config.json").exists() and empty.read_text() == "" and notes.read_text() == "mine"
    trained(*sft(world, out, *one, "--heldout", world / "benign.jsonl"))  # held out may be benign alone
    assert set(metrics(out)[-1]) == {"step", "heldout/answer", "heldout/reset_after_safe"}


def test_a_loss_that_is_not_finite(world, tmp_path, monkeypatch):
    """The run ends, and says what is saved."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *more: math.inf if step == 2 else rate(step, *more))
    more = ("--steps", 9, "--save-every", 2, "--max-length", 32, "--batch-size", 2)
    said = trained(*base(world, tmp_path / "out", *more), code=2).splitlines()[-1]
    assert f"step 4: loss is nan, gradient norm nan; {tmp_path / 'out'} still holds step 2" in said and "--lr" in said
    assert saved_step(tmp_path / "out") == 2 and load_model(tmp_path / "out")


# ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def same_run(a, b):
    """The same bits, and the same record of every step."""
    ours, theirs = contents(a), contents(b)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"metrics.jsonl"}:
        read = json.loads if name.endswith(".json") else bytes  # of which keys may stand in another order
        assert read(ours[name]) == read(theirs[name]), name
    assert steps_of(a) == steps_of(b)
    assert no_leftovers(a)


def saved_step(out):
    return json.loads((out / PROGRESS).read_text())["step"] if (out / PROGRESS).exists() else 0


def loads(out):
    """Whatever a kill left: nothing yet, or a whole checkpoint."""
    return not (out / "config.json").exists() or load_model(out) is not None


def life(words, prepare):
    """A process of its own that trains, after prepare(); whether it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end)
            program, sys.argv = command_line(words)
            prepare()
            program.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


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


@pytest.mark.parametrize("save", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_at_every_point_of_a_save(world, tmp_path, save):
    """The first of three, the second or the last. Each death comes a little later than the one before; what is there
    always loads and goes on."""
    more = ("--steps", 3, "--save-every", 1, "--log-every", 1, "--batch-size", 1, "--max-length", 16)
    trained(*base(world, tmp_path / "unbroken", *more))
    out, deaths = tmp_path / "out", 0
    words = base(world, out, *more, "--resume")
    if save > 1:
        interrupted(words, at=save)
    while saved_step(out) < save:
        deaths += 1
        assert life(words, partial(die_at, deaths, tmp_path))
        assert loads(out) and saved_step(out) in (save - 1, save)
    assert deaths > 20
    trained(*words)
    same_run(out, tmp_path / "unbroken")


def test_resume_between_two_logs(world, tmp_path):
    """Losses are means over the steps since the last log, also where a resume lies between."""
    more = ("--steps", 7, "--save-every", 2, "--log-every", 3)
    words = sft(world, tmp_path / "out", *more, "--resume")  # nothing there yet: the beginning
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


def test_resume_with_other_settings(world, halfway):
    before = contents(halfway)
    for flags in ("--lr 2e-3", "--batch-size 4", "--max-length 191", "--seed 1", "--dtype bfloat16", "--steps 7") + (
        *("--restart all", "--method in-place", "--resets every", "--reset-weight 2"),
    ):
        said = trained(*sft(world, halfway, "--steps", 6, "--resume", *flags.split()), code=2)
        assert f"was started with {flags.split()[0].strip('-').replace('-', '_')} = " in said
    said = trained(*sft(world, halfway, "--steps", 6, "--resume", data=("heldout.jsonl",)), code=2)
    assert "was started with data = " in said
    said = trained(*base(world, halfway, "--steps", 6, "--resume", "--max-length", 192), code=2)
    assert "was started with command = sft, now base" in said
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
        for damaged in (whole[: len(whole) // 2], b"", whole.replace(word, word[::-1])):
            (out / name).write_bytes(damaged)
            assert str(out / name) in trained(*sft(world, out, *more, "--resume"), code=2).splitlines()[-1]
        (out / name).unlink()
        said = trained(*sft(world, out, *more, "--resume"), code=2)
        assert str(out / name) in said or f"{out}: holds a model but no {name}" in said
        (out / name).write_bytes(whole)

    kept = before["metrics.jsonl"].splitlines(keepends=True)[:2]  # half a line, as a kill leaves it; zeros, as a power
    tails = (b'{"step": 3, "lo', bytes(40), bytes(40) + b"\n")  # cut leaves them
    trained(*sft(world, tmp_path / "whole", *more))
    for number, tail in enumerate(tails):
        again = tmp_path / f"again{number}"
        shutil.copytree(halfway, again)
        (again / "metrics.jsonl").write_bytes(b"".join(kept) + tail)
        (again / "notes.txt").write_text("mine")
        assert "resuming after step 2" in trained(*sft(world, again, *more, "--resume"))
        assert (again / "notes.txt").read_text() == "mine"  # what lies beside the checkpoint survives a save
        (again / "notes.txt").unlink()
        same_run(again, tmp_path / "whole")
    assert (out / STATE).exists() and not (again / STATE).exists()  # a finished run needs no optimizer
    before = contents(again)
    assert f"{again}: already trained for all 6 steps" in trained(*sft(world, again, *more, "--resume"))
    assert contents(again) == before


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
    write(tmp_path / "rows.jsonl", *(row_of(x, good, bad, unsafe=unsafe) for x, good, bad, unsafe in LESSONS))
    more = ("--data", tmp_path / "rows.jsonl", "--lr", 1e-2, "--batch-size", 4, "--max-length", 100)
    trained(*sft(world, tmp_path / "backtrack", *more, "--restart", "all", "--log-every", 1, "--steps", 120))
    trained(*sft(world, tmp_path / "plain", *more, "--no-backtrack", "--steps", 80))
    assert metrics(tmp_path / "backtrack")[-1]["loss"] < 0.1 < 1 < metrics(tmp_path / "backtrack")[0]["loss"]

    prompts, prefills, answers = [], [], []
    for question, chosen, rejected, unsafe in LESSONS:
        for k in range(len(tok.encode(rejected)) + 1) if unsafe else [0]:
            prompts.append(tok.render(user(question)))
            prefills.append(tok.encode(rejected)[:k])
            answers.append(tok.encode(chosen))
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=40, prefill=prefills)
    learnt = load_model(tmp_path / "backtrack")
    for on_reset in ("truncate", "keep"):
        found = generate(learnt, prompts, on_reset=on_reset, **options)
        for g, prefill, answer in zip(found, prefills, answers, strict=True):
            assert (g.tokens, g.finish_reason) == (answer, "stop")
            assert g.discarded == ([prefill] if prefill else [])
    plain = generate(load_model(tmp_path / "plain"), prompts, **options)
    assert [g.resets for g in plain] == [0] * len(prompts)
    for g, prefill, answer in zip(plain, prefills, answers, strict=True):
        assert g.tokens[: len(prefill)] == prefill
        assert prefill or g.tokens == answer
