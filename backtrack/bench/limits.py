"""How far from what the machine allows are training and decoding?

    python -m backtrack.bench.limits [--model DIR] [--out limits.json]

Each line names a limit, measured in turns with the thing itself (limit, step, limit, step, …):

- *products*: the FLOPs that the rows need, at the speed of a bare matrix product of the model's width.
- *bandwidth*: every decode step has to read all weights once, and the keys and values of every batch row. With many
  batch rows the products may take longer than that; the limit is the larger of the two.
- *a step's own products*: how much of a step they take, each weight times as many tokens as the step has, in training
  with those of the backward pass, and with nothing between them. No eager step can be faster, and few rows are far from
  the speed of 1,024.

Training is SFT and DPO on row trees as long as those of HH-RLHF, of random ids, in bf16 by autocast; a step is two
micro-batches, clipping and AdamW. Without --model it is a Llama of 125M random parameters. Shares are medians over the
rounds, with the range behind. A busy machine makes them jump.
"""

import argparse
import random
import statistics
from types import SimpleNamespace

import torch

from backtrack.bench import __main__ as bench
from backtrack.evaluate.results import made_by, write_result
from backtrack.examples import dpo_pairs, draw_prefix, sft_views
from backtrack.generate import generate
from backtrack.rows import Row
from backtrack.run.parallel import micro_batches
from backtrack.trees import Tree, make_batch, pair_tree, view_tree
from model import ModelConfig, Transformer, load_model
from model.errors import positive, run
from model.files import check_file
from model.linear import Linear
from train import CLIP, logprobs, make_optimizer, sft_loss

TOKENS = SimpleNamespace(reset_id=3, eos_id=2)  # what examples.py asks of a tokenizer
ROWS = 4  # of a micro-batch in training
BATCHES, CONTEXT, NEW_TOKENS = (1, 8, 32, 64), 16, 24  # batch rows in decoding, tokens before and after


def random_tree(kind: str, config: ModelConfig, index: int) -> Tree:
    """The tree of a row of random ids; its lengths are spread like those of HH-RLHF under a limit of 512."""
    ids = random.Random(index)
    lengths = (ids.randint(40, 180), ids.randint(20, 90), ids.randint(20, 90))
    row = Row(*(ids.choices(range(4, config.vocab_size), k=n) for n in lengths), unsafe=True)
    k, j = (draw_prefix(seed, 0, index, len(y)) for seed, y in enumerate((row.rejected, row.chosen)))
    if kind == "sft":
        return view_tree(sft_views(row, k, TOKENS), 512)
    return pair_tree(dpo_pairs(row, k, j, TOKENS), {"elicit": 1.0, "discourage": 1.0}, 512)


def weights_per_token(model: Transformer) -> int:
    """How many weights each token is multiplied with, without the head."""
    return sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)


def training_flops(model: Transformer, tree: Tree) -> float:
    """Of a forward and a backward pass: 6 for each weight and token, 12 for each pair of nodes and number of a head."""
    config = model.config
    head = len(set(tree.target_node)) * config.vocab_size * config.hidden_size
    pairs = sum(depth + 1 for depth in tree.depths)
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * (len(tree) * weights_per_token(model) + head) + 12 * pairs * width


