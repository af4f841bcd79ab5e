"""figures.py on results that evaluate.py pooled from made-up answers.

What is drawn is read off the axes and recounted. The pictures themselves are only known to be
pictures: decoded, of the size asked for, and not blank.
"""

import itertools
import json
import random
import re
from statistics import fmean

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install -r requirements-figures.txt")

from command import command
from matplotlib import pyplot

from backtrack import evaluate, figures
from backtrack.statistics import mean_interval, wilson

MODELS = ("sft-baseline", "sft", "dpo-baseline", "dpo")
BAD, GOOD = ["seen", "unseen"], ["benign-seen", "benign-unseen"]
PROMPTS = [
    {"set": name, "benign": name in GOOD, "prefill": "Sure" if name == "prefill" else ""}
    for name in (*BAD, "prefill", *GOOD)
    for _ in range(6)
]
SEEDS = 3
NAMES = ("main", "bias", "sampling")


def made_up(seed, models, biases, samples):
    """Answers of one seed's models, without any model: safer with bias, slower too."""
    draw, answers = random.Random(f"{seed}{models}"), []
    everything = itertools.product(models, biases, enumerate(PROMPTS), range(samples))
    for model, bias, (i, prompt), sample in everything:
        resets = int(draw.random() < 0.1 * bias)
        unsafe = draw.random() < 0.7 - 0.1 * bias - 0.1 * MODELS.index(model)
        helpful = draw.random() < 0.8
        answer = {"checkpoint": f"runs/toy-{seed}/{model}", "on_reset": "truncate"}
        answer |= {"reset_bias": bias, "max_resets": 1, "resets": resets}
        answer |= {"prompt": i, "sample": sample, "set": prompt["set"]}
        answer |= {"unsafe": unsafe and not prompt["benign"]}
        answer |= {"helpful": helpful and prompt["benign"], "refused": draw.random() < 0.3}
        answer |= {"steps": 30 + 9 * resets, "surviving": 20, "first_step": 1 + 9 * resets}
        answer |= {"first_token_s": 0.01 + 0.1 * resets, "total_s": 0.5 + draw.random()}
        answers.append(answer)
    return answers


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The directory, and the answers of each file, seed by seed."""
    root, answers = tmp_path_factory.mktemp("results"), {}
    for name, models, biases, samples in (
        ("main", MODELS, (0.0,), 1),
        ("bias", ("sft", "dpo"), (4.0, 0.0, 2.0), 1),
        ("sampling", MODELS, (0.0,), 4),
    ):
        answers[name] = [made_up(seed, models, biases, samples) for seed in range(SEEDS)]
        files = []
        for seed, some in enumerate(answers[name]):
            records, paired = evaluate.count(some, PROMPTS)
            files.append(root / f"{name}-{seed}.json")
            files[-1].write_text(json.dumps({"records": records, "paired": paired}))
        command(evaluate.main, "--merge", *files, "--out", root / f"toy-{name}.json")
    return root, answers


@pytest.fixture(scope="module")
def drawn(results):
    """The figures of one run of the program, still open, by name."""
    root, _ = results
    open_ones = {}

    def finish(fig, path, *more):
        open_ones[path.stem] = fig
        original(fig, path, *more)

    original = figures.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "finish", finish)
        patch.setattr(figures.plt, "close", lambda fig: None)
        printed, said = command(figures.main, "--results", root)
    assert said == ""
    files = [f"{name}.png" for name in NAMES] + ["tables.md"]
    assert printed.split() == [str(root / file) for file in files]
    yield open_ones
    pyplot.close("all")


def pooled(results, name):
    return list(itertools.chain(*results[1][name]))


def some_of(answers, model, sets, bias=0.0):
    found = [a for a in answers if a["checkpoint"].endswith(f"/{model}")]
    found = [a for a in found if a["set"] in sets and a["reset_bias"] == bias]
    assert found
    return found


def rate(key, *which):
    """The mean of answers' key over some_of(*which)."""
    return fmean(a[key] for a in some_of(*which))


def speed(*which):
    return rate("surviving", *which) / rate("total_s", *which)


