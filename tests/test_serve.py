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
from model import InputError

TOK = toy_tokenizer()
ARGS = SimpleNamespace(prefill=False, max_tokens=9, reset_bias=0.0, max_resets=1, on_reset="truncate", hold_back=0)


def told(hold_back, *texts, max_resets=1, stop=()):
    """An Answer and what it tells at each event; all texts but the last are taken back."""
    *taken_back, last = [TOK.encode(text) for text in texts]
    options = Options(TOK.reset_id, [], 99, max_resets=max_resets, hold_back=hold_back)
    answer, pieces = engine.Answer(TOK, [1], [], options, "", stop), []
    answer.tell = lambda piece: pieces[-1].append(piece)
    events = [e for ids in taken_back for e in (*(Token(0, id) for id in ids), Reset(0, ids))]
    done = Done(0, Generation(last, taken_back, len(taken_back), "stop", 0, 0.0, 0.0))
    for event in [*events, *(Token(0, id) for id in last), done]:
        pieces.append([])
        answer.add(event)
    return answer, pieces


def text_of(pieces):
    return "".join(piece["text"] for some in pieces for piece in some)


@pytest.mark.parametrize("hold_back", [0, 1, 4, math.inf])
def test_nothing_is_sent_that_can_still_be_taken_back(hold_back):
    unsafe, safe = "Sure, take the road 漢 to", "No, 漢漢 never é."
    _, pieces = told(hold_back, unsafe, safe)
    n, before = len(TOK.encode(unsafe)), text_of(pieces[: len(TOK.encode(unsafe))])
    visible = [] if hold_back == math.inf else TOK.encode(unsafe)[: n - hold_back]
    assert before == TOK.decode(visible).rstrip("\ufffd")
    assert [piece["retracted"] for piece in pieces[n]] == ([before] if before else [])
    assert text_of(pieces[n:]) == safe and not any("\ufffd" in text_of([some]) for some in pieces)
    assert sum(map(len, pieces[n + 1 :])) > 5  # the resets are used up: it streams
    last = pieces[-1][0]
    assert last["finish_reason"] == "stop" and last["backtrack"] == {"resets": 1, "retracted_tokens": n}
    _, pieces = told(math.inf, unsafe, safe, max_resets=2)  # another reset might come: all at the end
    assert text_of(pieces[-1:]) == text_of(pieces) == safe


def test_stop_strings_count_in_what_cannot_be_taken_back():
    answer, pieces = told(math.inf, "Sure. It", "No. Never. It", stop=["er. ", ". It"])
    assert text_of(pieces) == answer.sent == "No. Nev" and answer.finish_reason == "stop"
    _, pieces = told(0, "so it is e", stop=["er"])  # what might have been its beginning
    assert text_of(pieces) == "so it is e"
    _, pieces = told(0, "it \ufffd", max_resets=0)  # the last bytes of a character never came, or it is U+FFFD itself
    assert text_of(pieces) == "it \ufffd"


def test_what_waits_is_one_batch_and_who_left_is_left_out(monkeypatch):
    model = prone_to(7, network_of(LLAMA, vocab_size=61, tie_word_embeddings=False, scale=0.4))
    model.decoded = []
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda model, *rest: (model.decoded.append(rest[0]), decode(model, *rest))[1])
    prompts, answers, over = random_ids(3, 9, 4, 6, vocab=61), [], queue.Queue()
    jobs = queue.SimpleQueue()
    for i, prompt in enumerate(prompts):
        options = Options(reset_id=7, stop_ids=[11], max_new_tokens=1 if i == 1 else 12, temperature=1.0)
        answers.append(engine.Answer(SimpleNamespace(decode=lambda ids: "x" * len(ids)), prompt, [], options, f"0/{i}"))
        answers[i].tell = lambda piece, i=i: over.put(i) if piece["finish_reason"] else None
        answers[i].over = i == 2
        jobs.put(answers[i])
    engine.threading.Thread(target=engine.sample_all, args=(model, jobs, 64), daemon=True).start()
    assert sorted(over.get(timeout=60) for _ in range(3)) == [0, 1, 3]
    assert [list(some) for some in model.decoded] == [[prompts[0], prompts[3]], [prompts[1]]]
    some = [prompts[i] for i in (0, 1, 3)]
    how = {"reset_id": 7, "stop_ids": [11], "temperature": 1.0, "sample_ids": [0, 1, 3]}
    long, short = ([g.tokens for g in generate(model, some, max_new_tokens=n, **how)] for n in (12, 1))
    assert [answers[i].ids for i in (0, 1, 3)] == [long[0], short[1], long[2]]


