"""The sampler in front of a server: generate.py's answers and events, from the completions of a vLLM server.

    from backtrack.serve.remote import generate
    generate("http://127.0.0.1:8000", "runs/toy-0/sft", prompts, reset_id=tok.reset_id, stop_ids=tok.stop_ids, …)

    vllm serve runs/toy-0/sft                                                    # the server, on its own machine
    python sample.py --ckpt runs/toy-0/sft --url http://127.0.0.1:8000           # --ckpt: whose tokenizer
    python -m backtrack.evaluate --ckpt runs/toy-0/sft --url http://127.0.0.1:8000 …

A server knows nothing of [RESET]. Here it is one of the ids at which a request stops, and what follows is another
request: prompt ⊕ [RESET]^r, of which the server's prefix cache has the prompt; or, with on_reset="keep", all that was
taken back as well. Prompts and answers are ids both ways (return_token_ids, vLLM 0.10.2 or newer): text is never
encoded again. What is not fixed here is the server's: its weights' dtype, its kernels. Greedy answers equal ours where
both compute in fp32.

A request that fails is sent again, waiting longer each time, with what had come of it: it goes on where it stopped.
"""

import json
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException

from backtrack.generate import Done, Generation, Options, Record, Reset, Token, check, held_back, told
from model import InputError

TRIES = 6  # of one request: about half a minute of waiting in all
WAIT_S = 1.0  # before the second try; twice as long before each one after it
LIMIT = 100.0  # servers cut logit_bias off there, in either direction
MANY = 2**31  # where nothing is known of a limit
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server of one's own is behind no proxy


def generate(url: str, model: str, prompts: list[list[int]], **options) -> list[Generation]:
    """Answer every prompt (token ids). Options, result and errors as in `stream`; the Generations are in order."""
    answers: list[Generation | None] = [None] * len(prompts)
    for event in stream(url, model, prompts, **options):
        if isinstance(event, Done):
            answers[event.row] = event.generation
    return answers


def stream(
    url: str,
    model: str,
    prompts: list[list[int]],
    *,
    reset_id: int | None,
    stop_ids,
    max_new_tokens: int,
    vocab_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    reset_bias: float = 0.0,
    max_resets: int = 1,
    on_reset: str = "truncate",
    prefill: list[list[int]] | None = None,
    seed: int = 0,
    sample_ids: list[int] | None = None,
    hold_back: int = 0,
    parallel: int = 64,
    timeout_s: float = 300.0,
) -> Iterator[Token | Reset | Done]:
    """generate.stream with a server's `url` and the name of a model there in place of a model, and two more options:

    parallel    so many prompts are with the server at once; the others wait here.
    timeout_s   so long may the server say nothing before a request counts as failed.

    Seconds in a Generation are counted from the moment its prompt was first sent. Sampled answers depend on (seed, i)
    and the server. A server limits reset_bias to ±100, and masks [RESET] by as much, which is as good as -inf.

    Raises InputError as generate.stream does, and for a server that is not there, is none, has not that model, sends no
    token ids, refuses a request, or keeps failing.
    """
    server = look(url, model, timeout_s)
    server.vocab_size = MANY if vocab_size is None else vocab_size
    prefill = [[] for _ in prompts] if prefill is None else prefill
    sample_ids = list(range(len(prompts))) if sample_ids is None else sample_ids
    options = Options(
        reset_id=reset_id,
        stop_ids=sorted(set(stop_ids)),
        max_new_tokens=max_new_tokens,
        vocab_size=server.vocab_size,
        temperature=temperature,
        top_p=top_p,
        reset_bias=reset_bias,
        max_resets=0 if reset_id is None else max_resets,
        on_reset=on_reset,
    )
    check(options, prompts, prefill, sample_ids, server)
    if abs(reset_bias) > LIMIT:
        raise InputError(f"reset_bias is {reset_bias}; a server takes -{LIMIT:g} to {LIMIT:g}")
    if parallel < 1:
        raise InputError(f"parallel is {parallel}, must be at least 1")
    rows = [Record(row, prompt, list(prefill[row]), entries=0) for row, prompt in enumerate(prompts)]
    events = at_once(server, rows, options, [f"{seed}/{i}" for i in sample_ids], parallel)
    return held_back(events, hold_back, prefill)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_once(server: "Server", rows: list[Record], options: Options, seeds: list[str], parallel: int):
    """The events of all rows, `parallel` of which are being answered at a time, by a thread each."""
    waiting, events, over = deque(rows), queue.Queue(), threading.Event()

    def work() -> None:
        try:
            while not over.is_set():
                record = waiting.popleft()
                for event in answer(server, record, options, seeds[record.row]):
                    events.put(event)
                    if over.is_set():
                        return
        except IndexError:  # nobody waits any more
            return
        except Exception as error:  # raised again where somebody reads the events
            events.put(error)

    for _ in range(min(parallel, len(rows))):
        threading.Thread(target=work, daemon=True).start()
    left = len(rows)
    try:
        while left:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield event
    finally:  # also when nobody wants the rest
        over.set()


