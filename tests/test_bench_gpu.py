"""backtrack/bench/gpu.py: its arithmetic against PyTorch's own count, its step on a CPU; on a GPU, all of it."""

import dataclasses

import pytest
import torch
from command import command
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backtrack.bench import gpu
from backtrack.bench.gpu import LLAMA_8B

SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4)
SMALL = dataclasses.replace(LLAMA_8B, **SIZES, num_key_value_heads=2, head_dim=32)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied):
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the fused one
        seconds = gpu.step_seconds(config, batch=1, length=512, device="cpu", steps=1)
    assert len(seconds) == 1 and seconds[0] > 0
    # Three steps. The last token of a window predicts nothing, so it is fed and the head leaves it out.
    assert counter.get_total_flops() / 3 == pytest.approx(gpu.sft_flops(config, 1, 512), rel=0.02)


def test_as_many_layers_as_fit_and_the_shape_is_llama_3_8b(monkeypatch):
    monkeypatch.setattr(gpu, "planned", lambda config, batch: 6e9 + config.num_hidden_layers * batch * 4e9)
    assert gpu.cut(LLAMA_8B, 80e9, batch=1).num_hidden_layers == 16  # 1.1 × 70 GB
    with pytest.raises(gpu.InputError, match="hold no layer"):
        gpu.cut(LLAMA_8B, 8e9, batch=1)
    monkeypatch.undo()
    assert gpu.planned(SMALL, 2) > gpu.planned(SMALL, 1) > 16 * 512 * 128  # bytes of weights, gradients and moments
    with torch.device("meta"):
        model = gpu.Transformer(LLAMA_8B)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_what_is_printed():
    decoded = {"name": "decoding", "tokens_per_s": 150.4, "bandwidth_share": 0.86, "range": [0.8, 0.9]}
    assert gpu.line(decoded) == "decoding: 150 tokens/s, 86% of the copy bandwidth (80%–90%)"
    trained = {"name": "SFT", "tokens_per_s": 11_200.0, "mfu": 0.514, "peak_memory": 58.9e9, "planned_memory": 73e9}
    assert gpu.line(trained) == "SFT: 11,200 tokens/s, 51% MFU, 58.9 GB (73.0 planned)"
    assert "peak unknown" in gpu.line({**trained, "mfu": None})
    if not torch.cuda.is_available():
        assert "no CUDA device" in command(gpu.main, code=2)[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is measured")
def test_measured(capsys):
    bandwidth = gpu.copy_bandwidth()
    trained = gpu.train_8b(batch=1, compiled=False, accumulated=2, steps=2)
    torch.cuda.empty_cache()
    model = gpu.random_model(LLAMA_8B, "cuda", torch.bfloat16)
    decoded = [gpu.decode_8b(model, batch, False, repeats=2, bandwidth=bandwidth) for batch in (1, 16)]
    with capsys.disabled():
        print(*map(gpu.line, [trained, *decoded]), sep="\n")
    assert trained["flops_per_s"] > 0 and (trained["mfu"] is None or trained["mfu"] < 1)
    assert trained["planned_memory"] == pytest.approx(trained["peak_memory"], rel=0.1)
    assert all(0 < record["bandwidth_share"] < 1.05 for record in decoded)
