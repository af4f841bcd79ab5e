"""backtrack/bench/gpu.py: its arithmetic against PyTorch's own count, its step on a CPU; on a GPU, all of it."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backtrack.bench import gpu as bench_gpu
from backtrack.bench.gpu import LLAMA_8B
from backtrack.run.plan import plan
from tests.command import command
from train import CHUNK

SMALL = dataclasses.replace(
    LLAMA_8B,
    vocab_size=512,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied):
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fused one
        seconds = bench_gpu.step_seconds(config, batch=2, length=64, device="cpu", steps=1)
    assert len(seconds) == 1 and seconds[0] > 0
    # Three steps. The last token of a window predicts nothing, so it is fed and the head leaves it out.
    assert counter.get_total_flops() / 3 == pytest.approx(bench_gpu.sft_flops(config, 2, 64), rel=0.02)


def test_as_many_layers_as_fit():
    config = bench_gpu.cut(LLAMA_8B, 80e9, batch=1)
    more = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    size = [plan(c, bench_gpu.settings(1, "cuda"), CHUNK).total for c in (config, more)]
    assert size[0] * 1.1 < 80e9 <= size[1] * 1.1
    with pytest.raises(bench_gpu.InputError, match="hold no layer"):
        bench_gpu.cut(LLAMA_8B, 8e9, batch=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    _, said = command(bench_gpu.main, code=2)
    assert "no CUDA device" in said


def test_the_shape_is_llama_3_8b():
    with torch.device("meta"):
        model = bench_gpu.train.Transformer(LLAMA_8B)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_a_line_says_what_the_record_says():
    decoded = {"name": "decoding", "tokens_per_s": 150.4, "bandwidth_share": 0.86, "range": [0.8, 0.9]}
    assert bench_gpu.line(decoded) == "decoding: 150 tokens/s, 86% of the copy bandwidth (80%–90%)"
    trained = {"name": "SFT", "tokens_per_s": 11_200.0, "mfu": 0.514, "peak_memory": 58.9e9, "planned_memory": 73e9}
    assert bench_gpu.line(trained) == "SFT: 11,200 tokens/s, 51% MFU, 58.9 GB (73.0 planned)"
    assert "peak unknown" in bench_gpu.line({**trained, "mfu": None})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: MFU is not measured")
def test_mfu_and_memory(capsys):
    record = bench_gpu.train_8b(batch=1, compiled=False, accumulated=2, steps=2)
    with capsys.disabled():
        print(bench_gpu.line(record))
    assert record["flops_per_s"] > 0 and (record["mfu"] is None or record["mfu"] < 1)
    assert record["planned_memory"] == pytest.approx(record["peak_memory"], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: decoding is not measured")
def test_decoding_as_a_share_of_the_bandwidth(capsys):
    bandwidth = bench_gpu.copy_bandwidth()
    model = bench_gpu.random_model(LLAMA_8B, "cuda", torch.bfloat16)
    for batch in (1, 16):
        record = bench_gpu.decode_8b(model, batch, False, repeats=2, bandwidth=bandwidth)
        with capsys.disabled():
            print(bench_gpu.line(record))
        assert 0 < record["bandwidth_share"] < 1.05