def answer(server: "Server", record: Record, options: Options, seed: str) -> Iterator[Token | Reset | Done]:
    """One row, request after request: what generate.decode does on a device."""
    start = time.perf_counter()
    for id in record.tokens:
        yield Token(record.row, id)
    while not record.done:
        context = record.prompt + retracted(record, options) + record.tokens
        for id in sampled(server, context, request_body(record, options), f"{seed}/{len(record.discarded)}"):
            if id >= options.vocab_size:
                raise InputError(f"{server.url}: sampled the id {id}, which the tokenizer has not: another model's?")
            if id == options.reset_id and len(record.discarded) == options.max_resets:
                raise InputError(f"{server.url}: said [RESET] where it was masked; does that server heed logit_bias?")
            yield from told(record, id, options, time.perf_counter() - start)


def retracted(record: Record, options: Options) -> list[int]:
    """What the retry sees of earlier attempts, between the prompt and itself."""
    if options.on_reset == "keep":
        return [id for attempt in record.discarded for id in [*attempt, options.reset_id]]
    return [options.reset_id] * len(record.discarded)


def request_body(record: Record, options: Options) -> dict:
    """What the server is asked to do in this attempt, but for the prompt."""
    body = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_new_tokens}
    # A server takes what is not said from the model's generation_config.json.
    body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    # It stops where we say, which is not at every eos_token_id; ids are what counts, text is not looked at.
    body |= {"ignore_eos": True, "stop_token_ids": list(options.stop_ids)}
    body |= {"stream": True, "return_token_ids": True, "skip_special_tokens": False}
    if options.reset_id is None:
        return body
    bias = options.reset_bias if len(record.discarded) < options.max_resets else -LIMIT
    return body | {
        "stop_token_ids": [*options.stop_ids, options.reset_id],
        "logit_bias": {str(options.reset_id): bias},
    }


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Server:
    url: str
    name: str  # of the model
    max_position_embeddings: int
    timeout_s: float
    vocab_size: int = MANY  # servers do not say; as far as it is known


class TryAgain(Exception):
    """What went wrong with a request may not go wrong the next time."""


def sampled(server: Server, prompt: list[int], body: dict, seed: str) -> Iterator[int]:
    """The ids that the server samples after `prompt`, one by one; the id that it stopped at is the last."""
    ids: list[int] = []
    failures = 0
    while True:
        number = random.Random(f"{seed}/{len(ids)}").getrandbits(31)
        rest = {"prompt": prompt + ids, "max_tokens": body["max_tokens"] - len(ids), "seed": number}
        try:
            for id in completion(server, {"model": server.name} | body | rest):
                ids.append(id)
                failures = 0
                yield id
                if id in body["stop_token_ids"] or len(ids) == body["max_tokens"]:
                    return
            raise TryAgain("the answer broke off")
        except TryAgain as error:
            failures += 1
            wait(server, error, failures)


