"""How `python -m backtrack.serve` samples answers, and which of their text may be sent.

jobs = start(model, 64)     # a model that is here, or the Server that has it
jobs.put(Job(…, tell=…))    # tell(event) is called with each Token, Reset and Done
Shown(tok, …).add(event)    # the text that this event releases
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from backtrack.generate import Done, Record, Reset, decode
from backtrack.sampling import Options
from backtrack.serve import remote


@dataclass(eq=False)
class Job:
    prompt: list[int]
    prefill: list[int]
    options: Options
    seed: str
    tell: Callable  # called in another thread with every event, and with an Exception if it fails
    left: bool = False  # nobody waits for the answer any more


def start(model, most: int) -> queue.SimpleQueue:
    """Jobs put into the queue are answered, `most` at a time: by a vLLM server, or here in batches."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    if isinstance(model, remote.Server):
        for _ in range(most):
            threading.Thread(target=ask_server, args=(model, jobs), daemon=True).start()
    else:
        threading.Thread(target=answer_here, args=(model, jobs, most), daemon=True).start()
    return jobs


def ask_server(server: remote.Server, jobs: queue.SimpleQueue) -> None:
    def sampler(job: Job):
        return remote.answer(server, Record(0, job.prompt, list(job.prefill), entries=0), job.options, job.seed)

    while True:
        run([jobs.get()], sampler)


def answer_here(model, jobs: queue.SimpleQueue, most: int) -> None:
    """Whatever waits and has the same options is answered as one batch."""

    def sampler(*batch: Job):
        prompts, prefill, seeds = zip(*((job.prompt, job.prefill, job.seed) for job in batch), strict=True)
        return decode(model, prompts, prefill, batch[0].options, seeds)

    waiting: list[Job] = []
    while True:
        while not waiting or not jobs.empty():
            waiting.append(jobs.get())
        batch = [job for job in waiting if job.options == waiting[0].options][:most]
        waiting = [job for job in waiting if job not in batch]
        run(batch, sampler)


def run(batch: list[Job], sampler: Callable) -> None:
    """Tell each job its events, until all are done or left."""
    batch = [job for job in batch if not job.left]
    if not batch:
        return
    try:
        with closing(sampler(*batch)) as events:
            for event in events:
                if all(job.left for job in batch):
                    return
                if not batch[event.row].left:
                    batch[event.row].tell(event)
    except Exception as error:  # also a bug: whoever waits must hear of it
        for job in batch:
            if not job.left:
                job.tell(error)


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
