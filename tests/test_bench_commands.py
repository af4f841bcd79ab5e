"""backtrack/bench/commands.py: the two commands really run, and say so when they fail."""

import json

from command import command
from test_evaluate import furnish

from backtrack.bench import commands


def test_the_whole_command(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.setattr(commands, "QUESTIONS", 3)
    monkeypatch.setattr(commands, "NEW_TOKENS", 4)
    found = tmp_path / "commands.json"
    printed, _ = command(commands.main, "--ckpt", tmp_path / "one", "--repeats", 1, "--out", found)
    lines = json.loads(found.read_text())["limits"]
    assert [r["name"] for r in lines] == [text.split(":")[0] for text in printed.splitlines()]
    assert [r["name"].split(",")[0] for r in lines] == ["evaluate", "collect"]
    assert all(r["share"] > 0 and r["tokens_per_s"] > 0 and r["of"] > 0 for r in lines)


def test_what_has_no_room_is_an_error(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.setattr(commands, "NEW_TOKENS", 10**6)
    _, err = command(commands.main, "--ckpt", tmp_path / "one", "--repeats", 1, code=2)
    assert "too long" in err or "positions" in err


def test_a_command_that_fails_says_why(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.setattr(commands, "QUESTIONS", 1)
    monkeypatch.setattr(commands, "COMMANDS", {"evaluate": (["--samples", "2"], {})})
    _, err = command(commands.main, "--ckpt", tmp_path / "one", "--repeats", 1, code=2)
    assert "backtrack.evaluate: " in err and "--samples needs a --temperature" in err
