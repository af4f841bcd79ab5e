"""`train.py dpo` as it is run, against loops that feed every prefix alone to the model.

The loss starts at ln 2, a step is what the definition says, the reference on disk is what would be computed anew, a
killed run ends with the bits of one that was not, and a few dozen steps teach where to reset and where not to.
"""

import json
import math
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from models import LLAMA
from safetensors.torch import load_file, save_file
from training import (
    arguments,
    contents,
    gradients,
    gradients_before_clipping,
    interrupted,
    logprobs_of,
    plain_dpo,
    prefixes,
    steps_of,
    toy_files,
    trained,
    visited,
)

import train
from backtrack.examples import dpo_pairs, draw_prefix
from backtrack.rows import load_rows
from model import load_model, load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world's tokenizer, a corner of its data, and `start`: fine-tuned for a second, from nothing."""
    root = tmp_path_factory.mktemp("world")
    files = toy_files()
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    (root / "config.json").write_text(json.dumps(LLAMA))
    lines = files["sft.jsonl"].splitlines(keepends=True)
    unsafe = [line for line in lines if json.loads(line)["unsafe"]]
    benign = [line for line in lines if not json.loads(line)["unsafe"] and json.loads(line).get("rejected")]
    without = files["replay.jsonl"].splitlines(keepends=True)
    rows = [line for both in zip(unsafe[:6], benign[:6], strict=True) for line in both]
    for name, kept in (
        ("rows.jsonl", rows),
        ("other.jsonl", rows[:-1] + benign[6:7]),
        ("mixed.jsonl", rows + without[:3]),
        ("heldout.jsonl", unsafe[6:9] + benign[6:8]),
        ("unsafe.jsonl", unsafe[:6]),
        ("without.jsonl", without[:3]),
    ):
        (root / name).write_bytes(b"".join(kept))
    words = ["base", "--config", root / "config.json", "--tokenizer", root / "tokenizer", "--device", "cpu"]
    trained(*words, "--max-length", 32, "--steps", 0, "--out", root / "base")
    words = ["sft", "--init", root / "base", "--data", root / "mixed.jsonl", "--device", "cpu", "--max-length", 192]
    trained(*words, "--steps", 20, "--lr", 1e-2, "--out", root / "start")
    return root


@pytest.fixture(scope="module")
def start(world):
    return world / "start"


@pytest.fixture(scope="module")
def tok(start):
    return load_tokenizer(start)


def dpo(world, out, *more, data=("rows.jsonl",)):
    words = ["dpo", "--init", world / "start", "--data", *(world / name for name in data), "--device", "cpu"]
    return [*words, "--out", out, "--max-length", 192, "--batch-size", 4, "--lr", 1e-3, "--log-every", 1, *more]


def by_hand(args, paths, tok):
    """(how many rows; (epoch, row) -> its pairs, the prefixes drawn as the settings say)."""
    rows = [row for row in load_rows(list(map(str, paths)), tok, args.max_length) if row.rejected]

    def pairs(epoch, index):
        row = rows[index]
        room = args.max_length - len(row.prompt) - 2  # for [RESET] and a token after it
        k = draw_prefix(args.seed, epoch, index, min(len(row.rejected), room), args.prefix)
        j = draw_prefix(args.seed + 1, epoch, index, min(len(row.chosen), room), args.prefix)
        return dpo_pairs(row, k, j, tok, method=args.method, restart=args.restart)

    return len(rows), pairs


def step_by_hand(args, step, tok):
    """The pairs of all rows of a step."""
    count, pairs = by_hand(args, args.data, tok)
    return [pair for visit in visited(args, count)(step) for pair in pairs(*visit)]


