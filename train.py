"""Train a model that can take its words back: pretrain a small base, or fine-tune a Hugging Face checkpoint.

    python train.py base --config data/toy.json --tokenizer DIR --data corpus.jsonl --out runs/base --steps 2000
    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/sft            # backtracking
    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/plain --no-backtrack  # the baseline

`sft` is the paper's supervised objective (arXiv 2409.14586, section 3.1) on rows in TRL's preference format; which
sequences it sees and where loss falls is decided in backtrack/examples.py. Everything else is in this file, top to
bottom: loss, data order, save and resume, the loop. The model directory written to --out loads in transformers.

One process, one device. Weights and optimizer are fp32; --dtype bfloat16 computes in bf16 by autocast. A run that was
killed goes on with --resume and ends, on CPU, with the very same bits.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import random
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from backtrack.examples import Example, draw_prefix, load_rows, read_rows, sft_views
from model import InputError, ModelConfig, Transformer, load_model, load_tokenizer
from model.checkpoint import atomic_directory, write_model, write_tensors
from model.errors import device, run

STATE = "training_state.safetensors"
# How much a token of each view counts. Rows appear once per view, so without weights unsafe rows would count double.
VIEW_WEIGHT = {"text": 1.0, "answer": 0.5, "backtrack": 0.5, "restart": 0.25}


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor  # (B, T) int64, padded on the right
    weights: torch.Tensor  # (B, T) fp32: what the loss of each token counts; 0 on prompt, prefix and padding
    views: list[str]  # (B) names


def collate(examples: list[Example], max_length: int, device) -> Batch:
    """Pad examples to a rectangle. Tokens beyond max_length are cut off (load_rows has counted and reported them)."""
    width = min(max_length, max(len(e.tokens) for e in examples))
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    weights = torch.zeros(len(examples), width)
    for i, e in enumerate(examples):
        n = min(len(e.tokens), width)
        tokens[i, :n] = torch.tensor(e.tokens[:n])
        weights[i, e.loss_from : n] = VIEW_WEIGHT[e.view]
    return Batch(tokens.to(device), weights.to(device), [e.view for e in examples])


def target_logprobs(model: Transformer, tokens: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """log π(tokens[b, t] | tokens[b, :t]) wherever is_target (B, T), as one flat fp32 vector in row-major order.

    The only place where labels are shifted: the hidden state at t − 1 predicts the token at t. The vocabulary-wide
    logits are built for targets alone, which is what makes a 128k vocabulary affordable.
    """
    hidden = model.model(tokens[:, :-1])  # (B, T-1, D)
    is_target = is_target[:, 1:]
    logits = model.logits(hidden[is_target])  # (N, V) fp32
    return -F.cross_entropy(logits.float(), tokens[:, 1:][is_target], reduction="none")  # (N,)


def weighted_nll(model: Transformer, batch: Batch) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Σ weight · −log π(token), not yet divided; and per view [Σ −log π, number of targets] to report.

    The paper's objective, with θ found by descending the mean over all target tokens of the (whole) batch:
        −E log π(y+ | x)  −  E log π([RESET] ⊕ y+ | x ⊕ prefix_k(y−))
    """
    is_target = batch.weights > 0
    nll = -target_logprobs(model, batch.tokens, is_target)  # (N,)
    row = torch.arange(len(batch.views), device=nll.device)[:, None].expand_as(is_target)[:, 1:][is_target[:, 1:]]
    per_row = torch.zeros(len(batch.views), device=nll.device).index_add(0, row, nll.detach())  # (B,)
    sums: dict[str, list[float]] = {}
    for view, total, n in zip(batch.views, per_row.tolist(), is_target.sum(dim=1).tolist(), strict=True):
        add(sums, {view: (total, n)})
    return (nll * batch.weights[is_target]).sum(), sums


# ── Data: which examples make step n. A function of (seed, n) alone, so a resumed run needs only the step ─────────────


