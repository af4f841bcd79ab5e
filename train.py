"""Train a model that can take its words back: pretrain a small base, fine-tune, prefer.

    python train.py base --config data/toy.json --tokenizer DIR --data corpus.jsonl --out runs/base
    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/sft
    python train.py dpo --init runs/sft --data rows.jsonl --out runs/dpo

`sft` is the paper's supervised objective (arXiv 2409.14586, section 3.1), `dpo` its preference
optimisation (section 3.2). Both read rows in TRL's preference format; --method baseline trains on
the same rows without backtracking. Which sequences a row gives, and where loss falls, is decided in
backtrack/examples.py. The rest is here, top to bottom: losses, loop, the three commands, arguments.

Weights and optimizer are fp32; --dtype bfloat16 computes in bf16 by autocast. A killed run goes on
with --resume. The model directory written to --out loads in transformers. On many devices, with the
same result (backtrack/run/parallel.py): torchrun --nproc-per-node 8 train.py sft …

Shapes: N targets and S sequences of a batch, P = S / 2 pairs, M nodes that predict, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from backtrack.examples import dpo_pairs, draw_prefix, resets_after_safe, sft_views
from backtrack.reset_row import start_new_tokens
from backtrack.rows import Row, describe, load_rows, read_stream
from backtrack.run import launch, lora, parallel
from backtrack.run import progress as log
from backtrack.run.progress import Progress
from backtrack.run.say import say
from backtrack.trees import NO_ROW, Batch, Tree, count_windows, make_batch, pair_tree, pairs_of, view_tree, window_tree
from model import InputError, ModelConfig, Transformer, load_model, load_tokenizer
from model.checkpoint import take_memory, weights_digest
from model.errors import ABOVE_ZERO, SEED, Help, device, not_negative, positive, run

HELDOUT = 64  # held-out rows that are measured: often, so few
CHUNK = 2**28  # logits that are in memory at once, 1 GiB

# ── Losses ────────────────────────────────────────────────────────────────────────────────────────


def logprobs(model: Transformer, batch: Batch) -> torch.Tensor:
    """log π(target | the nodes its predicting node sees), (N,) fp32.

    The only place where log-probabilities are taken. Logits are built only for nodes that predict
    something, once each and a chunk at a time: with a vocabulary of 128,000 they would take more
    memory than all the rest.
    """
    chunk = max(1, CHUNK // model.config.vocab_size)

    def read(hidden: torch.Tensor) -> torch.Tensor:  # (M, D) -> (N,)
        if len(hidden) <= chunk:
            return target_logprobs(model, hidden, batch.place, batch.target)
        values = torch.zeros(len(batch.target), device=hidden.device)
        for first in range(0, len(hidden), chunk):
            here = (batch.place // chunk == first // chunk).nonzero()[:, 0]  # these targets
            some = hidden[first : first + chunk], batch.place[here] - first, batch.target[here]
            # Their logits are not kept for the backward pass but computed again.
            again = {"use_reentrant": False, "preserve_rng_state": False}
            values = values.index_add(0, here, checkpoint(target_logprobs, model, *some, **again))
        return values

    where = {"positions": batch.positions, "visible": batch.visible, "at": batch.places}
    return model(batch.tokens, **where, read=read)


def target_logprobs(model: Transformer, hidden, place, target) -> torch.Tensor:
    """log π of targets (n,), each predicted by its place among the hidden states (m, D): (n,)."""
    logits = model.logits(hidden)  # (m, V) fp32
    return logits.log_softmax(dim=-1)[place, target]


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


def reference_logprobs(model: Transformer, args, groups) -> Iterator[list[float]]:
    """log π_ref of every sequence of each group of trees, by the model as it is."""
    for count, trees in enumerate(groups, start=1):
        for few in my_batches(trees, args.batch_size):
            batch = make_batch(few, args.device)
            with torch.no_grad(), autocast(args):
                sums = batch.by_sequence(logprobs(model, batch))  # (S,)
            parts = sums.split([len(tree.names) for tree in few])
            for tree, part in zip(few, parts, strict=True):
                tree.reference = part.tolist()
        # A tree has its numbers on the rank that computed it, the others have None.
        by_rank = parallel.exchange([tree.reference for tree in trees])
        per_tree = [next(filter(None, answers)) for answers in zip(*by_rank, strict=True)]
        yield [value for sums in per_tree for value in sums]
        if count % 50 == 0:
            say(f"reference log-probs: {count} steps")


# ── The loop ──────────────────────────────────────────────────────────────────────────────────────


def fit(
    args,
    progress: Progress,
    model: Transformer,
    tok,
    trees_of: Callable[[int], list[Tree]],
    heldout: list[Tree],
    loss: Callable[[torch.Tensor, Batch], torch.Tensor],
    report: Callable[[torch.Tensor, Batch], dict],
) -> None:
    """Descend the mean of `loss` over the trees of each step, from where `progress` is.

    trees_of(step)         the rows of a step, a function of the step alone: so a run can go on.
    loss(logprobs, batch)  Σ of what is optimised; divided by the weight of the step's trees.
    report(…)              name -> (sum, count) of what is logged, apart from what is optimised.
    """
    steps = progress.settings["steps"]
    optimizer = make_optimizer(model, args)
    if progress.step:
        log.load_optimizer(optimizer, model, args.out, progress.step)
        say(f"{args.out}: resuming after step {progress.step}")
    log.rewind_metrics(args.out, progress.step)
    parallel.agree({"heldout": log.digest(heldout)})
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters; {steps} steps of {args.batch_size * args.grad_accum} rows")
    if steps == 0:
        log.save(progress, model, optimizer, tok, args.out)
        return
    model.train()
    if args.compile:
        model.model.compile(dynamic=True)

    meter = log.Meter(progress)
    for step in range(progress.step, steps):
        lr = learning_rate(step, steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        total_loss = accumulate(args, progress, model, trees_of(step), loss, report)
        max_norm = args.clip or math.inf  # 0 is off
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        grad_norm = parallel.whole(grad_norm).item()
        if not (math.isfinite(total_loss) and math.isfinite(grad_norm)):
            raise InputError(
                f"step {step + 1}: loss is {total_loss}, gradient norm {grad_norm};"
                f" {log.what_is_kept(args.out)}. Try a lower --lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress.step = step + 1
        is_last = progress.step == steps
        if progress.step % args.log_every == 0 or is_last:
            meter.log(args.out, total_loss, lr, grad_norm)
            if heldout:
                log.log_heldout(args.out, progress.step, evaluate(model, heldout, report, args))
        if progress.step % args.save_every == 0 or is_last:
            log.save(progress, model, optimizer, tok, args.out)
    say(f"saved {args.out}")


def accumulate(
    args, progress: Progress, model: Transformer, trees: list[Tree], loss, report
) -> float:
    """Add up the gradient of the mean loss over the trees of a step; returns that loss.

    Divided by the weight of the whole step, micro-batches give the gradient of the one big batch. A
    mean of means would weigh a token by how few others share its micro-batch.
    """
    # The weight is 0 where no pair counts: --discourage 0 and no unsafe row in the step.
    total_weight = max(sum(tree.weight for tree in trees), 1e-9)
    found: dict = {}
    for few in my_batches(trees, args.batch_size):
        batch = make_batch(few, args.device)
        with autocast(args):
            values = logprobs(model, batch)  # (N,)
        batch_loss = loss(values, batch) / total_weight
        batch_loss.backward()
        log.add(found, report(values.detach(), batch))
        log.add(found, {"of the step": (batch_loss.item(), batch.tokens.numel())})
    found = parallel.add_up(found)  # over ranks, as the gradients are already
    total_loss, computed_tokens = found.pop("of the step")
    progress.add(found)
    progress.tokens += sum(map(len, trees))
    progress.computed_tokens += computed_tokens
    return total_loss


def my_batches(trees: list[Tree], size: int) -> list[list[Tree]]:
    """The micro-batches of this rank: of one process all; of several a share, equally many each."""
    mine, rounds = parallel.share_out(trees, size)
    batches = micro_batches(mine, size)
    return batches + [[NO_ROW]] * (rounds - len(batches))


def micro_batches(trees: list[Tree], size: int) -> list[list[Tree]]:
    """Cut a step into micro-batches of `size` trees, sorted by length: so padding is small."""
    trees = sorted(trees, key=len)
    return [trees[i : i + size] for i in range(0, len(trees), size)]


def evaluate(model: Transformer, trees: list[Tree], report: Callable, args) -> dict:
    """What `report` says of held-out rows."""
    sums: dict = {}
    model.eval()
    for few in my_batches(trees, args.batch_size):
        batch = make_batch(few, args.device)
        with torch.no_grad(), autocast(args):
            log.add(sums, report(logprobs(model, batch), batch))
    model.train()
    return log.means(parallel.add_up(sums))


def autocast(args):
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def make_optimizer(model: Transformer, args) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]  # all, without --lora
    matrices = [p for p in trained if p.dim() >= 2]
    gains = [p for p in trained if p.dim() < 2]  # of the norms: not decayed
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth (at most 100 steps), then a cosine down to a tenth."""
    warmup = min(100, math.ceil(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


# ── base: pretrain on plain text ──────────────────────────────────────────────────────────────────


def base(args) -> None:
    """Text as one stream <bos> text <end> …, cut into windows at a new offset each epoch."""
    tok = load_tokenizer(args.tokenizer)
    length = args.max_length
    stream = read_stream(args.data, tok)
    trains = args.steps != 0  # else nothing has to fit into --max-length
    count = count_windows(stream, args.data, length) if trains else 0

    def tree(epoch: int, index: int) -> Tree:
        offset = random.Random(f"{args.seed}/{epoch}").randrange(length)
        return window_tree(stream, offset + index * length, length)

    heldout = []
    if args.heldout and trains:
        text = read_stream(args.heldout, tok)
        for index in spread(range(count_windows(text, args.heldout, length))):
            heldout.append(window_tree(text, index * length, length))

    progress = log.start(args, log.run_settings(args, count, stream))
    model = load(args.out, tok, args) if progress.step else fresh_model(tok, args)
    check_model(model, tok, args)

    def loss(values: torch.Tensor, batch: Batch) -> torch.Tensor:
        return sft_loss(values, batch.weight)

    trees_of = rows_in_order(args, count, tree)
    fit(args, progress, model, tok, trees_of, heldout, loss, log.view_report)


# ── sft: learn to backtrack ───────────────────────────────────────────────────────────────────────


def sft(args) -> None:
    tok = load_tokenizer(args.init)
    rows = load_rows(args.data, tok, args.max_length, args.on_long)
    describe(rows, args)
    if args.data and args.method != "baseline" and not any(row.unsafe for row in rows):
        raise InputError(
            f'{args.data[0]}: no row says "unsafe": true, nothing to backtrack from;'
            " or --method baseline"
        )

    def tree(epoch: int, index: int) -> Tree:
        return sft_tree(args, tok, rows[index], epoch, index)

    heldout_rows = spread(load_rows(args.heldout, tok, args.max_length, args.on_long))
    heldout = [sft_tree(args, tok, row, 0, i, watch=True) for i, row in enumerate(heldout_rows)]
    progress = log.start(args, log.run_settings(args, len(rows), rows))
    model = load(args.out if progress.step and not args.lora else args.init, tok, args)
    check_model(model, tok, args)
    trees_of = rows_in_order(args, len(rows), tree)
    if model.config.reset_token_id is None:
        sample = trees_of(0) if args.data and args.method == "backtrack" else []
        start_new_tokens(model, tok, [make_batch([tree], args.device) for tree in sample])

    def loss(values: torch.Tensor, batch: Batch) -> torch.Tensor:
        return sft_loss(values, batch.weight)

    report = partial(log.view_report, reset_id=tok.reset_id)
    fit(args, progress, model, tok, trees_of, heldout, loss, report)


def sft_tree(args, tok, row: Row, epoch: int, index: int, watch: bool = False) -> Tree:
    k = 0
    if row.unsafe:  # leave room for [RESET] and one token of the answer
        longest = min(len(row.rejected), args.max_length - len(row.prompt) - 2)
        row = dataclasses.replace(row, rejected=row.rejected[:longest])  # every k is one of these
        k = draw_prefix(args.seed, epoch, index, longest, args.prefix)
    views = sft_views(
        row,
        k,
        tok,
        method=args.method,
        resets=args.resets,
        part=args.prefix,
        reset_weight=args.reset_weight,
        restart=args.restart,
    )
    if watch and args.method == "backtrack":
        views += resets_after_safe(row, tok)
    return view_tree(views, args.max_length)


# ── dpo: prefer to backtrack from unsafe answers, and only from those ─────────────────────────────


def dpo(args) -> None:
    tok = load_tokenizer(args.init)
    rows = load_rows(args.data, tok, args.max_length, args.on_long)
    describe(rows, args)
    rows = with_rejected(rows, args.data)
    heldout_rows = load_rows(args.heldout, tok, args.max_length, args.on_long)
    heldout_rows = spread(with_rejected(heldout_rows, args.heldout))
    weight = {
        "elicit": args.elicit,
        "discourage": args.discourage,
        "restart": args.restart_weight,
        "baseline": 1.0,
    }

    def tree(epoch: int, index: int) -> Tree:
        return dpo_tree(args, tok, rows[index], epoch, index, weight)

    heldout = [dpo_tree(args, tok, row, 0, i, weight) for i, row in enumerate(heldout_rows)]
    settings = log.run_settings(args, len(rows), rows)
    settings |= {"init": weights_digest(args.init), "heldout": log.digest(heldout_rows)}
    progress = log.start(args, settings)

    # The model is the reference now. Its log-probs, taken for the whole run at once, spare training
    # a second model.
    model = load(args.init, tok, args)
    check_model(model, tok, args)
    plain_trees = rows_in_order(args, len(rows), tree)

    def groups():
        yield from map(plain_trees, range(settings["steps"]))
        yield heldout

    def compute(first: int) -> Iterator[list[float]]:
        return reference_logprobs(model, args, islice(groups(), first, None))

    reference = log.remembered(args, settings, compute)
    heldout = with_reference(heldout, reference.pop())
    if progress.step and not args.lora:
        model = load(args.out, tok, args)
    model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)

    def losses(values: torch.Tensor, batch: Batch) -> torch.Tensor:
        chosen, rejected = pairs_of(batch.by_sequence(values))
        losses = dpo_loss(chosen, rejected, *pairs_of(batch.reference), args.beta)  # (P,)
        # It keeps the chosen answer likely in itself, not only against the rejected one. Summed
        # like the rest: a mean would teach to refuse, for refusals are short.
        nll, _ = pairs_of(batch.by_sequence(-batch.weight * values))
        return losses + args.nll * nll

    def loss(values: torch.Tensor, batch: Batch) -> torch.Tensor:
        weights = torch.tensor([weight[kind] for kind in batch.names[0::2]], device=values.device)
        return (weights * losses(values, batch)).sum()

    def report(values: torch.Tensor, batch: Batch) -> dict:
        return log.pair_report(values, batch, losses(values, batch), args.beta, tok.reset_id)

    def trees_of(step: int) -> list[Tree]:
        return with_reference(plain_trees(step), reference[step])

    fit(args, progress, model, tok, trees_of, heldout, loss, report)


def with_rejected(rows: list[Row], paths: list[str]) -> list[Row]:
    found = [row for row in rows if row.rejected is not None]
    if paths and not found:
        raise InputError(f"{paths[0]}: no row has a 'rejected' answer, nothing to prefer")
    return found


def dpo_tree(args, tok, row: Row, epoch: int, index: int, weight: dict[str, float]) -> Tree:
    room = args.max_length - len(row.prompt) - 2  # for [RESET] and one token of the answer
    longest_rejected, longest_chosen = min(len(row.rejected), room), min(len(row.chosen), room)
    k_rejected = draw_prefix(args.seed, epoch, index, longest_rejected, args.prefix)
    k_chosen = draw_prefix(args.seed + 1, epoch, index, longest_chosen, args.prefix)
    pairs = dpo_pairs(row, k_rejected, k_chosen, tok, method=args.method, restart=args.restart)
    return pair_tree(pairs, weight, args.max_length)


def with_reference(trees: list[Tree], values: list[float]) -> list[Tree]:
    """Hand each tree its sequences' share of `values`."""
    first = 0
    for tree in trees:
        tree.reference = values[first : first + len(tree.names)]
        first += len(tree.names)
    return trees


# ── What the commands share ───────────────────────────────────────────────────────────────────────


def load(path: str, tok, args) -> Transformer:
    """A model to train; under torchrun each process reads its slices.

    With --lora it is that of --init, also when a run goes on: what is added to it is read later.
    """
    prepare = partial(before_weights, tok=tok, args=args)
    model = load_model(path, home(args), prepare=prepare)
    lora.start(model, args.seed)
    return model


def fresh_model(tok, args) -> Transformer:
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(args.config))
    before_weights(model, tok, args)
    take_memory(model, home(args))
    model.init_weights(args.seed)
    return model


