"""The loop of one's own in data/README.md runs, and learns."""

import re
from pathlib import Path

from models import LLAMA, network_of
from samples import row_of, toy_tokenizer, write

from model import load_model, save_model

README = Path(__file__).resolve().parents[1] / "data/README.md"


def test_the_loop_of_ones_own(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    [code] = [block for block in blocks if "INIT, ROWS" in block]
    rows = [row_of(f"Hi {i}", "no word", f"yes {i}", unsafe=i % 2 == 0) for i in range(10)]
    write(tmp_path / "rows.jsonl", *rows)
    save_model(network_of(LLAMA, scale=0.1), tmp_path / "init", tokenizer=None)
    toy_tokenizer().save(tmp_path / "init")
    [line] = re.findall(r"^INIT, .*$", code, flags=re.MULTILINE)
    mine = [str(tmp_path / name) for name in ("init", "rows.jsonl", "mine")]
    scope: dict = {}
    code = code.replace(line, f"INIT, ROWS, OUT, STEPS = {mine[0]!r}, {mine[1]!r}, {mine[2]!r}, 60")
    exec(code.replace("lr=1e-3", "lr=2e-2"), scope)
    assert scope["loss"].item() < 2.0  # from ln 1024 = 6.9
    assert load_model(tmp_path / "mine").config.reset_token_id == scope["tok"].reset_id
