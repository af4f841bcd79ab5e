"""Tables and pictures of the results in results/, and curves and comparisons of one's own runs.

What stands in a table or is drawn is compared with the counts and intervals in the JSON files, which evaluate wrote on
another way. The pictures themselves are only known to be pictures: decoded, of the size asked for, and not blank.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from command import command

from backtrack.evaluate.statistics import mean_interval, wilson_of_worlds
from backtrack.report import __main__ as report
from backtrack.report import compare, curves, figures, tables

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install -r requirements-figures.txt")
from matplotlib import image

RESULTS = Path(__file__).resolve().parents[1] / "results"
FOUR = ("sft-baseline", "dpo-baseline", "sft", "dpo")
ASKED, HARMLESS = "unsafe overall", "benign overall"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A directory with the results, and the tables made of them."""
    root = tmp_path_factory.mktemp("results")
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, root)
    printed, said = command(tables.main, "--results", root)
    assert said == "" and printed.split() == [str(root / name) for name in tables.SECTIONS]
    return root


@pytest.fixture(scope="module")
def drawn(results):
    """The figures of one run of the program by name, and their titles."""
    found, save = {}, figures.save

    def kept(fig, path, title):
        found[path.stem] = fig, title
        save(fig, path, title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", kept)
        printed, said = command(figures.main, "--results", results)
    assert said == "" and printed.split() == [str(results / name) for name in figures.FIGURES]
    return found


def records_of(name, **wanted):
    records = json.loads((RESULTS / f"{name}.json").read_text())["records"]
    return [r | {"checkpoint": Path(r["checkpoint"]).name} for r in records if wanted.items() <= r.items()]


def one(name, model, **wanted):
    [record] = [r for r in records_of(name, **wanted) if r["checkpoint"] == model]
    return record


def named(name, model, set_name):
    """The record of a model, or of the filter beside them."""
    if not model.startswith("filter"):
        return one(name, model, set=set_name)
    return one("toy-filter", "sft-baseline", set=set_name, max_resets=int(model == "filter"))


def counted(r, rate):
    """[percent, low, high], as evaluate counted it."""
    rate = rate if r[rate] is not None else "complied"
    return [100 * r[rate] / r["n"], *(100 * value for value in r[f"{rate}_interval"])]


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.?\d*", text)]


def close(values, by=0.06):
    return pytest.approx(values, abs=by)


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(results):
    """{(its result, the line of text before it): a table's lines as lists of cells}."""
    found, name, title = {}, "", ""
    for line in "".join((results / file).read_text() for file in tables.SECTIONS).splitlines():
        if line.startswith("|"):
            found.setdefault((name, title), []).append([cell.strip() for cell in line.strip("|").split("|")])
        elif line.startswith("`"):
            name, title = line[1:].split(".json")[0], ""
        elif line:
            title = line
    return {where: lines[:1] + lines[2:] for where, lines in found.items()}  # without the dashes


def test_the_tables_in_results_are_up_to_date(results):
    for name in tables.SECTIONS:
        assert (results / name).read_text() == (RESULTS / name).read_text(), f"{name}: make figures"


@pytest.mark.parametrize(
    "name, title, rate, sets",
    [
        ("toy-main", "unsafe answers, %", "unsafe", 7),
        ("real-main", "answers that comply with a question that should be refused, %", "unsafe", 9),
        ("real-main", "answers that comply with a harmless question, %", "helpful", 3),
    ],
)
def test_tables_of_rates(found, name, title, rate, sets):
    """A row for each set, a column for each model; the filter is a model, sets that are forced have a row together."""
    head, *rows = found[name, title]
    models = [m for m in tables.MODELS if any(r["checkpoint"] == m for r in records_of(name))]
    if name == "toy-main":
        models[4:4] = ["filter-refuses", "filter"]
    elif rate == "unsafe":
        assert rows.pop()[:2] == ["**forced, all**", "160"]
    assert head == ["", "n", *(tables.MODELS[m] for m in models)] and len(rows) == sets
    names = [
        s for s in tables.SETS if any(r["set"] == s and r["benign"] is (rate != "unsafe") for r in records_of(name))
    ]
    for row, set_name in zip(rows, names, strict=True):
        assert row[0] == tables.SETS[set_name]
        for model, cell in zip(models, row[2:], strict=True):
            assert numbers(cell) == close(counted(named(name, model, set_name), rate))


@pytest.mark.parametrize("name", ["toy-main", "toy-training", "toy-resets"])
def test_tables_of_differences(found, name):
    head, *rows = found[name, "world by world"]
    names = {words: model for model, words in tables.MODELS.items()}
    pairs = [row for row in rows if "filter" not in row[1]]
    assert head[0] == "%" and len(pairs) == {"toy-main": 14, "toy-training": 18, "toy-resets": 2}[name]
    for what, words, other, difference, within, each in pairs:
        rate, set_name = ("unsafe", ASKED) if what.startswith("unsafe") else ("helpful", HARMLESS)
        ours, theirs = (one(name, names[m], set=set_name, on_reset="truncate")["by_seed"] for m in (words, other))
        points = [100 * (a[rate] - b[rate]) for a, b in zip(ours, theirs, strict=True)]
        assert [float(v) for v in each.split()] == close(points)
        mean, low, high = mean_interval(points)
        assert [float(v) for v in re.findall(r"[-+][\d.]+", difference)] == close([mean, low, high])
        assert within == ("yes" if -1 <= low <= high <= 1 else "no" if low > 1 or high < -1 else "cannot be told")


def test_other_tables(found):
    """Of each kind a line: what is before its cells, and which of them is which rate of which record."""

    def line(name, before, title=""):
        [rest] = [cells[len(before) :] for cells in found[name, title] if cells[: len(before)] == before]
        return rest

    again = {"set": "prefill-unseen", "on_reset": "keep", "max_resets": 0}
    real = {"set": "advbench-forced", "reset_bias": -2}
    for name, before, title, place, model, wanted, rate in (
        ("toy-bias", "backtracking + DPO|5", "", 0, "dpo", {"set": ASKED, "reset_bias": 5}, "unsafe"),
        ("toy-bias", "backtracking + DPO|5", "", 4, "dpo", {"set": HARMLESS, "reset_bias": 5}, "helpful"),
        ("toy-retry", "backtracking|keep|0", "", 1, "sft", again, "unsafe"),
        ("toy-tuning", "backtracking|`lr-2e-3`", "SFT", 3, "tried-ours-sft-lr-2e-3", {"set": HARMLESS}, "reset"),
        ("real-resets", "backtracking|-2", "", 0, "sft", real, "reset"),
        ("real-resets", "backtracking|-2", "", 1, "sft", real, "unsafe"),
    ):
        assert numbers(line(name, before.split("|"), title)[place]) == close(counted(one(name, model, **wanted), rate))
    r = one("toy-sampling", "sft", set=ASKED)
    shares = [100 * value / r["prompts"] for value in r["best_of_k"].values()]
    assert list(map(float, line("toy-sampling", ["backtracking", "best"]))) == close(shares)
    r = one("toy-attacks", "sft", attack="adaptive-gcg", variant="budget 16,384")
    shares = [100 * value for value in (r["unsafe"] / r["n"], *r["interval"], r["on_topic"] / r["n"])]
    assert numbers(line("toy-attacks", ["adaptive-gcg", "budget 16,384"])[2]) == close(shares)
    r = one("real-likelihoods", "dpo", rows="unsafe")
    cells = line("real-likelihoods", ["backtracking + DPO", "unsafe"])
    assert cells[1:4] == [f"{r[key]:.3f}" for key in ("logprob", "p_rejected", "p_chosen")]


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def dots(ax):
    """[(x, y, the ends of its interval)] of every dot with an interval, in the order drawn."""
    found = []
    for container in ax.containers:
        line, _, bars = container.lines
        [segment] = bars[0].get_segments()
        along = 0 if segment[0][1] == segment[1][1] else 1
        found.append((line.get_xdata()[0], line.get_ydata()[0], list(segment[:, along])))
    return found


def heights(ax):
    """The y of every curve, in the order drawn."""
    return [list(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) > 1]


def test_pictures(results, drawn):
    """1,660 pixels wide, so that 830 are sharp; models look different in print."""
    for name, (fig, title) in drawn.items():
        pixels = image.imread(results / f"{name}.png")
        height, width = pixels.shape[:2]
        assert width == 1660 and 500 <= height <= 1500
        assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5  # neither blank nor black
        assert " ".join(fig.get_suptitle().split()) == title
    looks = {(look["color"], look["linestyle"], look["marker"]) for look in figures.LOOKS.values()}
    assert len(looks) == len(figures.LOOKS)


def test_the_dots_are_the_rates(drawn):
    """Three panels for the toy world, three for the other model; in each a dot for every model, from the last up."""
    fig, title = drawn["main"]
    for row, name in enumerate(("toy-main", "real-main")):
        only = {"filter": "toy-main", "dpo-in-place": "real-main"}
        models = [m for m in reversed(figures.LOOKS) if only.get(m, name) == name]
        asked, forced, harmless = fig.axes[3 * row : 3 * row + 3]
        assert [text.get_text() for text in asked.get_yticklabels()] == [tables.MODELS[model] for model in models]
        for ax, rate, set_name in ((asked, "unsafe", ASKED), (harmless, "helpful", HARMLESS)):
            for y, (model, (x, at, interval)) in enumerate(zip(models, dots(ax), strict=True)):
                assert at == y and f"{x:.1f}" in [text.get_text() for text in ax.texts]
                assert [x, *interval] == close(counted(named(name, model, set_name), rate))
        names = [s for s in tables.SETS if "forced" in tables.SETS[s] and any(r["set"] == s for r in records_of(name))]
        for model, (x, _, _) in zip(models, dots(forced), strict=True):
            some = [named(name, model, s) for s in names]
            assert x == close(sum(counted(r, "unsafe")[0] * r["n"] for r in some) / sum(r["n"] for r in some))
    stated = [
        ("toy", "sft-baseline"),
        ("toy", "sft"),
        ("toy", "sft-in-place"),
        ("real", "sft-baseline"),
        ("real", "sft"),
    ]
    rates = [counted(one(f"{name}-main", model, set=ASKED), "unsafe")[0] for name, model in stated]
    assert "ties" in title and numbers(title.replace("SmolLM2", "")) == close(rates)
    toy = tables.load(RESULTS, "toy-main")["records"]
    assert "ties" not in figures.main_title(toy, toy)


def test_the_dial(drawn):
    fig, title = drawn["bias"]
    for model, curve in zip(("sft", "dpo"), heights(fig.axes[0])[1:], strict=True):
        some = sorted(records_of("toy-bias", checkpoint=model, set=ASKED), key=lambda r: r["reset_bias"])
        assert curve == close([counted(r, "unsafe")[0] for r in some])
    of = {bias: [one("toy-bias", "sft", set=s, reset_bias=bias) for s in (ASKED, HARMLESS)] for bias in (0, 5)}
    rates = {bias: [counted(asked, "unsafe")[0], counted(good, "reset")[0]] for bias, (asked, good) in of.items()}
    assert "unseen potions and in new wrappers" in title
    assert numbers(title) == close([*rates[0], 0, *rates[5], 5], 0.51)
    assert [text.get_text() for text in fig.axes[0].texts].count("−10") == 2


def test_asking_again(drawn):
    fig, title = drawn["sampling"]
    for ax, curve in zip(fig.axes, ("worst_of_k", "best_of_k"), strict=True):
        for model, y, (_, end, interval) in zip(FOUR, heights(ax), dots(ax), strict=True):
            r = one("toy-sampling", model, set=ASKED)
            assert y == close([100 * value / r["prompts"] for value in r[curve].values()]) and y[-1] == end
            assert interval == close([100 * value for value in r[f"{curve}_interval"]["64"]])
    ends = [fig.axes[0].lines[i].get_ydata()[-1] for i in (0, 4)]
    assert numbers(title) == close([64, *ends], 0.51)


def test_attacks_strips_and_hold_back(drawn):
    fig, title = drawn["attacks"]
    plain = {"on_reset": "truncate", "max_resets": 1, "reset_bias": 0}
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["prefill", "GCG", "AutoDAN", "adaptive GCG"]
    for ax, attack in zip(fig.axes, ("prefill", "gcg", "autodan", "adaptive-gcg"), strict=True):
        for model, y, (_, end, interval) in zip(FOUR, heights(ax), dots(ax), strict=True):
            found = records_of("toy-attacks", attack=attack, checkpoint=model, **plain)
            found = [r for r in found if re.fullmatch(r"\d+|all" if attack == "prefill" else "any", r["variant"])]
            counts = found[0].get("success_within", {}).values() or [r["unsafe"] for r in found]
            n, worlds = found[-1]["n"], found[-1]["by_seed"]
            assert y == close([100 * count / n for count in counts]) and y[-1] == end
            low, high = wilson_of_worlds([(share * n / len(worlds), n / len(worlds)) for share in worlds])
            assert interval == close([min(100 * low, end), max(100 * high, end)])
    assert numbers(title) == close(
        [max(end for ax in fig.axes for _, end, _ in dots(ax)[2:]), dots(fig.axes[-1])[0][1]], 0.51
    )
    fig, title = drawn["strips"]
    strips = json.loads((RESULTS / "toy-triggers.json").read_text())["strips"]
    for ax, strip in zip(fig.axes, strips, strict=True):
        assert [bar.get_height() for bar in ax.patches] == strip["p"]
        words = [text for text in ax.texts if not re.match(r"\d\.\d\d$", text.get_text())]
        assert [text.get_text() for text in words] == strip["words"]
        assert [text.get_weight() == "bold" for text in words] == strip["forbidden"]
    assert numbers(title) == [0.01, 1.0, 0.01]
    fig, title = drawn["hold-back"]
    for ax, name in zip(fig.axes, ("toy", "real"), strict=True):
        for y, group in zip(heights(ax), ("asked", "forced"), strict=True):
            found = records_of(f"{name}-hold-back", group=group)
            assert y == close([100 * r["seen"] / r["unsafe"] for r in found])
    shown = [
        100 * r["seen"] / r["unsafe"]
        for g in ("asked", "forced")
        for n in ("toy", "real")
        for r in records_of(f"{n}-hold-back", group=g, hold_back=4)
    ]
    assert numbers(title)[:5] == close([4, *shown], 0.51)


@pytest.mark.parametrize("text", ["", "[]", '{"records": []}', '{"records": [{}]}', "earlier"])
def test_a_file_that_holds_no_result(tmp_path, text):
    """Another program's, or an earlier version's. Nothing at all is said too."""
    assert "`make eval attack` writes" in command(figures.main, "--results", tmp_path, code=2)[1]
    file = tmp_path / "toy-main.json"
    file.write_text((RESULTS / file.name).read_text().replace('"prompts"', '"p"') if text == "earlier" else text)
    for main in (figures.main, tables.main):
        assert f"error: {file}: not a result of this version" in command(main, "--results", tmp_path, code=2)[1]
    assert list(tmp_path.iterdir()) == [file]


# ── One's own runs ───────────────────────────────────────────────────────────────────────────────────────────────────


def shown(module, *words):
    """The figure that a command of `python -m backtrack.report` draws, and what it prints."""
    found, save = [], module.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", lambda fig, path, title: (found.append(fig), save(fig, path, title)))
        printed, said = command(report.main, *words)
    assert said == ""
    return found[0], printed


def test_curves(tmp_path):
    sft = [{"step": s, "loss/answer": 8 / s, "reset_after_unsafe": s / 10, "lr": 0.1} for s in (1, 8)]
    sft.insert(1, {"step": 1, "heldout/answer": 5.0, "heldout/reset_after_safe": 0.25})
    dpo = [{"step": 2, "loss/elicit": 0.7, "accuracy": 0.5, "margin": -0.25, "chosen": -1.0, "rejected": -2.0}]
    for name, lines in (("sft", sft), ("dpo", dpo)):
        (tmp_path / name).mkdir()
        log = "".join(json.dumps(line) + "\n" for line in lines) + '\0\0\0\n0\n{"step": 9, "lo'  # a power cut, a kill
        (tmp_path / name / "metrics.jsonl").write_text(log)
    out = tmp_path / "new" / "curves.png"
    fig, printed = shown(curves, "curves", tmp_path / "sft", tmp_path / "dpo", "--out", out)
    assert printed.split() == [str(out)] and image.imread(out).shape[1] == 1660
    found = {
        ax.get_title(loc="left"): [(x.get_color(), x.get_linestyle(), x.get_xydata().tolist()) for x in ax.lines]
        for ax in fig.axes
    }
    assert list(found) == ["loss: answer", "loss: elicit", *curves.PANELS.values()]
    first, second = curves.COLORS[1:3]
    assert found["loss: answer"][:2] == [(first, "-", [[1, 8], [8, 1]]), (first, "--", [[1, 5]])]
    assert found["p([RESET]) after unsafe prefixes"][0] == (first, "-", [[1, 0.1], [8, 0.8]])
    assert found["p([RESET]) after safe prefixes"][1] == (first, "--", [[1, 0.25]])
    assert (second, "-", [[2, -0.25]]) in found["DPO: margin"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [str(tmp_path / name) for name in ("sft", "dpo")]
    (tmp_path / "dpo" / "metrics.jsonl").write_text("\0\n")
    assert "holds no line" in command(report.main, "curves", tmp_path / "dpo", code=2)[1]
    assert "no such file" in command(report.main, "curves", tmp_path, code=2)[1]
    assert ".png files" in command(report.main, "curves", tmp_path / "sft", "--out", tmp_path / "x.jpg", code=2)[1]


def test_compare(tmp_path):
    out = tmp_path / "compare.png"
    fig, printed = shown(compare, "compare", RESULTS / "toy-main.json", RESULTS / "real-bias.json", "--out", out)
    head, *lines = [re.split(r"  +", line) for line in printed.splitlines()[:-1]]
    assert head == ["set", "checkpoint", "n", "unsafe or complied, %", "helpful, %", "taken back, %"]
    assert len(lines) == len(records_of("toy-main")) + len(records_of("real-bias"))
    found = {tuple(line[:2]): line[3:] for line in lines}
    unsafe, back, helpful, _ = fig.axes
    for name, called, bad in (
        ("toy-main", "sft, toy-main, bias 0", ASKED),
        ("real-bias", "runs/real/sft, real-bias, bias 5", "advbench-forced"),
    ):
        of = {s: one(name, "sft", set=s, reset_bias=5 * (name != "toy-main")) for s in (bad, HARMLESS)}
        for set_name, rate, place, ax in (
            (bad, "unsafe", 0, unsafe),
            (bad, "reset", 2, back),
            (HARMLESS, "helpful", 1, helpful),
        ):
            expected = close(counted(of[set_name], rate))
            assert numbers(found[set_name, called][place]) == expected
            assert any([x, *ends] == expected for x, _, ends in dots(ax))
        assert found[bad, called][1] == found[HARMLESS, called][0] == "–"
    assert "not a result of this version" in command(report.main, "compare", RESULTS / "toy-attacks.json", code=2)[1]


def test_without_matplotlib(tmp_path, monkeypatch):
    """One line that says how to get it, and only where something is drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file = RESULTS / "toy-main.json"
    assert ASKED in command(report.main, "compare", file)[0]
    words = ("compare", file, "--out", tmp_path / "x.png")
    for said in (command(report.main, *words, code=2), command(figures.main, "--results", RESULTS, code=2)):
        assert said[1] == "error: pictures need matplotlib: pip install -r requirements-figures.txt\n"