def test_a_failure_is_told_to_all_who_wait(monkeypatch):
    def broken(*batch):
        raise InputError("no room")

    monkeypatch.setattr(engine, "decode", broken)
    heard = []
    answers = [engine.Answer(TOK, [1], [], None, "") for _ in range(2)]
    for answer in answers:
        answer.tell = heard.append
    answers[1].over = True
    engine.sample(None, answers)
    assert [(str(error), error.status_code) for error in heard] == [("no room", 502)]


def ask(chat=True, **body):
    config = remote.Server("", "", 64, vocab_size=TOK.vocab_size)
    state = SimpleNamespace(name="toy", tok=TOK, config=config, args=ARGS)
    return engine.understand(json.dumps(body).encode(), chat, state)


def test_what_is_understood():
    chat = {"messages": user("Hi <reset> [RESET]")}
    body, answers = ask(**chat, seed=3, n=2, max_tokens=5, stop="x", temperature=0, logit_bias=None, logprobs=False)
    assert answers[0].prompt == TOK.render(user("Hi <reset> [RESET]")) and TOK.reset_id not in answers[0].prompt
    assert [(a.index, a.seed, a.stop) for a in answers] == [
        (0, "3/0", ["x"]),
        (1, "3/1", ["x"]),
    ] and "stream" not in body
    options = answers[0].options
    assert (options.max_new_tokens, options.temperature, options.reset_id) == (5, 0, TOK.reset_id)
    [answer] = ask(**chat)[1]
    assert (answer.options.max_new_tokens, answer.options.temperature) == (9, 1)
    for prompt in ("<reset>", ["<reset>"]):
        assert ask(False, prompt=prompt)[1][0].prompt == [TOK.text_start_id, *TOK.encode("<reset>")]


REFUSED = [
    "logit_bias",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "stop_token_ids",
    "echo",
    "top_k",
]
REFUSED += [
    "prompt_logprobs",
    "guided_json",
    "guided_regex",
    "continue_final_message",
    "functions",
    "logits_processors",
]


def test_only_known_parameters_are_allowed():
    for name in REFUSED:
        with pytest.raises(engine.Refusal, match=f"'{name}' is not allowed") as refused:
            ask(messages=user("Hi"), **{name: 0})
        assert refused.value.status_code == 400 and refused.value.param == name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"logprobs": True}, "logprobs must be"),
        ({"temperature": -1}, "temperature must be float from 0 to 1000"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"n": True}, "n must be int"),
        ({"n": 1000}, "n must be"),
        ({"max_tokens": 10**5}, "too long"),
        ({"stop": ["a"] * 5}, "stop must be"),
        ({"stop": [""]}, "stop must be"),
        ({"stream": "yes"}, "stream must be"),
        ({"model": "gpt"}, "no model 'gpt'"),
        ({"messages": "Hi"}, "a chat must be a list"),
        ({"messages": [3]}, "message 0"),
        ({"messages": [{"role": "<reset>", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"messages": user("word " * 99)}, "too long"),
        ({"messages": [*user("Hi"), {"role": "assistant", "content": "Sure"}]}, "prefilled"),
    ],
)
def test_what_is_refused(body, message):
    with pytest.raises(InputError, match=message):
        ask(**{"messages": user("Hi"), "max_tokens": 4} | body)


def test_completions_take_text_alone():
    for prompt in ([7, 8], ["a", "b"], None):
        with pytest.raises(InputError, match="must be a string"):
            ask(False, prompt=prompt)
