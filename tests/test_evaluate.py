"""evaluate.py against its own definition: one prompt at a time, one judgement at a time, counted by hand.

The model is random; whole answers given to it as prefill make it helpful, refusing or unsafe, and a bias on [RESET]
makes it take them back. Wilson's interval is found again by bisection from the equation it solves.
"""

import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from backtrack import evaluate
from backtrack.evaluate import pool, read_prompts, wilson
from backtrack.generate import generate
from backtrack.judge import toy_judge
from data import toy
from model import InputError, ModelConfig, Transformer, load_model, load_tokenizer, save_model
from model.errors import run

RATES = ("unsafe", "helpful", "refused", "reset")


def random_checkpoint(path, tokenizer, seed):
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    model, generator = Transformer(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    save_model(model, path, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """world.json, two random models, and prompts.jsonl whose answers have begun in four ways, in a mixed order."""
    root = tmp_path_factory.mktemp("place")
    files = toy.build(0)
    (root / "world.json").write_bytes(files["world.json"])
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.model").write_bytes(files["tokenizer/tokenizer.model"])
    for seed, name in enumerate(("one", "two")):
        random_checkpoint(root / name, load_tokenizer(root / "tokenizer"), seed)
    rows = [json.loads(line) for line in files["prompts.jsonl"].splitlines()]
    prompts = []
    for i in range(3):
        for name in ("prefill-unseen", "unseen", "benign-unseen", "benign-seen"):
            row = [r for r in rows if r["set"] == name][7 * i]
            row |= {"prefill": [row["target"], toy.REFUSALS[i], "", row.get("prefill", "")][i] if i else row["target"]}
            prompts.append(row)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return root


def command(*words, code=0):
    """`python -m backtrack.evaluate words` in this process; what it printed, and what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        try:
            run(evaluate.main)
            status = 0
        except SystemExit as end:
            status = end.code
    assert status == code, err.getvalue()
    assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


def evaluated(place, *more, ckpt=("one",), prompts=("prompts.jsonl",), out):
    words = ["--ckpt", *(place / name for name in ckpt), "--prompts", *(place / name for name in prompts)]
    words += ["--judge", place / "world.json", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 12]
    printed, said = command(*words, *more, "--out", out)
    return json.loads(out.read_text()), printed, said


# ── Wilson's interval ────────────────────────────────────────────────────────────────────────────────────────────────


def bisect(f, low, high):
    """The root of f between low and high, where its sign differs."""
    rising = f(high) > 0
    for _ in range(200):
        middle = (low + high) / 2
        if (f(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return low


@pytest.mark.parametrize("n", [1, 2, 10, 128, 5000])
def test_wilson_solves_the_score_equation(n):
    """Its ends are the rates p for which count lies z standard deviations of a Binomial(n, p) from n·p."""
    z = 1.959964
    for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):

        def outside(p, count=count):
            return (count - n * p) ** 2 - z * z * n * p * (1 - p)

        rate = count / n
        low, high = wilson(count, n)
        assert low == pytest.approx(0.0 if count == 0 else bisect(outside, 0.0, rate), abs=1e-9)
        assert high == pytest.approx(1.0 if count == n else bisect(outside, rate, 1.0), abs=1e-9)
        assert 0.0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1.0


def test_wilson_by_hand():
    """z is the normal distribution's: 2.5% lie beyond it on either side. Values from Wilson's paper's formula."""
    assert 0.5 * math.erfc(1.959964 / math.sqrt(2)) == pytest.approx(0.025, abs=1e-8)
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0, 10) == (0.0, pytest.approx(1.959964**2 / (10 + 1.959964**2)))
    assert wilson(10, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(30, 100, z=1.0)[0] > wilson(30, 100)[0]


def test_wilson_is_symmetric():
    for n in (1, 7, 40):
        for count in range(n + 1):
            low, high = wilson(count, n)
            assert wilson(n - count, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


# ── Prompt files ─────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = {"prompt": [{"role": "user", "content": "Hi"}]}


def test_read_prompts(tmp_path):
    full = GOOD | {"set": "s", "benign": True, "prefill": "Su", "target": "Sure", "topic": "t"}
    odd = {"prompt": [{"role": "user", "content": "a\u2028b\x85c\x1dd"}]}  # line ends for Python, not for JSON lines
    text = f"{json.dumps(GOOD)}\r\n\n   \n{json.dumps(full)}\n{json.dumps(odd, ensure_ascii=False)}"
    (tmp_path / "mine.jsonl").write_bytes(text.encode())
    first, second, third = read_prompts(str(tmp_path / "mine.jsonl"))
    assert first == GOOD | {"set": "mine", "benign": False, "prefill": ""}
    assert second == full
    assert third["prompt"] == odd["prompt"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"{", "not a line of JSON"),
        (b"\xff\xff", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b"[]", "'prompt' must be a list"),
        (b"null", "'prompt' must be a list"),
        (b"{}", "'prompt' must be a list"),
        (b'{"prompt": "Hi"}', "'prompt' must be a list"),
        (b'{"prompt": []}', "'prompt' must be a list"),
        (b'{"prompt": ["Hi"]}', "'content'"),
        (b'{"prompt": [{"role": "user"}]}', "'content'"),
        (b'{"prompt": [{"role": "user", "content": null}]}', "'content'"),
        (json.dumps(GOOD | {"set": 1}).encode(), "'set' must be a str"),
        (json.dumps(GOOD | {"benign": "no"}).encode(), "'benign' must be a bool"),
        (json.dumps(GOOD | {"prefill": None}).encode(), "'prefill' must be a str"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    (tmp_path / "mine.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError, match=rf"mine\.jsonl:3: .*{complaint}"):
        read_prompts(str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_prompts(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"mine\.jsonl: holds no prompts"):
        read_prompts(str(tmp_path / "mine.jsonl"))


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        read_prompts(str(tmp_path / "gone.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        read_prompts(str(tmp_path))


# ── From prompts to counts ───────────────────────────────────────────────────────────────────────────────────────────


def expected_records(place, ckpt, on_reset, **options):
    """As evaluate should count, with a batch of one and everything written out."""
    model, tok, judge = load_model(place / ckpt), load_tokenizer(place / ckpt), toy_judge(place / "world.json")
    records = {}
    for line in (place / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        [g] = generate(
            model,
            [tok.render(row["prompt"])],
            prefill=[tok.encode(row["prefill"])],
            reset_id=tok.reset_id,
            stop_ids=tok.stop_ids,
            max_new_tokens=12,
            on_reset=on_reset,
            **options,
        )
        verdict = judge(row["prompt"], tok.decode(g.tokens))
        record = records.setdefault(
            row["set"], {"benign": row["benign"], "n": 0, "steps": 0, **dict.fromkeys(RATES, 0)}
        )
        for key, more in (
            ("n", 1),
            ("steps", g.steps),
            ("unsafe", verdict.unsafe),
            ("helpful", verdict.helpful),
            ("refused", verdict.refused),
            ("reset", g.resets > 0),
        ):
            record[key] += int(more)
    return records


def by_set(result, ckpt, on_reset):
    keys = ("benign", "n", "steps", *RATES)
    chosen = [r for r in result["records"] if (r["checkpoint"], r["on_reset"]) == (str(ckpt), on_reset)]
    return {r["set"]: {key: r[key] for key in keys} for r in chosen}


@pytest.mark.parametrize("bias, max_resets", [(0.0, 1), (4.0, 1), (4.0, 3), (4.0, 0)])
def test_counts(place, tmp_path, bias, max_resets):
    result, _, _ = evaluated(
        place,
        *("--reset-bias", bias, "--max-resets", max_resets, "--batch-size", 5),
        ckpt=("one", "two"),
        out=tmp_path / "eval.json",
    )
    assert len(result["records"]) == 2 * 2 * 4
    totals = dict.fromkeys(RATES, 0)
    for ckpt in ("one", "two"):
        for on_reset in ("truncate", "keep"):
            expected = expected_records(place, ckpt, on_reset, reset_bias=bias, max_resets=max_resets)
            assert by_set(result, place / ckpt, on_reset) == expected
            for record in expected.values():
                for rate in RATES:
                    totals[rate] += record[rate]
    # The comparison means something: there was something to count.
    resetting = bias > 0 and max_resets > 0
    assert (totals["reset"] > 0) == resetting and totals["unsafe"] > 0
    assert resetting or (totals["helpful"] > 0 and totals["refused"] > 0)  # the random retry is neither


def test_the_two_modes_differ(place, tmp_path):
    """Steps tell them apart, for the retry sees something else; asked for one, it does that one."""
    options = ("--reset-bias", 4, "--max-resets", 2, "--max-new-tokens", 30, "--temperature", 1)
    both, _, said = evaluated(place, *options, out=tmp_path / "both.json")
    assert by_set(both, place / "one", "truncate") != by_set(both, place / "one", "keep")
    assert "truncate: 12/12 prompts" in said and "keep: 12/12 prompts" in said
    for on_reset in ("truncate", "keep"):
        one, _, said = evaluated(place, *options, "--on-reset", on_reset, out=tmp_path / "one.json")
        assert one["records"] == [r for r in both["records"] if r["on_reset"] == on_reset]
        assert said.count("12/12") == 1


def test_batch_size_changes_nothing(place, tmp_path):
    results = [
        evaluated(place, "--reset-bias", 4, "--batch-size", size, out=tmp_path / "eval.json")[0]["records"]
        for size in (1, 5, 12, 64)
    ]
    assert results[0] == results[1] == results[2] == results[3]


def test_generations_are_in_the_order_of_the_prompts(place):
    """They are sampled in the order of their lengths."""
    model, tok = load_model(place / "one"), load_tokenizer(place / "one")
    prompts = read_prompts(str(place / "prompts.jsonl"))
    args = SimpleNamespace(
        batch_size=3, max_new_tokens=4, temperature=0.0, top_p=1.0, reset_bias=0.0, max_resets=0, seed=0
    )
    with contextlib.redirect_stderr(io.StringIO()):
        generations = evaluate.answer_all(model, tok, prompts, "truncate", args)
    lengths = [len(tok.render(p["prompt"])) for p in prompts]
    assert lengths != sorted(lengths)
    for p, g in zip(prompts, generations, strict=True):
        assert g.tokens[: len(g.tokens) - 4] == tok.encode(p["prefill"])


def texts(place, monkeypatch, tmp_path, *more):
    """All answers of one run, as the judge sees them."""
    seen = []
    judge = toy_judge(place / "world.json")
    monkeypatch.setattr(evaluate, "toy_judge", lambda path: lambda p, text: (seen.append(text), judge(p, text))[1])
    evaluated(place, *more, out=tmp_path / "eval.json")
    return seen


def test_sampling_follows_the_seed(place, tmp_path, monkeypatch):
    options = ("--temperature", 1, "--batch-size", 5, "--on-reset", "truncate")
    first, again, other, default, narrow, greedy = (
        texts(place, monkeypatch, tmp_path, *options, *more)
        for more in (
            ("--seed", 3),
            ("--seed", 3),
            ("--seed", 4),
            (),
            ("--seed", 3, "--top-p", 1e-9),
            ("--temperature", 0),
        )
    )
    assert first == again != other and default not in (first, other)
    assert narrow == greedy != first
    assert len(first) == 12


def test_the_judge_sees_surviving_text_only(place, tmp_path, monkeypatch):
    """With [RESET] certain, every prefilled answer is taken back: nothing of it is judged."""
    prefills = [json.loads(line)["prefill"] for line in (place / "prompts.jsonl").read_text().splitlines()]
    kept = texts(place, monkeypatch, tmp_path, "--max-resets", 0, "--on-reset", "keep")
    assert all(text.startswith(prefill) for text, prefill in zip(kept, prefills, strict=True))
    gone = texts(place, monkeypatch, tmp_path, "--reset-bias", 1000, "--on-reset", "keep")
    assert not any(prefill and prefill in text for text, prefill in zip(gone, prefills, strict=True))


def test_several_prompt_files(place, tmp_path):
    """Sets that share a name are one; a set without a name has its file's."""
    (place / "more.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"set": "unseen"}) + "\n")
    result, _, _ = evaluated(
        place, "--on-reset", "keep", prompts=("prompts.jsonl", "more.jsonl"), out=tmp_path / "eval.json"
    )
    sizes = {r["set"]: r["n"] for r in result["records"]}
    assert sizes == {"prefill-unseen": 3, "unseen": 4, "benign-unseen": 3, "benign-seen": 3, "more": 1}


# ── What comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(printed):
    """The table as {(set, checkpoint, mode): (n, [rate, low, high] per rate)}."""
    head, *lines = printed.splitlines()
    assert head.split() == ["set", "n", "checkpoint", "on_reset", *(w for rate in RATES for w in (rate, "%"))]
    rows = {}
    for line in lines:
        name, n, ckpt, on_reset, *cells = line.replace("[", " ").replace("]", " ").replace(",", " ").split()
        assert len(line) == len(head) and len(cells) == 12
        numbers = [float(x) for x in cells]
        rows[name, ckpt, on_reset] = int(n), [numbers[i : i + 3] for i in range(0, 12, 3)]
    assert len(rows) == len(lines)
    return rows


def test_file_and_table(place, tmp_path):
    out = tmp_path / "deep" / "eval.json"
    result, printed, _ = evaluated(place, "--reset-bias", 4, ckpt=("one", "two"), out=out)
    assert set(result) == {"command", "machine", "records"}
    assert result["command"].startswith("python -m backtrack.evaluate --ckpt ") and str(out) in result["command"]
    assert torch.__version__ in result["machine"]
    table = rows_of(printed)
    assert len(result["records"]) == len(table) == 16
    for r in result["records"]:
        assert set(r) == {"checkpoint", "on_reset", "set", "benign", "n", "steps"} | {
            key for rate in RATES for key in (rate, f"{rate}_interval")
        }
        n, cells = table[r["set"], r["checkpoint"], r["on_reset"]]
        assert n == r["n"] == 3
        for rate, (percent, low, high) in zip(RATES, cells, strict=True):
            assert type(r[rate]) is int
            assert r[f"{rate}_interval"] == pytest.approx(wilson(r[rate], 3), abs=5e-5)
            assert percent == pytest.approx(100 * r[rate] / 3, abs=0.0501)
            assert [low, high] == pytest.approx([100 * x for x in wilson(r[rate], 3)], abs=0.0501)
    assert [p.name for p in out.parent.iterdir()] == ["eval.json"]


def record(**changes):
    return {
        "checkpoint": "runs/a/sft",
        "on_reset": "keep",
        "set": "s",
        "benign": False,
        "n": 10,
        "steps": 100,
        "unsafe": 1,
        "helpful": 2,
        "refused": 3,
        "reset": 4,
    } | changes


def test_pool_by_hand():
    records = [
        record(),
        record(checkpoint="runs/a/sft", on_reset="truncate"),
        record(checkpoint="runs/a/plain"),
        record(checkpoint="runs/b/sft/", n=30, steps=7, unsafe=0, helpful=30, refused=1, reset=0),
        record(checkpoint="runs/b/sft", set="t", benign=True),
    ]
    pooled = pool(records)
    assert [(r["checkpoint"], r["on_reset"], r["set"]) for r in pooled] == [
        ("sft", "keep", "s"),
        ("sft", "truncate", "s"),
        ("plain", "keep", "s"),
        ("sft", "keep", "t"),
    ]
    assert pooled[0] == {
        "checkpoint": "sft",
        "on_reset": "keep",
        "set": "s",
        "benign": False,
        "n": 40,
        "steps": 107,
        "unsafe": 1,
        "helpful": 32,
        "refused": 4,
        "reset": 4,
        "by_seed": [
            {"unsafe": 0.1, "helpful": 0.2, "refused": 0.3, "reset": 0.4},
            {"unsafe": 0.0, "helpful": 1.0, "refused": 0.0333, "reset": 0.0},
        ],
    }
    assert pooled[3]["benign"] is True and pooled[3]["n"] == 10


def test_merge(tmp_path):
    for name, n, unsafe in (("a", 10, 1), ("b", 30, 6)):
        content = {"records": [record(checkpoint=f"runs/{name}/sft", n=n, unsafe=unsafe)]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    printed, _ = command("--merge", *files, "--out", tmp_path / "pooled.json")
    [(key, (n, cells))] = rows_of(printed).items()
    assert key == ("s", "sft", "keep") and n == 40
    assert cells[0] == pytest.approx([17.5, *(100 * x for x in wilson(7, 40))], abs=0.0501)
    [r] = json.loads((tmp_path / "pooled.json").read_text())["records"]
    assert (r["n"], r["unsafe"], r["helpful"], r["steps"]) == (40, 7, 4, 200)
    assert r["unsafe_interval"] == pytest.approx(wilson(7, 40), abs=5e-5)
    assert [seed["unsafe"] for seed in r["by_seed"]] == [0.1, 0.2]
    assert command("--merge", *files)[0] == printed


def test_out_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps({"records": [record()]}))
    (tmp_path / "out.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        _, said = command("--merge", tmp_path / "a.json", "--out", tmp_path / "out.json", code=2)
    assert said == "error: [Errno 28] No space left on device\n"
    assert (tmp_path / "out.json").read_text() == "old"
    command("--merge", tmp_path / "a.json", "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["records"][0]["n"] == 10


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "--ckpt --merge"),
        (("--ckpt", "one"), "--ckpt needs --prompts and --judge"),
        (("--ckpt", "one", "--prompts", "prompts.jsonl"), "--ckpt needs"),
        (("--ckpt", "one", "--judge", "world.json"), "--ckpt needs"),
        (("--ckpt", "one", "--merge", "a.json"), "not allowed with"),
        (("--ckpt",), "expected at least one"),
        ((..., "--batch-size", 0), "--batch-size must be at least 1"),
        ((..., "--on-reset", "maybe"), "invalid choice"),
        ((..., "--dtype", "float8"), "invalid choice"),
        ((..., "--device", "foo"), "'foo'"),
        ((..., "--temperature", -1), "temperature is -1"),
        ((..., "--top-p", 0), "top_p is 0"),
        ((..., "--max-resets", -1), "max_resets is -1"),
        ((..., "--max-new-tokens", 0), "max_new_tokens is 0"),
        ((..., "--max-new-tokens", 1000), "too long"),
        ((..., "--ckpt", "gone"), "gone"),
        ((..., "--prompts", "gone.jsonl"), "gone.jsonl: no such file"),
        ((..., "--prompts", "world.json"), "world.json:1: not a line of JSON"),
        ((..., "--judge", "gone.json"), "gone.json"),
        ((..., "--judge", "prompts.jsonl"), "prompts.jsonl: not a toy world"),
        (("--merge", "gone.json"), "gone.json"),
        (("--merge", "prompts.jsonl"), "prompts.jsonl: not a result"),
        (("--merge", "world.json"), "world.json: not a result"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, monkeypatch, words, complaint):
    monkeypatch.chdir(place)
    full = ("--ckpt", "one", "--prompts", "prompts.jsonl", "--judge", "world.json", "--device", "cpu")
    printed, said = command(*[w for word in words for w in (full if word is ... else (word,))], code=2)
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0] == said.splitlines()[-1] and complaint in errors[0]
    assert printed == ""


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"records": 3},
        {"records": "abc"},
        {"records": [3]},
        {"records": [{}]},
        {"records": [record(n=0)]},
        {"records": [record(unsafe="1")]},
        {"records": [record(checkpoint=None)]},
        {"records": []},
    ],
)
def test_merge_of_something_else(tmp_path, content):
    (tmp_path / "odd.json").write_text(json.dumps(content))
    _, said = command("--merge", tmp_path / "odd.json", code=2)
    [line] = said.splitlines()
    assert line.startswith("error: ") and "odd.json" in line
