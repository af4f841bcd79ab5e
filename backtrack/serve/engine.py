"""The endpoint without its HTTP: what a request may ask, who samples its answers, and which text may be sent.

body, answers = understand(data, …)    # a request's JSON, checked: an Answer for each choice
jobs = start(model, 64)                # threads that sample with a model that is here, or a vLLM server
answers[0].tell = print                # will be called there with each piece of the answer that may be sent
jobs.put(answers[0])
"""

import json
import queue
import threading
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import closing

from backtrack.generate import Done, Record, Reset, decode
from backtrack.sampling import Options, checked
from backtrack.serve import remote
from model import InputError

# All that a request may have: its kind, least and most. Others, such as logit_bias, ignore_eos, min_tokens, bad_words
# or stop_token_ids, can switch the defence off.
PARAMETERS = dict.fromkeys(("messages", "prompt", "stop", "user", "metadata"), (object,))
PARAMETERS |= {
    "model": (str,),
    "stream": (bool,),
    "stream_options": (dict,),
    "n": (int, 1, 16),
    "max_tokens": (int, 1, 10**6),
    "max_completion_tokens": (int, 1, 10**6),
    "temperature": (float, 0, 1000),
    "top_p": (float, 1e-9, 1),
    "seed": (int, -(2**63), 2**63),
    "frequency_penalty": (float, 0, 0),  # clients send these three to ask for nothing
    "presence_penalty": (float, 0, 0),
    "logprobs": (bool, False, False),
}


class Refusal(InputError):
    """An error for the client, with its HTTP status and the parameter that is wrong."""

    def __init__(self, status_code: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status_code, self.param = status_code, param


def understand(data: bytes, chat: bool, state):
    """(a request's parameters, an Answer for each choice). Raises InputError for what is not allowed.

    state: the model's name, its tok, its config or the Server that has it, and args: those of the command line.
    Text never becomes a special token: tok.render and tok.encode see to it.
    """
    body, name, tok, args = parameters(data), state.name, state.tok, state.args
    if body.get("model", name) != name:
        raise Refusal(404, f"there is no model {body['model']!r}; this is {name!r}", "model")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    if not (isinstance(stop, list) and len(stop) <= 4 and all(isinstance(s, str) and 0 < len(s) < 1000 for s in stop)):
        raise Refusal(400, "stop must be up to 4 strings", "stop")
    prompt, prefill = ids_of(tok, body, chat)
    if prefill and not args.prefill:
        raise Refusal(400, "the last message is the assistant's: a prefilled answer is not allowed here", "messages")
    attempts = args.max_resets + 1 if args.on_reset == "keep" else 1
    room = (state.config.max_position_embeddings - len(prompt) - len(prefill) - args.max_resets) // attempts
    most = body.get("max_completion_tokens", body.get("max_tokens", max(1, min(args.max_tokens, room))))
    how = {name: getattr(tok, name) for name in ("reset_id", "stop_ids", "vocab_size")}
    how |= {name: getattr(args, name) for name in ("reset_bias", "max_resets", "on_reset", "hold_back")}
    how |= {name: body.get(name, 1.0) for name in ("temperature", "top_p")}
    options = Options(max_new_tokens=most, **how)
    checked(options, [prompt], [prefill], None, 0, state.config)
    seed, numbers = body.get("seed", uuid.uuid4().int), range(body.get("n", 1))
    return body, [Answer(tok, prompt, prefill, options, f"{seed}/{i}", stop, i) for i in numbers]


def parameters(data: bytes) -> dict:
    """Those of a body; what is null counts as left out."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        kind, *limits = PARAMETERS.get(name, (None,))
        if kind is None:
            raise Refusal(400, f"the parameter {name!r} is not allowed here", name)
        fits = kind is object or type(value) is kind or (kind is float and type(value) is int)
        if not fits or (limits and not limits[0] <= value <= limits[1]):
            between = " from {} to {}".format(*limits) if limits else ""
            raise Refusal(400, f"{name} must be {kind.__name__}{between}", name)
    return body


def ids_of(tok, body: dict, chat: bool) -> tuple[list[int], list[int]]:
    """The prompt, and the beginning of the answer if the last message is the assistant's."""
    given = body.get("messages" if chat else "prompt")
    if not chat:
        [text] = given if isinstance(given, list) and len(given) == 1 else [given]
        return [tok.text_start_id, *tok.encode(text)], []
    messages = []
    for message in given if isinstance(given, list) else []:
        role, content = map(message.get, ("role", "content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text")) for part in content)
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    if messages and messages[-1]["role"] == "assistant":
        return tok.render(messages[:-1]), tok.encode(messages[-1]["content"])
    return tok.render(messages), []


