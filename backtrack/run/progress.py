"""What a training run leaves behind: a checkpoint to go on from, and metrics.jsonl.

    with alone(args.out): …                   # no other run writes there; Ctrl-C says what is saved
    progress = start(args, settings)          # step 0, or where --resume goes on
    save(progress, model, optimizer, tok, args.out)
    load_optimizer(optimizer, model, args.out, progress.step)

A save is the whole directory, swapped in at once: model, optimizer, position and random state,
never a mix of two steps. A run that was killed and goes on ends, on CPU, with the very same bits.
training.json says where the run stands; optimizer.state is there until it is finished.

Of several processes (parallel.py) the first writes and says everything; all call these functions.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from backtrack.run import lora, parallel
from backtrack.run.parallel import rank
from backtrack.run.say import say
from backtrack.trees import Batch, pairs_of
from model.checkpoint import write_model
from model.errors import InputError
from model.files import (
    STATE,
    atomic_directory,
    finish_save,
    holds_strangers,
    kept_beside,
    locked,
    sweep,
    try_save,
    write_tensors,
)
from model.transformer import own_rows

PROGRESS = "training.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
PART = 20  # steps of reference log-probs that are written at once


@contextlib.contextmanager
def alone(out: str) -> Iterator[None]:
    """Keep other runs away from --out; on Ctrl-C say what it holds."""
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        try:
            yield
        except KeyboardInterrupt:
            how = "; --resume goes on from there" if (Path(out) / PROGRESS).is_file() else ""
            say(f"\nstopped: {what_is_kept(out)}{how}")
            raise


def what_is_kept(out: str) -> str:
    with contextlib.suppress(InputError, OSError):
        progress = read_progress(out)
        return f"{out} still holds step {progress.step} of {progress.settings['steps']}"
    return "nothing is saved yet"


@dataclass
class Progress:
    settings: dict  # what determines the result: a resumed run must repeat it
    step: int = 0
    tokens: int = 0  # distinct tokens trained on
    computed_tokens: int = 0  # what went through the network, padding included
    sums: dict = field(default_factory=dict)  # since the last log line: name -> (sum, count)

    def add(self, more: dict[str, tuple[float, int]]) -> None:
        add(self.sums, more)


def run_settings(args, count: int, data) -> dict:
    """What determines the result of a run, apart from the weights it starts from."""
    steps = args.steps
    if steps is None:
        steps = math.ceil(args.epochs * count / (args.batch_size * args.grad_accum))
    names = [
        "command",
        "lr",
        "batch_size",
        "grad_accum",
        "max_length",
        "seed",
        "dtype",
        "weight_decay",
        "clip",
    ]
    names += ["method", "resets", "reset_weight", "restart", "prefix", "lora"]
    names += ["beta", "nll", "elicit", "discourage", "restart_weight"]
    settings = {name: getattr(args, name) for name in names if name in args}
    return settings | {"steps": steps, "data": digest(data)}


def digest(data) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def start(args, settings: dict) -> Progress:
    """Where to go on from: what the last save stored, or step 0.

    Raises InputError if --out holds anything else than a run with the same settings, or --resume is
    missing, or if ranks differ in their settings. Ends the program, with success, if that run is
    finished.
    """
    parallel.agree(vars(args) | settings)
    return Progress(**parallel.from_first(lambda: dataclasses.asdict(_start(args, settings))))


def _start(args, settings: dict) -> Progress:
    out = Path(args.out)
    finish_save(out)
    if not (out / "config.json").is_file():
        if holds_strangers(out):
            raise InputError(
                f"{out}: holds files but no checkpoint; choose an empty or new directory"
            )
        check_saving(out)
        return Progress(settings)
    if not args.resume:
        raise InputError(
            f"{out}: holds a checkpoint already; continue it with --resume or choose another --out"
        )
    if not (out / PROGRESS).is_file():
        raise InputError(
            f"{out}: holds a model but no {PROGRESS}, so there is no run to resume; choose another"
            " --out"
        )
    progress = read_progress(out)
    for name, now in settings.items():
        before = progress.settings.get(name)
        if before != now:
            raise InputError(
                f"{out}: was started with {name} = {before}, now {now}; resume with the same"
                " settings"
            )
    if progress.step == progress.settings["steps"] > 0:
        sweep(out)  # a kill after the last save may have left something
        say(f"{out}: already trained for all {progress.step} steps")
        sys.exit(0)
    check_saving(out)
    return progress


def read_progress(out: str | Path) -> Progress:
    file = Path(out) / PROGRESS
    try:
        return Progress(**json.loads(file.read_bytes()))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: truncated or not ours ({error}); choose another --out") from None


def check_saving(out: Path) -> None:
    """A save that cannot work is found out now, not after the first 500 steps."""
    if not try_save(out):
        say(f"{out}: may not be replaced as a whole (a mount?), so saves are built inside it")


def save(progress: Progress, model, optimizer, tok, out: str) -> None:
    """Replace the checkpoint at `out`. Ranks that hold slices lend them to the first, which writes."""
    weights, state = lora.weights(model), {}
    if progress.step < progress.settings["steps"]:  # a finished run needs no optimizer
        state |= {f"adapter/{name}": p for name, p in lora.adapters(model).items()}
        for name, p in trained(model).items():
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = optimizer.state[p][moment]
    if rank() > 0:
        parallel.lend([*weights.values(), *state.values()])
        return
    with atomic_directory(out) as directory:
        write_model(model, directory, tok, weights=weights)
        if state:
            write_tensors(state | {"rng": torch.get_rng_state()}, directory / STATE)
        (directory / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)) + "\n")


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_optimizer(optimizer, model, out: str, step: int) -> None:
    """Read what `save` has written beside the weights: moments, and the factors of LoRA.

    A rank reads its own rows of each. Raises InputError that names the file if it is not whole.
    """
    file = Path(out) / STATE
    try:
        with safe_open(file, framework="pt") as f:
            torch.set_rng_state(f.get_tensor("rng"))
            for name, p in lora.adapters(model).items():
                read_own_rows(f, f"adapter/{name}", p)
            for name, p in trained(model).items():
                state = optimizer.state[p]
                state["step"] = torch.tensor(float(step), device=p.device if p.is_cuda else "cpu")
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(p, requires_grad=False)
                    read_own_rows(f, f"{moment}/{name}", state[moment])
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: missing or truncated ({error}); choose another --out") from None


def read_own_rows(file, name: str, tensor: torch.Tensor) -> None:
    rows, first = own_rows(tensor)
    rows.copy_(file.get_slice(name)[first : first + len(rows)])


def remembered(
    args, settings: dict, compute: Callable[[int], Iterable[list[float]]]
) -> list[list[float]]:
    """compute(0)'s lists of numbers, kept on disk under a hash of all that they depend on.

    A run that goes on after a kill, or is tried again with another β, does not compute the
    reference's log-probs anew, and one with other weights or data never finds them. They are
    written part by part: after a kill it is compute(n) that is called, for those from n on.
    """
    names = (
        "init data heldout steps batch_size grad_accum max_length seed dtype method restart prefix"
    )
    key = [settings[name] for name in names.split()]
    key += [args.device, torch.__version__]
    file = kept_beside(args.out, "reference") / f"{digest(key)}.safetensors"
    lists, is_all = parallel.from_first(lambda: found_lists(file))
    if is_all:
        say(f"reference log-probs: read from {file}")
        return lists

    written = len(lists)
    if lists:
        say(f"reference log-probs: those of {written} steps are there already")
    try:
        for numbers in compute(written):
            lists.append(numbers)
            if len(lists) == written + PART:
                write_lists(lists[written:], part_of(file, written))
                written = len(lists)
    except KeyboardInterrupt:
        write_lists(lists[written:], part_of(file, written))
        say(f"\nreference log-probs: those of {len(lists)} steps are kept")
        raise
    write_lists(lists, file)
    for old in file.parent.glob(part_of(file, "*").name) if rank() == 0 else ():
        old.unlink()
    return lists


def found_lists(file: Path) -> tuple[list[list[float]], bool]:
    """The lists that are kept, and whether those are all."""
    if lists := read_lists(file):
        return lists, True
    while more := read_lists(part_of(file, len(lists))):
        lists += more
    return lists, False


def part_of(file: Path, first: int | str) -> Path:
    """Where the lists from number `first` on are, until all are there."""
    return file.with_name(f"{file.stem}.from-{first}.safetensors")


def read_lists(file: Path) -> list[list[float]]:
    """[] if the file is not there or is damaged."""
    if not file.is_file():
        return []
    with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as f:
        parts = f.get_tensor("values").split(f.get_tensor("sizes").tolist())
        return [part.tolist() for part in parts]
    return []


def write_lists(lists: list[list[float]], file: Path) -> None:
    values = torch.tensor([value for numbers in lists for value in numbers])
    sizes = torch.tensor([len(numbers) for numbers in lists])
    if not len(values) or rank() > 0:  # none: --steps 0
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    write_tensors({"values": values, "sizes": sizes}, temporary)
    temporary.replace(file)


# ── metrics.jsonl ─────────────────────────────────────────────────────────────────────────────────


def log_metrics(out: str, record: dict) -> None:
    if rank() > 0:
        return
    with open(Path(out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def rewind_metrics(out: str, step: int) -> None:
    """Drop what a killed run logged after its last save."""
    if rank() > 0:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "metrics.jsonl", "ab+") as f:
        f.seek(0)
        kept = 0
        for line in f:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break  # steps only grow, so what is kept is the head
            kept += len(line)
        f.truncate(kept)


class Meter:
    """Speed, time left, and the lines of the log."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.first_step = progress.step
        self.first_tokens = progress.tokens
        self.began = time.time()

    def log(self, out: str, loss: float, lr: float, grad_norm: float) -> None:
        progress, steps = self.progress, self.progress.settings["steps"]
        seconds = time.time() - self.began
        speed = (progress.tokens - self.first_tokens) / seconds
        left = seconds / (progress.step - self.first_step) * (steps - progress.step)
        found = means(progress.sums)
        progress.sums = {}
        parts = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in found.items())
        say(
            f"step {progress.step:>5}/{steps}  loss {loss:.4f}  ({parts})  lr {lr:.1e}"
            f"  {speed:,.0f} tokens/s  {left:.0f} s left"
        )
        record = {"step": progress.step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        record |= {"tokens": progress.tokens, "computed_tokens": progress.computed_tokens}
        record |= {"tokens_per_s": round(speed), "seconds": round(seconds, 2)}
        log_metrics(out, record | found)


def log_heldout(out: str, step: int, found: dict[str, float]) -> None:
    found = {name.removeprefix("loss/"): value for name, value in found.items()}
    say("  held out: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    log_metrics(out, {"step": step} | {f"heldout/{name}": v for name, v in found.items()})


# ── What is reported, apart from what is optimised: name -> (sum, count) ─────────────────────────


def view_report(values: torch.Tensor, batch: Batch, reset_id: int | None = None) -> dict:
    """loss/VIEW: −log π of its targets; how likely [RESET] is where it should be said, and not."""
    found: dict = {}
    sums = batch.by_sequence(-values).tolist()
    counts = batch.by_sequence(torch.ones_like(values)).tolist()
    for name, value, count in zip(batch.names, sums, counts, strict=True):
        if name != "safe":
            add(found, {f"loss/{name}": (value, int(count))})
    is_reset = batch.target == reset_id
    after_safe = [name == "safe" for name in batch.names]
    in_safe = torch.tensor(after_safe, dtype=torch.bool, device=values.device)[batch.sequence]
    found |= probability("reset_after_unsafe", values[is_reset & ~in_safe])
    found |= probability("reset_after_safe", values[is_reset & in_safe])
    return found


def probability(name: str, logprobs: torch.Tensor) -> dict:
    """How likely the targets are, on average; nothing if there are none."""
    if not len(logprobs):
        return {}
    return {name: (logprobs.exp().sum().item(), len(logprobs))}


def pair_report(values, batch: Batch, losses, beta: float, reset_id: int) -> dict:
    """Loss of each kind, margins and rewards, and how likely [RESET] is, wanted and not."""
    chosen, rejected = pairs_of(batch.by_sequence(values) - batch.reference)  # log π/π_ref, (P,)
    margin = beta * (chosen - rejected)
    found: dict = {}
    for kind, value in zip(batch.names[0::2], losses.tolist(), strict=True):
        add(found, {f"loss/{kind}": (value, 1)})
    P = len(margin)
    found["accuracy"] = ((margin > 0).sum().item(), P)
    found["margin"] = (margin.sum().item(), P)
    found["chosen"] = (chosen.sum().item(), P)
    found["rejected"] = (rejected.sum().item(), P)
    is_reset = batch.target == reset_id
    in_chosen = batch.sequence % 2 == 0
    found |= probability("reset_after_unsafe", values[is_reset & in_chosen])
    found |= probability("reset_after_safe", values[is_reset & ~in_chosen])
    return found


def add(sums: dict, more: dict[str, tuple[float, int]]) -> None:
    """name -> (sum, count): add what `more` has."""
    for name, (value, count) in more.items():
        old_value, old_count = sums.get(name, (0.0, 0))
        sums[name] = (old_value + value, old_count + count)


def means(sums: dict) -> dict[str, float]:
    return {name: value / max(1, count) for name, (value, count) in sorted(sums.items())}
