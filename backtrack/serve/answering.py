"""One request to `python -m backtrack.serve`, from the first job to the last chunk: which text may be sent, and its form.

shown = Shown(tok, …); shown.add(event)                   # a choice's events become text that is safe to send
answering = Answering(service, wanted, chat=True)         # all choices of a request
await answering.whole(request) or answering.events()      # OpenAI's object, or the lines of a stream
answering.close()
"""

import asyncio
import json
import time
import uuid
from collections import deque

from starlette.requests import ClientDisconnect

from backtrack.generate import Done, Reset
from backtrack.serve.engine import Job
from backtrack.serve.request import Refusal, Wanted
from model import InputError


class Shown:
    """What of an answer may be sent: text that no [RESET] can take back, or that is `hold_back` tokens old.

    Once the resets are used up nothing can be taken back: from then on text is sent at once. Stop strings count in
    this text only. In what may still be taken back they would cut an answer off before its [RESET].
    """

    def __init__(self, tok, max_resets: int, hold_back: float, stop: list[str]):
        self.tok, self.max_resets, self.hold_back, self.stop = tok, max_resets, hold_back, stop
        self.resets = self.retracted = 0  # retracted: tokens
        self.finish_reason: str | None = None
        self.begin()

    def begin(self) -> None:
        self.held: deque[int] = deque()  # sampled, but may not be sent yet
        self.ids: list[int] = []  # may be sent
        self.start = self.read = 0  # ids[:read] are in `text`; those from `start` on are decoded with what follows
        self.text = self.sent = ""

    def add(self, event) -> tuple[str, str]:
        """(text to send now, text sent before that the client has to forget). Sets finish_reason at the end."""
        if isinstance(event, Reset):
            forget = self.sent
            self.resets += 1
            self.retracted += len(event.discarded)
            self.begin()
            return "", forget
        done = isinstance(event, Done)
        if done:
            self.finish_reason = event.generation.finish_reason
        else:
            self.held.append(event.id)
        n = 0 if done or self.resets == self.max_resets else self.hold_back
        while len(self.held) > n:
            self.ids.append(self.held.popleft())
        new = self.tok.decode(self.ids[self.start :])
        if done or not new.endswith("\ufffd"):  # a character whose last bytes are still to come
            self.text += new[len(self.tok.decode(self.ids[self.start : self.read])) :]
            self.start, self.read = self.read, len(self.ids)
        end = len(self.text) if done else len(self.text) - max(map(len, self.stop), default=1) + 1
        found = [self.text.find(string) for string in self.stop if string in self.text]
        if found:
            end, self.finish_reason = min(found), "stop"
        before, self.sent = len(self.sent), self.text[: max(end, 0)]
        return self.sent[before:], ""


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
