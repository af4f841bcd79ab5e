"""The answers of a server are those of generate.py, and what becomes of one that is slow, gone or none at all."""

import json
import threading
import time
from itertools import islice

import completions
import pytest
from command import command
from completions import begin_stream, chunk, event, greedy, send, serving
from models import LLAMA, network_of, prone_to, random_ids
from samples import toy_tokenizer, user, write

import sample
from backtrack.evaluate import __main__ as evaluate
from backtrack.generate import Done, Reset, Token, generate, stream
from backtrack.serve import remote
from model import InputError, load_model, save_model

V, RESET, STOP = 61, 7, 11
HOW = {"reset_id": RESET, "stop_ids": [STOP], "max_new_tokens": 16}


@pytest.fixture(scope="module")
def model():
    """Says RESET about once in ten tokens."""
    return prone_to(RESET, network_of(LLAMA, vocab_size=V, tie_word_embeddings=False, scale=0.4))


@pytest.fixture
def server(model):
    with serving(model) as served:
        yield served


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAIT_S", 0.0)


def numbers(generation):
    """All of a Generation but the seconds."""
    times = generation.first_token_s, generation.total_s
    assert 0 <= times[0] <= times[1]
    g = generation
    return g.tokens, g.discarded, g.resets, g.finish_reason, g.steps


PROMPTS = random_ids(3, 9, 1, 14, 6, vocab=V)
PREFILL = [[], [1, 2, 3], [4], [], [5, 6]]


@pytest.mark.parametrize("options", [{"reset_id": None}, {"max_resets": 3, "on_reset": "keep"}, {"reset_bias": 1.0}])
def test_greedy_answers_are_those_of_generate(model, server, options):
    options = HOW | options | {"prefill": PREFILL}
    ours = generate(model, PROMPTS, **options)
    theirs = remote.generate(server.url, "tiny", PROMPTS, **options)
    assert [*map(numbers, theirs)] == [*map(numbers, ours)]
    assert sum(g.resets for g in ours) >= options.get("max_resets", 0)
    assert all(("logit_bias" in body) == (options["reset_id"] is not None) for body in server.requests)


@pytest.mark.parametrize("hold_back", [0, 3])
def test_events_are_those_of_stream(model, server, hold_back):
    options = HOW | {"max_resets": 2, "prefill": PREFILL, "hold_back": hold_back}

    def by_row(events):
        rows = {row: [] for row in range(len(PROMPTS))}
        for e in events:
            what = {Token: "id", Reset: "discarded"}.get(type(e))
            rows[e.row].append(numbers(e.generation) if isinstance(e, Done) else (what, getattr(e, what)))
        return rows

    assert by_row(remote.stream(server.url, "tiny", PROMPTS, **options)) == by_row(stream(model, PROMPTS, **options))


def test_what_is_asked_of_the_server(server):
    """Ids, our stop ids and no others, and nothing left to the model's generation_config.json."""
    options = HOW | {"temperature": 0.7, "top_p": 0.9, "seed": 3, "reset_bias": 2.0, "max_resets": 1}
    answers = remote.generate(server.url + "/v1/", "tiny", PROMPTS, **options)
    assert any(g.resets for g in answers)
    for body in server.requests:
        assert body["model"] == "tiny" and body["stop_token_ids"] == [STOP, RESET] and body["ignore_eos"] is True
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 16)
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
        assert body["logit_bias"] == {str(RESET): 2.0 if body["prompt"] in PROMPTS else -100.0}


def test_seeds(server):
    """Of a seed and a row's number: the same again, another for another, whatever is beside it."""

    def seeds(prompts, **options):
        server.requests.clear()
        remote.generate(server.url, "tiny", prompts, **HOW, temperature=1.0, max_resets=0, **options)
        return {tuple(body["prompt"]): body["seed"] for body in server.requests}

    first = seeds(PROMPTS)
    assert len(set(first.values())) == len(PROMPTS) and seeds(PROMPTS) == first
    assert seeds(PROMPTS[2:], sample_ids=[2, 3, 4]) == {k: v for k, v in first.items() if [*k] in PROMPTS[2:]}
    assert not set(first.values()) & set(seeds(PROMPTS, seed=1).values())


