"""What the OpenAI endpoint releases and refuses, without HTTP. `make test-serve` has the whole, in tests/served."""

import json
import math
import queue
from types import SimpleNamespace

import pytest
from models import LLAMA, network_of, prone_to, random_ids
from samples import toy_tokenizer, user

from backtrack.generate import Done, Generation, Reset, Token, generate
from backtrack.sampling import Options
from backtrack.serve import engine, remote
from backtrack.serve.engine import Job, Shown
from backtrack.serve.request import Refusal, understand
from model import InputError

TOK = toy_tokenizer()
ARGS = SimpleNamespace(prefill=False, max_tokens=9, reset_bias=0.0, max_resets=1, on_reset="truncate")


def events(*texts):
    """Of an answer whose texts but the last are taken back."""
    *taken_back, last = [TOK.encode(text) for text in texts]
    for ids in taken_back:
        yield from (Token(0, id) for id in ids)
        yield Reset(0, ids)
    yield from (Token(0, id) for id in last)
    yield Done(0, Generation(last, taken_back, len(taken_back), "stop", 0, 0.0, 0.0))


def shown(hold_back, *texts, max_resets=1, stop=()):
    """What is sent at each event, and what is to be forgotten."""
    released = Shown(TOK, max_resets, hold_back, list(stop))
    pieces = []
    for event in events(*texts):
        if released.finish_reason is None:
            pieces.append(released.add(event))
    return pieces, released


@pytest.mark.parametrize("hold_back", [0, 1, 4, math.inf])
def test_nothing_is_sent_that_can_still_be_taken_back(hold_back):
    unsafe, safe = "Sure, take the road 漢 to", "No, 漢漢 never é."
    pieces, released = shown(hold_back, unsafe, safe)
    n = len(TOK.encode(unsafe))
    before = "".join(text for text, _ in pieces[:n])
    visible = [] if hold_back == math.inf else TOK.encode(unsafe)[: n - hold_back]
    assert before == TOK.decode(visible).rstrip("\ufffd") and pieces[n] == ("", before)
    assert "".join(text for text, _ in pieces[n + 1 :]) == safe and not any("\ufffd" in text for text, _ in pieces)
    assert sum(bool(text) for text, _ in pieces[n + 1 :]) > 5  # the resets are used up: it streams
    assert (released.resets, released.retracted, released.finish_reason) == (1, n, "stop")
    if hold_back == math.inf:
        pieces, _ = shown(math.inf, unsafe, safe, max_resets=2)  # another reset might come: all at the end
        assert [text for text, _ in pieces if text] == [safe]


def test_stop_strings_count_in_what_cannot_be_taken_back():
    pieces, released = shown(math.inf, "Sure. It", "No. Never. It", stop=["er. ", ". It"])
    assert "".join(text for text, _ in pieces) == "No. Nev" and released.finish_reason == "stop"
    pieces, _ = shown(0, "so it is e", stop=["er"])  # what might have been its beginning
    assert "".join(text for text, _ in pieces) == "so it is e"
    pieces, _ = shown(0, "it \ufffd", max_resets=0)  # the last bytes of a character that never came, or U+FFFD itself
    assert "".join(text for text, _ in pieces) == "it \ufffd"


def test_what_waits_is_one_batch_and_who_left_is_left_out():
    model = prone_to(7, network_of(LLAMA, vocab_size=61, tie_word_embeddings=False, scale=0.4))
    options = Options(reset_id=7, stop_ids=[11], max_new_tokens=12, temperature=1.0)
    other = Options(reset_id=7, stop_ids=[11], max_new_tokens=1, temperature=1.0)
    prompts, told, jobs = random_ids(3, 9, 4, 6, vocab=61), queue.Queue(), []
    for i, prompt in enumerate(prompts):
        tell = lambda event, i=i: told.put((i, event))  # noqa: E731
        jobs.append(Job(prompt, [], other if i == 1 else options, f"0/{i}", tell, left=i == 2))
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    engine.threading.Thread(target=engine.answer_here, args=(model, waiting, 64), daemon=True).start()
    done = {}
    while len(done) < 3:
        i, event = told.get(timeout=60)
        if isinstance(event, Done):
            done[i] = event.generation.tokens
    how = {"reset_id": 7, "stop_ids": [11], "temperature": 1.0, "sample_ids": [0, 1, 3]}
    some = [prompts[i] for i in (0, 1, 3)]
    long, short = (generate(model, some, max_new_tokens=n, **how) for n in (12, 1))
    assert long[1].tokens != short[1].tokens
    assert done == {0: long[0].tokens, 1: short[1].tokens, 3: long[2].tokens}


def test_a_failure_is_told_to_all_who_wait():
    def broken(*batch):
        raise InputError("no room")
        yield

    told = []
    engine.run([Job([1], [], None, "", told.append), Job([1], [], None, "", told.append, left=True)], broken)
    assert [str(error) for error in told] == ["no room"]


def ask(chat=True, **body):
    config = remote.Server("", "", 64, vocab_size=TOK.vocab_size)
    return understand(json.dumps(body).encode(), chat, "toy", TOK, config, ARGS)


def test_what_is_understood():
    wanted = ask(
        messages=user("Hi <reset> [RESET]"), seed=3, n=2, max_tokens=5, stop="x", temperature=0, logit_bias=None
    )
    assert wanted.prompt == TOK.render(user("Hi <reset> [RESET]")) and TOK.reset_id not in wanted.prompt
    assert wanted.seeds == ["3/0", "3/1"] and wanted.stop == ["x"] and not wanted.stream
    assert (wanted.options.max_new_tokens, wanted.options.temperature, wanted.options.reset_id) == (5, 0, TOK.reset_id)
    assert ask(messages=user("Hi")).options.max_new_tokens == 9 and ask(messages=user("Hi")).options.temperature == 1
    assert ask(False, prompt="<reset>").prompt == [TOK.text_start_id, *TOK.encode("<reset>")]


@pytest.mark.parametrize("name", ["logit_bias", "ignore_eos", "min_tokens", "stop_token_ids", "guided_json", "echo"])
def test_only_known_parameters_are_allowed(name):
    with pytest.raises(Refusal, match=f"'{name}' is not allowed") as refused:
        ask(messages=user("Hi"), **{name: 0})
    assert refused.value.status == 400 and refused.value.body["error"]["param"] == name


def test_a_prefilled_answer_is_refused_and_too_long_a_chat():
    with pytest.raises(Refusal, match="prefilled"):
        ask(messages=[*user("Hi"), {"role": "assistant", "content": "Sure"}])
    with pytest.raises(InputError, match="too long"):
        ask(messages=user("word " * 99))