def product_speed(config: ModelConfig, dtype: torch.dtype) -> float:
    """FLOPs per second of a bare product of 1,024 tokens with a matrix of the MLP: the fastest of several."""
    x = torch.randn(1024, config.hidden_size).to(dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    return 2 * len(x) * weight.numel() / min(bench.timed(lambda: x @ weight.mT)[1] for _ in range(20))


def training_step(model: Transformer, optimizer, trees: list[Tree]) -> None:
    divisor = sum(tree.divisor for tree in trees)
    for few in micro_batches(trees, ROWS):
        batch = make_batch(few)
        with torch.autocast("cpu", torch.bfloat16):
            values = logprobs(model, batch)
        (sft_loss(values, batch.weight) / divisor).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def training(kind: str, model: Transformer, repeats: int) -> dict:
    """One record: tokens per second, and the share of the products' speed."""
    optimizer, shares, speeds, own = make_optimizer(model, 1e-6, 0.0), [], [], []
    for step in range(repeats + 1):
        trees = [random_tree(kind, model.config, 2 * ROWS * step + i) for i in range(2 * ROWS)]
        peak, alone = product_speed(model.config, torch.bfloat16), training_products(model, trees)
        _, seconds = bench.timed(lambda trees=trees: training_step(model, optimizer, trees))
        if step > 0:  # the first warms up
            shares.append(sum(training_flops(model, tree) for tree in trees) / peak / seconds)
            speeds.append(sum(map(len, trees)) / seconds)
            own.append(alone / seconds)
    return record(f"{kind}, 2 × {ROWS} rows a step, bfloat16", speeds, shares, "products", peak / 1e9, own)


@torch.no_grad()
def training_products(model: Transformer, trees: list[Tree]) -> float:
    """Seconds of the products of a step with weights, forward and backward in bf16, and of nothing else."""
    seconds = 0.0
    for few in micro_batches(trees, ROWS):
        batch = make_batch(few)
        for m in linears(model):
            tokens = len(batch.predicting) if m is model.lm_head else batch.tokens.numel()
            x, grad = (torch.randn(tokens, n, dtype=torch.bfloat16) for n in (m.in_features, m.out_features))
            weight = m.weight.bfloat16()
            for a, b in ((x, weight.mT), (grad, weight), (grad.mT, x)):
                seconds += bench.timed(lambda a=a, b=b: a @ b)[1]
    return seconds


def linears(model: Transformer) -> list[Linear]:
    return [m for m in model.modules() if isinstance(m, Linear)]


@torch.no_grad()
def own_products(model: Transformer, batch: int) -> float:
    """Seconds of the matrix products of a decode step, and of nothing else: the median of eight passes."""
    weights = linears(model)
    x = {m.in_features: torch.randn(batch, m.in_features).to(model.dtype) for m in weights}

    def all_of_them() -> None:
        for m in weights:
            m(x[m.in_features])

    return statistics.median(bench.timed(all_of_them)[1] for _ in range(8))


@torch.no_grad()
def decoding(model: Transformer, batch: int, repeats: int) -> dict:
    """One record: tokens per second, and the share of the bandwidth's or the products' speed, whichever binds."""
    prompts, shares, speeds, own = bench.random_prompts(model.config, batch, CONTEXT), [], [], []
    flops = 2 * batch * (weights_per_token(model) + model.lm_head.weight.numel())
    for step in range(repeats + 1):
        read, peak = bench.read_bandwidth(), product_speed(model.config, model.dtype)
        alone = own_products(model, batch)
        answers = generate(model, prompts, reset_id=None, stop_ids=(), max_new_tokens=NEW_TOKENS)
        by = {"bandwidth": bench.step_bytes(model, batch, CONTEXT + NEW_TOKENS / 2) / read, "products": flops / peak}
        binds, seconds = max(by, key=by.get), bench.step_seconds(answers)
        if step > 0:
            shares.append(by[binds] / seconds)
            speeds.append(batch / seconds)
            own.append(alone / seconds)
    name, of = f"decoding, {batch} batch rows, {str(model.dtype)[6:]}", (read if binds == "bandwidth" else peak) / 1e9
    return record(name, speeds, shares, binds, of, own)


def record(name: str, speeds: list[float], shares: list[float], limit: str, of: float, own: list[float] = ()) -> dict:
    """own: the share of each round that is the step's own products."""
    middle = {"tokens_per_s": statistics.median(speeds), "share": statistics.median(shares)}
    found = {"name": name, **middle, "range": [min(shares), max(shares)], "limit": limit, "of": of}
    return found | {"own_products": statistics.median(own)} if own else found


def said(r: dict) -> dict:
    spread = "({:.0%}–{:.0%})".format(*r["range"])
    unit = {"bandwidth": "GB/s", "products": "GFLOP/s", "decoding": "tokens/s"}[r["limit"]]
    limit = f"{r['limit']} ({r['of']:,.0f} {unit})"
    own = f"; {r['own_products']:.0%} of a step is its own products" if "own_products" in r else ""
    print(f"{r['name']}: {r['tokens_per_s']:,.0f} tokens/s, {r['share']:.0%} {spread} of {limit}{own}", flush=True)
    return r


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face model directory; no tokenizer is needed")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds")
    parser.add_argument("--out", help="write the results to this file as JSON")
    args = parser.parse_args()
    if args.out:
        check_file(args.out)
    model = load_model(args.model) if args.model else bench.random_model(bench.LLAMA_125M)
    print(f"{args.model or 'a Llama of 125M parameters'}; {made_by()['machine']}", flush=True)
    found = [said(training(kind, model.train(), args.repeats)) for kind in ("sft", "dpo")]
    for dtype in (torch.float32, torch.bfloat16):
        found += [said(decoding(model.to(dtype).eval(), batch, args.repeats)) for batch in BATCHES]
    if args.out:
        write_result(args.out, limits=found)


if __name__ == "__main__":
    run(main)