def before_weights(model: Transformer, tok, args) -> None:
    """What a model is to be, decided while it is on the meta device."""
    for block in model.model.layers:
        block.recompute = args.checkpoint_activations
    if args.lora:
        with torch.device("meta"):
            ids = {tok.reset_id, *tok.template_ids, *tok.stop_ids}
            lora.adapt(model, args.lora, sorted(ids))
    parallel.shard(model, args)


def home(args) -> str:
    """Where weights are kept; they are computed with on --device."""
    return "cpu" if args.offload else args.device


def say_plan(args) -> None:
    from backtrack.run.plan import lines, plan  # its imports take a second

    config = ModelConfig.load(args.config if args.command == "base" else args.init)
    print("\n".join(lines(plan(config, args, CHUNK), args)))


def rows_in_order(args, count: int, tree: Callable[[int, int], Tree]) -> Callable:
    """step -> the trees of its rows. Every epoch visits all rows, in a new order."""
    per_step = args.batch_size * args.grad_accum

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return random.Random(f"{args.seed}/{epoch}").sample(range(count), count)

    def trees_of(step: int) -> list[Tree]:
        trees = []
        for position in range(step * per_step, (step + 1) * per_step):
            epoch, place = divmod(position, count)
            trees.append(tree(epoch, order(epoch)[place]))
        return trees

    return trees_of


