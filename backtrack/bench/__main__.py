"""How fast is the sampler, and what does taking words back cost?

    make bench                                      # or: python -m backtrack.bench [--out bench.json]

Random weights, fixed seeds, one run on one machine:

- Tokens per second of `generate`, eager and compiled (as `sample.py --compile` does it), against `transformers`' own,
  eager: same checkpoint, prompts, dtype and threads, greedy. The two must give the same tokens, or the benchmark ends.
  All prompts are equally long, so that transformers needs no padding mask, which suits it best.
- Decode steps as a share of what the memory allows. Each step has to read every weight and the keys and values of
  every row once; no implementation can do that faster than the bandwidth measured in this run. The toy's weights fit
  into the processor's cache, so it has no share.
- Resets: the first token of a retry, whose prompt is in the cache, over reading prompt ⊕ [RESET] afresh.

The two sides alternate (ABAB…) after a warm-up. Numbers are medians; a ratio is of medians, with the range of the
pairs' ratios behind it. Five minutes on two quiet cores, most of them for the compiler. Training:
backtrack.bench.training. A GPU: backtrack.bench.gpu.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from backtrack.evaluate.results import write_result
from backtrack.generate import Reset, Token, generate, stream
from model import InputError, ModelConfig, Transformer, load_model, save_model
from model.errors import run
from model.files import check_file

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
NEW_TOKENS, REPEATS = 64, 5


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians of a and b, and the least and greatest ratio of a pair (a[i], b[i])."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(a) / statistics.median(b), min(pairs), max(pairs)


def step_bytes(model: Transformer, batch: int, context: float) -> float:
    """What one decode step must read at least: each matrix once, and `context` keys and values per row."""
    config, weight = model.config, model.model.embed_tokens.weight
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_word_embeddings:  # tied, the table is the output matrix as well
        weights -= weight.nbytes
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    return weights + batch * context * entry


def alternate(first, second, repeats: int, same) -> tuple[list, list[float], list[float]]:
    """Call the two in turn: the results of the first, and the seconds of both. `same` must hold for every pair."""
    rounds = []
    for _ in range(repeats + 1):
        (mine, mine_s), (other, other_s) = timed(first), timed(second)
        if not same(mine, other):
            raise AssertionError("the two sides disagree about the output; their times cannot be compared")
        rounds.append((mine, mine_s, other_s))
    return tuple(map(list, zip(*rounds[1:], strict=True)))  # the first round is the warm-up


def timed(call) -> tuple:
    """(result, seconds)"""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def read_bandwidth(mebibytes: int = 512) -> float:
    """Bytes per second that all threads together read from memory: the fastest of several sums over a big tensor."""
    x = torch.ones(mebibytes << 18)  # fp32
    return x.nbytes / min(timed(x.sum)[1] for _ in range(6))


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


def load_both(config: ModelConfig, transformers):
    """One random checkpoint on disk, loaded by us and by them."""
    with tempfile.TemporaryDirectory() as directory:
        save_model(random_model(config), directory)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        theirs.generation_config.eos_token_id = None  # neither side may stop early
        return load_model(directory), theirs


def compare(name: str, model, theirs, batch: int, bandwidth: float | None) -> dict:
    """Tokens per second of both: one table row. Raises AssertionError where the tokens differ.

    bandwidth   bytes per second that the memory gives; None: no share of it is reported.
    """
    prompts = random_prompts(model.config, batch, length=16)
    input_ids = torch.tensor(prompts)
    settings = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "pad_token_id": 0}

    def our_answers():
        return generate(model, prompts, reset_id=None, stop_ids=(), max_new_tokens=NEW_TOKENS)

    @torch.inference_mode()
    def their_answers():
        return theirs.generate(input_ids, max_new_tokens=NEW_TOKENS, **settings)

    def same(generations, output):
        return [g.tokens for g in generations] == output[:, input_ids.shape[1] :].tolist()

    generations, ours_s, theirs_s = alternate(our_answers, their_answers, REPEATS, same)
    speedup, *spread = ratio(theirs_s, ours_s)
    row = {
        "name": f"{name}, batch {batch}",
        "tokens_per_s": batch * NEW_TOKENS / statistics.median(ours_s),
        "transformers_tokens_per_s": batch * NEW_TOKENS / statistics.median(theirs_s),
        "ratio": speedup,
        "range": spread,
    }
    if bandwidth is not None:
        limit = step_bytes(model, batch, len(prompts[0]) + NEW_TOKENS / 2) / bandwidth  # seconds per step
        row["bandwidth_share"] = limit / statistics.median(map(step_seconds, generations))
    return row


def step_seconds(generations) -> float:
    """Of the decode steps alone, without reading the prompt."""
    g = generations[0]
    return (g.total_s - g.first_token_s) / (g.steps - 1)


def retry(name: str, model, prompt_length: int, reset_id: int = 3) -> dict:
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

    _, _, fresh_s = alternate(cached, fresh, REPEATS, same=int.__eq__)
    cached_s = times[1:]  # without the warm-up
    value, *spread = ratio(cached_s, fresh_s)
    return {
        "name": f"{name}, prompt of {prompt_length}: first token of a retry / of a fresh run",
        "retry_s": statistics.median(cached_s),
        "fresh_s": statistics.median(fresh_s),
        "ratio": value,
        "range": spread,
    }


def line(r: dict) -> str:
    share = f"{r['bandwidth_share']:.0%}" if "bandwidth_share" in r else "— (weights sit in the processor's cache)"
    speeds = "{tokens_per_s:.0f} tokens/s, transformers {transformers_tokens_per_s:.0f}".format(**r)
    spread = "{ratio:.2f} ({range[0]:.2f}–{range[1]:.2f})".format(**r)
    return f"{r['name']}: {speeds}, ratio {spread}; of the bandwidth limit {share}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results to this file as JSON")
    args = parser.parse_args(argv)
    if args.out:
        check_file(args.out)
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is the other side: pip install -r requirements-dev.txt") from None
    transformers.utils.logging.disable_progress_bar()
    bandwidth = read_bandwidth()
    print(f"transformers {transformers.__version__}, memory: {bandwidth / 1e9:.1f} GB/s read\n", flush=True)
    compiler = any(map(shutil.which, ("g++", "clang++")))
    if not compiler:
        print("no C++ compiler found: compiled decode steps are left out\n", flush=True)

    speed, retries = [], []
    toy = ModelConfig.load(Path(__file__).parents[2] / "data" / "toy.json")
    for name, config, batches, limit, prompt in (
        ("toy", toy, (1, 32), None, 128),
        ("125M", LLAMA_125M, (1, 8), bandwidth, 512),
    ):
        model, theirs = load_both(config, transformers)
        for batch in batches:
            sides = {name: model}
            if compiler:
                torch.compiler.reset()  # or the second batch size would get kernels that take any
                sides[f"{name}, compiled"] = random_model(config)  # the same weights once more
                sides[f"{name}, compiled"].compile()
            for side, ours in sides.items():
                speed.append(compare(side, ours, theirs, batch, limit))
                print(line(speed[-1]), flush=True)
        retries.append(retry(name, model, prompt))
        print("{name}: {ratio:.3f} ({range[0]:.3f}–{range[1]:.3f})".format(**retries[-1]), flush=True)
    if args.out:
        machine = {"transformers": transformers.__version__, "read_bytes_per_s": bandwidth}
        write_result(args.out, speed=speed, retries=retries, memory=[machine])


if __name__ == "__main__":
    run(main)