def test_no_more_at_once_than_said_and_none_that_nobody_waits_for(model, server):
    together = threading.Barrier(5, timeout=60)  # five requests wait for each other

    def waits(handler, body):
        together.wait()
        completions.stream(handler, body, model)

    server.faults += [waits] * 5
    done, begun = set(), set()
    events = remote.stream(server.url, "tiny", random_ids(*[4] * 30, vocab=V), **HOW, parallel=5)
    while len(done) < 5:
        e = next(events)
        begun.add(e.row)
        assert len(begun - done) <= 5
        done |= {e.row} if isinstance(e, Done) else set()
    events.close()
    time.sleep(0.1)
    assert len(server.requests) < 30


def overloaded(handler, body):
    send(handler, 503, {"error": {"message": "no room", "code": 503}})


def cut(handler, body):
    """Three tokens, and the connection is gone."""
    begin_stream(handler)
    for id in islice(greedy(handler.model, body), 3):
        chunk(handler, event([id]) + b"\n\n")
    handler.close_connection = True


def sends(line):
    def fault(handler, body):
        begin_stream(handler)
        chunk(handler, line + b"\n\n")
        chunk(handler, b"")

    return fault


says_error = sends(b'data: {"error": {"message": "the engine died", "code": 500}}')


def silent(handler, body):
    time.sleep(1.0)
    handler.close_connection = True


@pytest.fixture
def failing(model, server, monkeypatch):
    monkeypatch.setattr("completions.BaseHTTPRequestHandler.model", model, raising=False)
    return server


@pytest.mark.parametrize("faults", [[overloaded] * 5, [says_error, cut, silent, overloaded, cut]])
def test_what_fails_is_tried_again_and_nothing_is_lost(model, failing, faults):
    failing.faults += faults
    options = HOW | {"max_resets": 2}
    ours = generate(model, PROMPTS, **options)
    theirs = remote.generate(failing.url, "tiny", PROMPTS, **options, parallel=2, timeout_s=0.3)
    assert [*map(numbers, theirs)] == [*map(numbers, ours)]
    assert not failing.faults


def test_it_goes_on_where_the_answer_broke_off(failing, capsys, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 3)  # without a token in between
    failing.faults += [cut, silent, cut]
    [g] = remote.generate(failing.url, "tiny", [[1, 4]], **HOW | {"reset_id": None}, timeout_s=0.3)
    first, _, second, third = failing.requests
    assert second["prompt"] == [1, 4, *g.tokens[:3]] and second["max_tokens"] == first["max_tokens"] - 3
    assert second["seed"] != first["seed"] and third["prompt"] == [1, 4, *g.tokens[:6]]
    one, two, three = capsys.readouterr().err.splitlines()  # a line for every retry
    assert "broke" in one and "try 2 of 3" in one and "try 2 of 3" in three
    assert "no word from the server for 0.3 seconds; try 3 of 3" in two


def refuses(handler, body):
    send(handler, 400, {"error": {"message": "max_tokens\nis odd"}})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (overloaded, "no room, 6 times in a row"),
        (refuses, "HTTP 400: max_tokens is odd"),
        (sends(b'data: {"choices": [{"text": "Hello"}]}'), "no token ids; vLLM does from"),
        (sends(event([V + 5])), "which the tokenizer has not"),
        (sends(event([1], prompt=[0, 1])), "changed the prompt"),
        (sends(event([RESET])), "heed logit_bias"),
    ],
)
def test_what_does_not_get_better_is_said_at_once_or_after_a_while(server, fault, message):
    server.faults += [fault] * remote.TRIES
    with pytest.raises(InputError, match=message):
        remote.generate(server.url, "tiny", [[1]], **HOW | {"max_resets": 0}, vocab_size=V)
    assert len(server.requests) == (remote.TRIES if fault is overloaded else 1)


