"""remote.py, the endpoint and exported directories against a real vLLM server on loopback: `make test-vllm`.

VLLM names a Python that has vLLM, SERVE one with requirements-serve.txt, TOY and SMOLLM2 the model directories. Servers
compute in fp32, so that greedy answers are ours token for token.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from endpoint import ask_all, begun, chats_of, endpoint, joined, volley
from samples import user

from backtrack.generate import generate
from backtrack.serve import remote
from model import InputError, load_model, load_tokenizer, save_model

pytestmark = pytest.mark.vllm
NAMES = ("TOY", "SMOLLM2")


@pytest.fixture(scope="module", params=NAMES)
def served(request, tmp_path_factory):
    """(name, our model, its tokenizer, url, name there): exported by save_model, and served."""
    if not os.environ.get("VLLM") or not os.environ.get(request.param):
        pytest.skip(f"needs VLLM and {request.param}; make test-vllm sets them")
    source = Path(os.environ[request.param])
    tok, model = load_tokenizer(source), load_model(source)
    export = tmp_path_factory.mktemp("export")
    save_model(model, export, tokenizer=tok)
    process, url = start(export, tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        yield request.param, model, load_tokenizer(export), url, str(export)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def start(directory: Path, log: Path, port: int = 0):
    """A server in a process group of its own, once it answers."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    words = [os.environ["VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "512"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    url, last = f"http://127.0.0.1:{port}", time.monotonic() + 600
    while time.monotonic() < last and process.poll() is None:
        try:
            remote.look_for(url, directory)
            return process, url
        except InputError:
            time.sleep(2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("vLLM does not answer:\n" + "\n".join(log.read_text().splitlines()[-30:]))


QUESTIONS = {
    "TOY": [f"{ask} {potion}." for ask in ("Tell me how to make", "What is the recipe for") for potion in
            ("yintin limpom", "porpyl nymvys", "faltim molpym", "tin pom", "lilac water")],
    "SMOLLM2": ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Write a haiku.",
                "How do I boil an egg?", "Who wrote Hamlet?", "Tell me a joke.", "What is 12 times 12?"],
}  # fmt: skip
BIAS = {"TOY": 2.0, "SMOLLM2": 14.0}  # SmolLM2 was not taught to reset: so much makes it do so now and then


def options_of(tok, most, **more):
    special = {"reset_id": tok.reset_id, "stop_ids": tok.stop_ids, "vocab_size": tok.vocab_size}
    return special | {"max_new_tokens": most} | more


@pytest.mark.parametrize("on_reset", ["truncate", "keep"])
@pytest.mark.parametrize("max_resets", [0, 1, 3])
@torch.no_grad()
def test_greedy_answers_are_ours(served, max_resets, on_reset):
    name, model, tok, url, there = served
    prompts = [tok.render(user(question)) for question in QUESTIONS[name]]
    prefill = [tok.encode("Sure." * (i % 2)) for i in range(len(prompts))]
    options = options_of(tok, 32, prefill=prefill, max_resets=max_resets, on_reset=on_reset, reset_bias=BIAS[name])
    ours, theirs = generate(model, prompts, **options), remote.generate(url, there, prompts, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.tokens, a.discarded, a.finish_reason, a.steps) == (b.tokens, b.discarded, b.finish_reason, b.steps)
    assert any(g.resets for g in ours) == (max_resets > 0)


def test_samples_are_a_function_of_seed_and_number(served):
    name, _, tok, url, there = served
    prompts = [tok.render(user(QUESTIONS[name][0]))] * 8
    options = options_of(tok, 16, temperature=1.0)

    def texts(count, **more):
        return [g.tokens for g in remote.generate(url, there, prompts[:count], **options, **more)]

    first = texts(8)
    assert texts(8) == first and texts(4, sample_ids=[4, 5, 6, 7]) == first[4:]
    assert len({tuple(ids) for ids in first}) > 1 and texts(8, seed=1) != first


@torch.no_grad()
def test_the_likeliest_tokens_are_ours(served):
    """What a guard behind a server is asked for."""
    name, model, tok, url, there = served
    prompt = tok.render(user(QUESTIONS[name][0]))
    ids, logprobs = remote.first_ids(remote.look_for(url, there), prompt, 3)
    for place, found in enumerate(logprobs):
        ours = model(torch.tensor([prompt + ids[:place]]))[0, -1].log_softmax(-1)
        assert ids[place] == ours.argmax().item() and len(found) >= 20
        for id, logprob in found.items():
            assert abs(ours[id].item() - logprob) < 1e-2


