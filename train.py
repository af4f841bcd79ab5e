"""Train a model that can take its words back: supervised fine-tuning, then preferences.

    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/sft
    python train.py dpo --init runs/sft --data rows.jsonl --out runs/dpo

`sft` is the paper's supervised objective (arXiv 2409.14586, section 3.1), `dpo` its preference
optimisation (section 3.2). Both read rows in TRL's preference format (backtrack/rows.py); --method
baseline trains on the same rows without backtracking.

Read backtrack/plain.py first: it computes both losses for one row. backtrack/examples.py decides
which sequences a row gives, and backtrack/trees.py how they share one forward pass. The rest is
here, top to bottom: losses, loop, the two commands, arguments. What a run needs around that (saves,
logs, many devices, LoRA, memory) stands in backtrack/run/.

Weights and optimizer are fp32; --dtype bfloat16 computes in bf16 by autocast. A killed run goes on
with --resume. The model directory written to --out loads in transformers. torchrun --nproc-per-node
8 train.py sft … takes the same arguments and gives the same result on many devices.

Shapes: N targets and S sequences of a batch, P = S / 2 pairs, M nodes that predict, V vocabulary.
"""

import argparse
import dataclasses
import math
import random
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from backtrack.examples import dpo_pairs, draw_prefix, resets_after_safe, sft_views
from backtrack.reset_row import start_new_tokens
from backtrack.rows import Row, describe, few_of, load_rows
from backtrack.run import command, metrics, parallel, progress, reference
from backtrack.run.chunks import in_chunks
from backtrack.run.load import load
from backtrack.run.say import say
from backtrack.trees import Batch, Tree, make_batch, pair_tree, pairs_of, view_tree
from model import InputError, Transformer, errors, load_tokenizer

CLIP = 1.0  # the largest gradient norm

# ── Losses ────────────────────────────────────────────────────────────────────────────────────────


def logprobs(model: Transformer, batch: Batch) -> torch.Tensor:
    """log π(target | the nodes its predicting node sees), (N,) fp32.

    The only place where log-probabilities are taken. Logits are built only for nodes that predict
    something, and once for each.
    """

    def read(hidden, predicted_by, target):  # (M, D), (N,), (N,) -> (N,)
        logits = model.logits(hidden)  # (M, V) fp32
        return logits.log_softmax(dim=-1)[predicted_by, target]

    def read_all(hidden):
        return in_chunks(read, model, hidden, batch.predicted_by, batch.target)

    where = {"positions": batch.positions, "visible": batch.visible, "at": batch.predicting}
    return model(batch.tokens, **where, read=read_all)


