"""What the README says of the code is true: its line counts, the files and flags it names."""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from training import arguments, toy_files, visited

from backtrack.attacks.table import ATTACKERS

ROOT = Path(__file__).resolve().parents[1]
SUBCOMMANDS = ("sft", "dpo", "hh", "rows", "oasst", "oasst2", "prompts", *ATTACKERS, "table", "fit")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def length(file: str, name: str) -> int:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.end_lineno - node.lineno + 1
    raise AssertionError(f"{file} has no {name}")


def test_the_reading_list_counts_lines():
    rows = re.findall(r"^\| .* \| (.*) in ([\w/]+\.py) \| (\d+) \| .*\|$", README, flags=re.MULTILINE)
    assert len(rows) >= 8 and "`one_answer`" in rows[0][0]
    for names, file, stated in rows:
        assert int(stated) == sum(length(file, name) for name in re.findall(r"`(\w+)`", names)), names


def test_the_files_are_as_long_as_it_says():
    text = " ".join(README.split())
    for what, file in (
        (r"one training file \((\d+) lines", "train.py"),
        (r"a sampler \((\d+)\)", "backtrack/generate.py"),
        (r"Hugging Face weights \((\d+)\)", "model/transformer.py"),
    ):
        [stated] = re.findall(what, text)
        assert int(stated) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


def test_what_it_links_to_is_there():
    for file in ("README.md", "data/README.md", "results/README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#][^)]*)\)", text):
            if "://" not in link:
                assert ((ROOT / file).parent / link.split("#")[0]).exists(), f"{file}: {link}"


def commands_of_make_real(folder: Path) -> str:
    """What `make real` would run for either model, if all files that it names were there."""
    rules = "".join((ROOT / f"results/{name}.mk").read_text(encoding="utf-8") for name in ("real", "gemma"))
    (folder / "gptfuzz").mkdir()
    for name in re.findall(r"call source,([\w.-]+)", rules) + ["gptfuzz/train.csv", "gptfuzz/evaluate.csv"]:
        (folder / name).touch()
    said = ""
    for model in ("smollm2", "gemma3"):
        words = ["make", "-n", "real", f"MODEL={model}", f"DATA={folder}", f"RUNS={folder}/runs"]
        words += [f"RESULTS={folder}/results", f"HARM={folder}/harm"]
        said += subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^(?:\w+=\S+ )*\S*bin/python ", "python ", said.replace("\\\n", " "), flags=re.MULTILINE)


def test_the_flags_it_uses_exist(tmp_path):
    """Every `python … --flag` of the READMEs and of `make real`, asked of --help."""
    text = "\n".join((ROOT / f).read_text(encoding="utf-8") for f in ("README.md", "data/README.md"))
    text = text.replace("\\\n", " ") + commands_of_make_real(tmp_path)
    assert text.count("backtrack.evaluate.likelihoods") > 2
    helps: dict[tuple, str] = {}
    for line in re.findall(r"^(?:\$ )?python (.*)$", text, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        if words[:2] == ["-m", "pdb"]:
            words = words[2:]
        program = words[:2] if words[0] == "-m" else words[:1]
        rest = words[len(program) :]
        if program in (["-m", "pytest"], ["-m", "pip"]):
            continue
        sub = [rest[0]] if rest and rest[0] in SUBCOMMANDS else []
        command = (*program, *sub)
        flags = re.findall(r"(?<!\S)--[a-z-]+", " ".join(rest))
        if flags and command not in helps:
            helps[command] = help_of(program, sub)
        for flag in flags:
            assert flag in helps[command], f"{' '.join(command)} has no {flag}"
    assert len(helps) >= 6


def help_of(program: list[str], sub: list[str]) -> str:
    """What `python program sub --help` prints. In this process: each start of PyTorch takes seconds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what runs as a program here was imported before
        patch.setattr(sys, "argv", [program[-1], *sub, "--help"])
        with pytest.raises(SystemExit) as end:
            if program[0] == "-m":
                runpy.run_module(program[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    assert end.value.code in (0, None), said.getvalue()
    return said.getvalue()


def test_the_step_of_sft_to_debug_shows_the_method():
    """The two rows of its batch are an ordinary one and an unsafe one: a branch, a [RESET]."""
    text = README.replace("\\\n", " ")
    [line] = re.findall(r"^python -m pdb train.py (sft .*)$", text, flags=re.MULTILINE)
    launch = (ROOT / ".vscode/launch.json").read_text(encoding="utf-8")
    args = arguments(line.split())
    assert f'"--seed", "{args.seed}"' in launch and f'"--batch-size", "{args.batch_size}"' in launch
    rows = [json.loads(row) for row in toy_files()["sft.jsonl"].splitlines()]
    first = [rows[index]["unsafe"] for _, index in visited(args, len(rows))(0)]
    assert sorted(first) == [False, True]


def test_the_special_rule_of_make_comes_first():
    """GNU make 3.81 takes the first pattern that matches."""
    lines = (ROOT / "results/tuning.mk").read_text(encoding="utf-8").splitlines()
    rules = [line.split(":")[0] for line in lines if line.startswith("$(RUN)/tried-ours-dpo")]
    assert [rule.removeprefix("$(RUN)/tried-ours-dpo-") for rule in rules] == ["of-%.done", "%.done"]


def test_a_model_py_in_the_way_is_named(tmp_path):
    (tmp_path / "model.py").write_text("x = 1\n")
    words = [sys.executable, "-m", "backtrack.plain"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env)
    expected = f"error: {tmp_path / 'model.py'} hides backtrack's `model`; start from another folder\n"
    assert (done.returncode, done.stderr) == (2, expected)