def spread(rows: Sequence) -> Sequence:
    """At most HELDOUT of them, from all over: held-out rows are measured often."""
    return rows[:: math.ceil(len(rows) / HELDOUT) or 1]


def check_model(model: Transformer, tok, args) -> None:
    config = model.config
    if config.vocab_size < tok.vocab_size:
        raise InputError(
            f"the tokenizer has {tok.vocab_size} ids but the model only {config.vocab_size} rows"
        )
    if args.steps != 0 and config.max_position_embeddings < args.max_length:
        raise InputError(
            f"--max-length {args.max_length} exceeds the model's {config.max_position_embeddings}"
        )


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about, add_arguments in (
        ("base", "pretrain from scratch on plain text", base_arguments),
        ("sft", "supervised fine-tuning, with backtracking", sft_arguments),
        ("dpo", "preference optimisation, with backtracking", dpo_arguments),
    ):
        command = commands.add_parser(name, help=about, description=about, formatter_class=Help)
        add_arguments(command)
        common_arguments(command)
    args = parser.parse_args()
    if "prefix" in args and not args.prefix[0] <= args.prefix[1] <= 1:
        low, high = args.prefix
        parser.error(f"--prefix {low} {high}: needs 0 ≤ LOW ≤ HIGH ≤ 1")
    if not args.data and args.steps != 0 and not args.plan:
        parser.error("--data is needed; only --steps 0, which saves the start, goes without")
    if args.offload and "RANK" not in os.environ and not args.plan:
        parser.error("--offload needs torchrun, for one device too: --nproc-per-node 1")
    return args


