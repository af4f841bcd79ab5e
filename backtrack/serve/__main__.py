"""An endpoint for OpenAI clients that takes unsafe answers back before anybody has read them.

    python -m backtrack.serve --ckpt runs/toy-0/sft                                # our sampler, on this machine
    python -m backtrack.serve --ckpt DIR --url http://127.0.0.1:8000               # in front of `vllm serve DIR`
    curl http://127.0.0.1:8100/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "runs/toy-0/sft", "messages": [{"role": "user", "content": "Hello"}], "stream": true}'

It needs requirements-serve.txt. /v1/chat/completions, /v1/completions (text), /v1/models, /health, /metrics.

By default (--hold-back all) nothing that is taken back reaches a client: an answer is sent when it is finished, or
token by token once its resets are used up. --hold-back N sends text N tokens late. When text that was sent is taken
back, a streamed chunk says so: its choice has "retracted", the text to forget, and what follows is the retry.

Every choice has "backtrack": {"resets": …, "retracted_tokens": …}. Requests may only have the parameters that are known
here, since others (logit_bias, ignore_eos, stop_token_ids, …) can switch the defence off. Stop strings count in text
that nothing can take back any more. max_tokens ends each attempt, also one that would have been taken back later.
"""

import argparse
import asyncio
import hmac
import math
import signal
import sys
from collections import Counter

from backtrack.run.say import say
from backtrack.serve import arguments, engine, remote
from backtrack.serve.request import Refusal, understand
from model import InputError, errors

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    from backtrack.serve.answering import Answering, as_refusal
except ImportError as missing:
    print(f"error: {missing}; run `pip install -r requirements-serve.txt`", file=sys.stderr)
    sys.exit(2)

LARGEST_BODY = 4 * 2**20  # bytes; no model reads as much
DRAIN_S = 300  # what runs at SIGTERM has so long to finish
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, math.inf)  # seconds, of /metrics


class Service:
    def __init__(self, args, tok, model):
        self.args, self.tok, self.name = args, tok, args.name or args.ckpt
        self.config = model if isinstance(model, remote.Server) else model.config
        self.jobs = engine.start(model, args.parallel)
        self.key = arguments.secret(args.client_key_env)
        self.running = 0  # choices that are sampled or wait
        self.counts: Counter = Counter()  # /metrics: a line's name and labels -> its number

    def observe(self, name: str, seconds: float) -> None:
        """Into the histogram of that name."""
        self.counts[f"{name}_sum"] += seconds
        self.counts[f"{name}_count"] += 1
        for bucket in BUCKETS:
            self.counts[f'{name}_bucket{{le="{bucket if bucket < math.inf else "+Inf"}"}}'] += seconds <= bucket


class Stream(StreamingResponse):
    """Closes its Answering when all is sent or the client has left."""

    def __init__(self, answering: Answering):
        super().__init__(answering.events(), media_type="text/event-stream")
        self.answering = answering

    async def __call__(self, *connection) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self.answering.close()


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def guarded(path):
    """Answers who has the key, with errors in OpenAI's form."""

    async def answer(request: Request):
        service = request.app.state.service
        try:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if service.key and not hmac.compare_digest(given.encode(), service.key.encode()):
                raise Refusal(401, "the API key is missing or wrong")
            return await path(request, service)
        except Exception as error:
            refusal = as_refusal(error, 400)
            if refusal.status == 500:
                say(refusal.body["error"]["message"])
            service.counts[f'backtrack_refusals_total{{status="{refusal.status}"}}'] += 1
            return JSONResponse(refusal.body, refusal.status)

    return answer


async def completions(request: Request, service: Service):
    data, chat = bytearray(), request.url.path == "/v1/chat/completions"
    async for part in request.stream():  # to its end, or the client would not read our answer
        data += part if len(data) <= LARGEST_BODY else b""
    if len(data) > LARGEST_BODY:
        raise Refusal(413, f"the body has more than {LARGEST_BODY} bytes")
    about = service.name, service.tok, service.config, service.args
    wanted = await asyncio.to_thread(understand, bytes(data), chat, *about)
    if service.running + len(wanted.seeds) > service.args.queue:
        raise Refusal(429, f"{service.running} answers are on their way already; try again later")
    answering = Answering(service, wanted, chat)
    if wanted.stream:
        return Stream(answering)
    try:
        return JSONResponse(await answering.whole(request))
    except InputError as error:
        raise as_refusal(error, 502) from None
    finally:
        answering.close()


async def models(request: Request, service: Service):
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "backtrack"}
    model["max_model_len"] = service.config.max_position_embeddings
    return JSONResponse({"object": "list", "data": [model]})


async def no_such_path(request: Request, error: HTTPException):
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.body, refusal.status)


async def health(request: Request):
    return JSONResponse({"status": "ok"})


async def metrics(request: Request):
    service = request.app.state.service
    lines = {"backtrack_queue": service.running, **service.counts}
    return PlainTextResponse("".join(f"{name} {number:g}\n" for name, number in lines.items()))


# ── Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    tok, model = arguments.load(args)
    if args.url:
        model.vocab_size = tok.vocab_size
        remote.check_bias(args.reset_bias)
    post = ["POST"]
    paths = [Route(f"/v1/{path}", guarded(completions), methods=post) for path in ("chat/completions", "completions")]
    paths += [Route("/v1/models", guarded(models)), Route("/health", health), Route("/metrics", metrics)]
    app = Starlette(routes=paths, exception_handlers={HTTPException: no_such_path})
    app.state.service = Service(args, tok, model)
    if args.host not in ("127.0.0.1", "::1", "localhost") and not args.client_key_env:
        say(f"warning: everybody who reaches {args.host} may ask; --client-key-env NAME asks for a key")
    say(f"{app.state.service.name}: http://{args.host}:{args.port}/v1")
    # uvicorn finishes what runs, takes no more, and raises the signal again: then we leave with 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=DRAIN_S)


def hold_back(text: str) -> float:
    return math.inf if text == "all" else errors.not_negative(int)(text)


if __name__ == "__main__":
    errors.run(main)