def test_what_is_no_such_server(server):
    for code, body, message in (
        (200, b"<html>Welcome</html>", "something else than JSON"),
        (200, {"hello": 1}, "vLLM server"),
        (404, b"nothing", "HTTP 404"),
    ):
        server.faults.append(lambda handler, _, code=code, body=body: send(handler, code, body))
        server.faults[0].__name__ = "get"
        with pytest.raises(InputError, match=message):
            remote.stream(server.url, "tiny", [[1]], **HOW)  # at the call
    for url, message in (("127.0.0.1:1", "address"), ("http://127.0.0.1:1", "is the server up")):
        with pytest.raises(InputError, match=message):
            remote.stream(url, "tiny", [[1]], **HOW)
    with pytest.raises(InputError, match="does not serve 'huge'; it serves tiny"):
        remote.stream(server.url, "huge", [[1]], **HOW)


def test_bad_input_is_named(server):
    for change, message in (
        ({"prompts": [[1] * 250]}, "too long: 250 tokens"),  # the server's limit
        ({"reset_bias": 101.0}, "-100 to 100"),
        ({"vocab_size": V, "prompts": [[V]]}, "vocabulary"),
    ):
        options = {"prompts": [[1]]} | HOW | change
        with pytest.raises(InputError, match=message):
            remote.stream(server.url, "tiny", options.pop("prompts"), **options)
    assert not server.requests


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    root = tmp_path_factory.mktemp("ckpt")
    tok = toy_tokenizer()
    save_model(prone_to(tok.reset_id, network_of(LLAMA), times=4.0), root, tokenizer=tok)
    return root


@pytest.fixture
def toy_server(ckpt):
    with serving(load_model(ckpt), name=str(ckpt)) as served:
        yield served


def test_sample_py(ckpt, toy_server, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    toy_server.key = "secret"
    words = ["--ckpt", ckpt, "--prompt", "How?", "--json", "--show-discarded"]
    words += ["--max-new-tokens", 12, "--prefill", "It"]
    here, there = (
        {k: v for k, v in json.loads(command(sample.main, *words, *more)[0]).items() if not k.endswith("_s")}
        for more in ((), ("--url", toy_server.url, "--api-key-env", "KEY", "--timeout", 9))
    )
    assert here == there and toy_server.requests
    _, told = command(sample.main, *words, "--url", toy_server.url, code=2)
    assert "HTTP 401: no such key" in told


def test_evaluate(ckpt, toy_server, tmp_path):
    rows = [{"prompt": user(f"Question {i}?"), "set": "a", "prefill": "It" * (i % 2)} for i in range(9)]
    rows.append({"prompt": user("long " * 190), "set": "a"})  # too long for the server alone
    prompts = write(tmp_path / "prompts.jsonl", *rows)
    toy_server.longest = 200
    found = {}
    for name, more in (("here", ()), ("there", ("--url", toy_server.url))):
        out = tmp_path / f"{name}.json"
        words = ["--ckpt", ckpt, "--prompts", prompts, "--max-new-tokens", 12, "--batch-size", 4, "--out", out]
        _, said = command(evaluate.main, *words, *more)
        assert name == "here" or "1 of 10 prompts are too long" in said
        lines = [json.loads(line) for line in (tmp_path / f"{name}.answers.jsonl").read_text().splitlines()[1:]]
        found[name] = {
            a["prompt"]: [a[k] for k in ("response", "discarded", "resets", "steps", "first_step")] for a in lines
        }
    assert found["there"] == {k: v for k, v in found["here"].items() if k < 9}
    assert any(a[2] for a in found["there"].values())
    _, said = command(evaluate.main, *words, code=2)  # the same --out without --url: another dtype
    assert "was begun with dtype" in said