def base_arguments(p) -> None:
    p.add_argument("--config", required=True, help="a Hugging Face config.json: the model's shape")
    p.add_argument("--tokenizer", required=True, help="directory with tokenizer.model or .json")
    p.set_defaults(lr=1e-3, weight_decay=0.1, lora=None)


def sft_arguments(p) -> None:
    p.add_argument("--init", required=True, help="Hugging Face model directory to start from")
    row_arguments(p, "backtrack", "baseline", "in-place")
    p.set_defaults(lr=1e-5, weight_decay=0.0)
    about = "learn [RESET] after every length of prefix at once, or after the one drawn (the paper)"
    group = beyond_the_paper(p)
    group.add_argument("--resets", choices=("every", "drawn"), default="every", help=about)
    about = "with --resets every: how many tokens the resets of a row count for together"
    group.add_argument("--reset-weight", type=not_negative(float), default=1.0, help=about)


def dpo_arguments(p) -> None:
    number = not_negative(float)
    p.add_argument("--init", required=True, help="the SFT checkpoint: start and reference")
    row_arguments(p, "backtrack", "baseline")
    about = "how dear it is to leave the reference"
    p.add_argument("--beta", type=ABOVE_ZERO, default=0.1, help=about)
    p.set_defaults(lr=5e-7, weight_decay=0.0)
    group = beyond_the_paper(p)
    group.add_argument("--nll", type=number, default=0.0, help="weight of −log π(chosen)")
    group.add_argument(
        "--elicit", type=number, default=1.0, help="weight of pairs that want [RESET]"
    )
    group.add_argument("--discourage", type=number, default=1.0, help="of those that want none")
    group.add_argument("--restart-weight", type=number, default=1.0, help="of restart pairs")