class Answer:
    """One choice of a request, and what of its text may be sent: what is `hold_back` tokens old, or final.

    After max_resets resets nothing can be taken back: from then on text is sent at once. Stop strings count in text
    that may be sent. In what may still be taken back they would cut an answer off before its [RESET].
    """

    def __init__(self, tok, prompt: list[int], prefill: list[int], options: Options, seed: str, stop=(), index=0):
        self.tok, self.prompt, self.prefill, self.options, self.seed = tok, prompt, prefill, options, seed
        self.stop, self.index = stop, index
        self.tell: Callable = print  # called with every `piece`, or with an exception
        self.over = False  # finished, or nobody waits for it any more
        self.finish_reason, self.resets, self.retracted_tokens = None, 0, 0
        self.begin()

    def begin(self) -> None:
        self.held: deque[int] = deque()  # may not be sent yet
        self.ids: list[int] = []  # may be sent
        self.start = self.read = 0  # ids[:read] are in `text`; those from `start` on are decoded with what follows
        self.text = self.sent = ""

    def add(self, event) -> None:
        """Tell the piece that this Token, Reset or Done releases."""
        if self.over:
            return
        if isinstance(event, Reset):
            self.resets += 1
            self.retracted_tokens += len(event.discarded)
            if self.sent:
                self.tell(self.piece("", retracted=self.sent))
            return self.begin()
        if isinstance(event, Done):
            self.over, self.finish_reason = True, event.generation.finish_reason
        else:
            self.held.append(event.id)
        n = 0 if self.over or self.resets == self.options.max_resets else self.options.hold_back
        while len(self.held) > n:
            self.ids.append(self.held.popleft())
        new = self.tok.decode(self.ids[self.start :])
        if self.over or not new.endswith("\ufffd"):  # a character whose last bytes are still to come
            self.text += new[len(self.tok.decode(self.ids[self.start : self.read])) :]
            self.start, self.read = self.read, len(self.ids)
        # The end of the text may be the beginning of a stop string.
        end = len(self.text) if self.over else max(0, len(self.text) - max(map(len, self.stop), default=1) + 1)
        found = [at for at in map(self.text.find, self.stop) if at >= 0]
        if found:
            end, self.over, self.finish_reason = min(found), True, "stop"
        before, self.sent = len(self.sent), self.text[:end]
        if self.over or end > before:
            self.tell(self.piece(self.sent[before:]))

    def piece(self, text: str, **more) -> dict:
        """A choice in OpenAI's form: text to send, or retracted, the text to forget."""
        if self.over:
            more["backtrack"] = {"resets": self.resets, "retracted_tokens": self.retracted_tokens}
        return {"index": self.index, "text": text, "finish_reason": self.finish_reason, **more}


def start(model, most: int) -> queue.SimpleQueue:
    """Answers put into the queue are sampled, `most` at once: here in batches, or by threads that each ask a server."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threads, size = (most, 1) if isinstance(model, remote.Server) else (1, most)
    for _ in range(threads):
        threading.Thread(target=sample_all, args=(model, jobs, size), daemon=True).start()
    return jobs


def sample_all(model, jobs: queue.SimpleQueue, size: int) -> None:
    """Sample what waits, for ever: up to `size` answers with the same options are one batch."""
    waiting: list[Answer] = []
    while True:
        while not waiting or (size > 1 and not jobs.empty()):
            waiting.append(jobs.get())
        waiting = [answer for answer in waiting if not answer.over]
        batch = [answer for answer in waiting if answer.options == waiting[0].options][:size]
        waiting = [answer for answer in waiting if answer not in batch]
        if batch:
            sample(model, batch)


def sample(model, batch: list[Answer]) -> None:
    """Hand every event to its answer, until all are over."""
    prompts, prefills, seeds = zip(*((a.prompt, a.prefill, a.seed) for a in batch), strict=True)
    options = batch[0].options
    try:
        if isinstance(model, remote.Server):
            events = remote.answer(model, Record(0, prompts[0], list(prefills[0]), 0), options, seeds[0])
        else:
            events = decode(model, prompts, prefills, options, seeds)
        with closing(events):
            for event in events:
                batch[event.row].add(event)
                if all(answer.over for answer in batch):
                    return
    except Exception as error:  # also a bug: whoever waits must hear of it
        for answer in batch:
            if not answer.over:
                answer.tell(Refusal(502, str(error)) if isinstance(error, InputError) else error)