def sft_loss(logprobs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Σ weight · −log π(target), from (N,) each. Not yet divided by the weight of the whole step.

    Over the views of examples.py this is the paper's objective:

        −E log π(y+ | x)  −  E log π([RESET] ⊕ y+ | x ⊕ prefix_k(y−))
    """
    return -(weight * logprobs).sum()


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The loss of each pair, (P,), from log-probs summed over tokens, (P,) each (arXiv 2305.18290).

    −log σ( β [ (log π(c|x) − log π_ref(c|x)) − (log π(r|x) − log π_ref(r|x)) ] )
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margin)


# ── The loop ──────────────────────────────────────────────────────────────────────────────────────

# (log-probs (N,), batch) -> Σ of what is optimised, and what is logged: name -> (sum, count)
Loss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, metrics.Sums]]


def fit(
    run: progress.Run,
    model: Transformer,
    trees_of: Callable[[int], list[Tree]],
    heldout: list[Tree],
    loss: Loss,
    weight_decay: float = 0.0,
) -> None:
    """Descend the mean of `loss` over the trees of each step, from where the run stands.

    trees_of(step) is a function of the step alone: so a run that was killed can go on.
    """
    options, position = run.options, run.position
    optimizer = make_optimizer(model, options.lr, weight_decay)
    run.restore(model, optimizer)  # after --resume; else nothing
    parallel.agree({"heldout": progress.digest(heldout)})
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters; {options.steps} steps, {options.rows} rows")
    model.train()
    if run.machine.compile:
        model.model.compile(dynamic=True)

    meter = metrics.Meter(position)
    for step in run.steps():  # ends early, between two steps, on Ctrl-C
        lr = learning_rate(step, options.steps, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss = backward(run, model, trees_of(step), loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        grad_norm = parallel.whole(grad_norm).item()
        progress.refuse_nan(run, step_loss, grad_norm)
        optimizer.step()
        # On a CPU gradients keep their memory: glibc often cannot use a freed piece again.
        optimizer.zero_grad(set_to_none=run.machine.device != "cpu")

        position.step = step + 1
        is_last = position.step == options.steps
        if position.step % options.log_every == 0 or is_last:
            meter.log(options.out, options.steps, lr, grad_norm)
            if heldout:
                metrics.log_heldout(options.out, position.step, measure(run, model, heldout, loss))
        if position.step % options.save_every == 0 and not is_last:
            run.save(model, optimizer)
    run.save(model, optimizer)
    say(f"saved {options.out}")
    if run.is_stopped:
        raise KeyboardInterrupt


def backward(run: progress.Run, model: Transformer, trees: list[Tree], loss: Loss) -> float:
    """Add up the gradient of the mean loss over the trees of a step; returns that loss.

    Each micro-batch is divided by the divisor of the whole step, so together they give the gradient
    of the one big batch. A mean of means would weigh tokens of small micro-batches more.
    """
    # The divisor is 0 where no pair counts: --discourage 0 and no unsafe row in the step.
    divisor = max(sum(tree.divisor for tree in trees), 1e-9)
    sums: metrics.Sums = {}
    for few in parallel.micro_batches(trees, run.options.batch_size):
        batch = make_batch(few, run.machine.device)
        with run.machine.autocast():
            values = logprobs(model, batch)  # (N,)
        batch_loss, found = loss(values, batch)
        batch_loss = batch_loss / divisor
        batch_loss.backward()
        metrics.add(sums, found | {"of the step": (batch_loss.item(), batch.tokens.numel())})
    sums = parallel.add_up(sums)  # over processes, as the gradients are already
    step_loss, computed_tokens = sums.pop("of the step")
    metrics.add(run.position.sums, sums | {"loss": (step_loss, 1)})
    run.position.tokens += sum(map(len, trees))
    run.position.computed_tokens += computed_tokens
    return step_loss


def measure(run: progress.Run, model: Transformer, trees: list[Tree], loss: Loss) -> metrics.Sums:
    """What `loss` logs of held-out rows."""
    sums: metrics.Sums = {}
    model.eval()
    for few in parallel.micro_batches(trees, run.options.batch_size):
        batch = make_batch(few, run.machine.device)
        with torch.no_grad(), run.machine.autocast():
            _, found = loss(logprobs(model, batch), batch)
        metrics.add(sums, found)
    model.train()
    return parallel.add_up(sums)


def make_optimizer(model: Transformer, lr: float, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]  # all, without --lora
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]  # gains of norms: not decayed
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth (at most 100 steps), then a cosine down to a tenth."""
    warmup = min(100, math.ceil(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


def rows_in_order(options, count: int, tree_of: Callable[[int, int], Tree]) -> Callable:
    """step -> tree_of(epoch, index) of its rows. Every epoch visits all rows, in a new order."""
    per_step = options.batch_size * options.grad_accum

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return random.Random(f"{options.seed}/{epoch}").sample(range(count), count)

    def trees_of(step: int) -> list[Tree]:
        trees = []
        for position in range(step * per_step, min((step + 1) * per_step, options.rows)):
            epoch, index = divmod(position, count)
            trees.append(tree_of(epoch, order(epoch)[index]))
        return trees

    return trees_of


# ── sft: learn to backtrack ───────────────────────────────────────────────────────────────────────


def sft(args: argparse.Namespace) -> None:
    tok = load_tokenizer(args.init)
    rows = load_rows(args.data, tok, args.max_length)
    describe(rows, args.data, args.max_length)
    if args.data and args.method != "baseline" and not any(row.unsafe for row in rows):
        raise InputError(
            f'{args.data[0]}: no row says "unsafe": true, nothing to backtrack from;'
            " or --method baseline"
        )
    choices = {"method": args.method, "resets": args.resets}
    choices |= {"reset_weight": args.reset_weight, "restart": args.restart}

    def tree_of(row: Row, epoch: int, index: int, is_heldout: bool = False) -> Tree:
        k = 0
        if row.unsafe:  # leave room for [RESET] and one token of the answer
            room = args.max_length - len(row.prompt) - 2
            row = dataclasses.replace(row, rejected=row.rejected[:room])
            k = draw_prefix(args.seed, epoch, index, len(row.rejected))
        views = sft_views(row, k, tok, **choices)
        if is_heldout and args.method == "backtrack":
            views += resets_after_safe(row, tok)
        return view_tree(views, args.max_length)

    def loss(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, metrics.Sums]:
        logged = metrics.of_views(values.detach(), batch, tok.reset_id)
        return sft_loss(values, batch.weight), logged

    heldout_rows = few_of(load_rows(args.heldout, tok, args.max_length))
    heldout = [tree_of(row, 0, i, is_heldout=True) for i, row in enumerate(heldout_rows)]
    run = progress.start(args, tok, len(rows), rows)
    goes_on = run.position.step > 0 and not args.lora
    model = load(args.out if goes_on else args.init, run)
    trees_of = rows_in_order(run.options, len(rows), lambda e, i: tree_of(rows[i], e, i))
    if model.config.reset_token_id is None and not goes_on:  # [RESET] means nothing yet
        first = trees_of(0) if args.data and args.method == "backtrack" else []
        start_new_tokens(model, tok, [make_batch([tree], args.device) for tree in first])
    fit(run, model, trees_of, heldout, loss)


# ── dpo: prefer to backtrack from unsafe answers, and only from those ─────────────────────────────


def dpo(args: argparse.Namespace) -> None:
    tok = load_tokenizer(args.init)
    rows = load_rows(args.data, tok, args.max_length)
    describe(rows, args.data, args.max_length)
    rows = with_rejected(rows, args.data)
    heldout_rows = few_of(
        with_rejected(load_rows(args.heldout, tok, args.max_length), args.heldout)
    )
    pair_weight = {"elicit": args.elicit, "discourage": args.discourage}
    pair_weight |= {"restart": args.restart_weight, "baseline": 1.0}

    def tree_of(row: Row, epoch: int, index: int) -> Tree:
        room = args.max_length - len(row.prompt) - 2  # for [RESET] and one token of the answer
        k = draw_prefix(args.seed, epoch, index, min(len(row.rejected), room))
        j = draw_prefix(args.seed + 1, epoch, index, min(len(row.chosen), room))
        pairs = dpo_pairs(row, k, j, tok, method=args.method, restart=args.restart)
        return pair_tree(pairs, pair_weight, args.max_length)

    def loss(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, metrics.Sums]:
        chosen, rejected = pairs_of(batch.by_sequence(values))  # (P,), (P,)
        losses = dpo_loss(chosen, rejected, *pairs_of(batch.reference), args.beta)  # (P,)
        # It keeps the chosen answer likely in itself, not only against the rejected one. Summed
        # like the rest: a mean would teach to refuse, for refusals are short.
        nll, _ = pairs_of(batch.by_sequence(-batch.weight * values))
        losses = losses + args.nll * nll
        weights = torch.tensor([pair_weight[kind] for kind in batch.names[0::2]])
        logged = metrics.of_pairs(values.detach(), batch, losses, args.beta, tok.reset_id)
        return (weights.to(losses.device) * losses).sum(), logged

    heldout = [tree_of(row, 0, i) for i, row in enumerate(heldout_rows)]
    settings = reference.settings(args.init, heldout_rows)
    run = progress.start(args, tok, len(rows), rows, **settings)
    steps = run.options.steps
    model = load(args.init, run)
    trees_of = rows_in_order(run.options, len(rows), lambda e, i: tree_of(rows[i], e, i))

    # The model is π_ref now. What it says of every sequence of the run is taken once.
    every_group = (trees_of(step) if step < steps else heldout for step in range(steps + 1))
    log_p = reference.logprobs(run, model, every_group, steps + 1, logprobs)
    reference.give(heldout, log_p[steps])
    if run.position.step and not args.lora:
        model = load(args.out, run)
    if args.method == "backtrack":
        model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)

    def trees_with_reference(step: int) -> list[Tree]:
        return reference.give(trees_of(step), log_p[step])

    fit(run, model, trees_with_reference, heldout, loss)


def with_rejected(rows: list[Row], paths: list[str]) -> list[Row]:
    found = [row for row in rows if row.rejected is not None]
    if paths and not found:
        raise InputError(f"{paths[0]}: no row has a 'rejected' answer, nothing to prefer")
    if len(found) < len(rows):
        say(f"{len(rows) - len(found)} rows without a rejected answer are left out")
    return found


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=errors.Help)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about, add_arguments in (
        ("sft", "supervised fine-tuning, with backtracking", sft_arguments),
        ("dpo", "preference optimisation, with backtracking", dpo_arguments),
    ):
        p = commands.add_parser(name, help=about, description=about, formatter_class=errors.Help)
        add_arguments(p)
        row_arguments(p)
        command.run_arguments(p)
    return command.checked(parser)


def sft_arguments(p) -> None:
    about = "drawn (the paper): learn [RESET] after the prefix drawn; every: after every prefix"
    p.add_argument("--resets", choices=("every", "drawn"), default="every", help=about)
    p.set_defaults(lr=1e-5)
    group = p.add_argument_group("beyond the paper")
    about = "with --resets every: how many tokens the resets, or turns, of a row count together"
    group.add_argument("--reset-weight", type=errors.not_negative(float), default=1.0, help=about)
    restart_argument(group)


def dpo_arguments(p) -> None:
    number = errors.not_negative(float)
    about = "how strongly the model is held to the reference"
    p.add_argument("--beta", type=errors.ABOVE_ZERO, default=0.1, help=about)
    p.set_defaults(lr=5e-7)
    group = p.add_argument_group("beyond the paper")
    group.add_argument("--nll", type=number, default=0.0, help="weight of −log π(chosen)")
    group.add_argument("--elicit", type=number, default=1.0, help="of pairs that want [RESET]")
    group.add_argument("--discourage", type=number, default=1.0, help="of those that want none")
    restart_argument(group)
    group.add_argument("--restart-weight", type=number, default=1.0, help="of restart pairs")


def restart_argument(group) -> None:
    about = "rows that also teach what follows x ⊕ [RESET]"
    group.add_argument("--restart", choices=("none", "unsafe", "all"), default="none", help=about)


def row_arguments(p) -> None:
    p.add_argument("--init", required=True, help="Hugging Face model directory to start from")
    about = "baseline: without backtracking; in-place: the answer goes on, nothing is taken back"
    methods = ("backtrack", "baseline", "in-place")
    p.add_argument("--method", choices=methods, default="backtrack", help=about)
    alias = {"action": "store_const", "dest": "method", "const": "baseline"}
    p.add_argument("--no-backtrack", **alias, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    about = "train factors of this rank beside frozen weights, and rows of special tokens"
    p.add_argument("--lora", type=errors.positive, metavar="RANK", help=about)


def main() -> None:
    command.train(parse_args, {"sft": sft, "dpo": dpo})


def program() -> None:
    errors.run(main, ranks=True)


if __name__ == "__main__":
    program()
