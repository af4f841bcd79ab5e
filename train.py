"""Train a model that can take its words back: pretrain a small base, fine-tune a Hugging Face checkpoint, prefer.

    python train.py base --config data/toy.json --tokenizer DIR --data corpus.jsonl --out runs/base --steps 2000
    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/sft            # backtracking
    python train.py sft --init runs/base --data rows.jsonl replay.jsonl --out runs/plain --no-backtrack  # the baseline

    python train.py dpo --init runs/sft --data rows.jsonl --out runs/dpo

`sft` is the paper's supervised objective (arXiv 2409.14586, section 3.1), `dpo` its preference optimisation (section
3.2), both on rows in TRL's preference format; which sequences they see and where loss falls is decided in
backtrack/examples.py. Everything else is in this file, top to bottom: losses, data order, save and resume, the loop.
The model directory written to --out loads in transformers.

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

from backtrack.examples import Example, Pair, dpo_pairs, draw_prefix, load_rows, read_rows, sft_views
from model import InputError, ModelConfig, Transformer, load_model, load_tokenizer
from model.checkpoint import atomic_directory, weights_digest, write_model, write_tensors
from model.errors import device, positive, run

STATE = "training_state.safetensors"
DPO_STATS = ("accuracy", "margin", "chosen", "rejected", "reset_after_unsafe", "reset_after_safe")
# How much a token of each view counts. Rows appear once per view, so without weights unsafe rows would count double.
VIEW_WEIGHT = {"text": 1.0, "answer": 0.5, "backtrack": 0.5, "restart": 0.25}


# ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor  # (B, T) int64, padded on the right
    weights: torch.Tensor  # (B, T) fp32: what the loss of each token counts; 0 on prompt, prefix and padding
    views: list[str]  # (B) names
    length: int  # tokens without padding


def collate(examples: list[Example], max_length: int, device) -> Batch:
    """Pad examples to a rectangle. Tokens beyond max_length are cut off (load_rows has counted and reported them)."""
    width = min(max_length, max(len(e.tokens) for e in examples))
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    weights = torch.zeros(len(examples), width)
    for i, e in enumerate(examples):
        n = min(len(e.tokens), width)
        tokens[i, :n] = torch.tensor(e.tokens[:n])
        weights[i, e.loss_from : n] = VIEW_WEIGHT[e.view]
    length = sum(min(len(e.tokens), width) for e in examples)
    return Batch(tokens.to(device), weights.to(device), [e.view for e in examples], length)


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


# ── DPO ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass
class PairBatch:
    """P pairs as 2P rows, all the chosen before all the rejected, so that one forward serves both."""

    tokens: torch.Tensor  # (2P, T) int64
    is_target: torch.Tensor  # (2P, T) bool: the answer, shared prefix included
    has_nll: torch.Tensor  # (2P, T) bool: where the NLL term falls; chosen rows only
    weights: torch.Tensor  # (P,) fp32
    reference: torch.Tensor  # (2P,) fp32, log π_ref
    kinds: list[str]  # (P) names
    length: int  # tokens without padding
    reset_id: int


def collate_pairs(pairs: list[Pair], reference: torch.Tensor, args, reset_id: int) -> PairBatch:
    """reference (2P,): log π_ref of every chosen, then of every rejected answer."""
    rows = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
    width = min(args.max_length, max(map(len, rows)))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    is_target, has_nll = torch.zeros(2, len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        pair, n = pairs[i % len(pairs)], min(len(row), width)
        tokens[i, :n] = torch.tensor(row[:n])
        is_target[i, len(pair.prompt) : n] = True
        if i < len(pairs):
            has_nll[i, len(pair.prompt) + pair.nll_from : n] = True
    weight = {"elicit": args.elicit, "discourage": args.discourage, "restart": args.restart_weight}
    weight["baseline"] = 1.0
    weights = torch.tensor([weight[p.kind] for p in pairs])
    tensors = [t.to(args.device) for t in (tokens, is_target, has_nll, weights, reference)]
    return PairBatch(*tensors, [p.kind for p in pairs], sum(min(len(row), width) for row in rows), reset_id)


def sequence_logprobs(model: Transformer, tokens, is_target) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π of each row's targets, summed (B,); the same token by token, 0 elsewhere (B, T-1)), fp32."""
    each = torch.zeros(is_target[:, 1:].shape, device=tokens.device)
    each = each.masked_scatter(is_target[:, 1:], target_logprobs(model, tokens, is_target))
    return each.sum(dim=1), each


