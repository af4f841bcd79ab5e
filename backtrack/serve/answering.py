"""One request to `python -m backtrack.serve`, from its first job to its last chunk.

answering = Answering(service, wanted, chat=True)         # all choices of a request
await answering.whole(request) or answering.events()      # OpenAI's object, or the lines of a stream
answering.close()
"""

import asyncio
import json
import time
import uuid

from starlette.requests import ClientDisconnect

from backtrack.serve.engine import Job, Shown
from backtrack.serve.request import Refusal, Wanted
from model import InputError


class Answering:
    """One request on its way. Whoever makes one calls close() in the end, whatever happens."""

    def __init__(self, service, wanted: Wanted, chat: bool):
        self.service, self.wanted, self.chat = service, wanted, chat
        self.id, self.created, self.start = f"backtrack-{uuid.uuid4().hex}", int(time.time()), time.perf_counter()
        self.first_s: float | None = None  # seconds until there was text to send
        self.status = 499  # the client left, until we know better
        self.texts = ["" for _ in wanted.seeds]
        how = service.tok, wanted.options.max_resets, service.args.hold_back, wanted.stop
        self.shown = [Shown(*how) for _ in wanted.seeds]
        self.news: asyncio.Queue = asyncio.Queue()  # (choice, event), from the sampler's threads
        loop = asyncio.get_running_loop()
        self.jobs = []
        for i, seed in enumerate(wanted.seeds):

            def tell(event, i=i):
                loop.call_soon_threadsafe(self.news.put_nowait, (i, event))

            self.jobs.append(Job(wanted.prompt, wanted.prefill, wanted.options, seed, tell))
            service.jobs.put(self.jobs[-1])
        service.running += len(self.jobs)

    async def pieces(self):
        """(choice, text to send, text to forget) as they come, until all choices are finished."""
        while any(shown.finish_reason is None for shown in self.shown):
            i, event = await self.news.get()
            if isinstance(event, Exception):
                self.status = as_refusal(event, 502).status
                raise event
            shown = self.shown[i]
            if shown.finish_reason is not None:  # at a stop string
                continue
            text, forget = shown.add(event)
            self.jobs[i].left = shown.finish_reason is not None
            self.texts[i] = text if forget else self.texts[i] + text
            if text and self.first_s is None:
                self.first_s = time.perf_counter() - self.start
            if text or forget or shown.finish_reason:
                yield i, text, forget
        self.status = 200

    async def whole(self, request) -> dict:
        async def leaves():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.news.put_nowait((0, ClientDisconnect()))

        leaving = asyncio.create_task(leaves())
        try:
            async for _ in self.pieces():
                pass
        finally:
            leaving.cancel()
        return self.body([self.choice(i, "message", text) for i, text in enumerate(self.texts)], usage=True)

    async def events(self):
        """The lines of a stream."""
        if self.chat:
            for i in range(len(self.jobs)):
                yield line(self.body([self.choice(i, "delta", "", role="assistant")]))
        try:
            async for i, text, forget in self.pieces():
                yield line(self.body([self.choice(i, "delta", text, forget)]))
        except Exception as error:
            yield line(as_refusal(error, 502).body)
        else:
            if self.wanted.usage:
                yield line(self.body([], usage=True))
        yield b"data: [DONE]\n\n"

    def choice(self, i: int, where: str, text: str, forget: str = "", **more) -> dict:
        shown = self.shown[i]
        choice = {"index": i, "finish_reason": shown.finish_reason, "logprobs": None}
        if where == "message":
            more = {"role": "assistant"}
        choice |= {where: {"content": text} | more} if self.chat else {"text": text}
        if forget:
            choice["retracted"] = forget
        if shown.finish_reason is not None:
            choice["backtrack"] = {"resets": shown.resets, "retracted_tokens": shown.retracted}
        return choice

    def body(self, choices: list[dict], usage: bool = False) -> dict:
        kind = ("chat.completion" + ".chunk" * self.wanted.stream) if self.chat else "text_completion"
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name, "choices": choices}
        if usage:
            read, said = len(self.wanted.prompt) + len(self.wanted.prefill), self.tokens()
            body["usage"] = {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}
        return body

    def tokens(self) -> int:
        return sum(len(shown.ids) for shown in self.shown)

    def close(self) -> None:
        """Stop what is still being sampled; count and log the request."""
        for job in self.jobs:
            job.left = True
        service, seconds = self.service, time.perf_counter() - self.start
        resets, retracted = (sum(getattr(shown, name) for shown in self.shown) for name in ("resets", "retracted"))
        service.running -= len(self.jobs)
        service.counts[f'backtrack_requests_total{{status="{self.status}"}}'] += 1
        service.counts["backtrack_resets_total"] += resets
        service.counts["backtrack_retracted_tokens_total"] += retracted
        service.counts["backtrack_tokens_total"] += self.tokens()
        if self.first_s is not None:
            service.observe("backtrack_first_token_seconds", self.first_s)
        service.observe("backtrack_last_token_seconds", seconds)
        log = {"id": self.id, "status": self.status, "tokens": self.tokens(), "retracted_tokens": retracted}
        log |= {"resets": resets, "seconds": round(seconds, 4)}
        if service.args.log_text:
            log |= {"prompt": service.tok.decode(self.wanted.prompt), "texts": self.texts}
        print(json.dumps(log), flush=True)


def line(body: dict) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def as_refusal(error: Exception, status: int) -> Refusal:
    """status: what an InputError means here; other exceptions are bugs, or clients that have left."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(status, str(error), kind="invalid_request_error" if status == 400 else "upstream_error")
    if isinstance(error, ClientDisconnect):
        return Refusal(499, "the client left")
    return Refusal(500, f"the sampler failed: {error!r}", kind="server_error")
