"""What fits where: bytes per device that a training run will need, from config.json alone.

    python train.py sft --init Meta-Llama-3-8B --data hh.jsonl --out runs/x --dtype bfloat16 --max-length 2048 --plan 8

It reads no weight and takes no memory: shapes come from the network on the meta device, and activations from a forward
pass over tensors without numbers, of which autograd says what it would keep. It plans for the worst case: every
micro-batch is full (--batch-size sequences of --max-length tokens, each of them a target), and gradients are there
already. PyTorch, CUDA and the allocator's leftovers come on top: leave a tenth.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backtrack.run.chunks import LOGITS
from model import ModelConfig, Transformer
from model.transformer import Block

GB = 1e9


@dataclass
class Plan:
    """Bytes per device; with --offload `slices` lie in the host's memory."""

    parameters: int  # of the model, not bytes
    weights: float  # 4 per parameter held here
    gradients: float  # 4
    moments: float  # 8
    gathered: float  # a block and the tables at work, and their gradients, before they are shared out again
    activations: float  # all blocks, kept for the backward pass
    checkpointed: float  # the same with --checkpoint-activations: inputs of all blocks, the rest of one
    logits: float
    offload: bool
    checkpoint: bool

    @property
    def slices(self) -> float:
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> float:
        kept = self.checkpointed if self.checkpoint else self.activations
        return (0 if self.offload else self.slices) + self.gathered + kept + self.logits


def say_plan(args) -> None:
    """args: of train.py, whose --init has a config.json, or of data/base.py, whose --config is one."""
    config = ModelConfig.load(args.config if "config" in args else args.init)
    print("\n".join(lines(plan(config, args, LOGITS), args)))


def plan(config: ModelConfig, args, chunk: int) -> Plan:
    """args: of train.py, with `plan` devices. chunk: how many logits there are at once."""
    with torch.device("meta"):
        model = Transformer(config)
    size = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    tables = size - block * config.num_hidden_layers  # embedding, head and last norm
    tokens = args.batch_size * args.max_length
    working = 2 if args.dtype == "bfloat16" else 4  # bytes of a number in a block
    in_slices = args.plan > 1 or args.offload
    # A block, the next one on its way, and the same for gradients; the tables in fp32: weight, gradient, and each once
    # more while it is sent.
    copies = 2 if args.lora else 4  # frozen weights have no gradients
    gathered = copies * (working * block + 4 * tables) if in_slices else 0
    if args.dtype == "bfloat16" and not in_slices:
        gathered = working * size  # what autocast keeps of the weights until the pass is over
    kept = kept_by_block(config, args)
    trained = size
    if args.lora:
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        trained = sum(args.lora * (m.in_features + m.out_features) for m in layers)
        size += trained  # the rows of special tokens beside it are too few to count
    inputs = 4 * tokens * config.hidden_size * config.num_hidden_layers
    held = min(chunk, tokens * config.vocab_size)
    return Plan(
        parameters=size,
        weights=4 * size / args.plan,
        gradients=4 * trained / args.plan,
        moments=8 * trained / args.plan,
        gathered=gathered,
        activations=kept * config.num_hidden_layers,
        checkpointed=inputs + kept,
        logits=3 * 4 * held,  # as they are, their gradient, and one on the way between the two
        offload=args.offload,
        checkpoint=args.checkpoint_activations,
    )


def kept_by_block(config: ModelConfig, args) -> float:
    """Bytes that autograd keeps of a block in a full micro-batch.

    Global and local blocks differ only in the mask and the angles that they are given, which all share.
    """
    dtype = getattr(torch, args.dtype)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        block = Block(config, 0)
        for p in block.parameters():
            p.data = p.data.to(dtype)  # so autocast makes no copies of weights: those are counted elsewhere
        weights = {p.untyped_storage()._cdata for p in block.parameters()}
        B, T = args.batch_size, args.max_length
        x = torch.empty(B, T, config.hidden_size, requires_grad=True)
        angles = torch.empty(1, 1, T, config.head_dim // 2)
        mask = torch.empty(B, 1, T, T)  # of trees; it is one for all blocks
        shared = {t.untyped_storage()._cdata for t in (x, angles, mask)} | weights
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in shared:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x, (angles, angles), mask, torch.empty(1, T), None)
        return sum(storage.nbytes() for storage in kept.values())


def lines(p: Plan, args) -> list[str]:
    """The plan as a table to print."""
    where = "on the host" if p.offload else ""
    kept = {False: "", True: "  (not counted)"}
    rows = [
        ("weights, fp32", p.weights, where),
        ("gradients, fp32", p.gradients, where),
        ("moments, fp32", p.moments, where),
        ("gathered for a moment", p.gathered, ""),
        ("activations", p.activations, kept[p.checkpoint]),
        ("  with --checkpoint-activations", p.checkpointed, kept[not p.checkpoint]),
        ("logits, in chunks", p.logits, ""),
        ("total per device", p.total, "and about a tenth on top"),
    ]
    micro = f"micro-batches of {args.batch_size} × {args.max_length} tokens, {args.dtype}"
    head = f"{p.parameters:,} parameters on {args.plan} device{'s' * (args.plan > 1)}, {micro}; an estimate"
    return [head, *(f"  {name:<34}{size / GB:9.3f} GB  {note}".rstrip() for name, size, note in rows)]
