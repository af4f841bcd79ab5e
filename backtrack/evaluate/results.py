"""Result files: numbers, and where they come from.

write_result("results/toy-main.json", records=[…], paired=[…])
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from model.errors import InputError
from model.files import write_text


@contextlib.contextmanager
def naming(path: str | Path):
    """Turn an OSError, such as that of a full disk, into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot write it ({error.strerror or error}); make room, or choose another --out"
        ) from None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def made_by() -> dict:
    """What a result file says of its origin: command, commit, machine."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    package = max((i for i, part in enumerate(parts) if part == "backtrack"), default=len(parts) - 2)
    name = ".".join(part for part in parts[package + 1 :] if part != "__main__")
    where = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    where += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": " ".join([f"python -m backtrack.{name}", *sys.argv[1:]]),
        "commit": commit_of(Path(__file__)),
        "machine": f"{where}, torch {torch.__version__}",
    }


def commit_of(file: Path) -> str | None:
    """The commit of the repository that tracks this file. (An installed copy may lie in somebody else's.)"""
    git = ["git", "-C", str(file.parent)]
    try:
        for words in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "--short", "HEAD"]):
            said = subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip()


def print_records(records: list[dict]) -> None:
    """A line for each: all that is no list, such as an interval."""
    for r in records:
        cells = {
            name: f"{v:.4g}" if isinstance(v, float) else v for name, v in r.items() if not isinstance(v, list | tuple)
        }
        print("  ".join(f"{name} {value}" for name, value in cells.items()))


def write_result(path: str, **lists: list[dict]) -> None:
    """A result file: made_by() and lists of records, a line of JSON each, so that a diff shows what changed."""
    text = json.dumps(made_by(), indent=1)[:-2]
    for name, records in lists.items():
        lines = ",\n".join("  " + json.dumps(r) for r in records)
        text += f',\n "{name}": [\n{lines}\n ]'
    with naming(path):
        write_text(text + "\n}\n", path)
