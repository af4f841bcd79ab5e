"""The sampler in front of a vLLM server: generate.py's answers and events, from the server's completions.

    from backtrack.remote import generate
    generate("http://127.0.0.1:8000", "runs/toy-0/sft", prompts, reset_id=tok.reset_id, stop_ids=tok.stop_ids, …)

    vllm serve runs/toy-0/sft                                              # the server, on any machine
    python sample.py --ckpt runs/toy-0/sft --url http://127.0.0.1:8000     # --ckpt names the tokenizer
    python -m backtrack.serve --ckpt runs/toy-0/sft --url …                # an endpoint for OpenAI clients

The server does not know [RESET]. We ask it to stop there, and send the retry as another request: prompt ⊕ [RESET]^r, or
with on_reset="keep" all that was taken back as well. Prompts and answers are ids both ways (return_token_ids, vLLM
0.10.2 or newer): text is never encoded again. Greedy answers equal ours where both compute in fp32. A request that
fails is sent again with the tokens that had come: the answer goes on where it broke off.
"""

import json
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException

from backtrack.generate import Done, Generation, Record, Reset, Token, delay_tokens, ids_in_cache, in_order, note_token
from backtrack.run.say import say
from backtrack.sampling import Options, checked
from model import InputError

TRIES = 6  # of one request: about half a minute of waiting in all
WAIT_S = 1.0  # before the second try; twice as long before each one after it
TIMEOUT_S = 120.0  # a request has failed when the server sends nothing for so long
LIMIT = 100.0  # the largest logit_bias that servers take, in either direction
MANY = 2**31  # where no limit is known
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # one's own server is not behind a proxy


@dataclass
class Server:
    url: str
    name: str  # of the model
    max_position_embeddings: int
    timeout_s: float = TIMEOUT_S
    api_key: str | None = None
    vocab_size: int = MANY  # servers do not say


class TryAgain(Exception):
    """A request failed in a way that may not happen again."""


def generate(url: str, model: str, prompts: list[list[int]], **options) -> list[Generation]:
    """Answer every prompt (token ids). Options and errors as in `stream`; the Generations are in order."""
    return in_order(stream(url, model, prompts, **options), len(prompts))


def stream(
    url: str,
    model: str,
    prompts: list[list[int]],
    *,
    prefill: list[list[int]] | None = None,
    seed: int = 0,
    sample_ids: list[int] | None = None,
    parallel: int = 64,
    timeout_s: float = TIMEOUT_S,
    api_key: str | None = None,
    **options,
) -> Iterator[Token | Reset | Done]:
    """generate.stream behind a server's `url` and the name of a model there.

    parallel: most prompts that are with the server at once. api_key: sent as a bearer token. A request has failed when
    the server sends nothing for timeout_s. Sampled answers depend on (seed, i) and the server. Servers limit reset_bias
    to ±100; −100, which masks [RESET], is as good as −∞. Raises InputError as generate.stream does, and for a server
    that does not answer, is not vLLM, does not have that model, refuses a request, or keeps failing.
    """
    server = look_for(url, model, timeout_s, api_key, any_name=False)
    options = Options(**options)
    server.vocab_size = options.vocab_size or MANY
    prefill, seeds = checked(options, prompts, prefill, sample_ids, seed, server)
    check_bias(options.reset_bias)
    records = [Record(row, prompt, list(prefill[row]), entries=0) for row, prompt in enumerate(prompts)]
    return delay_tokens(in_parallel(server, records, options, seeds, parallel), options.hold_back, prefill)


def check_bias(reset_bias: float) -> None:
    if abs(reset_bias) > LIMIT:
        raise InputError(f"reset_bias is {reset_bias}; a server takes -{LIMIT:g} to {LIMIT:g}")


def in_parallel(server: Server, records: list[Record], options: Options, seeds: list[str], parallel: int):
    """The events of all records. Up to `parallel` threads answer one at a time each."""
    waiting, events, over = iter(records), queue.SimpleQueue(), threading.Event()  # the threads share one iterator

    def work() -> None:
        try:
            for record in waiting:
                for event in answer(server, record, options, seeds[record.row]):
                    if over.is_set():
                        return
                    events.put(event)
        except Exception as error:  # raised again by the thread that reads the events
            events.put(error)

    for _ in range(max(1, min(parallel, len(records)))):
        threading.Thread(target=work, daemon=True).start()
    left = len(records)
    try:
        while left:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield event
    finally:  # also when the caller stops reading
        over.set()


def answer(server: Server, record: Record, options: Options, seed: str) -> Iterator[Token | Reset | Done]:
    """The state machine: a request, and another one after each [RESET]; what generate.decode does on a device."""
    start = time.perf_counter()
    for id in record.tokens:
        yield Token(record.row, id)
    while not record.done:
        resets = len(record.discarded)
        for id in sampled(server, ids_in_cache(record, options), request_body(resets, options), f"{seed}/{resets}"):
            if options.vocab_size is not None and id >= options.vocab_size:
                raise InputError(f"{server.url}: sampled the id {id}, which the tokenizer has not: another model's?")
            if id == options.reset_id and resets == options.max_resets:
                raise InputError(f"{server.url}: said [RESET] where it was masked; does that server heed logit_bias?")
            yield from note_token(record, id, options, time.perf_counter() - start)


