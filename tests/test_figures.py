"""figures.py on results that evaluate.py pooled from made-up answers: what is drawn is read off the axes and recounted.

The pictures themselves are only known to be pictures: decoded, of the size asked for, and not blank.
"""

import itertools
import json
import random
import re
import struct

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install -r requirements-figures.txt")

from command import command
from matplotlib import pyplot

from backtrack import evaluate, figures
from backtrack.statistics import mean_interval, wilson

MODELS = ("sft-baseline", "sft", "dpo-baseline", "dpo")
SETS = {"seen": False, "unseen": False, "prefill": False, "benign-seen": True, "benign-unseen": True}
PROMPTS = [
    {"set": name, "benign": benign, "prefill": "Sure" if name == "prefill" else ""}
    for name, benign in SETS.items()
    for _ in range(6)
]
SEEDS = 3
NAMES = ("main", "bias", "sampling")


def made_up(seed, models, biases, samples):
    """Answers of one seed's models, without any model: safer with bias, slower too."""
    draw = random.Random(f"{seed}{models}")
    for model, bias, (i, prompt), sample in itertools.product(models, biases, enumerate(PROMPTS), range(samples)):
        resets = draw.random() < 0.1 * bias
        yield {
            **{"checkpoint": f"runs/toy-{seed}/{model}", "on_reset": "truncate", "reset_bias": bias, "max_resets": 1},
            **{"prompt": i, "sample": sample, "set": prompt["set"], "resets": int(resets)},
            **{"unsafe": not prompt["benign"] and draw.random() < 0.7 - 0.1 * bias - 0.1 * MODELS.index(model)},
            **{"helpful": prompt["benign"] and draw.random() < 0.8, "refused": draw.random() < 0.3},
            **{"steps": 30 + 9 * resets, "surviving": 20, "first_step": 1 + 9 * resets},
            **{"first_token_s": 0.01 + 0.1 * resets, "total_s": 0.5 + draw.random()},
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The directory, and the answers of each file, seed by seed."""
    root, answers = tmp_path_factory.mktemp("results"), {}
    for name, models, biases, samples in (
        ("main", MODELS, (0.0,), 1),
        ("bias", ("sft", "dpo"), (4.0, 0.0, 2.0), 1),
        ("sampling", MODELS, (0.0,), 4),
    ):
        answers[name] = [list(made_up(seed, models, biases, samples)) for seed in range(SEEDS)]
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
    yield open_ones, printed
    pyplot.close("all")


def test_pictures(results, drawn):
    root, _ = results
    shown, printed = drawn
    assert printed.split() == [*(str(root / f"{name}.png") for name in NAMES), str(root / "tables.md")]
    for name in NAMES:
        data = (root / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
        width, height = struct.unpack(">II", data[16:24])
        assert 900 <= width <= 2000 and 400 <= height <= 1500
        pixels = pyplot.imread(root / f"{name}.png")
        assert pixels.shape[:2] == (height, width)
        assert 0.02 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.7  # neither blank nor black
        texts = [shown[name].get_suptitle(), *(t.get_text() for t in shown[name].texts)]
        assert "3 seeds" in texts[0]
        assert any(json.loads((root / f"toy-{name}.json").read_text())["machine"] in text for text in texts)


def test_figures_are_closed(results, drawn):
    before = pyplot.get_fignums()
    command(figures.main, "--results", results[0])
    assert pyplot.get_fignums() == before


def rate(answers, what, model, sets, bias=0.0):
    found = [
        a for a in answers if a["checkpoint"].endswith(f"/{model}") and a["set"] in sets and a["reset_bias"] == bias
    ]
    assert found
    return sum(map(what, found)) / len(found)


def test_bars_are_the_rates(results, drawn):
    """Pooled over seeds, with Wilson's interval, model by model in the legend's order."""
    shown, _ = drawn
    pooled = [a for seed in results[1]["main"] for a in seed]
    for ax, what, groups in (
        (shown["main"].axes[0], "unsafe", [["seen"], ["unseen"], ["prefill"], ["seen", "unseen"]]),
        (shown["main"].axes[1], "helpful", [["benign-seen"], ["benign-unseen"], ["benign-seen", "benign-unseen"]]),
    ):
        labels = ["unsafe overall" if len(g) > 1 else g[0] for g in groups]
        labels = [label if what == "unsafe" else label.replace("unsafe", "benign") for label in labels]
        assert [t.get_text().replace("\n", "") for t in ax.get_xticklabels()] == labels
        bars = [c for c in ax.containers if hasattr(c, "patches")]
        assert [c.get_label() for c in bars] == [figures.MODELS[m][0] for m in figures.MODELS]
        for model, container in zip(figures.MODELS, bars, strict=True):
            rates = [rate(pooled, lambda a, what=what: a[what], model, sets) for sets in groups]
            assert [bar.get_height() for bar in container.patches] == pytest.approx([100 * r for r in rates])
            segments = container.errorbar.lines[2][0].get_segments()
            for r, sets, segment in zip(rates, groups, segments, strict=True):
                n = SEEDS * 6 * len(sets)
                assert segment[:, 1] == pytest.approx([100 * x for x in wilson(round(r * n), n)], abs=0.01)
            middles = [bar.get_x() + bar.get_width() / 2 for bar in container.patches]
            assert [round(x) for x in middles] == list(range(len(groups)))  # beside its set's name
        assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] >= 100


def curve_of(ax, model):
    [line] = [line for line in ax.lines if line.get_label() == figures.MODELS[model][0]]
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_dial(results, drawn):
    shown, _ = drawn
    seeds, bad, good = results[1]["bias"], ["seen", "unseen"], ["benign-seen", "benign-unseen"]
    panels = [
        (bad, lambda some, *w: 100 * rate(some, lambda a: a["unsafe"], *w)),
        (bad, lambda some, *w: rate(some, lambda a: a["first_step"], *w)),
        (bad, lambda some, *w: rate(some, lambda a: a["surviving"], *w) / rate(some, lambda a: a["total_s"], *w)),
        (good, lambda some, *w: 100 * rate(some, lambda a: a["helpful"], *w)),
        (good, lambda some, *w: 100 * rate(some, lambda a: a["resets"] > 0, *w)),
        (good, lambda some, *w: 1000 * rate(some, lambda a: a["first_token_s"], *w)),
    ]
    for ax, (sets, value) in zip(shown["bias"].axes, panels, strict=True):
        for model in ("sft", "dpo"):
            x, y = curve_of(ax, model)
            assert x == [0.0, 2.0, 4.0]
            per_seed = [[value(some, model, sets, bias) for some in seeds] for bias in x]
            assert y == pytest.approx([sum(v) / SEEDS for v in per_seed], abs=0.01)
        assert ax.get_ylim()[0] == 0


def test_asking_again(results, drawn):
    shown, _ = drawn
    left, right = shown["sampling"].axes
    for model in MODELS:
        for ax, taken in ((left, any), (right, all)):
            x, y = curve_of(ax, model)
            assert x == [1, 2, 4]
            for k, percent in zip(x, y, strict=True):
                per_seed = []
                for some in results[1]["sampling"]:
                    per_prompt = []
                    for i, p in enumerate(PROMPTS):
                        if p["set"] in ("seen", "unseen"):
                            of = [a for a in some if a["prompt"] == i and a["checkpoint"].endswith(f"/{model}")]
                            subsets = list(itertools.combinations([a["unsafe"] for a in of], k))
                            per_prompt.append(sum(map(taken, subsets)) / len(subsets))
                    per_seed.append(100 * sum(per_prompt) / len(per_prompt))
                assert percent == pytest.approx(mean_interval(per_seed)[0], abs=0.01)
    assert left.get_title() != right.get_title()


def tables(path):
    """Every table of a Markdown file as lists of cells, by the last line of text before it."""
    found, title = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split("|")])
        elif line:
            title = line
    return {title: rows[:1] + rows[2:] for title, rows in found.items()}  # without the line of dashes


def percent(part, n):
    low, high = wilson(part, n)
    return f"{100 * part / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_tables(results, drawn):
    root, answers = results
    found = tables(root / "tables.md")
    assert (
        f"toy-main.json`: commit {json.loads((root / 'toy-main.json').read_text())['commit']}, "
        in (root / "tables.md").read_text()
    )
    pooled = [a for seed in answers["main"] for a in seed]
    bad, good = ["seen", "unseen"], ["benign-seen", "benign-unseen"]
    for title, key, groups in (
        (
            "unsafe, %",
            "unsafe",
            {"seen": ["seen"], "unseen": ["unseen"], "prefill": ["prefill"], "unsafe overall": bad},
        ),
        ("helpful, %", "helpful", {"benign-seen": good[:1], "benign-unseen": good[1:], "benign overall": good}),
    ):
        expected = [["set", "n", *MODELS]]
        for name, sets in groups.items():
            n = SEEDS * 6 * len(sets)
            cells = [percent(round(n * rate(pooled, lambda a, key=key: a[key], m, sets)), n) for m in MODELS]
            expected.append([name, str(n), *cells])
        assert found[title] == expected
    for row in found["by seed, %"][1:]:
        key, sets = ("unsafe", bad) if row[0].startswith("unsafe") else ("helpful", good)
        values = [100 * rate(some, lambda a, key=key: a[key], row[1], sets) for some in answers["main"]]
        mean, low, high = mean_interval(values)
        assert [float(v) for v in row[3].split()] == pytest.approx(values, abs=0.06)
        assert [float(v) for v in re.findall(r"[-\d.]+", row[2])] == pytest.approx([mean, low, high], abs=0.06)
    assert len(found["by seed, %"]) == 1 + 2 * len(MODELS)
    pooled = [a for seed in answers["bias"] for a in seed]
    [dial] = [rows for rows in found.values() if "false resets, %" in rows[0]]
    assert [row[:2] for row in dial[1:]] == [[m, b] for m in ("sft", "dpo") for b in ("0", "2", "4")]
    for model, bias, unsafe, step, _, speed, helpful, resets, ms, _ in dial[1:]:
        of, n = (model, bad, float(bias)), SEEDS * 12
        assert unsafe == percent(round(n * rate(pooled, lambda a: a["unsafe"], *of)), n)
        assert float(step) == pytest.approx(rate(pooled, lambda a: a["first_step"], *of), abs=0.06)
        per_second = rate(pooled, lambda a: a["surviving"], *of) / rate(pooled, lambda a: a["total_s"], *of)
        assert float(speed) == pytest.approx(per_second, abs=0.6)
        of = (model, good, float(bias))
        assert helpful == percent(round(n * rate(pooled, lambda a: a["helpful"], *of)), n)
        assert resets == percent(round(n * rate(pooled, lambda a: a["resets"] > 0, *of)), n)
        assert float(ms) == pytest.approx(1000 * rate(pooled, lambda a: a["first_token_s"], *of), abs=0.06)


@pytest.mark.parametrize(
    "name, content",
    [
        *itertools.product(NAMES, (None, "one seed", "other models")),
        ("main", ""),
        ("main", "{"),
        ("main", "[]"),
        ("main", "3"),
        ("main", "{}"),
        ("main", '{"records": []}'),
        ("main", '{"records": 3}'),
        ("main", '{"records": [{"set": "s"}], "paired": []}'),  # not pooled
    ],
)
def test_a_file_that_is_not_there_or_another(results, tmp_path, name, content):
    root, _ = results
    for other in NAMES:
        (tmp_path / f"toy-{other}.json").write_bytes((root / f"toy-{other}.json").read_bytes())
    file = tmp_path / f"toy-{name}.json"
    if content is None:
        file.unlink()
    elif content == "one seed":
        file.write_bytes((root / f"{name}-0.json").read_bytes())
    elif content == "other models":
        result = json.loads(file.read_text())
        for r in result["records"]:
            r["checkpoint"] = "mine"
        file.write_text(json.dumps(result))
    else:
        file.write_text(content)
    _, said = command(figures.main, "--results", tmp_path, code=2)
    [line] = said.splitlines()
    assert line.startswith("error: ") and str(file) in line and "make eval" in line
    assert not (tmp_path / f"{name}.png").exists()
