"""What do several processes cost? SFT on 2 ranks with a core each against 1 process with 2 cores.

    python -m backtrack.bench_parallel --data rows.jsonl --tokenizer DIR

A Llama of about 26 million random weights. Both sides run train.py over the same rows in turns (ABAB) and must log the
same losses; the first step of a turn warms up. Rows per second would be the same if talking to each other cost nothing.

Then the bytes that FSDP2's collectives move in a step beside the theory: every weight gathered twice, forward and
backward, every gradient scattered once. Whole tensors are counted; of N ranks each sends (N − 1) / N of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist

import train
from backtrack import launch, parallel
from backtrack.bench import random_model, ratio, table
from backtrack.results import made_by
from model import InputError, ModelConfig, load_tokenizer, save_model
from model.errors import positive, run

RANKS = 2
HIDDEN, LAYERS = 512, 8
TURNS = 2  # of each side
MICRO_BATCH = 4
# As FSDP2 calls them: before torch 2.13, and from then on.
KINDS = {
    "gathered": ("all_gather_into_tensor", "all_gather_single"),
    "scattered": ("reduce_scatter_tensor", "reduce_scatter_single"),
}


def count_bytes() -> dict[str, int]:
    """Bytes of the whole tensors that are gathered and scattered from here on."""
    moved = dict.fromkeys(KINDS, 0)

    def counted(kind, collective):
        def call(*args, **more):  # of its two tensors the larger is the whole one
            moved[kind] += max(t.nbytes for t in (*args, *more.values()) if hasattr(t, "nbytes"))
            return collective(*args, **more)

        return call

    for kind, names in KINDS.items():
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, counted(kind, getattr(dist, name)))
    return moved


def worker() -> None:
    """`train.py sft` with its bytes counted: what the benchmark starts, by torchrun or without."""
    with launch.together():
        moved = count_bytes()
        args = train.parse_args()
        train.sft(args)
        if parallel.rank() == 0:
            (Path(args.out) / "moved.json").write_text(json.dumps(moved))


def trained(ranks: int, words: list[str], out: Path) -> tuple[list[float], list[float], dict]:
    """(seconds of each step but the first, losses, bytes moved) of a run on so many ranks, which share RANKS cores."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "backtrack.bench_parallel", *words, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": str(RANKS // ranks), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"training on {ranks} ranks failed:\n{done.stderr}")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ends = [record["seconds"] for record in log]
    seconds = [end - begin for begin, end in pairwise(ends)]
    return seconds, [record["loss"] for record in log], json.loads((out / "moved.json").read_text())


def measured(args) -> dict:
    """Both sides, in turns."""
    tok = load_tokenizer(args.tokenizer)
    heads = HIDDEN // 64
    config = ModelConfig(
        vocab_size=tok.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=2048,
        reset_token_id=tok.reset_id,  # so no row has to be found for it, which gathers weights too
    )
    model = random_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    seconds, losses, moved = {1: [], RANKS: []}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/init", tokenizer=tok)
        words = ["sft", "--init", f"{folder}/init", "--data", *args.data, "--device", "cpu", "--log-every", "1"]
        words += ["--batch-size", str(MICRO_BATCH), "--grad-accum", str(RANKS), "--steps", str(args.steps + 1)]
        for turn in range(TURNS):
            for ranks in seconds:
                out = Path(folder) / f"{ranks}-{turn}"
                more, losses[ranks], moved[ranks] = trained(ranks, words, out)
                seconds[ranks] += more
    if any(abs(a - b) > 1e-3 * abs(a) for a, b in zip(*losses.values(), strict=True)):
        raise InputError(f"the two sides do not train alike: {losses}")
    value, low, high = ratio(seconds[1], seconds[RANKS])
    rows = MICRO_BATCH * RANKS
    return {
        "parameters": parameters,
        "rows_per_s": {ranks: rows * len(s) / sum(s) for ranks, s in seconds.items()},
        "ratio": value,
        "range": [low, high],
        "moved": {kind: moved[RANKS][kind] / (args.steps + 1) for kind in KINDS},
        "theory": {"gathered": 2 * 4 * parameters, "scattered": 4 * parameters},
    }


def main() -> None:
    if sys.argv[1:2] == ["sft"]:
        return worker()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="preference rows")
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer")
    parser.add_argument("--steps", type=positive, default=6, help="timed steps of a turn")
    args = parser.parse_args()
    found = measured(args)
    lines = [["rows per second", "1 process", f"{RANKS} ranks", "ratio of medians (range of the steps)"]]
    one, many = (f"{speed:.2f}" for speed in found["rows_per_s"].values())
    spread = "{:.2f} ({:.2f}–{:.2f})".format(found["ratio"], *found["range"])
    lines.append([f"{found['parameters']:,} parameters", one, many, spread])
    print(f"{made_by()['machine']}\n\n{table(lines)}\n")
    lines = [["MB per step", "counted", "theory", "ratio"]]
    for kind, moved in found["moved"].items():
        theory = found["theory"][kind]
        lines.append([kind, f"{moved / 1e6:.1f}", f"{theory / 1e6:.1f}", f"{moved / theory:.3f}"])
    print(table(lines))


if __name__ == "__main__":
    run(main, ranks=True)
