"""backtrack/evaluate/filter.py a second time, by hand: states a prefix at a time, the filter a prompt at a time."""

import json
from functools import partial

import pytest
import torch
from command import command as run_command
from models import LLAMA, network_of, random_ids
from samples import row_of, toy_tokenizer, user, write

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate import filter as filters
from backtrack.evaluate.filter import L2, Filter, filtered, fit, hidden_states, threshold_for
from backtrack.generate import generate
from model import save_model

command = partial(run_command, filters.main)


@pytest.fixture(scope="module")
def model():
    return network_of(LLAMA, vocab_size=61)


def state(model, tokens):
    with torch.no_grad():
        return model.model(torch.tensor([tokens]))[0, -1]


def test_hidden_states(model):
    prompt, answer = random_ids(7, 5, vocab=61)
    assert Filter(torch.ones(32), 100.0, 0.0).peak(model, prompt, []) == float("-inf")
    for k, h in enumerate(hidden_states(model, prompt, answer), start=1):
        torch.testing.assert_close(h, state(model, prompt + answer[:k]), atol=1e-5, rtol=1e-4)


def test_the_fit_is_the_minimum(model):
    """No direction is better than where it stopped, by the loss written out with one term for each prefix."""
    answers = [(*random_ids(4, 3 + i, vocab=61, seed=i), i % 3 == 0) for i in range(12)]
    found = fit(model, answers)
    weight = found.weight.double().requires_grad_()
    bias = torch.tensor(found.bias, dtype=torch.float64, requires_grad=True)
    loss = L2 / 2 * (weight**2).sum()
    for prompt, answer, unsafe in answers:
        for k in range(1, len(answer) + 1):
            p = torch.sigmoid(state(model, prompt + answer[:k]).double() @ weight + bias)
            loss = loss - torch.log(p if unsafe else 1 - p) / len(answer) / len(answers)
    loss.backward()
    assert weight.grad.abs().max() < 1e-4 and abs(bias.grad) < 1e-4


@pytest.mark.parametrize("share, alarms", [(0.0, 0), (0.09, 0), (0.25, 2), (1.0, 9)])
def test_threshold(share, alarms):
    peaks = [0.3, -1.0, 2.5, 0.9, 0.1, 1.7, -0.4, 0.8, 0.2, 1.1]
    assert sum(peak > threshold_for(peaks, share) for peak in peaks) == alarms


@pytest.mark.parametrize("max_resets", [0, 1, 2])
def test_the_filter(model, max_resets):
    """One prompt at a time, each step written out, until every way through it has been taken."""
    prompts, prefill = random_ids(*range(3, 15), vocab=61), [[5, 6] * (i % 2) for i in range(12)]
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    watching = Filter(direction, bias=0.2, threshold=2.0)
    options = {"reset_id": 60, "stop_ids": range(40, 50), "max_new_tokens": 6}
    more = options | {"temperature": 0.0, "seed": 3, "reset_bias": 1.0, "max_resets": max_resets}
    found = filtered(model, watching, [1, 2, 3], prompts, prefill, list(range(12)), more)
    seen = set()
    for i, g in enumerate(found):
        discarded, steps, forced = [], 0, prefill[i]
        for attempt in range(max_resets + 1):
            sampled = {"temperature": 1.0, "seed": 3 + attempt, "sample_ids": [i]} if attempt else {"prefill": [forced]}
            [expected] = generate(model, [prompts[i]], max_resets=0, **options, **sampled)
            steps += expected.steps
            said = expected.tokens
            scores = [state(model, prompts[i] + said[:k]) @ direction + 0.2 for k in range(1, len(said) + 1)]
            if not any(score + 1.0 > 2.0 for score in scores):
                break
            discarded.append(said)
        else:
            said, steps = [1, 2, 3], steps + 4  # the refusal's, and its end
        assert (g.tokens, g.discarded, g.resets, g.steps) == (said, discarded, len(discarded), steps)
        assert 0 <= g.first_token_s <= g.total_s
        seen.add(len(discarded))
    assert seen == set(range(max_resets + 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows whose rejected answers all say "counted", and prompts."""
    root = tmp_path_factory.mktemp("place")
    for seed in range(2):
        save_model(network_of(LLAMA, seed=seed), root / f"model-{seed}", tokenizer=toy_tokenizer())
    rows = [row_of(f"word{i}", f"nobody opens other{i}", f"he counted thing{i}", unsafe=i % 2 == 0) for i in range(20)]
    write(root / "rows.jsonl", *rows[:14], {"text": "the gate"})
    write(root / "heldout.jsonl", *rows[14:])
    write(root / "safe.jsonl", *(row_of() for _ in range(3)))
    write(root / "prompts.jsonl", *({"prompt": user(f"other{i}"), "prefill": "It" * (i % 2)} for i in range(6)))
    (root / "mild.py").write_text(
        "from backtrack.judge import Verdict\ndef judge(prompt, text):\n    return Verdict(unsafe=False)\n"
    )
    return root


def test_the_commands(place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(place)
    out = tmp_path / "fitted"
    words = ["fit", "--ckpt", place / "model-0", "--data", place / "rows.jsonl", "--out", out]
    command(*words, "--heldout", place / "heldout.jsonl", "--false-alarms", 0.2)
    about = json.loads((tmp_path / "fitted.json").read_text())
    assert about["answers"] == 14 + 7 and about["heldout"]["chosen"] == 6 and about["heldout"]["rejected"] == 3
    assert about["heldout"]["false_alarms"] == 1 and about["heldout"]["caught"] >= 2

    asked = ["--prompts", place / "prompts.jsonl", "--judge", "mild:judge", "--max-new-tokens", 8]
    results = {}
    for bias in (-1000, 1000):
        file = tmp_path / f"{bias}.json"
        run_command(
            evaluate.main, "--ckpt", place / "model-0", *asked, "--filter", out, "--reset-bias", bias, "--out", file
        )
        [results[bias]] = json.loads(file.read_text())["records"]
    assert results[-1000]["reset"] == 0 and results[-1000]["first_step"] == 6
    assert results[1000]["reset"] == 6 and results[1000]["resets"] == 12  # alarm, asked again, alarm, refusal
    answers = (tmp_path / "1000.answers.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["response"] for line in answers} == {filters.REFUSAL}

    def refused(*words, of=evaluate.main):
        return run_command(of, *words, "--out", tmp_path / "new.json", code=2)[1]

    assert "was fitted on" in refused("--ckpt", place / "model-1", *asked, "--filter", out)
    assert "one --ckpt" in refused("--ckpt", place / "model-0", place / "model-1", *asked, "--filter", out)
    words_without = ("--ckpt", place / "model-0", *asked, "--out", tmp_path / "1000.json")
    assert "was begun with filter" in run_command(evaluate.main, *words_without, code=2)[1]
    assert "safe.jsonl: a filter needs" in refused(*words[:-2], "--heldout", place / "safe.jsonl", of=filters.main)
    (tmp_path / "fitted.safetensors").write_bytes(b"x")
    assert "fit it again" in refused("--ckpt", place / "model-0", *asked, "--filter", out)
