"""How much of a GPU does SFT use? A Llama-3-8B shape, cut to as many layers as fit, one device.

    python -m backtrack.bench_gpu [--out bench-gpu.json]      # make test-gpu runs it too

MFU is the share of the device's peak that goes into the products that the model itself asks for, forward and
backward (arXiv 2204.02311, appendix B): 6 FLOPs per weight and token, and 12 · layers · width · length for attention,
as if every token saw all others. Sequences of 2,048 tokens, each a target; bf16 by autocast, fp32 weights, AdamW, as in
train.py. Goal: at least 50% on an H100. How fast it decodes is measured by `python -m backtrack.bench`.

No GPU was at hand when this was written: it HAS NOT BEEN RUN on one, unless numbers are committed.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time

import torch

import train
from backtrack.bench import LLAMA_8B, random_model
from backtrack.examples import make_batch, window_tree
from backtrack.plan import plan
from backtrack.results import made_by
from model import InputError, ModelConfig
from model.errors import positive, run
from model.files import check_file, write_text

LENGTH = 2048
# Dense bf16 FLOPs per second, from NVIDIA's data sheets of the SXM cards.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def sft_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Of one step, forward and backward, without what is computed again."""
    with torch.device("meta"):
        model = train.Transformer(config)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if not config.tie_word_embeddings:
        matrices -= model.model.embed_tokens.weight.numel()  # it is looked up, not multiplied
    tokens = batch * length
    width = config.num_attention_heads * config.head_dim
    return tokens * (6 * matrices + 12 * config.num_hidden_layers * width * length)


def settings(batch: int, device: str) -> argparse.Namespace:
    """train.py's arguments, as far as they are needed."""
    sizes = {"batch_size": batch, "max_length": LENGTH, "plan": 1, "lora": 0, "lr": 1e-5, "weight_decay": 0.0}
    more = {"checkpoint_activations": False, "offload": False, "dtype": "bfloat16", "device": device}
    return argparse.Namespace(**sizes, **more)


def cut(config: ModelConfig, memory: float, batch: int) -> ModelConfig:
    """As many layers as fit into so many bytes, says --plan; a tenth stays free."""
    for layers in range(config.num_hidden_layers, 0, -1):
        smaller = dataclasses.replace(config, num_hidden_layers=layers)
        if 1.1 * plan(smaller, settings(batch, "cuda"), train.CHUNK).total < memory:
            return smaller
    raise InputError(f"{memory / 1e9:.0f} GB hold no layer of this shape; take a larger device")


def step_seconds(config: ModelConfig, batch: int, length: int, device: str, steps: int) -> list[float]:
    """Of `steps` optimizer steps, after two that warm up."""
    args = settings(batch, device)
    model = random_model(config, device).train()
    optimizer = train.make_optimizer(model, args)
    ids = random.Random(0)
    stream = [ids.randrange(config.vocab_size) for _ in range(batch * length)]
    trees = [window_tree(stream, first, length) for first in range(0, len(stream), length)]
    found = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        some = make_batch(trees, device)
        with train.autocast(args):
            values = train.logprobs(model, some)
        (train.sft_loss(values, some.weight) / some.weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[2:]


def measure(batch: int, steps: int) -> dict:
    """One record: shape, tokens per second, and the share of the peak where the card's is known."""
    name = torch.cuda.get_device_name()
    config = cut(LLAMA_8B, torch.cuda.get_device_properties(0).total_memory, batch)
    seconds = step_seconds(config, batch, LENGTH, "cuda", steps)
    rate = sft_flops(config, batch, LENGTH) / statistics.median(seconds)
    peak = next((value for card, value in PEAK.items() if card in name), None)
    return {
        "device": name,
        "layers": config.num_hidden_layers,
        "tokens_per_s": batch * LENGTH / statistics.median(seconds),
        "flops_per_s": rate,
        "mfu": None if peak is None else rate / peak,
        "range_s": [min(seconds), max(seconds)],
        "peak_memory": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=1, help="sequences of 2,048 tokens (default: 1)")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps (default: 10)")
    parser.add_argument("--out", help="write the result to this file as JSON")
    args = parser.parse_args()
    if args.out:
        check_file(args.out)
    if not torch.cuda.is_available():
        raise InputError("no CUDA device: nothing to measure here")
    record = measure(args.batch_size, args.steps)
    share = "unknown peak" if record["mfu"] is None else f"{100 * record['mfu']:.0f}% MFU"
    print(
        f"{record['device']}: {record['layers']} of 32 layers, {record['tokens_per_s']:,.0f} tokens/s,"
        f" {record['flops_per_s'] / 1e12:.0f} TFLOP/s, {share}, {record['peak_memory'] / 1e9:.1f} GB"
    )
    if args.out:
        write_text(json.dumps({**made_by(), **record}, indent=1) + "\n", args.out)


if __name__ == "__main__":
    run(main)
