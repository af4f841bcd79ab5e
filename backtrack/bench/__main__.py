"""How fast is the sampler, and what does taking words back cost?

    make bench                                      # or: python -m backtrack.bench [--quick] [--out bench.json]

Four questions, each answered in one run on one machine, with random weights and fixed seeds:

- Tokens per second of `generate`, eager and with the decode step compiled (as `sample.py --compile` does it), against
  `transformers`' own, eager, on the same checkpoint, prompts, dtype and thread count, greedy, no stop token. The
  outputs must be equal token by token or the benchmark ends there. All prompts are equally long, so
  transformers needs no padding mask: the case that suits it best.
- Decode steps as a share of what the memory allows. Each step has to read every weight and the keys and values of
  every row once; bytes / (bandwidth measured in this run) is the time that no implementation at this precision can
  beat. Toy weights fit into the processor's cache, so for the toy no share is given.
- Resets: a step in which rows reset over one in which none does, and the first token of a truncated retry over
  reading prompt ⊕ [RESET] afresh.
- GCG: candidates scored per second with the keys and values of the prompt before the suffix cached, over reading every
  candidate from its first token.

Sides alternate (ABAB…) after a warm-up; numbers are medians, ratios are ratios of medians with the range of the
pairs' ratios behind them. Bars are printed with "ok", "below" or "above"; they never change the exit code, as the
machine may be busy. Five minutes on two quiet cores, most of them for the compiler; --quick measures the toy alone and
eager alone in a quarter of a minute.

It measures neither quality, nor training, nor a GPU (bench_gpu.py), nor other servers (vLLM and the like), and tunes
nothing for the machine.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from backtrack.attacks.objective import Objective
from backtrack.attacks.suffix import Scorer, Slots
from backtrack.evaluate.results import cpu_name
from backtrack.generate import (
    Options,
    Record,
    Reset,
    Rows,
    Token,
    feed,
    generate,
    pick,
    read_tokens,
    stream,
    to_host,
)
from model import InputError, KVCache, ModelConfig, Transformer, load_model, save_model
from model.errors import run
from model.files import check_file, write_text

SEED = 0
LLAMA_125M = ModelConfig(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)
# (batch, new tokens, least tokens/s as a multiple of transformers')
TOY_RUNS = ((1, 64, 3.0), (32, 64, 3.0))
RUNS_125M = ((1, 64, 1.4), (8, 64, 1.5))
MOST_A_RESET_STEP_MAY_COST = 1.05
PROMPT_OF_RETRY = 512  # tokens


# ── Arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians of a and b, and the least and greatest ratio of a pair (a[i], b[i])."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(a) / statistics.median(b), min(pairs), max(pairs)


def verdict(value: float, least: float | None = None, most: float | None = None) -> str:
    """Beside a bar: "ok", or on which side of it the value is."""
    if least is not None and value < least:
        return "below"
    return "above" if most is not None and value > most else "ok"


def step_bytes(model: Transformer, batch: int, context: float) -> float:
    """What one decode step must read at least: each matrix once, and `context` keys and values per row."""
    config, weight = model.config, model.model.embed_tokens.weight
    # Of the input embedding a step reads one line per row; tied, the same table is the output matrix and counts.
    table = 0 if config.tie_word_embeddings else weight.nbytes
    weights = sum(p.nbytes for p in model.parameters()) - table
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    return weights + batch * context * entry


def table(rows: list[list[str]]) -> str:
    """Left-aligned columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def alternate(first, second, repeats: int, same=None) -> tuple[list, list, list[float], list[float]]:
    """Call the two in turn: their results and their seconds. `same(x, y)` must hold for every pair of results."""
    results, seconds = ([], []), ([], [])
    for i in range(repeats + 1):
        for side, call in enumerate((first, second)):
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            if i > 0:  # the first round is the warm-up
                results[side].append(result)
                seconds[side].append(elapsed)
            if side == 0:
                earlier = result
        if same is not None and not same(earlier, result):
            raise AssertionError("the two sides disagree about the output; their times cannot be compared")
    return *results, *seconds


