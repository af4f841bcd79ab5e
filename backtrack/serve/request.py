"""What a client of `python -m backtrack.serve` may ask for: a request's JSON becomes ids and Options, or is refused.

Only the parameters named here are allowed: others, such as logit_bias, ignore_eos, min_tokens, bad_words or
stop_token_ids, can switch the defence off. Text never becomes a special token: tok.render and tok.encode see to it.
"""

import json
import uuid
from dataclasses import dataclass

from backtrack.sampling import Options, checked

LARGEST = 10**6  # more tokens than any model answers with
NUMBERS = {  # name -> kind, least and most
    "n": (int, 1, 16),
    "max_tokens": (int, 1, LARGEST),
    "max_completion_tokens": (int, 1, LARGEST),
    "temperature": (float, 0, 1000),
    "top_p": (float, 1e-9, 1),
    "seed": (int, -(2**63), 2**63),
}
OTHERS = {"model", "stream", "stream_options", "stop", "user", "metadata"}
# Allowed as long as they ask for nothing: some clients always send them.
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "store": False, "tools": []}


class Refusal(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclass
class Wanted:
    """A request, checked."""

    prompt: list[int]
    prefill: list[int]
    options: Options
    seeds: list[str]  # one for each choice
    stop: list[str]
    stream: bool
    usage: bool  # wanted at the end of a stream


def understand(data: bytes, chat: bool, name: str, tok, config, args) -> Wanted:
    """Raises Refusal and InputError. config: knows vocab_size and max_position_embeddings; name: the model's."""
    text = "messages" if chat else "prompt"
    body = parameters(data, text)
    if body.get("model", name) != name:
        raise Refusal(404, f"there is no model {body['model']!r}; this is {name!r}", "model")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and len(stop) <= 4 and all(isinstance(s, str) and 0 < len(s) < 1000 for s in stop)):
        raise Refusal(400, "stop must be up to 4 strings", "stop")
    if chat:
        prompt, prefill = ids_of_chat(tok, body.get(text), args.prefill)
    else:
        prompt, prefill = ids_of_text(tok, body.get(text)), []
    attempts = args.max_resets + 1 if args.on_reset == "keep" else 1
    room = (config.max_position_embeddings - len(prompt) - len(prefill) - args.max_resets) // attempts
    options = Options(
        reset_id=tok.reset_id,
        stop_ids=tok.stop_ids,
        vocab_size=tok.vocab_size,
        max_new_tokens=body.get("max_completion_tokens", body.get("max_tokens", max(1, min(args.max_tokens, room)))),
        temperature=float(body.get("temperature", 1.0)),
        top_p=float(body.get("top_p", 1.0)),
        reset_bias=args.reset_bias,
        max_resets=args.max_resets,
        on_reset=args.on_reset,
    )
    checked(options, [prompt], [prefill], None, 0, config)
    seed = body.get("seed", uuid.uuid4().int)
    seeds = [f"{seed}/{i}" for i in range(body.get("n", 1))]
    usage = bool(body.get("stream_options", {}).get("include_usage"))
    return Wanted(prompt, prefill, options, seeds, stop, body.get("stream", False), usage)


def parameters(data: bytes, text: str) -> dict:
    """A body's parameters, those that are null left out. text: the one that has the text."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in OTHERS | NUMBERS.keys() | {text} and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise Refusal(400, f"the parameter {name!r} is not allowed here", name)
        if name in NUMBERS:
            kind, least, most = NUMBERS[name]
            if type(value) not in (int, kind) or not least <= value <= most:
                raise Refusal(400, f"{name} must be {kind.__name__} from {least} to {most}", name)
    for name, kind in (("stream", bool), ("stream_options", dict), ("model", str)):
        if not isinstance(body.get(name, kind()), kind):
            raise Refusal(400, f"{name} must be {kind.__name__}", name)
    return body


def ids_of_chat(tok, messages, may_prefill: bool) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and of a beginning of the answer if the last message is one."""
    messages = messages if isinstance(messages, list) else []
    plain = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text")) for part in content)
        plain.append({"role": "system" if role == "developer" else role, "content": content})
    if not plain or plain[-1]["role"] != "assistant":
        return tok.render(plain), []
    if not may_prefill:
        raise Refusal(400, "the last message is the assistant's: a prefilled answer is not allowed here", "messages")
    return tok.render(plain[:-1]), tok.encode(plain[-1]["content"])


def ids_of_text(tok, prompt) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    if not isinstance(prompt, str):
        raise Refusal(400, "prompt must be one string", "prompt")
    return [tok.text_start_id, *tok.encode(prompt)]