def same_run(a, b):
    """The same bits, and the same record of every step."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert steps_of(a) == steps_of(b)


def same_weights(a, b, atol=1e-6):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


def cached(out):
    """The files of reference log-probs beside `out`."""
    directory = Path(f"{out}.reference")
    return {file.name for file in directory.iterdir()} if directory.exists() else set()


@pytest.fixture
def plain_descent(monkeypatch):
    """Gradient descent instead of Adam, which blows rounding errors around zero up to the learning rate."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, args: torch.optim.SGD(model.parameters(), lr=args.lr))


@pytest.fixture
def made(monkeypatch):
    """Pairs and weights of every tree that is made, in order, and the longest that a sequence of it may be."""
    calls, real = [], train.pair_tree

    def watched(pairs, weight, max_length):
        calls.append((pairs, max_length))
        return real(pairs, weight, max_length)

    monkeypatch.setattr(train, "pair_tree", watched)
    return calls


# ── Which pairs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prefixes_are_a_function_of_seed_epoch_and_row(world, tmp_path, tok, made):
    """And the policy is held against the reference on the very same pairs."""
    more = ("--epochs", 6, "--batch-size", 12)
    drawn, seen = {}, {}
    for seed in (3, 5):
        made.clear()
        words = dpo(world, tmp_path / f"{seed}", *more, "--seed", seed)
        trained(*words)
        assert len(made) == 2 * 72 and made[:72] == made[72:]  # of the reference, then of training
        args = arguments(words)
        visits = [*chain(*map(visited(args, 12), range(6)))]
        assert sorted(visits) == [(epoch, index) for epoch in range(6) for index in range(12)]
        seen[seed] = dict(zip(visits, (pairs for pairs, _ in made[:72]), strict=True))
    raw = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    for (epoch, index), pairs in seen[3].items():
        row = raw[index]
        prompt = tok.render(row["prompt"])
        good, bad = (tok.encode(row[key][0]["content"]) for key in ("chosen", "rejected"))
        pairs = {p.kind: p for p in pairs}
        assert set(pairs) == {"discourage", *(["elicit"] if row["unsafe"] else [])}
        k_good = draw_prefix(4, epoch, index, len(good))
        assert pairs["discourage"].prompt == prompt
        assert pairs["discourage"].chosen == [*good, tok.turn_end[0]]
        assert pairs["discourage"].rejected == [*good[:k_good], tok.reset_id, *bad, tok.turn_end[0]]
        if row["unsafe"]:
            k_bad = draw_prefix(3, epoch, index, len(bad))
            assert pairs["elicit"].chosen == [*bad[:k_bad], tok.reset_id, *good, tok.turn_end[0]]
            assert pairs["elicit"].rejected == [*bad, tok.turn_end[0]]
            drawn.setdefault(index, set()).add(k_bad)
    assert len(drawn) == 6 and all(len(lengths) > 1 for lengths in drawn.values())
    assert seen[3] != seen[5]


def test_a_short_max_length_leaves_room_for_reset_and_an_answer(world, tmp_path, tok, made):
    more = ("--max-length", 40, "--restart", "all", "--epochs", 5, "--batch-size", 12)
    said = trained(*dpo(world, tmp_path / "out", *more))
    long = 0
    for row in map(json.loads, (world / "rows.jsonl").read_text().splitlines()):
        parts = [tok.encode(row[key][0]["content"]) for key in ("chosen", "rejected")]
        long += len(tok.render(row["prompt"])) + sum(map(len, parts)) + 2 > 40
    assert f"{long} of 12 rows" in said and long > 4
    cut = 0
    for pairs, max_length in made:
        assert max_length == 40
        for p in pairs:
            sides = [(p.prompt + answer)[:40][len(p.prompt) :] for answer in (p.chosen, p.rejected)]
            resets = [side[:-1].count(tok.reset_id) for side in sides]  # with a token behind them
            assert resets == [p.kind == "elicit", p.kind == "discourage"]
            cut += len(p.prompt + p.chosen) > 40
    assert cut


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flags", [(), ("--no-backtrack",), ("--restart", "all", "--beta", 2), ("--dtype", "bfloat16")])
def test_the_first_loss_is_ln_2(world, tmp_path, flags):
    trained(*dpo(world, tmp_path / "out", "--steps", 2, "--nll", 0, *flags))
    first, second = steps_of(tmp_path / "out")
    kinds = {"loss/baseline"} if "--no-backtrack" in flags else {"loss/elicit", "loss/discourage"}
    kinds |= {"loss/restart"} if "--restart" in flags else set()
    assert {name for name in first if name.startswith("loss/")} == kinds
    for name in ("loss", *kinds):
        assert first[name] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["accuracy"], first["margin"], first["chosen"], first["rejected"]) == (0, 0, 0, 0)
    assert second["loss"] != first["loss"] and first["grad_norm"] > 1e-3
    resets = {"reset_after_unsafe", "reset_after_safe"}
    assert resets & first.keys() == (set() if "--no-backtrack" in flags else resets)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["reset_token_id"] == load_tokenizer(tmp_path / "out").reset_id


