"""A logistic regression on disk: NAME.json says where it comes from, NAME.safetensors has its weights.

The refusal judge (refusals.py), the harm judge (harm.py) and the filter (evaluate/filter.py) are kept in this way.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.errors import InputError
from model.files import check_file, write_tensors, write_text


def minimise(parameters: list[torch.Tensor], loss: Callable[[], torch.Tensor], **options) -> None:
    """Change the parameters to the minimum of a smooth convex loss. options: of torch.optim.LBFGS."""
    optimizer = torch.optim.LBFGS(parameters, tolerance_change=0, line_search_fn="strong_wolfe", **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def files_of(name: str | Path) -> tuple[Path, Path]:
    """runs/refusal-judge or runs/refusal-judge.json -> the .json and the .safetensors."""
    stem = str(name).removesuffix(".json").removesuffix(".safetensors")
    return Path(f"{stem}.json"), Path(f"{stem}.safetensors")


def is_kind(about: Path, kind: str) -> bool:
    """Whether the .json file is of this kind."""
    try:
        return json.loads(about.read_text(encoding="utf-8")).get("kind") == kind
    except (OSError, ValueError, AttributeError):
        return False


def check_out(name: str | Path, kind: str) -> None:
    """Before the fit: refuse to overwrite anything but another one of this kind."""
    for path in files_of(name):
        check_file(path)
        if path.exists() and not is_kind(files_of(name)[0], kind):
            raise InputError(f"{path}: exists and is no {kind}; choose another --out")


def save(name: str | Path, tensors: dict[str, torch.Tensor], content: dict) -> Path:
    """Write both files; content needs a "kind". Returns the .json file."""
    about, file = files_of(name)
    write_tensors(tensors, file)
    write_text(json.dumps(content | {"weights_sha256": digest(file)}, indent=1, ensure_ascii=False) + "\n", about)
    return about


def load(name: str | Path, kind: str, use: Callable[[dict, dict[str, torch.Tensor]], object]):
    """use(content, tensors) of the two files. Raises InputError if they are damaged, or not of this kind."""
    about, file = files_of(name)
    if not is_kind(about, kind):
        raise InputError(f"{about}: is no {kind}")
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        if digest(file) != content["weights_sha256"]:
            raise InputError(f"{file}: does not belong to {about}; fit it again")
        return use(content, load_file(file))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{about}: not a whole {kind} ({error!r}); fit it again") from None


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
