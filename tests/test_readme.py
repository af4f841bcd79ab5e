"""What the README says of the code is true: its line counts, the files and flags it names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUBCOMMANDS = ("base", "sft", "dpo", "hh", "oasst", "prompts", "gcg", "adaptive-gcg", "table", "fit")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def length(file: str, name: str) -> int:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.end_lineno - node.lineno + 1
    raise AssertionError(f"{file} has no {name}")


def test_the_reading_list_counts_lines():
    rows = re.findall(r"^\| .* \| (.*) in ([\w/]+\.py) \| (\d+) \|$", README, flags=re.MULTILINE)
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
    """What `make real` would run, if all files that it names were there."""
    for name in re.findall(r"call source,([\w.-]+)", (ROOT / "results/real.mk").read_text(encoding="utf-8")):
        (folder / name).touch()
    words = ["make", "-n", "real", f"DATA={folder}", f"RUNS={folder}/runs", f"RESULTS={folder}/results"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^\S*bin/python ", "python ", said.replace("\\\n", " "), flags=re.MULTILINE)


def test_the_flags_it_uses_exist(tmp_path):
    """Every `python … --flag` of the READMEs and of `make real`, asked of --help."""
    text = "\n".join((ROOT / f).read_text(encoding="utf-8") for f in ("README.md", "data/README.md"))
    text = text.replace("\\\n", " ") + commands_of_make_real(tmp_path)
    assert text.count("backtrack.likelihoods") > 2
    asked: dict[tuple, subprocess.Popen] = {}  # all at once: each start of PyTorch takes seconds
    used = []
    for line in re.findall(r"^(?:\$ )?python (.*)$", text, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        if words[:2] == ["-m", "pdb"]:
            words = words[2:]
        program = words[:2] if words[0] == "-m" else words[:1]
        rest = words[len(program) :]
        if program == ["-m", "pytest"]:
            continue
        sub = [rest[0]] if rest and rest[0] in SUBCOMMANDS else []
        command = (*program, *sub)
        if command not in asked:
            words = [sys.executable, *command, "--help"]
            asked[command] = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        used += [(command, flag) for flag in re.findall(r"(?<!\S)--[a-z-]+", " ".join(rest))]
    helps = {command: process.communicate()[0] for command, process in asked.items()}
    for command, flag in used:
        assert flag in helps[command], f"{' '.join(command)} has no {flag}"
    assert len(helps) >= 6