def request_body(resets: int, options: Options) -> dict:
    """What we ask of the server after so many resets, without the prompt."""
    body = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_new_tokens}
    # What we do not say the server takes from the model's generation_config.json.
    body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    # It stops at our ids only, which need not be all eos_token_ids.
    body |= {"ignore_eos": True, "stop_token_ids": list(options.stop_ids)}
    body |= {"stream": True, "return_token_ids": True, "skip_special_tokens": False}
    if options.reset_id is not None:
        body["stop_token_ids"].append(options.reset_id)
        body["logit_bias"] = {str(options.reset_id): options.reset_bias if resets < options.max_resets else -LIMIT}
    return body


def sampled(server: Server, prompt: list[int], body: dict, seed: str) -> Iterator[int]:
    """The ids that the server samples after `prompt`, one by one; the id that it stopped at is the last."""
    ids, failures = [], 0
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


def completion(server: Server, body: dict) -> Iterator[int]:
    """One request's ids as they come. Raises TryAgain, or InputError for what will not get better."""
    for line in answered(server, "/v1/completions", body):
        if not line.startswith(b"data: {"):  # an empty line, or "data: [DONE]"
            continue
        line = line.removeprefix(b"data: ")
        chunk = as_json(line)
        if "error" in chunk:
            raise TryAgain(complaint(line))
        choice = (chunk.get("choices") or [{}])[0]  # a last chunk may have token counts and no choice
        read = choice.get("prompt_token_ids")
        if read is not None and read != body["prompt"]:
            raise InputError(f"{server.url}: the server changed the prompt's ids; send requests to vLLM itself")
        ids = choice.get("token_ids")
        if ids is None and choice.get("text"):
            raise InputError(f"{server.url}: the server sends no token ids; vLLM does from 0.10.2 on")
        yield from ids or []


def first_ids(server: Server, prompt: list[int], count: int) -> tuple[list[int], list[dict[int, float]]]:
    """The first ids of the greedy answer, and for each of them {id: logprob} of the 20 likeliest there."""
    body = {"model": server.name, "prompt": prompt, "max_tokens": count, "temperature": 0.0, "ignore_eos": True}
    body |= {"logprobs": 20, "return_tokens_as_token_ids": True, "return_token_ids": True}
    for failures in range(1, TRIES + 1):
        try:
            choice = as_json(b"".join(answered(server, "/v1/completions", body)))["choices"][0]
            likeliest = choice["logprobs"]["top_logprobs"]
            return choice["token_ids"], [{int(k.removeprefix("token_id:")): v for k, v in d.items()} for d in likeliest]
        except TryAgain as error:
            wait(server, error, failures)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise InputError(f"{server.url}: sends no token ids with its logprobs; vLLM does from 0.10.2 on") from None


def wait(server: Server, error: TryAgain, failures: int) -> None:
    """Before the next try, longer each time. InputError after the last one."""
    if failures == TRIES:
        raise InputError(f"{server.url}: {error}, {TRIES} times in a row; is the server well?")
    seconds = WAIT_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
    say(f"{server.url}: {error}; try {failures + 1} of {TRIES} in {seconds:.1f} s")
    time.sleep(seconds)


def answered(server: Server, path: str, body: dict | None = None) -> Iterator[bytes]:
    """The lines of a server's answer; body: what is posted. Raises TryAgain and InputError, see `completion`."""
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        request = urllib.request.Request(server.url + path, json.dumps(body).encode() if body else None, headers)
        with OPENER.open(request, timeout=server.timeout_s) as response:
            yield from response
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code}: {complaint(error.read(100_000))}"
        if error.code in (408, 429) or error.code >= 500:
            raise TryAgain(said) from None
        raise InputError(f"{server.url}{path}: {said}") from None
    except TimeoutError:
        raise TryAgain(f"no word from the server for {server.timeout_s:g} seconds") from None
    except (OSError, HTTPException) as error:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise TryAgain(f"the connection broke ({why})") from None


def as_json(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        raise TryAgain("it answers with something else than JSON") from None


def complaint(data: bytes) -> str:
    """The message in a server's error, on one line."""
    try:
        said = str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = data.decode(errors="replace")
    return " ".join(said.split())[:300] or "no reason given"


def look_for(url: str, model: str, timeout_s=TIMEOUT_S, api_key: str | None = None, any_name: bool = True) -> Server:
    """The server at `url`, if it has that model: under that name or, with any_name, as its only one."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: not the address of a server; it looks like http://127.0.0.1:8000")
    server = Server(url.rstrip("/").removesuffix("/v1"), str(model), MANY, min(timeout_s, 30.0), api_key)
    try:
        listed = as_json(b"".join(answered(server, "/v1/models")))
        found = {entry["id"]: entry.get("max_model_len") or MANY for entry in listed["data"]}
    except TryAgain as error:
        raise InputError(f"{url}: {error}; is the server up, and is that its address?") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{url}: lists no models as vLLM does; is that a vLLM server?") from None
    if any_name and len(found) == 1:
        [server.name] = found
    if server.name not in found:
        raise InputError(f"{url}: does not serve {server.name!r}; it serves {', '.join(found) or 'nothing'}")
    server.max_position_embeddings, server.timeout_s = found[server.name], timeout_s
    return server