def dpo_loss(model: Transformer, batch: PairBatch, beta: float, nll_weight: float):
    """Σ weight · loss of each pair, not yet divided; and sums to report: per kind the loss, over all pairs the rest.

        loss = −log σ( β [ (log π(c|x) − log π_ref(c|x)) − (log π(r|x) − log π_ref(r|x)) ] )         arXiv 2305.18290

    plus nll_weight times −log π of what the chosen answer says from [RESET] on (all of it, where there is none): it
    keeps the chosen answer likely in itself and not only against the rejected one. Summed over tokens like the rest: a
    mean would give each token of a short refusal more weight than each of a long answer, and teach to refuse.
    """
    P = len(batch.kinds)
    logprobs, each = sequence_logprobs(model, batch.tokens, batch.is_target)  # (2P,), (2P, T-1)
    ratio = logprobs - batch.reference
    chosen, rejected = ratio[:P], ratio[P:]
    margin = beta * (chosen - rejected)
    losses = -F.logsigmoid(margin)  # (P,)
    if nll_weight:
        mask = batch.has_nll[:P, 1:]
        losses = losses - nll_weight * (each[:P] * mask).sum(dim=1)

    sums: dict[str, list[float]] = {}
    for kind, value in zip(batch.kinds, losses.tolist(), strict=True):
        add(sums, {kind: (value, 1)})
    for name, values in (("accuracy", margin > 0), ("margin", margin), ("chosen", chosen), ("rejected", rejected)):
        add(sums, {name: (values.sum().item(), P)})
    # How likely is [RESET] where a pair has one? After an unsafe prefix it should be, after a safe one it should not.
    is_reset = (batch.tokens[:, 1:] == batch.reset_id) & batch.is_target[:, 1:]  # (2P, T-1)
    for name, half in (("reset_after_unsafe", slice(P)), ("reset_after_safe", slice(P, None))):
        found = is_reset[half].sum().item()
        if found:
            add(sums, {name: (each[half][is_reset[half]].exp().sum().item(), found)})
    return (losses * batch.weights).sum(), sums


def reference_logprobs(model, groups: list[list[Pair]], weights: str, args, reset_id: int) -> list[torch.Tensor]:
    """log π_ref of every chosen and then every rejected answer, (2P,) for each micro-batch of the run, by the model as
    it is before the first step.

    Kept on disk under a hash of everything it depends on, weights included: a run that goes on after a kill, or is
    tried again with another β, does not compute it anew, and one with other data never finds it.
    """
    if not groups:  # --steps 0
        return []
    sha = hashlib.sha256(weights.encode())
    for group in groups:
        sha.update(repr([(p.prompt, p.chosen, p.rejected) for p in group]).encode())
    sha.update(f"{args.max_length} {args.dtype} {args.device} {torch.__version__}".encode())
    file = Path(f"{args.out}.reference") / f"{sha.hexdigest()[:16]}.safetensors"
    sizes = [2 * len(group) for group in groups]
    if file.is_file():
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as f:
            say(f"reference log-probs: read from {file}")
            return list(f.get_tensor("logprobs").split(sizes))
    out, began = [], time.time()
    for n, group in enumerate(groups, start=1):
        batch = collate_pairs(group, torch.zeros(2 * len(group)), args, reset_id)
        with torch.no_grad(), autocast(args):
            out.append(sequence_logprobs(model, batch.tokens, batch.is_target)[0].cpu())
        if n % 50 == 0:
            left = (time.time() - began) / n * (len(groups) - n)
            say(f"reference log-probs: {n} of {len(groups)} batches, {left:.0f} s left")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    write_tensors({"logprobs": torch.cat(out)}, temporary)
    temporary.replace(file)
    return out


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
    if args.no_backtrack:  # then there is the answer view alone
        long = sum(len(r.prompt) + len(r.chosen) + 1 > args.max_length for r in rows)
    if long:
        say(f"{long} of {len(rows)} rows have a view longer than --max-length {args.max_length}: they are cut there")
    unsafe = sum(r.unsafe for r in rows)
    say(f"{', '.join(paths)}: {len(rows)} rows, {unsafe} with an unsafe rejected answer")
    if not args.no_backtrack and not unsafe and paths == args.data:  # held-out rows may do without
        raise InputError(f'{paths[0]}: no row says "unsafe": true, nothing to backtrack from; or --no-backtrack')

    def examples(epoch: int, index: int) -> list[Example]:
        row, k = rows[index], 0
        if row.unsafe:  # leave room for [RESET] and at least one token of the answer
            longest = min(len(row.rejected), args.max_length - len(row.prompt) - 2)
            k = draw_prefix(args.seed, epoch, index, longest, args.prefix)
        return sft_views(row, k, tok, backtrack=not args.no_backtrack, restart=args.restart)

    return len(rows), examples, _digest([(r.prompt, r.chosen, r.rejected, r.unsafe) for r in rows])


