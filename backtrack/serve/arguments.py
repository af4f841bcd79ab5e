"""Arguments that sample.py and `python -m backtrack.serve` share: which model answers, and how it may take it back."""

import os
import re
from pathlib import Path

import torch

from backtrack.run.say import warn_of_slow_bfloat16
from backtrack.serve import remote
from model import InputError, errors, load_model, load_tokenizer


def add_model(parser) -> None:
    on, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    add = parser.add_argument
    add("--ckpt", required=True, help="Hugging Face model directory, e.g. the --out of train.py")
    add("--url", help="a vLLM server that has the model; --ckpt is then for its tokenizer")
    add("--api-key-env", metavar="NAME", help="environment variable with the key of the server of --url")
    timeout = "seconds that the server of --url may be silent before we ask again"
    add("--timeout", type=errors.ABOVE_ZERO, default=remote.TIMEOUT_S, help=timeout)
    add("--device", type=errors.device, default=on, help="of PyTorch")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default=dtype, help="of weights and computation")
    add("--reset-bias", type=errors.BIAS, default=0.0, help="added to the logit of [RESET]")
    add("--max-resets", type=errors.RESETS, default=1, help="after so many, [RESET] is masked")
    what = ("truncate", "keep")
    add("--on-reset", choices=what, default="truncate", help="forget what was retracted or keep it")


def load(args):
    """The tokenizer, and the model or the Server that has it."""
    check_place(Path(args.ckpt))
    tok = load_tokenizer(args.ckpt)
    if args.url:
        return tok, remote.look_for(args.url, args.ckpt, args.timeout, secret(args.api_key_env))
    warn_of_slow_bfloat16(args.dtype, args.device)
    return tok, load_model(args.ckpt, args.device, getattr(torch, args.dtype))


def check_place(ckpt: Path) -> None:
    """Where there is no checkpoint, say how to make it or which ones lie inside."""
    toy = re.search(r"toy-(\d+)/(base|sft|dpo)(-baseline)?$", str(ckpt))
    if toy and not ckpt.exists():
        raise InputError(f"{ckpt} is not there yet; `make train-{toy[2]}{toy[3] or ''} SEED={toy[1]}` makes it")
    inside = [str(path.parent) for path in sorted(ckpt.glob("*/config.json"))]
    if inside and not (ckpt / "config.json").exists():
        raise InputError(f"{ckpt} is no checkpoint; inside are {', '.join(inside)}")


def secret(name: str | None) -> str | None:
    """A key that is kept in an environment variable: command lines can be read by other users."""
    if name and not os.environ.get(name):
        raise InputError(f"the environment has no {name}, which should hold the key")
    return os.environ[name] if name else None
