"""An endpoint for OpenAI clients that takes unsafe answers back before anybody has read them.

    python -m backtrack.serve --ckpt runs/toy-0/sft                           # our sampler, on this machine
    python -m backtrack.serve --ckpt DIR --url http://127.0.0.1:8000          # in front of `vllm serve DIR`
    curl http://127.0.0.1:8100/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

It needs requirements-serve.txt. /v1/chat/completions, /v1/completions (text), /v1/models, /health, /metrics.

By default (--hold-back all) nothing that is taken back reaches a client: an answer is sent when it is finished, or
token by token once its resets are used up. --hold-back N sends text N tokens late. When text that was sent is taken
back, a streamed chunk says so: its choice has "retracted", the text to forget, and what follows is the retry. The last
chunk of a choice has "backtrack": {"resets": …, "retracted_tokens": …}.

Requests may only have known parameters, since others (logit_bias, ignore_eos, …) can switch the defence off. Stop
strings count in text that nothing can take back any more. max_tokens ends each attempt: a small one can end an unsafe
answer before its [RESET] would come, and then its beginning is shown.
"""

import argparse
import asyncio
import hmac
import json
import math
import signal
import socket
import sys
import time
import traceback
import uuid
from collections import Counter
from functools import partial

from backtrack.run.say import say
from backtrack.serve import arguments, remote
from backtrack.serve.engine import Answer, Refusal, start, understand
from model import InputError, errors

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route
except ImportError as missing:
    print(f"error: {missing}; run `pip install -r requirements-serve.txt`", file=sys.stderr)
    sys.exit(2)

LARGEST_BODY = 4 * 2**20  # bytes; no model reads as much
DRAIN_S = 300  # what runs at SIGTERM has so long to finish
EVENTS = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
ROLE = {"role": "assistant"}


async def completions(request: Request):
    check_key(request)
    state, data, chat = request.app.state, bytearray(), request.url.path == "/v1/chat/completions"
    async for part in request.stream():  # to its end, or the client would not read our answer
        data += part if len(data) <= LARGEST_BODY else b""
    if len(data) > LARGEST_BODY:
        raise Refusal(413, f"the body has more than {LARGEST_BODY} bytes")
    body, answers = await asyncio.to_thread(understand, bytes(data), chat, state)
    if state.running + len(answers) > state.args.queue:
        raise Refusal(429, f"{state.running} answers are on their way already; try again later")
    return partial(respond, state, chat, body, answers)  # Starlette calls it with the connection


async def models(request: Request):
    check_key(request)
    name, positions = request.app.state.name, request.app.state.config.max_position_embeddings
    model = {"id": name, "object": "model", "created": 0, "owned_by": "backtrack", "max_model_len": positions}
    return JSONResponse({"object": "list", "data": [model]})


async def metrics(request: Request):
    lines = {"queue": request.app.state.running, **request.app.state.counts}
    return PlainTextResponse("".join(f"backtrack_{name} {number:g}\n" for name, number in lines.items()))


def check_key(request: Request) -> None:
    given, key = request.headers.get("Authorization", "").removeprefix("Bearer "), request.app.state.key
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "the API key is missing or wrong")


async def refuse(request: Request, error: Exception):
    status, body = in_openai_form(error)
    request.app.state.counts[f'requests_total{{status="{status}"}}'] += 1
    return JSONResponse(body, status)


def in_openai_form(error: Exception) -> tuple[int, dict]:
    other = 400 if isinstance(error, InputError) else 499 if isinstance(error, ClientDisconnect) else 500
    status = getattr(error, "status_code", other)
    kind = {500: "server_error", 502: "upstream_error"}.get(status, "invalid_request_error")
    said = {"message": str(error) or repr(error), "type": kind, "param": getattr(error, "param", None), "code": None}
    return status, {"error": said}


