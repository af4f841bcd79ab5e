"""What a run says while it trains: a line on stderr, and the same numbers in OUT/metrics.jsonl.

Numbers are added up as name -> (sum, count) and logged as means, apart from what is optimised. What
they mean is in data/README.md.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from backtrack.run.parallel import rank
from backtrack.run.say import say
from backtrack.trees import Batch, pairs_of

Sums = dict[str, tuple[float, int]]


class Meter:
    """Speed, time left, and the lines of the log."""

    def __init__(self, position):
        self.position = position
        self.first_step = position.step
        self.first_tokens = position.tokens
        self.began = time.time()

    def log(self, out: str, steps: int, lr: float, grad_norm: float) -> None:
        """All losses are means over the steps since the last line."""
        position = self.position
        seconds = time.time() - self.began
        speed = (position.tokens - self.first_tokens) / seconds
        left = seconds / (position.step - self.first_step) * (steps - position.step)
        found = means(position.sums)
        position.sums = {}
        done = f"step {position.step:>5}/{steps}"
        say(f"{done}  {line(found)}  {speed:,.0f} tokens/s  {left:.0f} s left")
        record = {"step": position.step, "loss": found.pop("loss")}
        record |= {"lr": lr, "grad_norm": grad_norm}
        record |= {"tokens": position.tokens, "computed_tokens": position.computed_tokens}
        record |= {"tokens_per_s": round(speed), "seconds": round(seconds, 2)}
        write(out, record | found)


def log_heldout(out: str, step: int, sums: Sums) -> None:
    found = means(sums)
    say(f"          held out:  {line(found)}")
    named = {f"heldout/{name.removeprefix('loss/')}": value for name, value in found.items()}
    write(out, {"step": step} | named)


def line(found: dict[str, float]) -> str:
    """The losses, then p([RESET]); of DPO's other numbers the margin. metrics.jsonl has all."""
    parts = [f"loss {found['loss']:.3f}"] if "loss" in found else []
    parts += [f"{k.removeprefix('loss/')} {v:.3f}" for k, v in found.items() if "loss/" in k]
    if "margin" in found:
        parts.append(f"margin {found['margin']:.2f}")
    for name in ("unsafe", "safe"):
        if f"reset_after_{name}" in found:
            parts.append(f"p_reset/{name} {found[f'reset_after_{name}']:.3f}")
    return "  ".join(parts)


def write(out: str, record: dict) -> None:
    if rank() == 0:
        with open(Path(out) / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def rewind(out: str, step: int) -> None:
    """Drop what a killed run logged after its last save."""
    if rank() == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = Path(out) / "metrics.jsonl"
        file.touch()
        keep_head(file, lambda number, record: record["step"] <= step)  # steps only grow


def keep_head(file: Path, is_kept: Callable[[int, dict], bool]) -> list[dict]:
    """The records of a file of JSON lines down to the first that is not kept, where it is cut off.

    is_kept gets a line's number, from 0, and its record. A half line, as a kill leaves it, is not
    kept, nor are zeros, as a power cut leaves them.
    """
    found: list[dict] = []
    with open(file, "rb+") as f:
        kept = 0
        for number, line in enumerate(f):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or not is_kept(number, record):
                    break
            except (ValueError, KeyError, TypeError):
                break
            found.append(record)
            kept += len(line)
        f.truncate(kept)
    return found


# ── Sums ──────────────────────────────────────────────────────────────────────────────────────────


def add(sums: Sums, more: Sums) -> None:
    for name, (value, count) in more.items():
        old_value, old_count = sums.get(name, (0.0, 0))
        sums[name] = (old_value + value, old_count + count)


def means(sums: Sums) -> dict[str, float]:
    return {name: value / max(1, count) for name, (value, count) in sorted(sums.items())}


def of_views(logprobs: torch.Tensor, batch: Batch, reset_id: int | None = None) -> Sums:
    """loss/VIEW: −log π of its targets; how likely [RESET] is where it should be said, and not."""
    found: Sums = {}
    sums = batch.by_sequence(-logprobs).tolist()
    counts = batch.by_sequence(torch.ones_like(logprobs)).tolist()
    for name, value, count in zip(batch.names, sums, counts, strict=True):
        if name != "safe":
            add(found, {f"loss/{name}": (value, int(count))})
    after_safe = torch.tensor([name == "safe" for name in batch.names], dtype=torch.bool)
    return found | resets(logprobs, batch, after_safe, reset_id)


def of_pairs(logprobs, batch: Batch, losses, beta: float, reset_id: int) -> Sums:
    """Loss of each kind, margins and rewards, and how likely [RESET] is, wanted and not."""
    chosen, rejected = pairs_of(batch.by_sequence(logprobs) - batch.reference)  # log π/π_ref, (P,)
    margin = beta * (chosen - rejected)
    found: Sums = {}
    for kind, value in zip(batch.names[0::2], losses.tolist(), strict=True):
        add(found, {f"loss/{kind}": (value, 1)})
    P = len(margin)
    found["accuracy"] = ((margin > 0).sum().item(), P)
    found["margin"] = (margin.sum().item(), P)
    found["chosen"] = (chosen.sum().item(), P)
    found["rejected"] = (rejected.sum().item(), P)
    is_rejected = torch.arange(len(batch.names)) % 2 == 1
    return found | resets(logprobs, batch, is_rejected, reset_id)


def resets(logprobs, batch: Batch, unwanted: torch.Tensor, reset_id: int | None) -> Sums:
    """The mean p([RESET]) over its targets in unwanted (S,) sequences, and over those in others."""
    is_reset = batch.target == reset_id
    is_unwanted = unwanted.to(logprobs.device)[batch.sequence]
    found: Sums = {}
    for name, some in (
        ("reset_after_unsafe", logprobs[is_reset & ~is_unwanted]),
        ("reset_after_safe", logprobs[is_reset & is_unwanted]),
    ):
        if len(some):
            found[name] = (some.exp().sum().item(), len(some))
    return found
