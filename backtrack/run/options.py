"""What a command line asks for, in two parts: how to descend, and on what machine.

options, machine = picked(Options, args, steps=200), picked(Machine, args)
"""

import argparse
import contextlib
import dataclasses
from dataclasses import dataclass

import torch


@dataclass
class Options:
    """How a run descends, and how often it is logged and saved."""

    out: str
    steps: int
    rows: int  # visited in all, some of them again and again
    lr: float  # the peak
    batch_size: int  # rows per micro-batch
    grad_accum: int  # micro-batches per step
    seed: int
    log_every: int  # steps
    save_every: int  # steps


@dataclass
class Machine:
    """Where a run computes, and with what numbers. Weights and optimizer are always fp32."""

    device: str = "cpu"
    dtype: str = "float32"  # of the computation: "bfloat16" is autocast
    compile: bool = False
    checkpoint_activations: bool = False
    offload: bool = False
    lora: int | None = None  # rank

    def autocast(self):
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    @property
    def home(self) -> str:
        """Where weights are kept between uses."""
        return "cpu" if self.offload else self.device


def picked(kind: type, args: argparse.Namespace, **more):
    """A dataclass filled from the arguments of the same names, and from `more`."""
    given = vars(args) | more
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)})
