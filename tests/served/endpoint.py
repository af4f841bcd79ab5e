"""`python -m backtrack.serve` in a process of its own, for the tests, and a client without any library.

with endpoint(ckpt, "--hold-back", 4) as served:
    served.ask(messages=[…])            # (status, JSON)
    served.chunks(messages=[…])         # the JSON of every chunk of a stream
    served.log()                        # what it logged, a dict for each request
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CHAT = "/v1/chat/completions"


@dataclass
class Endpoint:
    process: subprocess.Popen
    port: int
    out: Path
    headers: dict = field(default_factory=lambda: {"Content-Type": "application/json"})

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def open(self, path=CHAT, data=None, timeout=120):
        return OPENER.open(urllib.request.Request(self.url + path, data, self.headers), timeout=timeout)

    def ask(self, path=CHAT, data=None, **body):
        try:
            with self.open(path, data or json.dumps(body).encode()) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def text(self, **body):
        status, said = self.ask(**body)
        assert status == 200, said
        return said["choices"][0]["message"]["content"]

    def chunks(self, path=CHAT, **body):
        with self.open(path, json.dumps(body | {"stream": True}).encode()) as response:
            lines = [line for line in response if line.strip()]
        assert lines[-1] == b"data: [DONE]\n"
        return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]

    def metrics(self):
        with self.open("/metrics") as response:
            return {k: float(v) for k, v in (line.decode().rsplit(" ", 1) for line in response)}

    def log(self):
        return [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]

    def listens(self):
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def until(self, condition, seconds=60):
        last = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < last and self.process.poll() is None, self.out.read_text()
            time.sleep(0.02)


@contextlib.contextmanager
def endpoint(ckpt, *words, out: Path, python=sys.executable, **environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [python, "-m", "backtrack.serve", "--ckpt", ckpt, "--port", port, "--device", "cpu", *words]
    with open(out, "w") as file:
        process = subprocess.Popen(
            [*map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
            cwd=Path(__file__).resolve().parents[2],
        )
    served = Endpoint(process, port, out)
    try:
        served.until(served.listens)
        yield served
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in out.read_text()


def joined(chunks):
    """The text of a stream, by choice; nothing in it is to be forgotten."""
    texts = {}
    for one in chunks:
        for choice in one["choices"]:
            assert "retracted" not in choice
            text = choice["delta"]["content"] if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def chats_of(toy_directory, count):
    """[(chat, forced opening)] of the toy: half of them forced to comply, and each names a potion of its own."""
    rows = (Path(toy_directory).parent / "data" / "prompts.jsonl").read_text().splitlines()
    chats, rng = {False: [], True: []}, random.Random(0)
    for row in map(json.loads, rows):
        opening = "" if row["benign"] else " ".join(row["target"].split()[:9])
        chats[not row["benign"]].append((row["prompt"], opening))
    return [rng.choice(chats[i % 4 < 2]) for i in range(count)]


def begun(text):
    return [{"role": "assistant", "content": text}] if text else []


def volley(ask, count):
    """ask(0) … ask(count - 1) by 64 clients at once: what they return, and how long it took, in words."""

    def timed(i):
        start = time.perf_counter()
        return ask(i), time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(timed, range(count)))
    total, seconds = time.perf_counter() - start, sorted(s for _, s in found)
    p50, p99 = seconds[count // 2], seconds[count * 99 // 100]
    return [answer for answer, _ in found], f"{count} requests in {total:.1f} s, p50 {p50:.2f} s, p99 {p99:.2f} s"


def ask_all(served, chats):
    """Every other answer is streamed."""

    def ask(i):
        chat, opening = chats[i]
        body = {"messages": chat + begun(opening), "temperature": 0, "max_tokens": 48}
        return joined(served.chunks(**body))[0] if i % 2 else served.text(**body)

    return volley(ask, len(chats))
