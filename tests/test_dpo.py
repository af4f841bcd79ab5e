"""`train.py dpo` as it is run, against loops that take one target at a time.

The loss starts at ln 2, a step is what the definition says, the reference on disk is what would be computed anew, a
killed run ends with the bits of one that was not, and a few dozen steps teach where to reset and where not to.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import (
    arguments,
    contents,
    gradients,
    gradients_before_clipping,
    interrupted,
    logprob,
    logprobs_of,
    plain_dpo,
    steps_of,
    toy_files,
    toy_place,
    trained,
    visited,
)

import train
from backtrack.examples import dpo_pairs, draw_prefix
from backtrack.rows import load_rows
from backtrack.run import reference
from model import load_model, load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world's tokenizer, a corner of its data, and `start`: fine-tuned for a second, from nothing."""
    root, files = toy_place(tmp_path_factory), toy_files()
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
    trained(*words, "--steps", 0, "--out", root / "base")
    words = ["sft", "--init", root / "base", "--data", root / "mixed.jsonl", "--device", "cpu", "--max-length", 192]
    trained(*words, "--steps", 20, "--lr", 1e-2, "--out", root / "start")
    # Another start: one number among all is another one.
    shutil.copytree(root / "start", root / "start2")
    weights, name = load_file(root / "start/model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    weights[name][3, 5] += 1e-3
    save_file(weights, root / "start2/model.safetensors", metadata={"format": "pt"})
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
    """(step -> the pairs of its rows; the pairs of all rows), the prefixes drawn as the settings say."""
    rows = [row for row in load_rows(list(map(str, paths)), tok, args.max_length) if row.rejected]

    def pairs(epoch, index):
        row = rows[index]
        room = args.max_length - len(row.prompt) - 2  # for [RESET] and a token after it
        k = draw_prefix(args.seed, epoch, index, min(len(row.rejected), room))
        j = draw_prefix(args.seed + 1, epoch, index, min(len(row.chosen), room))
        return dpo_pairs(row, k, j, tok, method=args.method, restart=args.restart)

    order = visited(args, len(rows))
    return lambda step: [p for visit in order(step) for p in pairs(*visit)], [
        p for i in range(len(rows)) for p in pairs(0, i)
    ]


def same_run(a, b):
    """The same bits, and the same record of every step."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert steps_of(a) == steps_of(b)


def cached(out):
    """The files of reference log-probs beside `out`: name -> bytes."""
    directory = Path(f"{out}.reference")
    return contents(directory) if directory.exists() else {}


@pytest.fixture
def made(monkeypatch):
    """The pairs of every tree that is made, in order, and the longest that a sequence of it may be."""
    calls, real = [], train.pair_tree

    def watched(pairs, weight, max_length):
        calls.append((pairs, max_length))
        return real(pairs, weight, max_length)

    monkeypatch.setattr(train, "pair_tree", watched)
    return calls


@pytest.fixture
def computed(monkeypatch):
    """An item for each step whose reference log-probs are computed."""
    calls, real = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *args: calls.append(1) or real(*args))
    return calls


# ── Which pairs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pairs_of_every_step(world, tmp_path, tok, made):
    """Of the reference, then of training, the very same. Cut at --max-length, [RESET] still has a token behind it."""
    words = dpo(world, tmp_path / "out", "--max-length", 40, "--epochs", 3, "--seed", 3, "--restart", "all")
    assert "rows have more than --max-length 40 tokens with both answers: cut" in trained(*words)
    assert len(made) == 2 * 36 and made[:36] == made[36:]
    args, drawn = arguments(words), {}
    pairs_of, _ = by_hand(args, args.data, tok)
    assert [p for pairs, _ in made[:36] for p in pairs] == [p for step in range(9) for p in pairs_of(step)]
    for pairs, max_length in made:
        assert max_length == 40
        for p in pairs:
            sides = [(p.prompt + answer)[:40][len(p.prompt) :] for answer in (p.chosen, p.rejected)]
            resets = [side[:-1].count(tok.reset_id) for side in sides]  # with a token behind them
            assert resets == [p.kind == "elicit", p.kind == "discourage"]
            if p.kind == "elicit":
                drawn.setdefault(str(p.rejected), set()).add(p.chosen.index(tok.reset_id))
    assert len(drawn) == 6 and max(map(len, drawn.values())) > 1  # redrawn in each epoch


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("", {"elicit", "discourage"}),
        ("--no-backtrack", {"baseline"}),
        ("--method in-place --restart all", {"elicit", "discourage"}),
        ("--restart all --beta 2 --dtype bfloat16", {"elicit", "discourage", "restart"}),
    ],
)
def test_the_first_loss_is_ln_2(world, tmp_path, flags, kinds):
    trained(*dpo(world, tmp_path / "out", "--steps", 2, *flags.split()))
    first, second = steps_of(tmp_path / "out")
    assert {name for name in first if name.startswith("loss/")} == {f"loss/{kind}" for kind in kinds}
    for name in ("loss", *(f"loss/{kind}" for kind in kinds)):
        assert first[name] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["accuracy"], first["margin"], first["chosen"], first["rejected"]) == (0, 0, 0, 0)
    assert second["loss"] != first["loss"] and first["grad_norm"] > 1e-3
    resets = {"reset_after_unsafe", "reset_after_safe"}
    assert resets & first.keys() == (resets if "restart" in kinds or not flags else set())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["reset_token_id"] == load_tokenizer(tmp_path / "out").reset_id


WEIGHTED = ("--nll", 0.7, "--elicit", 0.5, "--discourage", 2, "--restart", "all", "--restart-weight", 0.3)


def numbers(policy, before, pairs, args, tok):
    """All that is logged of pairs but the loss, from the definition, each [RESET] given its prefix alone."""
    found = {"reset_after_unsafe": [], "reset_after_safe": []}
    with torch.no_grad():
        _, kinds, ratios = plain_dpo(policy, before, pairs, args.beta, args.nll)
        for p in pairs:
            for name, answer in (("reset_after_unsafe", p.chosen), ("reset_after_safe", p.rejected)):
                if tok.reset_id in answer:
                    context = p.prompt + answer[: answer.index(tok.reset_id)]
                    found[name].append(logprob(policy, context, tok.reset_id).exp().item())
    found["margin"] = [args.beta * (c - r) for c, r in ratios]
    found["accuracy"] = [m > 0 for m in found["margin"]]
    found["chosen"], found["rejected"] = zip(*ratios, strict=True)
    return {f"loss/{kind}": value / n for kind, (value, n) in kinds.items()} | {
        name: sum(values) / len(values) for name, values in found.items()
    }


@pytest.mark.parametrize("flags", [(), WEIGHTED])
def test_a_step_by_hand(world, start, tok, tmp_path, monkeypatch, flags):
    """Interrupted before step 2, the weights on disk and the start give all that step 2 does, by definition alone."""
    more = ("--steps", 2, "--batch-size", 1, "--grad-accum", 2, "--save-every", 1, "--beta", 0.5, "--lr", 3e-3)
    words = dpo(world, tmp_path / "out", *more, *flags, "--heldout", world / "heldout.jsonl")
    interrupted(words, at=2)
    one, before = load_model(tmp_path / "out"), load_model(start)
    found = gradients_before_clipping(monkeypatch)
    trained(*words, "--resume")
    args = arguments(words)
    first, _, second, heldout = steps_of(tmp_path / "out")

    pairs_of, _ = by_hand(args, args.data, tok)
    weight = {"elicit": args.elicit, "discourage": args.discourage, "restart": args.restart_weight}
    loss, kinds, _ = plain_dpo(one, before, pairs_of(1), 0.5, args.nll, weight.get)
    loss = loss / sum(weight[p.kind] for p in pairs_of(1))
    assert kinds.keys() >= {"elicit", "discourage"} and abs(second["loss"] - first["loss"]) > 1e-3
    assert second["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for (name, gradient), other in zip(gradients(one, loss).items(), found[0], strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-5, rtol=1e-4, msg=name)
    for name, value in numbers(one, before, pairs_of(1), args, tok).items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name

    _, pairs = by_hand(args, args.heldout, tok)
    expected = numbers(load_model(tmp_path / "out"), before, pairs, args, tok)
    assert set(heldout) == {"step", *(f"heldout/{name.removeprefix('loss/')}" for name in expected)}
    for name, value in expected.items():
        assert heldout[f"heldout/{name.removeprefix('loss/')}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_a_step_in_which_no_pair_counts(world, tmp_path):
    """--discourage 0 and a batch without an unsafe row: nothing to learn, not a division by zero."""
    trained(*dpo(world, tmp_path / "out", "--steps", 6, "--batch-size", 1, "--discourage", 0))
    without = [r["loss"] for r in steps_of(tmp_path / "out") if "loss/elicit" not in r]
    assert without == [0.0] * len(without) and 0 < len(without) < 6


def test_no_steps_saves_the_start(start, tmp_path):
    trained("dpo", "--init", start, "--out", tmp_path / "bare", "--steps", 0, "--device", "cpu")
    assert contents(tmp_path / "bare")["model.safetensors"] == contents(start)["model.safetensors"]


def test_rows_without_rejected_are_left_out(world, tmp_path):
    said = trained(*dpo(world, tmp_path / "mixed", "--epochs", 1, data=("mixed.jsonl",)))
    assert "15 rows, 6 with an unsafe rejected answer" in said and "3 rows without a rejected answer" in said
    trained(*dpo(world, tmp_path / "rows", "--epochs", 1))
    same_run(tmp_path / "mixed", tmp_path / "rows")
    assert len(steps_of(tmp_path / "rows")) == 3  # 12 rows in batches of 4


# ── The reference on disk ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_is_read_again(world, tmp_path, computed):
    """Under another β and what else does not change it; half of it, as a kill leaves it, is completed."""
    out, steps = tmp_path / "out", ("--steps", 4)
    assert "read from" not in trained(*dpo(world, out, *steps))
    assert len(computed) == 5  # four steps, and the held-out rows
    before = cached(out)
    ((name, whole),) = before.items()
    shutil.move(out, tmp_path / "first")
    assert f"read from {out}.reference/{name}" in trained(*dpo(world, out, *steps))
    same_run(out, tmp_path / "first")
    for flags in (("--beta", 0.5), ("--lr", 1e-2), ("--nll", 1), ("--elicit", 0.5)):
        shutil.rmtree(out)
        trained(*dpo(world, out, *steps, *flags))
        assert len(computed) == 5 and cached(out) == before

    lines = whole.splitlines(keepends=True)
    wrong_step = b"".join([lines[0], *lines[2:]])
    damaged = {whole[:-4]: 1, whole[: len(lines[0]) + 9]: 4, b"": 5, b"x\n" * 50: 5, lines[0] + bytes(80): 4}
    for content, missing in (damaged | {wrong_step: 4, whole.rstrip(b"\n"): 1}).items():
        shutil.rmtree(out)
        computed.clear()
        (tmp_path / f"out.reference/{name}").write_bytes(content)
        trained(*dpo(world, out, *steps))
        assert len(computed) == missing and cached(out) == before
        same_run(out, tmp_path / "first")


def test_what_is_in_the_file(world, start, tok, tmp_path):
    """log π_ref of every sequence, in the order of steps, rows and pairs, whatever order they were computed in."""
    words = dpo(world, tmp_path / "out", "--steps", 2, "--batch-size", 3, "--heldout", world / "heldout.jsonl")
    trained(*words)
    (text,) = cached(tmp_path / "out").values()
    args, network = arguments(words), load_model(start)
    pairs_of, _ = by_hand(args, args.data, tok)
    _, heldout = by_hand(args, args.heldout, tok)
    groups = [pairs_of(0), pairs_of(1), heldout]
    for step, (line, pairs) in enumerate(zip(text.splitlines(), groups, strict=True)):
        expected = []
        with torch.no_grad():
            for p in pairs:
                for answer in (p.chosen, p.rejected):
                    expected.append(sum(logprobs_of(network, p.prompt + answer, len(p.prompt))).item())
        assert json.loads(line) == {"step": step, "values": pytest.approx(expected, rel=1e-5)}


def test_another_run_has_another_file(world, tmp_path):
    """Weights, data, seed, pairs, the cut: nothing of it finds the file of another."""
    out = tmp_path / "out"
    variants = [(), ("--init", world / "start2"), ("--data", world / "other.jsonl"), ("--seed", 1)]
    variants += [("--restart", "all"), ("--method", "in-place"), ("--max-length", 60), ("--dtype", "bfloat16")]
    variants += [("--heldout", world / "heldout.jsonl"), ("--batch-size", 3)]
    for n, flags in enumerate(variants, start=1):
        assert "read from" not in trained(*dpo(world, out, "--steps", 1, *flags))
        assert len(cached(out)) == n, flags
        assert steps_of(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), flags
        shutil.rmtree(out)


# ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LONG = ("--epochs", 2, "--save-every", 2, "--nll", 0.2, "--restart", "unsafe")


@pytest.fixture(scope="module")
def halfway(world, tmp_path_factory):
    """A run over two epochs that ended in step 4 of 6, two steps after its last save."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    interrupted(dpo(world, out, *LONG), at=4)
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3]
    return out