def row_arguments(p, *methods: str) -> None:
    about = "baseline: without backtracking; in-place: the answer goes on, nothing is taken back"
    p.add_argument("--method", choices=methods, default="backtrack", help=about)
    alias = {"action": "store_const", "dest": "method", "const": "baseline"}
    p.add_argument("--no-backtrack", **alias, default=argparse.SUPPRESS, help="--method baseline")
    about = "what to do about rows whose prompt leaves no room for an answer"
    p.add_argument("--on-long", choices=("skip", "error"), default="skip", help=about)
    about = "train factors of this rank beside frozen weights, and rows of special tokens"
    p.add_argument("--lora", type=positive, metavar="RANK", help=about)


def beyond_the_paper(p):
    group = p.add_argument_group("beyond the paper")
    which = ("none", "unsafe", "all")
    about = "rows that also teach what follows x ⊕ [RESET]"
    group.add_argument("--restart", choices=which, default="none", help=about)
    about = "prefixes that end in this part of the answer"
    part = {"nargs": 2, "type": not_negative(float), "metavar": ("LOW", "HIGH")}
    group.add_argument("--prefix", **part, default=[0.0, 1.0], help=about)
    return group


def common_arguments(p) -> None:
    number, steps = not_negative(float), not_negative(int)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    default = p.get_default
    p.add_argument("--data", nargs="+", default=[], help=".jsonl or .jsonl.gz files")
    about = f"files of which {HELDOUT} rows are measured at every log line"
    p.add_argument("--heldout", nargs="+", default=[], help=about)
    p.add_argument("--out", required=True, help="model directory to write")
    p.add_argument("--lr", type=ABOVE_ZERO, default=default("lr"), help="peak learning rate")
    p.add_argument("--weight-decay", type=number, default=default("weight_decay"), help="AdamW's")
    p.add_argument("--clip", type=number, default=1.0, help="largest gradient norm; 0: off")
    p.add_argument("--batch-size", type=positive, default=8, help="rows per micro-batch")
    p.add_argument("--grad-accum", type=positive, default=1, help="micro-batches per step")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=number, default=1.0, help="times through the data")
    length.add_argument("--steps", type=steps, help="instead of --epochs; 0 saves the start")
    p.add_argument("--max-length", type=positive, default=1024, help="longest sequence in tokens")
    p.add_argument("--seed", type=SEED, default=0, help="of data order, prefixes, fresh weights")
    p.add_argument("--device", type=device, default=on, help="of PyTorch")
    dtypes = ("float32", "bfloat16")
    p.add_argument("--dtype", choices=dtypes, default="float32", help="of the computation")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    about = "keep the input of each block alone, and compute the rest again: less memory, slower"
    p.add_argument("--checkpoint-activations", action="store_true", help=about)
    about = "keep weights and optimizer in the memory of the host; under torchrun"
    p.add_argument("--offload", action="store_true", help=about)
    about = "say what N devices need of memory for this, from config.json alone, and end"
    p.add_argument("--plan", type=positive, metavar="N", help=about)
    p.add_argument("--resume", action="store_true", help="go on from what --out holds, if anything")
    p.add_argument("--log-every", type=positive, default=10, help="steps")
    p.add_argument("--save-every", type=positive, default=500, help="steps")


def main() -> None:
    with launch.together():
        args = parse_args()
        if args.plan:
            say_plan(args)
            return
        launch.check_device(args)
        with log.alone(args.out):
            {"base": base, "sft": sft, "dpo": dpo}[args.command](args)


if __name__ == "__main__":
    run(main, ranks=True)
