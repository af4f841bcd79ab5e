"""Evaluation in bfloat16, and on a GPU, against float32 on the CPU.

Greedy answers may part ways where two tokens are nearly as good, so answers are not compared word by word: every token
that was picked must be, to the float32 model on the CPU and after the same context, as good as the best one but for a
tolerance. The tests on CUDA have the marker gpu; without a GPU they are skipped and say so (`make test-gpu`).
"""

import json

import pytest
import torch
from command import command
from models import FAMILIES, network_of, prone_to, random_ids
from samples import toy_tokenizer, user, write

from backtrack.evaluate import __main__ as evaluate
from backtrack.generate import generate
from model import load_model, save_model

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: bf16 and fp32 on a GPU are not compared"),
]
# The largest loss of log-probability that a pick may cost. bf16 keeps 8 bits: 0.4% of logits of up to 20 here.
WHERE = [
    pytest.param("cpu", torch.bfloat16, 0.2),
    pytest.param("cuda", torch.float32, 0.01, marks=gpu),
    pytest.param("cuda", torch.bfloat16, 0.2, marks=gpu),
]
BIAS, RESETS = 2.0, 2


@pytest.fixture(scope="module", params=FAMILIES)
def ckpt(request, tmp_path_factory):
    tok = toy_tokenizer()
    directory = tmp_path_factory.mktemp(request.param)
    model = prone_to(tok.reset_id, network_of(FAMILIES[request.param], tie_word_embeddings=False), times=1.5)
    save_model(model, directory, tokenizer=tok)
    return directory


@torch.no_grad()
def costs(model, tok, prompt: list[int], answer, max_resets: int) -> list[float]:
    """How much less likely each token that was picked is than the best one, to this model."""
    found = []
    for resets, attempt in enumerate([*answer.discarded, answer.tokens]):
        picked = attempt + [tok.reset_id] * (resets < answer.resets)
        context = prompt + [tok.reset_id] * resets
        logits = model(torch.tensor([context + picked]))[0, len(context) - 1 : -1]
        logits = logits[:, : tok.vocab_size].clone()
        logits[:, tok.reset_id] += BIAS if resets < max_resets else float("-inf")
        log_p = logits.log_softmax(dim=-1)
        found += (log_p.max(dim=-1).values - log_p[torch.arange(len(picked)), picked]).tolist()
    return found


@pytest.mark.parametrize(("device", "dtype", "tolerance"), WHERE)
def test_picked_tokens_are_the_best_but_for_rounding(ckpt, device, dtype, tolerance):
    tok = toy_tokenizer()
    reference, model = load_model(ckpt), load_model(ckpt, device, dtype)
    prompts = random_ids(*range(5, 29), vocab=tok.vocab_size)
    prompts = [[id for id in prompt if id not in tok.special_ids] for prompt in prompts]
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=24)
    options |= dict(reset_bias=BIAS, max_resets=RESETS)
    answers = generate(model, prompts, **options)
    found = [costs(reference, tok, p, a, RESETS) for p, a in zip(prompts, answers, strict=True)]
    found = torch.tensor([cost for one in found for cost in one])
    assert len(found) > 300 and sum(a.resets for a in answers) > 5
    assert found.max() <= tolerance and found.mean() <= tolerance / 20
    # The check sees what is wrong: another model's picks are far worse.
    wrong = generate(network_of({**FAMILIES["llama"]}, seed=5), prompts, **options)
    far = [costs(reference, tok, p, a, RESETS) for p, a in zip(prompts, wrong, strict=True)]
    assert torch.tensor([cost for one in far for cost in one]).mean() > tolerance


@pytest.mark.parametrize(("device", "dtype", "tolerance"), WHERE)
def test_evaluate_says_nearly_the_same(ckpt, tmp_path, device, dtype, tolerance):
    """The whole program: the same prompts and counts. Where the answers differ, the tokens were as good: see above."""
    prompts = write(tmp_path / "p.jsonl", *({"prompt": user(f"word{i} thing{i * i}"), "set": "s"} for i in range(24)))
    results = []
    for name, where, kind in (("a", "cpu", "float32"), ("b", device, str(dtype).removeprefix("torch."))):
        out = tmp_path / f"{name}.json"
        words = ["--ckpt", ckpt, "--prompts", prompts, "--out", out, "--device", where, "--dtype", kind]
        command(evaluate.main, *words, "--max-new-tokens", 12, "--reset-bias", BIAS)
        [record] = json.loads(out.read_text())["records"]
        results.append(record)
    first, second = results
    assert first["n"] == second["n"] == 24
    assert abs(first["reset"] - second["reset"]) <= 6
