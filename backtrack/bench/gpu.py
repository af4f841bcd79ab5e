"""How much of a GPU do SFT and decoding use? A Llama-3-8B shape, one device, random weights.

    make bench-gpu           # or: python -m backtrack.bench.gpu [--out bench-gpu.json]; make test-gpu runs its parts

SFT: as many layers as fit. MFU is the share of the device's peak that goes into the products that the model itself asks
for, forward and backward (arXiv 2204.02311, appendix B): 6 FLOPs per weight and token, and 12 · layers · width · length
for attention, as if every token saw all others. A step is --grad-accum micro-batches of sequences of 2,048 tokens, each
a target; bf16 by autocast, fp32 weights, AdamW, as in train.py. Goal: at least 50% on an H100.

Decoding: all layers in bf16, as a share of what the memory allows. A step has to read every weight and the keys and
values of every row once; the bandwidth is that of a copy on the device. Goal: 85%, compiled, one row.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time

import torch

from backtrack.bench.__main__ import random_model, random_prompts, step_bytes, timed
from backtrack.bench.__main__ import step_seconds as decode_seconds
from backtrack.evaluate.results import made_by
from backtrack.generate import generate
from backtrack.run.chunks import LOGITS
from backtrack.run.plan import plan
from backtrack.trees import make_batch
from data.base import window_tree
from model import InputError, ModelConfig, Transformer
from model.errors import positive, run
from model.files import check_file, write_text
from train import CLIP, logprobs, make_optimizer, sft_loss

LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
)
LENGTH = 2048
# Dense bf16 FLOPs per second, from NVIDIA's data sheets of the SXM cards.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
HOW = {True: "compiled", False: "eager"}
TRAINING = ((1, False), (4, False), (4, True))  # (sequences in a micro-batch, compiled)
DECODING = ((1, False), (16, False), (1, True), (16, True))  # (rows, compiled); compiled a model stays


def sft_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Of one pass, forward and backward, without what is computed again."""
    with torch.device("meta"):
        model = Transformer(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if not config.tie_word_embeddings:
        matrices -= model.model.embed_tokens.weight.numel()  # it is looked up, not multiplied
    tokens = batch * length
    width = config.num_attention_heads * config.head_dim
    return tokens * (6 * matrices + 12 * config.num_hidden_layers * width * length)


def planned(config: ModelConfig, batch: int) -> float:
    """Bytes that train.py's --plan expects for micro-batches of `batch` full sequences."""
    more = {"plan": 1, "lora": 0, "checkpoint_activations": False, "offload": False, "dtype": "bfloat16"}
    return plan(config, argparse.Namespace(batch_size=batch, max_length=LENGTH, **more), LOGITS).total


def cut(config: ModelConfig, memory: float, batch: int) -> ModelConfig:
    """As many layers as fit into so many bytes, says --plan; a tenth stays free."""
    for layers in range(config.num_hidden_layers, 0, -1):
        smaller = dataclasses.replace(config, num_hidden_layers=layers)
        if 1.1 * planned(smaller, batch) < memory:
            return smaller
    raise InputError(f"{memory / 1e9:.0f} GB hold no layer of this shape; take a larger device")


def step_seconds(
    config: ModelConfig, batch: int, length: int, device: str, steps: int, accumulated=1, compiled=False
) -> list[float]:
    """Of `steps` optimizer steps of `accumulated` micro-batches, after two that warm up."""
    model = random_model(config, device).train()
    if compiled:
        model.model.compile(dynamic=True)
    optimizer = make_optimizer(model, lr=1e-5, weight_decay=0.0)
    ids = random.Random(0)
    stream = [ids.randrange(config.vocab_size) for _ in range(batch * length)]
    trees = [window_tree(stream, first, length) for first in range(0, len(stream), length)]
    found = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        for _ in range(accumulated):
            some = make_batch(trees, device)
            with torch.autocast(device, torch.bfloat16):
                values = logprobs(model, some)
            (sft_loss(values, some.weight) / (accumulated * some.weight.sum())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[2:]


def train_8b(batch: int, compiled: bool, accumulated: int, steps: int) -> dict:
    """One record: tokens per second, memory, and the share of the peak (None for an unknown card)."""
    name = torch.cuda.get_device_name()
    config = cut(LLAMA_8B, torch.cuda.get_device_properties(0).total_memory, batch)
    torch.cuda.reset_peak_memory_stats()
    seconds = step_seconds(config, batch, LENGTH, "cuda", steps, accumulated, compiled)
    step = statistics.median(seconds)
    rate = accumulated * sft_flops(config, batch, LENGTH) / step
    peak = next((value for card, value in PEAK.items() if card in name), None)
    return {
        "name": f"SFT, {config.num_hidden_layers} layers, {batch} × {LENGTH} tokens, {HOW[compiled]}",
        "tokens_per_s": accumulated * batch * LENGTH / step,
        "flops_per_s": rate,
        "mfu": None if peak is None else rate / peak,
        "range_s": [min(seconds), max(seconds)],
        "peak_memory": torch.cuda.max_memory_allocated(),
        "planned_memory": planned(config, batch),
    }


def copy_bandwidth(mebibytes: int = 4096) -> float:
    """Bytes per second read and written by a copy on the device, the usual yardstick for GPUs."""
    x = torch.ones(mebibytes << 18, device="cuda")
    y = torch.empty_like(x)

    def copy():
        y.copy_(x)
        torch.cuda.synchronize()

    copy()
    return 2 * x.nbytes / min(timed(copy)[1] for _ in range(10))


def decode_8b(model, batch: int, compiled: bool, repeats: int, bandwidth: float) -> dict:
    """One record: tokens per second, and the share of the bandwidth with its range."""
    if compiled:
        torch.compiler.reset()  # or the second batch size would get kernels that take any
        model.compile()  # as sample.py does it: the decode step, not the reading of the prompt
    prompts, new_tokens = random_prompts(model.config, batch, length=128), 128
    seconds = []
    for _ in range(repeats + 1):
        done = generate(model, prompts, reset_id=None, stop_ids=(), max_new_tokens=new_tokens)
        seconds.append(decode_seconds(done))
    step = statistics.median(seconds[1:])  # the first run warms up and compiles
    least = step_bytes(model, batch, len(prompts[0]) + new_tokens / 2) / bandwidth
    return {
        "name": f"decoding, {model.config.num_hidden_layers} layers, {batch} rows, {HOW[compiled]}",
        "tokens_per_s": batch / step,
        "bandwidth_share": least / step,
        "range": [least / max(seconds[1:]), least / min(seconds[1:])],
    }


def line(r: dict) -> str:
    if "bandwidth_share" in r:
        share = "{bandwidth_share:.0%} of the copy bandwidth ({range[0]:.0%}–{range[1]:.0%})".format(**r)
    else:
        share = "peak unknown" if r["mfu"] is None else f"{r['mfu']:.0%} MFU"
        share += f", {r['peak_memory'] / 1e9:.1f} GB ({r['planned_memory'] / 1e9:.1f} planned)"
    return f"{r['name']}: {r['tokens_per_s']:,.0f} tokens/s, {share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grad-accum", type=positive, default=8, help="micro-batches in a step (default: 8)")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps, and repeats of decoding (default: 5)")
    parser.add_argument("--out", help="write the result to this file as JSON")
    args = parser.parse_args()
    if args.out:
        check_file(args.out)
    if not torch.cuda.is_available():
        raise InputError("no CUDA device: nothing to measure here")
    report = {**made_by(), "records": []}

    def add(record: dict) -> None:
        print(line(record), flush=True)
        report["records"].append(record)
        if args.out:  # each time: a lent GPU may be gone before the compiler is done
            write_text(json.dumps(report, indent=1) + "\n", args.out)

    for batch, compiled in TRAINING:
        add(train_8b(batch, compiled, args.grad_accum, args.steps))
        torch.cuda.empty_cache()
    report["copy_bytes_per_s"] = bandwidth = copy_bandwidth()
    print(f"a copy on the device: {bandwidth / 1e9:,.0f} GB/s read and written", flush=True)
    model = random_model(LLAMA_8B, "cuda", torch.bfloat16)
    for batch, compiled in DECODING:
        add(decode_8b(model, batch, compiled, args.steps, bandwidth))


if __name__ == "__main__":
    run(main)