def dpo_source(args, tok, paths: list[str]):
    """Rows of preferences. Returns (number of rows, (epoch, index) -> pairs of that row, digest)."""
    rows, _ = load_rows(paths, tok, args.max_length)
    every = len(rows)
    rows = [row for row in rows if row.rejected is not None]
    # Unlike in supervised training, safe rows too join both answers.
    long = sum(len(r.prompt) + len(r.chosen) + len(r.rejected) + 2 > args.max_length for r in rows)
    if long:
        say(f"{long} of {len(rows)} rows are longer than --max-length {args.max_length}: their answers are cut there")
    say(f"{', '.join(paths)}: {len(rows)} pairs, {sum(r.unsafe for r in rows)} with an unsafe rejected answer")
    if len(rows) < every:
        say(f"{every - len(rows)} rows without a rejected answer are left out")
    if not rows:
        raise InputError(f"{paths[0]}: no row has a 'rejected' answer, nothing to prefer")

    def pairs(epoch: int, index: int) -> list[Pair]:
        row = rows[index]
        room = args.max_length - len(row.prompt) - 2
        k_rejected = draw_prefix(args.seed, epoch, index, min(len(row.rejected), room), args.prefix)
        k_chosen = draw_prefix(args.seed + 1, epoch, index, min(len(row.chosen), room), args.prefix)
        return dpo_pairs(row, k_rejected, k_chosen, tok, backtrack=not args.no_backtrack, restart=args.restart)

    return len(rows), pairs, _digest([(r.prompt, r.chosen, r.rejected, r.unsafe) for r in rows])


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