@pytest.mark.parametrize("keep", [True, False])
def test_resume(world, halfway, tmp_path, keep):
    """The very same bits, with the reference from disk or, where that is gone, from --init again."""
    out = tmp_path / "out"
    shutil.copytree(halfway, out)
    if keep:
        shutil.copytree(f"{halfway}.reference", f"{out}.reference")
    said = trained(*dpo(world, out, *LONG, "--resume"))
    assert "resuming after step 2" in said and ("read from" in said) == keep
    trained(*dpo(world, tmp_path / "whole", *LONG))
    same_run(out, tmp_path / "whole")
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3, 4, 5, 6]


def test_resume_with_another_setting(world, halfway):
    """With another --init the reference would be another one from here on."""
    before = contents(halfway.parent)
    for name, value in (
        *(("beta", 0.2), ("nll", 0), ("elicit", 0.5), ("discourage", 0.5), ("restart", "all")),
        *(("restart_weight", 0.5), ("method", "in-place"), ("lr", 1e-4), ("init", world / "start2")),
    ):
        flags = (f"--{name.replace('_', '-')}", value)
        said = trained(*dpo(world, halfway, *LONG, "--resume", *flags), code=2)
        assert f"was started with {name} = " in said.splitlines()[-1]
    assert contents(halfway.parent) == before


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_that_name_the_culprit(world, tmp_path):
    out, file = tmp_path / "out", tmp_path / "file.jsonl"
    file.write_text((world / "rows.jsonl").read_text() + '{"prompt": []}\n')
    for words, expected in (
        (("--data", file), f"{file}:13: "),
        (("--heldout", file), f"{file}:13: "),
        (("--data", world / "without.jsonl"), f"{world / 'without.jsonl'}: no row has a 'rejected' answer"),
        (("--heldout", world / "without.jsonl"), f"{world / 'without.jsonl'}: no row has a 'rejected' answer"),
        (("--init", tmp_path / "none"), str(tmp_path / "none")),
        *(((flag, value), flag) for flag, value in (("--beta", -1), ("--nll", "inf"), ("--discourage", "x"))),
    ):
        assert expected in trained(*dpo(world, out, "--steps", 1, *words), code=2).splitlines()[-1]
    assert not out.exists() and not cached(out)


def test_defaults():
    plain = vars(arguments(["dpo", "--init", "i", "--data", "d", "--out", "o"]))
    expected = {"beta": 0.1, "nll": 0.0, "elicit": 1.0, "discourage": 1.0, "restart_weight": 1.0, "restart": "none"}
    assert (expected | {"lr": 5e-7, "method": "backtrack"}).items() <= plain.items()


# ── It learns where to take its words back ───────────────────────────────────────────────────────────────────────────


def test_it_learns_where_to_reset(world, tmp_path):
    """Every pair is won. With the NLL term [RESET] itself becomes certain where it belongs, and only there."""
    more = ("--steps", 60, "--batch-size", 12, "--lr", 2e-2, "--nll", 0.1, "--heldout", world / "rows.jsonl")
    trained(*dpo(world, tmp_path / "out", *more, "--log-every", 20))
    first, *_, last = steps_of(tmp_path / "out")
    assert last["heldout/accuracy"] == 1 and last["heldout/margin"] > 1
    assert last["heldout/chosen"] > 0 > last["heldout/rejected"]
    assert first["reset_after_unsafe"] < 0.5 < 0.9 < last["heldout/reset_after_unsafe"]
    assert last["heldout/reset_after_safe"] < 0.05
