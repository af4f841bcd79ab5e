"""The benchmark's arithmetic, its refusal to time different outputs, its errors. No timing is asserted anywhere."""

import functools
import json
import sys

import pytest
import torch

from backtrack.bench import __main__ as bench
from model import InputError, ModelConfig

TINY = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def both():
    return bench.load_both(TINY, pytest.importorskip("transformers"))


# ── Arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ratio_is_of_medians_and_the_range_of_pairs():
    assert bench.ratio([2.0, 8.0, 4.0], [1.0, 2.0, 4.0]) == (4.0 / 2.0, 1.0, 4.0)
    with pytest.raises(ValueError):
        bench.ratio([1.0, 2.0], [1.0])


def test_verdict():
    assert bench.verdict(3.0, least=3.0) == "ok" and bench.verdict(2.99, least=3.0) == "below"
    assert bench.verdict(1.05, most=1.05) == "ok" and bench.verdict(1.06, most=1.05) == "above"


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied):
    """Counted by hand: per layer q, k, v, o, gate, up, down and two norms; then the last norm and the output matrix."""
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": tied})
    weights = 2 * (16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 24 + 2 * 16) + 16 + 50 * 16
    entries = 3 * 20.5 * (2 * 2 * 2 * 6)  # rows · context · (k and v · layers · heads · head_dim)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = bench.random_model(config, dtype=dtype)
        assert bench.step_bytes(model, batch=3, context=20.5) == size * (weights + entries)


def test_a_full_size_shape():
    def parameters(config):
        with torch.device("meta"):
            return sum(p.numel() for p in bench.Transformer(config).parameters())

    assert 120e6 < parameters(bench.LLAMA_125M) < 130e6


def test_table_lines_up():
    text = bench.table([["", "left", "right"], ["a longer name", "1", ""], ["b", "12345", "x"]])
    assert text.split("\n") == ["               left   right", "a longer name  1", "b              12345  x"]


def test_tables_say_what_the_rows_say():
    rate = {"tokens_per_s": 300.4, "transformers_tokens_per_s": 100.2, "ratio": 3.0, "range": [2.5, 3.5], "least": 2.9}
    text = bench.speed_table(
        [
            {"name": "toy, batch 1", **rate, "verdict": "ok"},
            {"name": "125M, batch 1", **rate, "verdict": "below", "bandwidth_share": 0.456},
        ]
    )
    toy, big = text.split("\n")[1:]
    assert "300 tokens/s" in toy and "100 tokens/s" in toy and "3.00 (2.50–3.50)" in toy and "≥ 2.9  ok" in toy
    assert "cache" in toy  # instead of a share that means nothing
    assert "below" in big and big.endswith("46%")
    text = bench.reset_table(
        [
            {"name": "step", "ratio": 1.0123, "most": 1.05, "verdict": "ok"},
            {"name": "retry", "ratio": 0.05, "range": [0.04, 0.06]},
        ]
    )
    assert "1.012" in text and "≤ 1.05  ok" in text and "0.050 (0.040–0.060)" in text


# ── What is timed ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sides_alternate_and_the_first_round_does_not_count():
    calls = []
    first, second, *seconds = bench.alternate(
        lambda: calls.append("a") or len(calls), lambda: calls.append("b") or len(calls), repeats=3
    )
    assert "".join(calls) == "abababab"
    assert first == [3, 5, 7] and second == [4, 6, 8] and list(map(len, seconds)) == [3, 3]


def test_different_outputs_end_the_benchmark():
    with pytest.raises(AssertionError, match="disagree"):
        bench.alternate(lambda: [1, 2], lambda: [1, 3], repeats=1, same=list.__eq__)
    outputs = iter([1, 1, 1, 2])  # equal in the warm-up, different later
    with pytest.raises(AssertionError, match="disagree"):
        bench.alternate(lambda: next(outputs), lambda: next(outputs), repeats=1, same=int.__eq__)


@pytest.mark.parametrize("batch", [1, 3])
def test_compare_finds_equal_tokens_and_reports_all_of_it(both, batch):
    model, theirs = both
    row = bench.compare("tiny", model, theirs, batch, new_tokens=8, bar=1.0, repeats=2, bandwidth=1e9)
    assert row["name"] == f"tiny, batch {batch}" and row["least"] == 1.0
    assert row["range"][0] <= row["range"][1] and row["bandwidth_share"] > 0
    assert row["tokens_per_s"] / row["transformers_tokens_per_s"] == pytest.approx(row["ratio"])
    assert "bandwidth_share" not in bench.compare("tiny", model, theirs, batch, 8, 1.0, 1, bandwidth=None)


def test_compare_refuses_another_model(both):
    other = bench.random_model(TINY)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    with pytest.raises(AssertionError, match="disagree"):
        bench.compare("tiny", other, both[1], 1, new_tokens=8, bar=1.0, repeats=1, bandwidth=None)


def test_reset_steps_do_reset():
    """reset_step itself counts the resets of both sides and fails if there are none, or any on the plain side."""
    row = bench.reset_step("tiny", bench.random_model(TINY), batch=3, steps=12)
    assert row["ratio"] > 0 and row["most"] == 1.05


def test_retry_and_fresh_run_say_the_same():
    row = bench.retry("tiny", bench.random_model(TINY), prompt_length=20, repeats=2)
    assert row["retry_s"] > 0 and row["fresh_s"] > 0 and row["range"][0] <= row["range"][1]


def test_random_models_do_not_just_repeat_themselves():
    """Otherwise equal outputs would prove nothing."""
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": True})
    prompts = bench.random_prompts(config, 4, 10)
    done = bench.generate(bench.random_model(config), prompts, reset_id=None, stop_ids=(), max_new_tokens=20)
    assert all(len(set(g.tokens)) > 3 for g in done)


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_transformers_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit) as end:
        bench.run(bench.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -r requirements-dev.txt" in error


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(InputError, match="is a directory"):
        bench.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        bench.main(["--fast"])
    assert end.value.code == 2 and "--fast" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """End to end with everything small: prints the machine and both tables, writes the same numbers as JSON."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench, "LLAMA_125M", TINY)
    monkeypatch.setattr(bench.ModelConfig, "load", lambda path: ModelConfig(**vars(TINY)))
    monkeypatch.setattr(bench, "TOY_RUNS", ((1, 4, 3.0),))
    monkeypatch.setattr(bench, "RUNS_125M", ((2, 4, 1.4),))
    monkeypatch.setattr(bench, "PROMPT_OF_RETRY", 20)
    traced = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # generating code would take a minute
    monkeypatch.setattr(bench.Transformer, "compile", traced)
    monkeypatch.setattr(bench.shutil, "which", lambda name: name)
    out = tmp_path / "bench.json"
    bench.main(["--out", str(out)])
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    assert f"torch {torch.__version__}" in printed and "transformers 5" in printed and "seed 0" in printed
    assert [r["name"] for r in report["speed"]] == [
        "toy, batch 1",
        "toy, compiled, batch 1",
        "125M, batch 2",
        "125M, compiled, batch 2",
    ]
    assert len(report["resets"]) == 3 and report["read_bytes_per_s"] == 1e10
    for row in report["speed"] + report["resets"]:
        assert row["name"] in printed
    bench.main(["--quick"])
    printed = capsys.readouterr().out
    assert "125M" not in printed and "compile" not in printed
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    bench.main([])
    printed = capsys.readouterr().out
    assert "no C++ compiler found" in printed and "compiled, batch" not in printed and "125M, batch 2" in printed
