"""Where a run stands: a checkpoint to go on from.

    with alone(args.out): …                        # no other run writes there meanwhile
    run = start(args, tok, count, data)            # step 0, or where --resume goes on
    run.restore(model, optimizer)
    run.save(model, optimizer)

A save is the whole directory, swapped in at once: model, optimizer, position and random state,
never a mix of two steps. A run that was killed and goes on ends, on CPU, with the very same bits.
training.json says where the run stands; optimizer.state is there until the run is finished.

Of several processes (parallel.py) the first writes and says everything; all call these functions.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from backtrack.run import lora, metrics, parallel
from backtrack.run.options import Machine, Options, picked
from backtrack.run.parallel import rank
from backtrack.run.say import say
from model.checkpoint import write_model
from model.errors import InputError
from model.files import (
    STATE,
    atomic_directory,
    holds_strangers,
    locked,
    sweep,
    try_save,
    write_tensors,
)
from model.slices import own_rows

PROGRESS = "training.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
# What determines the result of a run, of its arguments: a resumed run must repeat them.
SETTINGS = ["command", "lr", "batch_size", "grad_accum", "max_length", "seed", "dtype", "lora"]
SETTINGS += ["method", "resets", "reset_weight", "restart"]
SETTINGS += ["beta", "nll", "elicit", "discourage", "restart_weight"]


@dataclass
class Position:
    """What training.json holds."""

    settings: dict
    step: int = 0
    tokens: int = 0  # distinct tokens trained on
    computed_tokens: int = 0  # what went through the network, padding included
    sums: metrics.Sums = field(default_factory=dict)  # since the last log line


@dataclass
class Run:
    options: Options
    machine: Machine
    tok: object
    position: Position
    is_stopped: bool = False  # somebody has asked for it

    @property
    def settings(self) -> dict:
        return self.position.settings

    def steps(self) -> Iterator[int]:
        """The steps to come. Ctrl-C or SIGTERM ends them when the step at work is done.

        A second one ends the program at once. Of several processes, all stop after the same step.
        """

        def note(*_) -> None:
            if self.is_stopped:
                raise KeyboardInterrupt
            self.is_stopped = True
            say("\nstopping after this step; again: at once")

        before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.position.step, self.options.steps):
                yield step
                self.is_stopped = any(parallel.exchange(self.is_stopped))
                if self.is_stopped:
                    return
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def save(self, model, optimizer) -> None:
        """Replace the checkpoint. Ranks that hold slices lend them to the first, which writes."""
        weights, state = lora.weights(model), {}
        if self.position.step < self.options.steps:  # a finished run needs no optimizer
            state |= {f"adapter/{name}": p for name, p in lora.adapters(model).items()}
            for name, p in trained(model).items():
                for moment in MOMENTS:
                    state[f"{moment}/{name}"] = optimizer.state[p][moment]
        if rank() > 0:
            parallel.lend([*weights.values(), *state.values()])
            return
        with atomic_directory(self.options.out) as directory:
            write_model(model, directory, self.tok, weights=weights)
            if state:
                write_tensors(state | {"rng": torch.get_rng_state()}, directory / STATE)
            (directory / PROGRESS).write_text(json.dumps(dataclasses.asdict(self.position)) + "\n")

    @torch.no_grad()
    def restore(self, model, optimizer) -> None:
        """Read what `save` has written beside the weights: moments, and the factors of LoRA.

        A rank reads its own rows of each. Raises InputError if the file is not whole.
        """
        metrics.rewind(self.options.out, self.position.step)
        if self.position.step == 0:
            return
        file = Path(self.options.out) / STATE
        step = float(self.position.step)
        try:
            with safe_open(file, framework="pt") as f:
                torch.set_rng_state(f.get_tensor("rng"))
                for name, p in lora.adapters(model).items():
                    read_own_rows(f, f"adapter/{name}", p)
                for name, p in trained(model).items():
                    state = optimizer.state[p]
                    state["step"] = torch.tensor(step, device=p.device if p.is_cuda else "cpu")
                    for moment in MOMENTS:
                        state[moment] = torch.zeros_like(p, requires_grad=False)
                        read_own_rows(f, f"{moment}/{name}", state[moment])
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: missing or truncated ({error}); choose another --out"
            ) from None
        say(f"{self.options.out}: resuming after step {self.position.step}")


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_own_rows(file, name: str, tensor: torch.Tensor) -> None:
    rows, first = own_rows(tensor)
    rows.copy_(file.get_slice(name)[first : first + len(rows)])


# ── Before the first step ─────────────────────────────────────────────────────────────────────────


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


def start(args, tok, count: int, data, **more) -> Run:
    """A run over `count` rows, `data`: where the last save stands, or step 0.

    more: settings besides the arguments that SETTINGS names. Raises InputError if --out holds
    anything else than a run with the same settings, if --resume is missing, or if ranks differ.
    Ends the program, with success, if that run is finished.
    """
    steps, visited = length_of(args, count)
    settings = {name: getattr(args, name) for name in SETTINGS if name in args}
    settings |= {"steps": steps, "rows": visited, "data": digest(data)} | more
    parallel.agree(vars(args) | settings)
    found = parallel.from_first(lambda: dataclasses.asdict(stored(args, settings)))
    options = picked(Options, args, steps=steps, rows=visited)
    return Run(options, picked(Machine, args), tok, Position(**found))


def length_of(args, count: int) -> tuple[int, int]:
    """(steps, rows visited) over `count` rows; with --epochs the last step may be smaller."""
    per_step = args.batch_size * args.grad_accum
    if args.steps is not None:  # --steps 0 still looks at the first step's rows: see reset_row.py
        return args.steps, max(1, args.steps) * per_step
    visited = math.ceil(round(args.epochs * count, 6))
    return math.ceil(visited / per_step), visited


def digest(data) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def stored(args, settings: dict) -> Position:
    out = Path(args.out)
    if not (out / "config.json").is_file():
        if holds_strangers(out):
            raise InputError(
                f"{out}: holds files but no checkpoint; choose an empty or new directory"
            )
        try_save(out)  # what cannot be saved is found out now, not after 500 steps
        return Position(settings)
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
        before = progress.settings.get(name, now)  # an older run may not name it
        if before != now:
            way_out = "resume with the same settings"
            if name == "steps":  # the learning rate has come down on the way to the last step
                way_out += f"; to train it further start a new run with --init {out}"
            raise InputError(f"{out}: was started with {name} = {before}, now {now}; {way_out}")
    if progress.step == progress.settings["steps"] > 0:
        sweep(out)  # a kill after the last save may have left something
        say(f"{out}: already trained for all {progress.step} steps")
        sys.exit(0)
    try_save(out)
    return progress


def read_progress(out: str | Path) -> Position:
    file = Path(out) / PROGRESS
    try:
        return Position(**json.loads(file.read_bytes()))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: truncated or not ours ({error}); choose another --out") from None


def what_is_kept(out: str) -> str:
    with contextlib.suppress(InputError, OSError):
        progress = read_progress(out)
        return f"{out} still holds step {progress.step} of {progress.settings['steps']}"
    return "nothing is saved yet"


def refuse_nan(run: Run, loss: float, grad_norm: float) -> None:
    """Raises InputError if a step's loss or gradient is not finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(
            f"step {run.position.step + 1}: loss is {loss}, gradient norm {grad_norm};"
            f" {what_is_kept(run.options.out)}. Try a lower --lr"
        )