async def respond(state, chat: bool, body: dict, answers: list[Answer], scope, receive, send) -> None:
    """Have the answers sampled; send them as they come, or all at the end. Counts and logs the request."""
    begun, first_s, status = time.perf_counter(), None, 499  # the client left, until we know better
    stream, left = body.get("stream", False), len(answers)
    kind = ("chat.completion" + ".chunk" * stream) if chat else "text_completion"
    about = {"id": f"backtrack-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": state.name}
    news, loop = asyncio.Queue(), asyncio.get_running_loop()  # pieces of answers, and exceptions

    def as_body(pieces: list[dict], where: str, **more) -> dict:
        for piece in pieces:
            role = piece.pop("role", {})
            if chat:
                piece[where] = role | {"content": piece.pop("text")}
        return about | {"choices": pieces} | more

    async def event(said: dict) -> None:
        await send({"type": "http.response.body", "body": f"data: {json.dumps(said)}\n\n".encode(), "more_body": True})

    state.running += len(answers)
    leaving = asyncio.create_task(client_leaves(receive, news))
    try:
        if stream:
            await send(EVENTS)
        for answer in answers:
            answer.tell = partial(loop.call_soon_threadsafe, news.put_nowait)
            if stream and chat:
                await event(as_body([answer.piece("", role=ROLE)], "delta"))
            state.jobs.put(answer)
        while left:
            piece = await news.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece["finish_reason"] is not None
            if piece["text"] and first_s is None:
                first_s = time.perf_counter() - begun
            if stream:
                await event(as_body([piece], "delta"))
        status = 200
        read, said = len(answers[0].prompt + answers[0].prefill), sum(len(answer.ids) for answer in answers)
        usage = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
        if not stream:
            whole = as_body([answer.piece(answer.sent, role=ROLE) for answer in answers], "message", usage=usage)
            await JSONResponse(whole)(scope, receive, send)
        elif body.get("stream_options", {}).get("include_usage"):
            await event(as_body([], "delta", usage=usage))
    except Exception as error:
        status, said = in_openai_form(error)
        if status == 500:  # a bug
            traceback.print_exception(error)
        await (event(said) if stream else JSONResponse(said, status)(scope, receive, send))
    finally:
        leaving.cancel()
        for answer in answers:
            answer.over = True
        state.running -= len(answers)
        note(state, about["id"], status, answers, first_s, time.perf_counter() - begun)
    if stream:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def client_leaves(receive, news: asyncio.Queue) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    news.put_nowait(ClientDisconnect("the client left"))


def note(state, id: str, status: int, answers: list[Answer], first_s: float | None, seconds: float) -> None:
    """Into the metrics and the log."""
    found = {"tokens": sum(len(answer.ids) for answer in answers)}
    found |= {name: sum(getattr(answer, name) for answer in answers) for name in ("resets", "retracted_tokens")}
    state.counts.update({f"{name}_total": number for name, number in found.items()})
    state.counts[f'requests_total{{status="{status}"}}'] += 1
    for name, value in (("first", first_s), ("last", seconds)):
        if value is not None:
            state.counts.update({f"{name}_token_seconds_sum": value, f"{name}_token_seconds_count": 1})
    line = {"id": id, "status": status, **found, "seconds": round(seconds, 4)}
    if state.args.log_text:
        line |= {"prompt": state.tok.decode(answers[0].prompt), "texts": [answer.sent for answer in answers]}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m backtrack.serve", description=__doc__, formatter_class=errors.Help)
    arguments.add_model(parser)
    add, positive = parser.add_argument, errors.positive
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=errors.between(1, 65535), default=8100, help="port to listen on")
    add("--name", help="what clients call the model; --ckpt by default")
    add("--client-key-env", metavar="NAME", help="environment variable with the key that clients must send")
    late = "tokens that text is sent late, or all: only what cannot be taken back"
    add("--hold-back", type=hold_back, default="all", metavar="all|N", help=late)
    add("--prefill", action="store_true", help="allow a last message of the assistant: the answer begins with it")
    add("--max-tokens", type=positive, default=512, help="of an attempt, where a request does not say")
    add("--parallel", type=positive, default=64, help="most answers sampled at once")
    add("--queue", type=positive, default=256, help="most answers sampled or waiting; beyond that clients get 429")
    add("--log-text", action="store_true", help="log prompts and answers too")
    args = parser.parse_args()
    key = arguments.secret(args.client_key_env)
    tok, model = arguments.load(args)
    if args.url:
        model.vocab_size = tok.vocab_size
        remote.check_bias(args.reset_bias)
    paths = [Route(f"/v1/{path}", completions, methods=["POST"]) for path in ("chat/completions", "completions")]
    paths += [Route("/v1/models", models), Route("/metrics", metrics)]
    paths.append(Route("/health", JSONResponse({"status": "ok"})))
    refused = (InputError, HTTPException, ClientDisconnect, Exception)
    app = Starlette(routes=paths, exception_handlers=dict.fromkeys(refused, refuse))
    state = app.state
    state.args, state.key, state.tok, state.name = args, key, tok, args.name or args.ckpt
    state.config, state.jobs = (model if args.url else model.config), start(model, args.parallel)
    state.running, state.counts = 0, Counter()  # answers that are sampled or wait; /metrics
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        raise InputError(f"{args.host}:{args.port}: {error.strerror}; choose another --port") from None
    say(f"{state.name}: http://{args.host}:{args.port}/v1")
    # uvicorn finishes what runs, takes no more, and raises the signal again: then we leave with 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=DRAIN_S)


def hold_back(text: str) -> float:
    return math.inf if text == "all" else errors.not_negative(int)(text)


if __name__ == "__main__":
    errors.run(main)