@pytest.mark.parametrize(
    "flags", [(), ("--nll", 0.7, "--elicit", 0.5, "--discourage", 2, "--restart", "all", "--restart-weight", 0.3)]
)
def test_a_step_by_hand(world, start, tok, tmp_path, monkeypatch, flags):
    """Interrupted before step 2, the weights on disk and the start give all that step 2 does, by definition alone."""
    more = ("--steps", 2, "--batch-size", 2, "--save-every", 1, "--beta", 0.5, "--lr", 3e-3, "--clip", 1e9)
    words = dpo(world, tmp_path / "out", *more, *flags)
    interrupted(words, at=2)
    one, reference = load_model(tmp_path / "out"), load_model(start)
    found = gradients_before_clipping(monkeypatch)
    trained(*words, "--resume")
    args = arguments(words)
    weight = {"elicit": args.elicit, "discourage": args.discourage, "restart": args.restart_weight}
    pairs = step_by_hand(args, 1, tok)
    assert {p.kind for p in pairs} >= {"elicit", "discourage"}
    loss, kinds, ratios = plain_dpo(one, reference, pairs, 0.5, args.nll, weight.get)
    loss = loss / sum(weight[p.kind] for p in pairs)
    second = steps_of(tmp_path / "out")[1]
    assert abs(second["loss"] - math.log(2)) > 1e-3
    assert second["loss"] == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    for kind, (value, n) in kinds.items():
        assert second[f"loss/{kind}"] == pytest.approx(value / n, rel=1e-5)
    margins = [0.5 * (c - r) for c, r in ratios]
    assert second["accuracy"] == sum(m > 0 for m in margins) / len(pairs)
    assert second["margin"] == pytest.approx(sum(margins) / len(pairs), abs=1e-4)
    assert second["chosen"] == pytest.approx(sum(c for c, _ in ratios) / len(pairs), abs=1e-4)
    assert second["rejected"] == pytest.approx(sum(r for _, r in ratios) / len(pairs), abs=1e-4)
    expected = gradients(one, loss)
    for (name, gradient), other in zip(expected.items(), found[0], strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_tokens_that_were_trained_on(world, tok, tmp_path):
    """Of a row, what its sequences begin with alike counts once; the last token of each predicts nothing."""
    words = dpo(world, tmp_path / "out", "--epochs", 1, "--restart", "unsafe")
    trained(*words)
    args, tokens = arguments(words), 0
    count, pairs_of = by_hand(args, args.data, tok)
    for step, record in enumerate(steps_of(tmp_path / "out")):
        for visit in visited(args, count)(step):
            tokens += len(prefixes([p.prompt + side for p in pairs_of(*visit) for side in (p.chosen, p.rejected)]))
        assert record["tokens"] == tokens <= record["computed_tokens"]


def test_accumulation_is_one_big_batch(world, tmp_path, plain_descent):
    for batch, accumulate in ((8, 1), (1, 8)):
        split = ("--batch-size", batch, "--grad-accum", accumulate, "--nll", 0.3, "--elicit", 0.5, "--clip", 1e9)
        trained(*dpo(world, tmp_path / f"{batch}", "--steps", 2, "--lr", 0.02, *split))
    same_weights(tmp_path / "8", tmp_path / "1")
    for a, b in zip(steps_of(tmp_path / "8"), steps_of(tmp_path / "1"), strict=True):
        assert a.pop("computed_tokens") >= b.pop("computed_tokens")  # a row alone has no padding
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    moved = load_file(tmp_path / "8/model.safetensors")["model.embed_tokens.weight"]
    assert (moved - load_file(world / "start/model.safetensors")["model.embed_tokens.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("dropped", ["elicit", "discourage"])
def test_weight_0_is_a_pair_that_is_not_there(world, tmp_path, monkeypatch, plain_descent, dropped):
    more = ("--steps", 2, "--batch-size", 6, "--lr", 0.02, "--nll", 0.3, "--data", world / "unsafe.jsonl")
    trained(*dpo(world, tmp_path / "zero", *more, f"--{dropped}", 0))
    trained(*dpo(world, tmp_path / "both", *more))
    pairs = train.dpo_pairs
    monkeypatch.setattr(train, "dpo_pairs", lambda *a, **k: [p for p in pairs(*a, **k) if p.kind != dropped])
    trained(*dpo(world, tmp_path / "gone", *more))
    same_weights(tmp_path / "zero", tmp_path / "gone")
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "zero", tmp_path / "both")


def test_a_step_in_which_no_pair_counts(world, tmp_path):
    """--discourage 0 and a batch without an unsafe row: nothing to learn, not a division by zero."""
    trained(*dpo(world, tmp_path / "out", "--steps", 6, "--batch-size", 1, "--discourage", 0))
    records = steps_of(tmp_path / "out")
    without = [r["loss"] for r in records if "loss/elicit" not in r]
    assert without == [0.0] * len(without) and 0 < len(without) < 6


def test_no_steps_saves_the_start(world, start, tmp_path):
    trained(*dpo(world, tmp_path / "out", "--steps", 0))
    same_weights(tmp_path / "out", start, atol=0)
    trained("dpo", "--init", start, "--out", tmp_path / "bare", "--steps", 0, "--device", "cpu", "--max-length", 64)
    same_weights(tmp_path / "bare", start, atol=0)


def test_rows_without_rejected_are_left_out(world, tmp_path):
    said = trained(*dpo(world, tmp_path / "mixed", "--epochs", 1, data=("mixed.jsonl",)))
    assert "15 rows, 6 with an unsafe rejected answer" in said and "3 rows without a rejected answer" in said
    trained(*dpo(world, tmp_path / "rows", "--epochs", 1))
    same_run(tmp_path / "mixed", tmp_path / "rows")
    assert len(steps_of(tmp_path / "rows")) == 3  # 12 rows in batches of 4


@pytest.mark.parametrize("no_backtrack", [False, True])
def test_heldout(world, start, tok, tmp_path, no_backtrack):
    """Every held-out number a second time, each [RESET] given its prefix alone."""
    heldout, flags = str(world / "heldout.jsonl"), ["--no-backtrack"] if no_backtrack else []
    words = dpo(world, tmp_path / "out", "--steps", 3, "--heldout", heldout, "--beta", 0.5, "--lr", 3e-3, *flags)
    said = trained(*words, "--log-every", 2)
    assert said.count("held out:") == said.count("step ") == 2
    records = [r for r in steps_of(tmp_path / "out") if "heldout/margin" in r]
    assert [r["step"] for r in records] == [2, 3]
    names = {"accuracy", "margin", "chosen", "rejected"}
    names |= {"baseline"} if no_backtrack else {"elicit", "discourage", "reset_after_unsafe", "reset_after_safe"}
    assert set(records[-1]) == {"step", *(f"heldout/{name}" for name in names)}

    n, pairs_of = by_hand(arguments(words), [heldout], tok)
    pairs = [p for i in range(n) for p in pairs_of(0, i)]
    end, reference = load_model(tmp_path / "out"), load_model(start)
    with torch.no_grad():
        _, kinds, ratios = plain_dpo(end, reference, pairs, 0.5)
        found = {"elicit": [], "discourage": []}
        for p in [] if no_backtrack else pairs:
            answer = p.chosen if p.kind == "elicit" else p.rejected
            k = answer.index(tok.reset_id)
            probabilities = end(torch.tensor([p.prompt + answer[:k]]))[0, -1].softmax(dim=0)
            found[p.kind].append(probabilities[tok.reset_id].item())
    margins = [0.5 * (c - r) for c, r in ratios]
    last = records[-1]
    for kind, (value, n) in kinds.items():
        assert last[f"heldout/{kind}"] == pytest.approx(value / n, rel=1e-5)
    assert last["heldout/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert last["heldout/accuracy"] == sum(m > 0 for m in margins) / len(margins)
    assert last["heldout/chosen"] == pytest.approx(sum(c for c, _ in ratios) / len(ratios), abs=1e-4)
    if not no_backtrack:
        assert (len(found["elicit"]), len(found["discourage"])) == (3, 5)
        assert last["heldout/reset_after_unsafe"] == pytest.approx(sum(found["elicit"]) / 3, rel=1e-4)
        assert last["heldout/reset_after_safe"] == pytest.approx(sum(found["discourage"]) / 5, rel=1e-4)


# ── The reference on disk ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def computed(monkeypatch):
    """How often a run's reference log-probs were computed."""
    calls, real = [], train.reference_logprobs
    monkeypatch.setattr(train, "reference_logprobs", lambda *args: calls.append(1) or real(*args))
    return calls


def test_the_reference_is_read_again(world, tmp_path, computed):
    """The same losses as computed anew, also under another β; what is in the file is log π_ref in order."""
    out, beta = tmp_path / "out", ("--steps", 4, "--beta", 0.5)
    said = trained(*dpo(world, out, "--steps", 4))
    assert len(computed) == 1 and "read from" not in said
    (name,) = cached(out)
    before = contents(Path(f"{out}.reference"))
    shutil.move(out, tmp_path / "first")
    said = trained(*dpo(world, out, "--steps", 4))
    assert len(computed) == 1 and f"read from {out}.reference/{name}" in said
    same_run(out, tmp_path / "first")
    shutil.rmtree(out)
    trained(*dpo(world, out, *beta))
    assert len(computed) == 1 and contents(Path(f"{out}.reference")) == before
    trained(*dpo(world, tmp_path / "anew", *beta))
    assert len(computed) == 2
    same_run(out, tmp_path / "anew")
    assert contents(tmp_path / "anew.reference") == before  # a function of weights and data
    for flags in (("--lr", 1e-2), ("--nll", 1), ("--elicit", 0.5), ("--clip", 2)):
        shutil.rmtree(out)
        trained(*dpo(world, out, "--steps", 4, *flags))
    assert len(computed) == 2 and contents(Path(f"{out}.reference")) == before


def test_what_is_in_the_file(world, start, tok, tmp_path):
    """log π_ref of every sequence, in the order of steps, rows and pairs, whatever order they were computed in."""
    words = dpo(world, tmp_path / "out", "--steps", 2, "--batch-size", 3, "--heldout", world / "heldout.jsonl")
    trained(*words)
    (name,) = cached(tmp_path / "out")
    tensors = load_file(tmp_path / f"out.reference/{name}")
    args, network = arguments(words), load_model(start)
    groups = [step_by_hand(args, step, tok) for step in range(2)]
    n, heldout_of = by_hand(args, args.heldout, tok)
    groups.append([p for i in range(n) for p in heldout_of(0, i)])
    expected = []
    with torch.no_grad():
        for p in chain(*groups):
            for answer in (p.chosen, p.rejected):
                expected.append(sum(logprobs_of(network, p.prompt + answer, len(p.prompt))).item())
    assert tensors["sizes"].tolist() == [2 * len(pairs) for pairs in groups]
    assert tensors["values"].tolist() == pytest.approx(expected, rel=1e-5)


def test_another_run_has_another_file(world, start, tmp_path, computed):
    """Weights, data, seed, pairs, the cut: nothing of it finds the file of another."""
    out, seen = tmp_path / "out", set()
    weights = load_file(start / "model.safetensors")
    shutil.copytree(start, tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][3, 5] += 1e-3  # one number among all
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    variants = [(), ("--init", tmp_path / "other"), ("--data", world / "other.jsonl"), ("--seed", 1)]
    variants += [("--restart", "unsafe"), ("--restart", "all"), ("--no-backtrack",), ("--max-length", 60)]
    variants += [("--dtype", "bfloat16"), ("--heldout", world / "heldout.jsonl"), ("--batch-size", 3)]
    for n, flags in enumerate(variants, start=1):
        before = len(computed)
        said = trained(*dpo(world, out, "--steps", 3, *flags))
        assert "read from" not in said and len(computed) > before, flags
        assert len(cached(out)) == n and cached(out) > seen, flags
        seen = cached(out)
        first = steps_of(out)[0]["loss"]
        assert first == pytest.approx(math.log(2), abs=1e-6), flags
        shutil.rmtree(out)


def test_a_damaged_file_is_computed_again(world, tmp_path, computed):
    out = tmp_path / "out"
    trained(*dpo(world, out, "--steps", 2))
    (name,) = cached(out)
    file = tmp_path / "out.reference" / name
    whole = file.read_bytes()
    shutil.move(out, tmp_path / "first")
    for n, damaged in enumerate((whole[:-4], whole[: len(whole) // 2], whole[:5], b"", b"x" * 100), start=2):
        file.write_bytes(damaged)
        trained(*dpo(world, out, "--steps", 2))
        assert len(computed) == n
        assert file.read_bytes() == whole and cached(out) == {name}
        same_run(out, tmp_path / "first")
        shutil.rmtree(out)


# ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """A run over two epochs that ended in step 4 of 6, two steps after its last save."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    interrupted(dpo(world, out, *LONG), at=4)
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3]
    return out


LONG = ("--epochs", 2, "--save-every", 2, "--nll", 0.2, "--restart", "unsafe")


@pytest.mark.parametrize("keep", [True, False])
def test_resume(world, halfway, tmp_path, computed, keep):
    """The very same bits, with the reference from disk or, where that is gone, from --init again."""
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    if keep:
        shutil.copytree(f"{halfway}.reference", f"{out}.reference")
    said = trained(*dpo(world, out, *LONG, "--resume"))
    assert "resuming after step 2" in said and ("read from" in said) == keep
    assert len(computed) == (0 if keep else 1)
    trained(*dpo(world, tmp_path / "whole", *LONG))
    same_run(out, tmp_path / "whole")
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3, 4, 5, 6]
    before = contents(out)
    assert "already trained for all 6 steps" in trained(*dpo(world, out, *LONG, "--resume"))
    assert contents(out) == before


def test_interrupted_again_and_again(world, tmp_path):
    words = dpo(world, tmp_path / "out", "--steps", 4, "--save-every", 1, "--resume")
    for at in (1, 2, 4):
        interrupted(words, at)
    trained(*words)
    trained(*dpo(world, tmp_path / "whole", "--steps", 4, "--save-every", 4))
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("beta", ("--beta", 0.2)),
        ("nll", ("--nll", 0)),
        ("elicit", ("--elicit", 0.5)),
        ("discourage", ("--discourage", 0.5)),
        ("restart", ("--restart", "all")),
        ("restart_weight", ("--restart-weight", 0.5)),
        ("prefix", ("--prefix", 0.5, 1)),
        ("method", ("--no-backtrack",)),
        ("seed", ("--seed", 1)),
        ("lr", ("--lr", 1e-4)),
    ],
)
def test_resume_with_another_setting(world, halfway, name, flags):
    before = contents(halfway.parent)
    assert f"was started with {name} = " in trained(*dpo(world, halfway, *LONG, "--resume", *flags), code=2)
    assert contents(halfway.parent) == before


def test_resume_with_another_start(world, start, halfway, tmp_path):
    """The reference would be another one from here on."""
    shutil.copytree(start, tmp_path / "other")
    weights = load_file(start / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    before = contents(halfway.parent)
    said = trained(*dpo(world, halfway, *LONG, "--resume", "--init", tmp_path / "other"), code=2)
    assert "was started with init = " in said.splitlines()[-1]
    assert contents(halfway.parent) == before


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_that_name_the_culprit(world, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file.jsonl"
    good = (world / "rows.jsonl").read_text()
    for text, expected in (
        (good + '{"prompt": []}\n', f"{file}:13: 'prompt' must be"),
        (good + '{"prompt": [{"role": "user", \n', f"{file}:13: not a line of JSON"),
        (good.replace('"rejected"', '"refused"', 1), f"{file}:1: 'unsafe' says"),
        ("", f"{file}: holds no rows"),
    ):
        file.write_text(text)
        for flags in (("--data", file), ("--heldout", file)):
            said = trained(*dpo(world, out, "--steps", 1, *flags), code=2)
            assert expected in said.splitlines()[-1]
    for flags in (("--data", world / "without.jsonl"), ("--heldout", world / "without.jsonl")):
        for more in ((), ("--no-backtrack",)):
            said = trained(*dpo(world, out, "--steps", 1, *flags, *more), code=2)
            assert f"{world / 'without.jsonl'}: no row has a 'rejected' answer" in said.splitlines()[-1]
    for flags in ("--beta -1", "--beta nan", "--nll inf", "--elicit -0.1", "--discourage x", "--restart some"):
        assert flags.split()[0] in trained(*dpo(world, out, *flags.split()), code=2).splitlines()[-1]
    said = trained(*dpo(world, out, "--init", tmp_path / "none"), code=2)
    assert str(tmp_path / "none") in said
    assert not out.exists() and not cached(out)


def test_defaults():
    plain = vars(arguments(["dpo", "--init", "i", "--data", "d", "--out", "o"]))
    assert (plain["beta"], plain["nll"], plain["elicit"], plain["discourage"], plain["restart_weight"]) == (
        *(0.1, 0.0, 1.0, 1.0, 1.0),
    )
    assert (plain["lr"], plain["weight_decay"], plain["method"]) == (5e-7, 0.0, "backtrack")
    assert (plain["restart"], plain["prefix"]) == ("none", [0.0, 1.0])


# ── It learns where to take its words back ───────────────────────────────────────────────────────────────────────────


def test_it_learns_where_to_reset(world, tmp_path):
    """Every pair is won. With the NLL term [RESET] itself becomes certain where it belongs, and only there."""
    more = ("--steps", 90, "--batch-size", 12, "--lr", 1e-2, "--nll", 0.1, "--heldout", world / "rows.jsonl")
    trained(*dpo(world, tmp_path / "out", *more))
    first, *_, last = steps_of(tmp_path / "out")
    assert first["accuracy"] == 0 and last["heldout/accuracy"] == 1 and last["heldout/margin"] > 1
    assert last["heldout/chosen"] > 0 > last["heldout/rejected"]
    assert first["reset_after_unsafe"] < 0.1 < 0.9 < last["heldout/reset_after_unsafe"]
    assert last["heldout/reset_after_safe"] < 0.05