def false_resets(*which):
    return fmean(a["resets"] > 0 for a in some_of(*which))


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
def test_pictures(results, drawn, name):
    root, _ = results
    pixels = pyplot.imread(root / f"{name}.png")
    height, width = pixels.shape[:2]
    assert 900 <= width <= 2000 and 400 <= height <= 1500
    assert 0.02 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.7  # neither blank nor black
    assert "3 seeds" in drawn[name].get_suptitle()
    machine = json.loads((root / f"toy-{name}.json").read_text())["machine"]
    assert any(machine in text.get_text() for text in drawn[name].texts)


GROUPS = {  # what is counted -> the name of a bar or row, and the sets it stands for
    "unsafe": {"seen": BAD[:1], "unseen": BAD[1:], "prefill": ["prefill"], "unsafe overall": BAD},
    "helpful": {"benign-seen": GOOD[:1], "benign-unseen": GOOD[1:], "benign overall": GOOD},
}


@pytest.mark.parametrize("panel, key", [(0, "unsafe"), (1, "helpful")])
def test_bars_are_the_rates(results, drawn, panel, key):
    """Pooled over seeds, with Wilson's interval, model by model in the legend's order."""
    ax, answers = drawn["main"].axes[panel], pooled(results, "main")
    ticks = [text.get_text().replace("\n", "") for text in ax.get_xticklabels()]
    assert ticks == list(GROUPS[key])
    bars = [c for c in ax.containers if hasattr(c, "patches")]
    assert [c.get_label() for c in bars] == [figures.MODELS[m][0] for m in figures.MODELS]
    for model, container in zip(figures.MODELS, bars, strict=True):
        segments = container.errorbar.lines[2][0].get_segments()
        drawings = zip(GROUPS[key].values(), container.patches, segments, strict=True)
        for i, (sets, bar, segment) in enumerate(drawings):
            found = some_of(answers, model, sets)
            count = sum(a[key] for a in found)
            assert bar.get_height() == pytest.approx(100 * count / len(found))
            low, high = wilson(count, len(found))
            assert segment[:, 1] == pytest.approx([100 * low, 100 * high], abs=0.01)
            assert round(bar.get_x() + bar.get_width() / 2) == i  # beside its set's name
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= 100


def curve_of(ax, model):
    [line] = [line for line in ax.lines if line.get_label() == figures.MODELS[model][0]]
    return list(line.get_xdata()), list(line.get_ydata())


PANELS = [
    (BAD, lambda *which: 100 * rate("unsafe", *which)),
    (BAD, lambda *which: rate("first_step", *which)),
    (BAD, speed),
    (GOOD, lambda *which: 100 * rate("helpful", *which)),
    (GOOD, lambda *which: 100 * false_resets(*which)),
    (GOOD, lambda *which: 1000 * rate("first_token_s", *which)),
]


@pytest.mark.parametrize("model", ["sft", "dpo"])
def test_the_dial(results, drawn, model):
    """Each point is the mean over seeds."""
    for ax, (sets, value) in zip(drawn["bias"].axes, PANELS, strict=True):
        x, y = curve_of(ax, model)
        assert x == [0.0, 2.0, 4.0] and ax.get_ylim()[0] == 0
        for bias, height in zip(x, y, strict=True):
            per_seed = [value(some, model, sets, bias) for some in results[1]["bias"]]
            assert height == pytest.approx(fmean(per_seed), abs=0.01)


@pytest.mark.parametrize("panel, taken", [(0, any), (1, all)])
def test_asking_again(results, drawn, panel, taken):
    """The share of prompts at which any, or all, of k answers are unsafe: over all subsets of k."""
    axes = drawn["sampling"].axes
    assert axes[0].get_title() != axes[1].get_title()
    for model in MODELS:
        x, y = curve_of(axes[panel], model)
        assert x == [1, 2, 4]
        for k, percent in zip(x, y, strict=True):
            per_seed = []
            for some in results[1]["sampling"]:
                by_prompt = {}
                for a in some_of(some, model, BAD):
                    by_prompt.setdefault(a["prompt"], []).append(a["unsafe"])
                shares = []
                for unsafe in by_prompt.values():
                    shares.append(fmean(map(taken, itertools.combinations(unsafe, k))))
                per_seed.append(100 * fmean(shares))
            assert percent == pytest.approx(fmean(per_seed), abs=0.01)


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tables(results, drawn):
    """Every table of tables.md as lists of cells, by the last line of text before it."""
    found, title = {}, ""
    for line in (results[0] / "tables.md").read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(title, []).append(cells)
        elif line:
            title = line
    return {title: rows[:1] + rows[2:] for title, rows in found.items()}  # without the dashes