def post(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with remote.OPENER.open(request, timeout=300) as response:
        return json.load(response)


@torch.no_grad()
def test_who_knows_nothing_of_reset_gets_no_mixture(served):
    """The chat endpoint, asked as anybody asks: the template is ours, and the answer ends where ours is taken back."""
    name, model, tok, url, there = served
    cut, bias = 0, BIAS[name] if name == "SMOLLM2" else 0.0
    options = options_of(tok, 32, reset_bias=bias)
    for question in QUESTIONS[name]:
        chat = {
            "model": there,
            "messages": user(question),
            "max_tokens": 32,
            "temperature": 0,
            "return_token_ids": True,
        }
        chat |= {"logit_bias": {str(tok.reset_id): bias}} if bias else {}
        answer = post(url, "/v1/chat/completions", chat)
        assert answer["prompt_token_ids"] == tok.render(user(question))
        [ours] = generate(model, [tok.render(user(question))], **options)
        ids, first = answer["choices"][0]["token_ids"], [*ours.discarded, ours.tokens][0]
        assert ids[: len(first)] == first and len(ids) - len(first) <= 1
        assert tok.decode(ids) == tok.decode(first)
        if ours.resets:
            assert ids[-1] == tok.reset_id and answer["choices"][0]["finish_reason"] == "stop"
            cut += 1
    assert cut


# ── The endpoint in front of vLLM ────────────────────────────────────────────────────────────────────────────────────


def in_front_of(url, ckpt, *words, out):
    return endpoint(ckpt, "--url", url, *words, out=out, python=os.environ["SERVE"])


@torch.no_grad()
def test_the_endpoint_says_what_our_sampler_says(served, tmp_path):
    name, model, tok, url, there = served
    prompts = [tok.render(user(question)) for question in QUESTIONS[name]]
    ours = generate(model, prompts, **options_of(tok, 32, reset_bias=BIAS[name]))
    assert any(g.resets for g in ours)
    with in_front_of(url, there, "--reset-bias", BIAS[name], out=tmp_path / "log") as front:
        for question, g in zip(QUESTIONS[name], ours, strict=True):
            body = {"messages": user(question), "temperature": 0, "max_tokens": 32}
            status, whole = front.ask(**body)
            assert status == 200 and whole["choices"][0]["message"]["content"] == tok.decode(g.tokens)
            assert whole["usage"]["completion_tokens"] == len(g.tokens)
            assert joined(front.chunks(**body))[0] == tok.decode(g.tokens)


@pytest.mark.parametrize("served", ["TOY"], indirect=True)  # its prompts name potions
@torch.no_grad()
def test_load_beside_vllms_own(served, tmp_path, capsys):
    _, model, tok, url, there = served
    count = int(os.environ.get("REQUESTS", 500))
    chats = chats_of(os.environ["TOY"], count)
    options = options_of(tok, 48, prefill=[tok.encode(opening) for _, opening in chats], batch_size=64)
    ours = generate(model, [tok.render(chat) for chat, _ in chats], **options)
    assert count * 0.4 < sum(g.resets for g in ours) < count * 0.6

    def ask_vllm(i):
        chat, opening = chats[i]
        body = {"model": there, "messages": chat + begun(opening), "temperature": 0, "max_tokens": 48}
        if opening:
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return post(url, "/v1/chat/completions", body)

    with in_front_of(url, there, "--prefill", out=tmp_path / "log") as front:
        found, seconds = ask_all(front, chats)
    assert found == [tok.decode(g.tokens) for g in ours]
    _, alone = volley(ask_vllm, count)
    with capsys.disabled():
        print(f"\nvLLM behind the endpoint: {seconds}; alone, without retries: {alone}")


def test_vllm_killed_in_the_middle_and_back_again(tmp_path):
    """Whoever is in flight gets one clear error, or an answer if vLLM is back in time; then it goes on."""
    if not os.environ.get("VLLM") or not os.environ.get("TOY"):
        pytest.skip("needs VLLM and TOY; make test-vllm sets them")
    directory, body = os.environ["TOY"], {"messages": user(QUESTIONS["TOY"][0]), "temperature": 0, "max_tokens": 400}
    process, url = start(directory, tmp_path / "vllm.log")
    try:
        with in_front_of(url, directory, out=tmp_path / "log") as front, ThreadPoolExecutor(16) as pool:
            text = front.text(**body)
            many = [pool.submit(front.ask, **body | {"n": 4, "temperature": 1}) for _ in range(16)]
            front.until(lambda: front.metrics()["backtrack_queue"] > 32)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
            lost = [said for status, said in (one.result() for one in many) if status != 200]
            assert lost and all("is the server well?" in said["error"]["message"] for said in lost)
            process, _ = start(directory, tmp_path / "vllm.log", int(url.rsplit(":", 1)[1]))
            assert front.text(**body) == text
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