def autocast(args):
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def evaluate(model, batches: list, loss_of, args) -> dict[str, float]:
    """On held-out rows: the mean −log π per target token of each view, or what dpo_loss reports."""
    sums: dict[str, list[float]] = {}
    model.eval()
    with torch.no_grad(), autocast(args):
        for batch in batches:
            add(sums, loss_of(model, batch)[1])
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
    dpo = args.command == "dpo"
    source = {"base": base_source, "sft": sft_source, "dpo": dpo_source}[args.command]
    count, examples_of, digest = source(args, tok, args.data) if args.data else (1, None, "none")
    rows_per_step = args.batch_size * args.grad_accum
    steps = math.ceil(args.epochs * count / rows_per_step) if args.steps is None else args.steps
    # What determines the result; a resumed run must repeat it.
    same = ("command", "lr", "batch_size", "grad_accum", "max_length", "seed", "dtype", "weight_decay", "clip")
    settings = {name: getattr(args, name) for name in same} | {"steps": steps, "data": digest}
    if args.command != "base":
        settings |= {"no_backtrack": args.no_backtrack, "restart": args.restart, "prefix": args.prefix}
    if dpo:
        settings |= {name: getattr(args, name) for name in ("beta", "nll", "elicit", "discourage", "restart_weight")}
        settings["init"] = weights_digest(args.init)  # the reference, also of a resumed run
    progress = read_progress(args, settings)
    if progress["step"] == steps > 0:
        say(f"{args.out}: already trained for all {steps} steps")
        return

    if progress["step"] and not dpo:
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
    order = row_order(count, args.seed)

    def micro_batch(start: int) -> list:
        """What the rows at positions start … of the run's order are trained on."""
        rows = [order(position) for position in range(start, start + args.batch_size)]
        return [e for epoch, index in rows for e in examples_of(epoch, index)]

    held_out = []
    if args.heldout:
        n, held_out_of, _ = source(args, tok, args.heldout)
        examples = [e for index in range(n) for e in held_out_of(0, index)]
        held_out = [examples[i : i + args.batch_size] for i in range(0, len(examples), args.batch_size)]
    if dpo:  # the model is the reference now; its log-probs for all the run will draw, so that training holds one model
        starts = range(0, steps * rows_per_step, args.batch_size)
        reference = reference_logprobs(
            model, [*map(micro_batch, starts), *held_out], settings["init"], args, tok.reset_id
        )
        if progress["step"]:
            model = load_model(args.out, args.device)

        def batch_of(examples, n):
            return collate_pairs(examples, reference[n], args, tok.reset_id)

        def loss_of(model, batch):
            return dpo_loss(model, batch, args.beta, args.nll)
    else:
        loss_of = weighted_nll

        def batch_of(examples, n):
            return collate(examples, args.max_length, args.device)

    held_out = [batch_of(examples, n - len(held_out)) for n, examples in enumerate(held_out)]
    optimizer = make_optimizer(model, args)
    if progress["step"]:
        load_optimizer(optimizer, model, args, progress["step"])
        say(f"{args.out}: resuming after step {progress['step']}")
    elif args.command == "sft" and model.config.reset_token_id is None:
        init_special_rows(model, tok)
    elif dpo:
        model.config = dataclasses.replace(model.config, reset_token_id=tok.reset_id)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rewind_metrics(args, progress["step"])

    model.train()
    if args.compile:
        model.model.compile(dynamic=True)
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters; {steps} steps of {rows_per_step} rows are {steps * rows_per_step / count:.1f} epochs")
    if steps == 0:
        save(model, optimizer, tok, args, progress)
        return

    saved_step, first_step, first_tokens, began = progress["step"], progress["step"], progress["tokens"], time.time()
    for step in range(progress["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        first = step * args.grad_accum
        micro_batches = [batch_of(micro_batch(n * args.batch_size), n) for n in range(first, first + args.grad_accum)]
        progress["tokens"] += sum(batch.length for batch in micro_batches)

        # Divided by the count over all micro-batches, accumulation gives the gradient of the one big batch. A mean of
        # per-micro-batch means would weigh a token by how few others share its micro-batch.
        # It is 0 where no pair counts: --discourage 0 and no unsafe row in the step.
        total_weight = sum(batch.weights.sum() for batch in micro_batches).clamp(min=1e-9)
        loss = 0.0
        for batch in micro_batches:
            with autocast(args):
                batch_loss, sums = loss_of(model, batch)
            (batch_loss / total_weight).backward()
            loss += (batch_loss.detach() / total_weight).item()
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
                | {name if name in DPO_STATS else f"loss/{name}": value for name, value in views.items()},
            )
        if progress["step"] % args.save_every == 0 or last:
            if held_out:
                losses = evaluate(model, held_out, loss_of, args)
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
    dpo = commands.add_parser("dpo", help="preference optimisation, with backtracking unless --no-backtrack")
    dpo.add_argument("--init", required=True, help="the SFT checkpoint: start and reference")
    dpo.add_argument("--no-backtrack", action="store_true", help="the baseline: chosen over rejected")
    dpo.add_argument("--restart", choices=("none", "unsafe", "all"), default="none", help="rows with a restart pair")
    dpo.add_argument("--beta", type=not_negative(float), default=0.1, help="how dear it is to leave the reference")
    dpo.add_argument("--nll", type=not_negative(float), default=0.0, help="weight of −log π(chosen)")
    dpo.add_argument("--elicit", type=not_negative(float), default=1.0, help="weight of the pairs that want [RESET]")
    dpo.add_argument("--discourage", type=not_negative(float), default=1.0, help="of those that want none")
    dpo.add_argument("--restart-weight", type=not_negative(float), default=1.0, help="of those after a [RESET]")
    dpo.set_defaults(lr=5e-7, weight_decay=0.0)
    for p in (sft, dpo):
        p.add_argument(
            "--prefix",
            nargs=2,
            type=not_negative(float),
            default=[0.0, 1.0],
            metavar=("LOW", "HIGH"),
            help="draw the length of prefixes from this part of the answer; the paper: all of it",
        )
    for p in (base, sft, dpo):
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
    if args.command != "base" and not args.prefix[0] <= args.prefix[1] <= 1:
        parser.error(f"--prefix {args.prefix[0]} {args.prefix[1]}: needs 0 ≤ LOW ≤ HIGH ≤ 1")
    if not args.data and args.steps != 0:
        parser.error("--data is needed; only --steps 0, which saves the start, goes without")
    return args


def not_negative(kind: type):
    def number(text: str):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
        return value

    return number


if __name__ == "__main__":
    run(lambda: train(parse_args()))