def first_ids(server: Server, prompt: list[int], count: int) -> tuple[list[int], list[dict[int, float]]]:
    """The first ids of the greedy answer, and for each of them {id: logprob} of the likeliest there."""
    body = {"model": server.name, "prompt": prompt, "max_tokens": count, "temperature": 0.0, "ignore_eos": True}
    body |= {"logprobs": 20, "return_tokens_as_token_ids": True, "return_token_ids": True}
    for failures in range(1, TRIES + 1):
        try:
            said = as_json(b"".join(answered(server.url, "/v1/completions", server.timeout_s, body)))
            choice = said["choices"][0]
            likeliest = choice["logprobs"]["top_logprobs"]
            return choice["token_ids"], [{int(k.removeprefix("token_id:")): v for k, v in d.items()} for d in likeliest]
        except TryAgain as error:
            wait(server, error, failures)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise InputError(f"{server.url}: sends no token ids with its logprobs; vLLM does from 0.10.2 on") from None


def wait(server: Server, error: TryAgain, failures: int) -> None:
    """Before the next try, longer each time. InputError if there have been enough."""
    if failures == TRIES:
        raise InputError(f"{server.url}: {error}, {TRIES} times in a row; is the server well?")
    time.sleep(WAIT_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0))


def completion(server: Server, body: dict) -> Iterator[int]:
    """One request's ids as they come. Raises TryAgain, or InputError for what will not get better."""
    for line in answered(server.url, "/v1/completions", server.timeout_s, body):
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        chunk = as_json(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise TryAgain(complaint(chunk))
        choices = chunk.get("choices") or [{}]  # a last chunk may count tokens and nothing else
        read = choices[0].get("prompt_token_ids")
        if read is not None and read != body["prompt"]:
            raise InputError(f"{server.url}: the server changed the prompt's ids; send requests to vLLM itself")
        ids = choices[0].get("token_ids")
        if ids is None and choices[0].get("text"):
            raise InputError(f"{server.url}: the server sends no token ids; vLLM does from 0.10.2 on")
        yield from ids or []


def served(url: str, timeout_s: float = 300.0) -> dict[str, int]:
    """Name of a model that the server has -> most positions there. InputError if there is no such server."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: no address of a server; it looks like http://127.0.0.1:8000")
    try:
        listed = as_json(b"".join(answered(root_of(url), "/v1/models", min(timeout_s, 30.0))))
        return {entry["id"]: entry.get("max_model_len") or MANY for entry in listed["data"]}
    except TryAgain as error:
        raise InputError(f"{url}: {error}; is the server up, and is that its address?") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{url}: lists no models as vLLM does; is that a vLLM server?") from None


def look(url: str, model: str, timeout_s: float = 300.0) -> Server:
    """The server at `url`, if it has that model; else InputError."""
    found = served(url, timeout_s)
    if model not in found:
        raise InputError(f"{url}: does not serve {model!r}; it serves {', '.join(found) or 'nothing'}")
    return Server(root_of(url), model, found[model], timeout_s)


def look_for(url: str, ckpt: str) -> Server:
    """The server that has this checkpoint: as its only model, or under the path that we know it by."""
    found = list(served(url))
    return look(url, found[0] if len(found) == 1 else str(ckpt))


def root_of(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def answered(root: str, path: str, timeout_s: float, body: dict | None = None) -> Iterator[bytes]:
    """The lines of a server's answer; body: what is posted. Raises TryAgain and InputError, see `completion`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(root + path, data, {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=timeout_s) as response:
            yield from response
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code}: {complaint(as_json(error.read(100_000), {}))}"
        if error.code in (408, 429) or error.code >= 500:
            raise TryAgain(said) from None
        raise InputError(f"{root}{path}: {said}") from None
    except urllib.error.URLError as error:
        raise TryAgain(str(error.reason)) from None
    except TimeoutError:
        raise TryAgain(f"no word from the server for {timeout_s:g} seconds") from None
    except (OSError, HTTPException) as error:
        raise TryAgain(f"the connection broke ({error or type(error).__name__})") from None


def as_json(data: bytes, otherwise: dict | None = None):
    try:
        return json.loads(data)
    except ValueError:
        if otherwise is None:
            raise TryAgain("it answers with something else than JSON") from None
        return otherwise


def complaint(said: object) -> str:
    """The message in a server's error, on one line."""
    error = said.get("error", said) if isinstance(said, dict) else said
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message or "no reason given").split())[:300]