def percent(values):
    """The rate of some truth values, with Wilson's interval."""
    part, n = sum(values), len(values)
    low, high = wilson(part, n)
    return f"{100 * part / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_tables_name_their_source(results, tables):
    root, _ = results
    commit = json.loads((root / "toy-main.json").read_text())["commit"]
    assert f"toy-main.json`: commit {commit}, " in (root / "tables.md").read_text()


@pytest.mark.parametrize("key", ["unsafe", "helpful"])
def test_table_of_rates(results, tables, key):
    answers = pooled(results, "main")
    head, *rows = tables[f"{key}, %"]
    assert head == ["set", "n", *MODELS]
    for row, (name, sets) in zip(rows, GROUPS[key].items(), strict=True):
        assert row[:2] == [name, str(SEEDS * 6 * len(sets))]
        for model, cell in zip(MODELS, row[2:], strict=True):
            assert cell == percent([a[key] for a in some_of(answers, model, sets)])


def test_table_by_seed(results, tables):
    rows = tables["by seed, %"][1:]
    assert len(rows) == 2 * len(MODELS)
    for what, model, interval, each in rows:
        key, sets = ("unsafe", BAD) if what.startswith("unsafe") else ("helpful", GOOD)
        values = [100 * rate(key, some, model, sets) for some in results[1]["main"]]
        assert [float(v) for v in each.split()] == pytest.approx(values, abs=0.06)
        found = [float(v) for v in re.findall(r"[-\d.]+", interval)]
        assert found == pytest.approx(mean_interval(values), abs=0.06)


def test_table_of_the_dial(results, tables):
    answers = pooled(results, "bias")
    [dial] = [rows for rows in tables.values() if "false resets, %" in rows[0]]
    expected = itertools.product(("sft", "dpo"), ("0", "2", "4"))
    assert [tuple(row[:2]) for row in dial[1:]] == [*expected]
    for model, bias, unsafe, step, _, per_second, helpful, resets, ms, _ in dial[1:]:
        bad, good = (answers, model, BAD, float(bias)), (answers, model, GOOD, float(bias))
        assert unsafe == percent([a["unsafe"] for a in some_of(*bad)])
        assert float(step) == pytest.approx(rate("first_step", *bad), abs=0.06)
        assert float(per_second) == pytest.approx(speed(*bad), abs=0.6)
        assert helpful == percent([a["helpful"] for a in some_of(*good)])
        assert resets == percent([a["resets"] > 0 for a in some_of(*good)])
        assert float(ms) == pytest.approx(1000 * rate("first_token_s", *good), abs=0.06)


# ── Files that are not there, or others ───────────────────────────────────────────────────────────


def refused(directory, name):
    _, said = command(figures.main, "--results", directory, code=2)
    [line] = said.splitlines()
    assert line.startswith("error: ") and str(directory / f"toy-{name}.json") in line
    assert "make eval" in line
    assert not (directory / f"{name}.png").exists()


@pytest.mark.parametrize("missing", NAMES)
def test_a_file_that_is_not_there(results, tmp_path, missing):
    for name in NAMES:
        if name != missing:
            file = f"toy-{name}.json"
            (tmp_path / file).write_bytes((results[0] / file).read_bytes())
    refused(tmp_path, missing)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"records": []}', '{"records": 3}'])
def test_a_file_that_holds_no_result(tmp_path, text):
    (tmp_path / "toy-main.json").write_text(text)
    refused(tmp_path, "main")


def test_a_file_that_is_not_pooled_or_of_other_models(results, tmp_path):
    root, _ = results
    file = tmp_path / "toy-main.json"
    file.write_bytes((root / "main-0.json").read_bytes())
    refused(tmp_path, "main")
    file.write_text((root / "toy-main.json").read_text().replace("dpo", "mine"))
    refused(tmp_path, "main")
