"""A small completions server, in a thread: vLLM's protocol as far as remote.py uses it, and faults on demand.

    with serving(model, reset_id) as server:
        generate(server.url, "tiny", …)
        server.requests      # the bodies that were posted, in order
        server.faults        # functions of (handler, body), each used once in place of an answer

It samples with a forward pass over everything for each token: no cache, and none of the sampler's code.
"""

import contextlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


@dataclass
class Served:
    model: object
    name: str = "tiny"
    longest: int = 256
    key: str = ""
    url: str = ""
    requests: list = field(default_factory=list)
    faults: list = field(default_factory=list)
    lock: object = field(default_factory=threading.Lock)


def greedy(model, body):
    """Ids one by one, as a server would sample them that knows nothing of [RESET]."""
    ids = list(body["prompt"])
    for _ in range(body["max_tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        for id, bias in (body.get("logit_bias") or {}).items():
            logits[int(id)] += max(-100.0, min(100.0, bias))
        ids.append(int(logits.argmax()))
        yield ids[-1]
        if ids[-1] in body["stop_token_ids"]:
            return


def send(handler, code, data, kind="application/json"):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(code)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def chunk(handler, data: bytes):
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    handler.wfile.flush()


def event(ids, prompt=None, **more):
    data = {"choices": [{"text": "?", "token_ids": ids, "prompt_token_ids": prompt}]} | more
    return b"data: " + json.dumps(data).encode()


def begin_stream(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def at_once(handler, body, model):
    """The whole answer in one object, with the likeliest tokens of every place."""
    ids, likeliest = list(body["prompt"]), []
    for _ in range(body["max_tokens"]):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        best = logprobs.topk(body["logprobs"])
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        likeliest.append({f"token_id:{id}": logprob for id, logprob in found})
    choice = {"text": "?", "token_ids": ids[len(body["prompt"]) :], "logprobs": {"top_logprobs": likeliest}}
    send(handler, 200, {"choices": [choice]})


def stream(handler, body, model):
    begin_stream(handler)
    prompt = body["prompt"]
    for id in greedy(model, body):
        chunk(handler, event([id], prompt) + b"\n\n")
        prompt = None
    chunk(handler, b"data: [DONE]\n\n")
    chunk(handler, b"")


@contextlib.contextmanager
def serving(model, **about):
    served = Served(model, **about)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            pass

        def do_GET(self):
            if served.faults and getattr(served.faults[0], "__name__", "") == "get":
                return served.faults.pop(0)(self, None)
            send(self, 200, {"data": [{"id": served.name, "max_model_len": served.longest}]})

        def do_POST(self):
            if served.key and self.headers["Authorization"] != f"Bearer {served.key}":
                return send(self, 401, {"error": {"message": "no such key"}})
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.requests.append(body)
                fault = served.faults.pop(0) if served.faults else None
            with contextlib.suppress(ConnectionError):
                whole = not body.get("stream")
                fault(self, body) if fault else (at_once if whole else stream)(self, body, served.model)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