def row_order(count: int, seed: int):
    """position -> (epoch, index): every epoch visits all rows in a fresh order."""

    @lru_cache(maxsize=2)
    def permutation(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{epoch}").sample(range(count), count)

    return lambda position: (position // count, permutation(position // count)[position % count])


def base_source(args, tok, paths: list[str]):
    """Pretraining text as one endless stream <bos> text <eos> …, cut into windows of max_length at a new offset each
    epoch. Returns (number of windows, (epoch, index) -> examples, digest)."""
    stream = []
    for path in paths:
        for where, row in read_rows(path):
            if "text" not in row:
                raise InputError(f'{where}: `base` trains on plain text, one {{"text": "…"}} per line')
            stream += [tok.bos_id, *tok.encode(row["text"]), tok.stop_ids[0]]
    L = args.max_length
    if L < 2:
        raise InputError(f"--max-length {L}: a window needs two tokens, one to predict and one to predict it from")
    count = len(stream) // L - 1
    if count < 1:
        raise InputError(f"{paths[0]}: only {len(stream)} tokens; need at least 2 × --max-length {L}")

    def examples(epoch: int, index: int) -> list[Example]:
        start = random.Random(f"{args.seed}/{epoch}").randrange(L) + index * L
        return [Example("text", stream[start : start + L], loss_from=1)]

    return count, examples, _digest(stream)


def sft_source(args, tok, paths: list[str]):
    """Rows of preferences (and plain text). Returns (number of rows, (epoch, index) -> views of that row, digest)."""
    rows, long = load_rows(paths, tok, args.max_length)
    if long:
        say(f"{long} of {len(rows)} rows have a view longer than --max-length {args.max_length}: they are cut there")
    unsafe = sum(r.unsafe for r in rows)
    say(f"{', '.join(paths)}: {len(rows)} rows, {unsafe} with an unsafe rejected answer")
    if not args.no_backtrack and not unsafe and paths == args.data:  # held-out rows may do without
        raise InputError(f'{paths[0]}: no row says "unsafe": true, nothing to backtrack from; or --no-backtrack')

    def examples(epoch: int, index: int) -> list[Example]:
        row, k = rows[index], 0
        if row.unsafe:  # leave room for [RESET] and at least one token of the answer
            k = draw_prefix(args.seed, epoch, index, min(len(row.rejected), args.max_length - len(row.prompt) - 2))
        return sft_views(row, k, tok, backtrack=not args.no_backtrack, restart=args.restart)

    return len(rows), examples, _digest([(r.prompt, r.chosen, r.rejected, r.unsafe) for r in rows])


def _digest(data) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


# ── Model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def init_special_rows(model: Transformer, tok) -> None:
    """Give [RESET], and every template token that the base was never trained on, rows at trained scale.

    A spare token's rows, input and output, are what initialisation and the softmax left there: ~0 in Llama-3, one
    common far-off vector where embeddings are tied. From such a start [RESET] is confused with rare tokens and hardly
    ever said. That place also tells the untrained template tokens (all of them in Llama-3 base): they lie there too.
    """
    generator = torch.Generator().manual_seed(0)
    for w in {id(w): w for w in (model.model.embed_tokens.weight, model.lm_head.weight)}.values():  # one if tied
        distance = (w - w[tok.reset_id]).float().norm(dim=1)  # (V,)
        trained = distance > 0.5 * distance.quantile(0.9)
        fresh = [t for t in tok.template_ids if t != tok.bos_id and not trained[t]]
        mean, std = w[trained].mean(dim=0), w[trained].std(dim=0)
        for t in fresh:
            w[t] = mean + 0.1 * std * torch.randn(std.shape, generator=generator).to(std)
        which = "embedding" if w is model.model.embed_tokens.weight else "output"
        say(f"set the untrained {which} rows of special tokens {fresh} to the mean of the trained rows")
    model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)  # from now on it means something


def make_optimizer(model: Transformer, args) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]  # gains are not decayed
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device.startswith("cuda"))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth (at most 100 steps), then a cosine down to a tenth."""
    warmup = min(100, math.ceil(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


# ── Save and resume ──────────────────────────────────────────────────────────────────────────────────────────────────


def save(model, optimizer, tok, args, progress: dict) -> None:
    """Model, optimizer, position and RNG in one directory, swapped in atomically: never a mix of two steps."""
    with atomic_directory(args.out) as directory:
        write_model(model, directory, tok)
        tensors = {"rng": torch.get_rng_state()}
        if progress["step"] < progress["settings"]["steps"]:  # a finished run needs no optimizer
            for name, p in model.named_parameters():
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{moment}/{name}"] = optimizer.state[p][moment]
        write_tensors(tensors, directory / STATE, {"progress": json.dumps(progress)})


def read_progress(args, settings: dict) -> dict:
    """Where to go on from: what the last save stored, or step 0. Raises InputError if this would be another run."""
    out = Path(args.out)
    if not (out / "config.json").is_file():
        if out.is_dir() and any(file.name != "metrics.jsonl" for file in out.iterdir()):
            raise InputError(f"{out}: holds files but no checkpoint; choose an empty or new directory")
        return {"step": 0, "tokens": 0, "recent": {}, "settings": settings}
    if not args.resume:
        raise InputError(f"{out}: holds a checkpoint already; continue it with --resume or choose another --out")
    if not (out / STATE).is_file():
        raise InputError(f"{out}: holds a model but no {STATE}, so there is no run to resume; choose another --out")
    try:
        with safe_open(out / STATE, framework="pt") as f:
            progress = json.loads(f.metadata()["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out / STATE}: truncated or not ours ({error}); choose another --out") from None
    for name, now in settings.items():
        before = progress["settings"].get(name)
        if before != now:
            raise InputError(f"{out}: was started with {name} = {before}, now {now}; resume with the same settings")
    return progress


def load_optimizer(optimizer, model, args, step: int) -> None:
    with safe_open(Path(args.out) / STATE, framework="pt") as f:
        torch.set_rng_state(f.get_tensor("rng"))
        for name, p in model.named_parameters():
            optimizer.state[p] = {
                "step": torch.tensor(float(step), device=p.device if p.is_cuda else "cpu"),
                "exp_avg": f.get_tensor(f"exp_avg/{name}").to(p.device),
                "exp_avg_sq": f.get_tensor(f"exp_avg_sq/{name}").to(p.device),
            }


def log_metrics(args, record: dict) -> None:
    with open(Path(args.out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def rewind_metrics(args, step: int) -> None:
    """Drop what a killed run logged after its last save."""
    with open(Path(args.out) / "metrics.jsonl", "ab+") as f:
        f.seek(0)
        kept = [line for line in f if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        f.truncate(sum(map(len, kept)))  # steps only grow, so what is kept is the head


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(model, batches: list[Batch], autocast) -> dict[str, float]:
    """Mean −log π per target token of each view on held-out rows."""
    sums: dict[str, list[float]] = {}
    model.eval()
    with torch.no_grad(), autocast:
        for batch in batches:
            add(sums, weighted_nll(model, batch)[1])
    model.train()
    return means(sums)


def add(total: dict, more: dict) -> None:
    for view, (value, n) in more.items():
        old = total.get(view, (0.0, 0))
        total[view] = [old[0] + value, old[1] + n]


def means(sums: dict) -> dict[str, float]:
    return {view: value / max(1, n) for view, (value, n) in sorted(sums.items())}


def train(args) -> None:
    tok = load_tokenizer(args.tokenizer if args.command == "base" else args.init)
    source = base_source if args.command == "base" else sft_source
    count, examples_of, digest = source(args, tok, args.data) if args.data else (1, None, "none")
    rows_per_step = args.batch_size * args.grad_accum
    steps = math.ceil(args.epochs * count / rows_per_step) if args.steps is None else args.steps
    # What determines the result; a resumed run must repeat it.
    same = ("command", "lr", "batch_size", "grad_accum", "max_length", "seed", "dtype", "weight_decay", "clip")
    settings = {name: getattr(args, name) for name in same} | {"steps": steps, "data": digest}
    if args.command == "sft":
        settings |= {"no_backtrack": args.no_backtrack, "restart": args.restart}
    progress = read_progress(args, settings)
    if progress["step"] == steps > 0:
        say(f"{args.out}: already trained for all {steps} steps")
        return

    if progress["step"]:
        model = load_model(args.out, args.device)
    elif args.command == "base":
        model = Transformer(ModelConfig.load(args.config)).to(args.device)
        model.init_weights(args.seed)
    else:
        model = load_model(args.init, args.device)
    if model.config.vocab_size < tok.vocab_size:
        raise InputError(f"the tokenizer has {tok.vocab_size} ids but the model only {model.config.vocab_size} rows")
    if model.config.max_position_embeddings < args.max_length:
        raise InputError(f"--max-length {args.max_length} exceeds the model's {model.config.max_position_embeddings}")
    optimizer = make_optimizer(model, args)
    if progress["step"]:
        load_optimizer(optimizer, model, args, progress["step"])
        say(f"{args.out}: resuming after step {progress['step']}")
    elif args.command == "sft" and model.config.reset_token_id is None:
        init_special_rows(model, tok)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rewind_metrics(args, progress["step"])

    held_out = []
    if args.heldout:
        n, held_out_of, _ = source(args, tok, args.heldout)
        examples = [e for index in range(n) for e in held_out_of(0, index)]
        held_out = [
            collate(examples[i : i + args.batch_size], args.max_length, args.device)
            for i in range(0, len(examples), args.batch_size)
        ]
    model.train()
    if args.compile:
        model.model.compile(dynamic=True)
    autocast = contextlib.nullcontext()
    if args.dtype == "bfloat16":
        autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16)
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters; {steps} steps of {rows_per_step} rows are {steps * rows_per_step / count:.1f} epochs")
    if steps == 0:
        save(model, optimizer, tok, args, progress)
        return

    order = row_order(count, args.seed)
    saved_step, first_step, first_tokens, began = progress["step"], progress["step"], progress["tokens"], time.time()
    for step in range(progress["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        micro_batches = []
        for start in range(step * rows_per_step, (step + 1) * rows_per_step, args.batch_size):
            rows = [order(position) for position in range(start, start + args.batch_size)]
            examples = [e for epoch, index in rows for e in examples_of(epoch, index)]
            micro_batches.append(collate(examples, args.max_length, args.device))
            progress["tokens"] += sum(min(len(e.tokens), args.max_length) for e in examples)

        # Divided by the count over all micro-batches, accumulation gives the gradient of the one big batch. A mean of
        # per-micro-batch means would weigh a token by how few others share its micro-batch.
        total_weight = sum(batch.weights.sum() for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            with autocast:
                nll, sums = weighted_nll(model, batch)
            (nll / total_weight).backward()
            loss += (nll.detach() / total_weight).item()
            add(progress["recent"], sums)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = f"{args.out} still holds step {saved_step}" if saved_step else "nothing has been saved yet"
            raise InputError(f"step {step + 1}: loss is {loss}, gradient norm {grad_norm}; {kept}. Try a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress["step"] = step + 1
        last = progress["step"] == steps
        if progress["step"] % args.log_every == 0 or last:
            seconds = time.time() - began
            speed = (progress["tokens"] - first_tokens) / seconds
            left = seconds / (progress["step"] - first_step) * (steps - progress["step"])
            views = means(progress["recent"])
            progress["recent"] = {}
            parts = "  ".join(f"{view} {value:.3f}" for view, value in views.items())
            say(
                f"step {progress['step']:>5}/{steps}  loss {loss:.4f}  ({parts})  lr {lr_now(optimizer):.1e}"
                f"  {speed:,.0f} tokens/s  {left:.0f} s left"
            )
            log_metrics(
                args,
                {"step": progress["step"], "loss": loss, "lr": lr_now(optimizer), "grad_norm": grad_norm}
                | {"tokens": progress["tokens"], "tokens_per_s": round(speed), "seconds": round(seconds, 2)}
                | {f"loss/{view}": value for view, value in views.items()},
            )
        if progress["step"] % args.save_every == 0 or last:
            if held_out:
                losses = evaluate(model, held_out, autocast)
                say("  held out: " + "  ".join(f"{view} {value:.3f}" for view, value in losses.items()))
                log_metrics(args, {"step": progress["step"]} | {f"heldout/{v}": x for v, x in losses.items()})
            save(model, optimizer, tok, args, progress)
            saved_step = progress["step"]
    say(f"saved {args.out}")


def lr_now(optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="pretrain from scratch on plain text")
    base.add_argument("--config", required=True, help="a Hugging Face config.json: the model's shape")
    base.add_argument("--tokenizer", required=True, help="directory with tokenizer.model or tokenizer.json")
    base.set_defaults(lr=1e-3, weight_decay=0.1)
    sft = commands.add_parser("sft", help="supervised fine-tuning, with backtracking unless --no-backtrack")
    sft.add_argument("--init", required=True, help="Hugging Face model directory to start from")
    sft.add_argument("--no-backtrack", action="store_true", help="the baseline: answer view alone, on the same rows")
    sft.add_argument("--restart", choices=("none", "unsafe", "all"), default="none", help="rows with a restart view")
    sft.set_defaults(lr=1e-5, weight_decay=0.0)
    for p in (base, sft):
        p.add_argument("--data", nargs="+", default=[], help=".jsonl or .jsonl.gz files; needed unless --steps 0")
        p.add_argument("--heldout", nargs="+", default=[], help="files for the held-out loss, measured at every save")
        p.add_argument("--out", required=True, help="model directory to write")
        p.add_argument("--lr", type=not_negative(float), default=p.get_default("lr"))
        p.add_argument("--weight-decay", type=not_negative(float), default=p.get_default("weight_decay"))
        p.add_argument("--clip", type=not_negative(float), default=1.0, help="largest gradient norm")
        p.add_argument("--batch-size", type=positive, default=8, help="rows per micro-batch")
        p.add_argument("--grad-accum", type=positive, default=1, help="micro-batches per step")
        length = p.add_mutually_exclusive_group()
        length.add_argument("--epochs", type=not_negative(float), default=1.0)
        length.add_argument(
            "--steps", type=not_negative(int), default=None, help="instead of --epochs; 0 saves the start"
        )
        p.add_argument("--max-length", type=positive, default=1024, help="longest sequence in tokens")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
        p.add_argument("--compile", action="store_true")
        p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
        p.add_argument("--log-every", type=positive, default=10, help="steps")
        p.add_argument("--save-every", type=positive, default=500, help="steps")
    args = parser.parse_args()
    if not args.data and args.steps != 0:
        parser.error("--data is needed; only --steps 0, which saves the start, goes without")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def not_negative(kind: type):
    def number(text: str):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
        return value

    return number


if __name__ == "__main__":
    run(lambda: train(parse_args()))
