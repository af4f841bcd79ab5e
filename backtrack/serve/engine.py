"""Threads that sample the answers of `python -m backtrack.serve`, and tell of them event by event.

jobs = start(model, 64)     # a model that is here, or the Server that has it
jobs.put(Job(…, tell=…))    # tell(event) is called with each Token, Reset and Done
"""

import queue
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from backtrack.generate import Record, decode
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
                batch[event.row].tell(event)
                if all(job.left for job in batch):
                    return
    except Exception as error:  # also a bug: whoever waits must hear of it
        for job in batch:
            job.tell(error)