def read_bandwidth(mebibytes: int = 512) -> float:
    """Bytes per second that all threads together read from memory: the fastest of several sums over a big tensor."""
    x = torch.ones(mebibytes << 18)  # fp32
    return x.nbytes / min(seconds_of(x.sum) for _ in range(6))


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def random_model(config: ModelConfig, device="cpu", dtype=torch.float32) -> Transformer:
    """Weights N(0, 1 / fan-in): every layer has a say in the next token, and the best logits are well apart.

    With the small weights of a training start, a tied model would only ever repeat its last token.
    """
    with torch.device("meta"):  # shapes only, so that 8B parameters never exist in fp32
        model = Transformer(config).to(dtype)
    model = model.to_empty(device=device).eval()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(SEED)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
        else:
            p.fill_(1.0)
    return model


def random_prompts(config: ModelConfig, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).tolist()


# ── Against transformers ─────────────────────────────────────────────────────────────────────────────────────────────


def load_transformers():
    try:
        import transformers
    except ImportError:
        raise InputError(
            "transformers, the other side of this benchmark, is not installed: pip install -r requirements-dev.txt"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_both(config: ModelConfig, transformers):
    """One random checkpoint on disk, loaded by us and by them."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint"
        save_model(random_model(config), path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None  # neither side may stop early
        return load_model(path), theirs


def compare(name: str, model, theirs, batch: int, new_tokens: int, bar: float, repeats: int, bandwidth: float | None):
    """Tokens per second of both; one row of the result. Raises AssertionError where the tokens differ.

    bandwidth   bytes per second that the memory gives; None: no share of it is reported.
    """
    prompts = random_prompts(model.config, batch, length=16)
    input_ids = torch.tensor(prompts)
    attention_mask = torch.ones_like(input_ids)

    def ours_():
        return generate(model, prompts, reset_id=None, stop_ids=(), max_new_tokens=new_tokens)

    @torch.inference_mode()
    def theirs_():
        return theirs.generate(
            input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )

    def same(generations, output):
        return [g.tokens for g in generations] == output[:, input_ids.shape[1] :].tolist()

    generations, _, ours_s, theirs_s = alternate(ours_, theirs_, repeats, same)
    speedup, low, high = ratio(theirs_s, ours_s)
    row = {
        "name": f"{name}, batch {batch}",
        "tokens_per_s": batch * new_tokens / statistics.median(ours_s),
        "transformers_tokens_per_s": batch * new_tokens / statistics.median(theirs_s),
        "ratio": speedup,
        "range": [low, high],
        "least": bar,
        "verdict": verdict(speedup, least=bar),
    }
    if bandwidth is not None:
        context = len(prompts[0]) + new_tokens / 2
        limit = step_bytes(model, batch, context) / bandwidth  # seconds per step
        row["bandwidth_share"] = limit / statistics.median(step_seconds(g) for g in generations)
    return row


def step_seconds(generations) -> float:
    """Of the decode steps alone, without reading the prompt."""
    g = generations[0]
    return (g.total_s - g.first_token_s) / (g.steps - 1)


# ── Resets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def reset_step(name: str, model, batch: int, steps: int, reset_id: int = 3) -> dict:
    """A step in which every fourth row resets, over the same step without resets; the two alternate step by step.

    Both look at equally many cache entries (`visible` is pinned; in `generate` a reset makes rows shorter and later
    steps cheaper). A row resets because its [RESET] logit is set to a large number; the plain side sets it, too, to a
    small one.
    """
    prompts = random_prompts(model.config, batch, length=16)
    capacity = len(prompts[0]) + 2 * steps
    options = Options(reset_id=reset_id, stop_ids=[], max_new_tokens=steps + 9, max_resets=steps)
    forced = torch.full((steps, batch), -1e9)
    forced[(torch.arange(steps)[:, None] + torch.arange(batch)) % 4 == 0] = 1e9
    plain = torch.full((steps, batch), -1e9)

    class Side:
        def __init__(self, script):
            self.script, self.seconds, self.resets = script, [], 0
            self.cache = KVCache(model.config, batch, capacity)
            self.logits = model(torch.tensor(prompts), self.cache)[:, -1]  # (B, V)
            self.records = [Record(i, prompts[i], [], entries=len(prompts[i])) for i in range(batch)]
            self.rows = Rows(torch.full((batch,), len(prompts[0])), torch.zeros(batch, dtype=torch.int64))

        def step(self, i):
            self.logits[:, reset_id] = self.script[i]
            start = time.perf_counter()
            token, best = pick(self.logits, self.rows, None, options)
            for event in read_tokens(*to_host(token, best), self.records, options, start):
                self.resets += isinstance(event, Reset)
            self.logits = feed(model, token, self.rows, self.cache, options)
            self.seconds.append(time.perf_counter() - start)

    with torch.inference_mode():
        sides = Side(forced), Side(plain)
        for i in range(steps):
            for side in sides if i % 2 else sides[::-1]:  # neither is always the one with the colder cache
                side.step(i)
    resetting, still = sides
    assert resetting.resets == (forced > 0).sum() and still.resets == 0
    value, *_ = ratio(resetting.seconds[4:], still.seconds[4:])  # the first few warm up
    return {
        "name": f"{name}, batch {batch}: step with resets / without",
        "ratio": value,
        "most": MOST_A_RESET_STEP_MAY_COST,
        "verdict": verdict(value, most=MOST_A_RESET_STEP_MAY_COST),
    }


def retry(name: str, model, prompt_length: int, repeats: int, reset_id: int = 3) -> dict:
    """Seconds from a reset to the first token of the retry, over those of reading x ⊕ [RESET] without the cache."""
    [prompt] = random_prompts(model.config, 1, prompt_length)
    options = dict(reset_id=reset_id, stop_ids=(), max_new_tokens=1)
    discarded = [id for id in range(40) if id != reset_id]
    times = []

    def cached():
        for event in stream(model, [prompt], prefill=[discarded], reset_bias=1e9, **options):
            if isinstance(event, Reset):
                start = time.perf_counter()
            elif isinstance(event, Token):
                end, token = time.perf_counter(), event.id
        times.append(end - start)
        return token

    def fresh():
        return generate(model, [prompt + [reset_id]], max_resets=0, **options)[0].tokens[0]

    _, _, _, fresh_s = alternate(cached, fresh, repeats, same=int.__eq__)
    cached_s = times[1:]  # without the warm-up
    value, low, high = ratio(cached_s, fresh_s)
    return {
        "name": f"{name}, prompt of {prompt_length}: first token of a retry / of a fresh run",
        "retry_s": statistics.median(cached_s),
        "fresh_s": statistics.median(fresh_s),
        "ratio": value,
        "range": [low, high],
    }


def scoring(name: str, model, prompt_length: int, candidates: int, repeats: int) -> dict:
    """Candidate suffixes scored per second: 20 tokens of suffix and 24 of target behind a prompt, cached or not."""
    before, target, *suffixes = (
        torch.randint(4, model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, n in enumerate([prompt_length, 24] + [20] * candidates)
    )
    objective = Objective()
    cached = Scorer(model, Slots(before, suffixes[0], [], target), rows=candidates)
    plain = Scorer(model, Slots(before[:1], before[1:] + suffixes[0], [], target), rows=candidates)

    def with_cache():
        return cached.losses(suffixes, len(target), objective)

    def without():
        return plain.losses([before[1:] + s for s in suffixes], len(target), objective)

    def same(a, b):
        return torch.allclose(a, b, atol=1e-3)

    _, _, cached_s, plain_s = alternate(with_cache, without, repeats, same=same)
    value, low, high = ratio(plain_s, cached_s)
    return {
        "name": f"{name}, prompt of {prompt_length}: GCG candidates per second, cached prompt / none",
        "candidates_per_s": candidates / statistics.median(cached_s),
        "ratio": value,
        "range": [low, high],
    }


# ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def speed_table(rows: list[dict]) -> str:
    lines = [["", "backtrack", "transformers", "ratio (range)", "bar", "", "of the bandwidth limit"]]
    for r in rows:
        share = f"{r['bandwidth_share']:.0%}" if "bandwidth_share" in r else "— (weights sit in the processor's cache)"
        low, high = r["range"]
        lines.append(
            [
                r["name"],
                f"{r['tokens_per_s']:.0f} tokens/s",
                f"{r['transformers_tokens_per_s']:.0f} tokens/s",
                f"{r['ratio']:.2f} ({low:.2f}–{high:.2f})",
                f"≥ {r['least']:g}",
                r["verdict"],
                share,
            ]
        )
    return table(lines)


def reset_table(rows: list[dict]) -> str:
    lines = [["", "ratio (range)", "bar", ""]]
    for r in rows:
        spread = " ({:.3f}–{:.3f})".format(*r["range"]) if "range" in r else ""
        bar = f"≤ {r['most']:g}" if "most" in r else ""
        lines.append([r["name"], f"{r['ratio']:.3f}{spread}", bar, r.get("verdict", "")])
    return table(lines)


def machine(transformers) -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the toy only, eager only, fewer repeats")
    parser.add_argument("--out", help="write the results to this file as JSON")
    args = parser.parse_args(argv)
    if args.out:
        check_file(args.out)
    transformers = load_transformers()
    report = {"machine": machine(transformers), "speed": [], "resets": [], "scoring": []}
    print(", ".join(f"{k} {v}" for k, v in report["machine"].items() if v is not None), flush=True)
    report["read_bytes_per_s"] = bandwidth = read_bandwidth()
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read\n", flush=True)

    repeats = 3 if args.quick else 5
    compiler = not args.quick and any(map(shutil.which, ("g++", "clang++")))
    if not args.quick and not compiler:
        print("no C++ compiler found: compiled decode steps are left out\n", flush=True)
    toy = ModelConfig.load(Path(__file__).parent.parent / "data" / "toy.json")
    for name, config, runs, in_cache in (("toy", toy, TOY_RUNS, True), ("125M", LLAMA_125M, RUNS_125M, False)):
        if args.quick and config is LLAMA_125M:
            continue
        model, theirs = load_both(config, transformers)
        for batch, new_tokens, bar in runs:
            limit = None if in_cache else bandwidth
            report["speed"].append(compare(name, model, theirs, batch, new_tokens, bar, repeats, limit))
            if compiler:
                torch.compiler.reset()  # or the second batch size would get kernels that take any
                compiled = random_model(config)  # the same weights once more
                compiled.compile()
                row = compare(f"{name}, compiled", compiled, theirs, batch, new_tokens, bar, repeats, limit)
                report["speed"].append(row)
                del compiled
        del theirs
        gc.collect()
        report["resets"].append(reset_step(name, model, batch=runs[-1][0], steps=120 if in_cache else 32))
        for prompt_length in (32, 256):
            report["scoring"].append(scoring(name, model, prompt_length, 64 if in_cache else 8, repeats))
        if not in_cache:
            report["resets"].append(retry(name, model, PROMPT_OF_RETRY, repeats=repeats))
    print(speed_table(report["speed"]), end="\n\n", flush=True)
    print(reset_table(report["resets"]), end="\n\n", flush=True)
    print(reset_table(report["scoring"]), flush=True)

    if args.out:
        write_text(json.dumps(report, indent=2) + "\n", args.out)


if __name__ == "__main__":
    run(main)
