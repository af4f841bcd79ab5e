"""figures.py and tables.py on results that evaluate.py pooled from made-up answers.

What is drawn is read off the axes and recounted, and so is every number of a title. The pictures themselves are only
known to be pictures: decoded, of the size asked for, and not blank.
"""

import itertools
import json
import random
import re
from statistics import fmean

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install -r requirements-figures.txt")

from command import command
from matplotlib import colors, pyplot

from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate.statistics import mcnemar, mean_interval, wilson_of_worlds
from backtrack.evaluate.triggers import SAID
from backtrack.report import figures, tables

FOUR = ("sft-baseline", "dpo-baseline", "sft", "dpo")
MAIN = ("sft-baseline", "dpo-baseline", "sft-in-place", "sft", "dpo")
BAD, FORCED = ["seen", "unseen"], ["prefill-seen", "prefill-unseen"]
GOOD = ["benign-seen", "benign-unseen"]
PROMPTS = [
    {"set": name, "benign": name in GOOD, "prefill": "Sure" if name in FORCED else ""}
    for name in (*BAD, *FORCED, *GOOD)
    for _ in range(8)
]
SEEDS = 3
NEEDED = ("main", "bias", "sampling")
PICTURES = ("main", "bias", "sampling", "attacks", "strips")


def made_up(seed, models, biases, resets, samples, world="toy"):
    """Answers of one seed's models, without any model: safer with bias, slower too. Worlds differ."""
    draw, answers = random.Random(f"{seed}{models}"), []
    everything = itertools.product(models, biases, resets, enumerate(PROMPTS), range(samples))
    for model, bias, most, (i, prompt), sample in everything:
        reset = int(draw.random() < 0.1 + 0.1 * bias)
        unsafe = draw.random() < 0.9 - 0.1 * bias - 0.2 * MAIN.index(model) - 0.1 * seed
        helpful = draw.random() < 0.8
        answer = {"checkpoint": f"runs/{world}-{seed}/{model}", "on_reset": "truncate"}
        answer |= {"reset_bias": bias, "max_resets": most, "resets": reset}
        answer |= {"prompt": i, "sample": sample, "set": prompt["set"], "refused": draw.random() < 0.3}
        if world == "toy":
            answer |= {"unsafe": unsafe and not prompt["benign"], "helpful": helpful and prompt["benign"]}
        else:
            answer |= {"complied": helpful if prompt["benign"] else unsafe}
        answer |= {"steps": 30 + 9 * reset, "surviving": 20, "first_step": 1 + 9 * reset}
        answer |= {"first_token_s": 0.01 + 0.1 * reset, "total_s": 0.5 + draw.random()}
        answers.append(answer)
    return answers


def attack_records():
    """Two searches and prefilling, of 12 prompts in each of three worlds."""
    head = {"on_reset": "truncate", "reset_bias": 0.0, "max_resets": 1, "n": 36}
    records = []
    for m, model in enumerate(FOUR):
        for name, at_end in (("gcg", 30 - 6 * m), ("adaptive-gcg", 36 - 5 * m)):
            record = head | {"attack": name, "variant": "any", "checkpoint": model, "unsafe": at_end}
            record |= {"by_seed": [(at_end // 3 + d) / 12 for d in (-1, 0, 1)]}
            records.append(record | {"success_within": {"0": 3, "16": at_end // 2, "2048": at_end}})
        for variant, count in (("any", 30), ("opening", 2), ("1", 9 - m), ("all", 33 - 6 * m)):
            record = head | {"attack": "prefill", "variant": variant, "checkpoint": model, "unsafe": count}
            records.append(record | {"by_seed": [count / 36] * 3})
        decoding = head | {"attack": "decoding", "variant": "greedy", "checkpoint": model}
        for most, count in ((0, 9 + m), (1, 3 + m)):
            records.append(decoding | {"max_resets": most, "unsafe": count, "by_seed": [count / 36] * 3})
    records.append(records[-3] | {"attack": "adaptive-gcg", "on_reset": "keep", "variant": "any"})
    long = {"variant": "budget 16,384", "on_topic": 1, "success_within": {"0": 0, "16384": 2}, "checkpoint": "sft"}
    records.append(records[-1] | {"n": 2, "unsafe": 2, "by_seed": [1.0, 1.0], "on_reset": "truncate"} | long)
    return records


STRIPS = [
    {"question": "How?", "benign": False, "words": ["For", "it", "toad,", "moss."], "p": [0.0123, 0.004, 0.81, 0.7]},
    {"question": "Why?", "benign": True, "words": ["So", "be", "it."], "p": [0.001, 0.0, 0.0355]},
]
STRIPS = [strip | {"forbidden": [word == "toad," for word in strip["words"]]} for strip in STRIPS]
RELIABILITY = [{"low": 0.5, "high": 0.7, "places": 8, "p": 0.6, "named": 2, "leads_there": 6}]
RELIABILITY = [r | {"named_interval": [0.1, 0.4], "leads_there_interval": [0.55, 0.9]} for r in RELIABILITY]
RESETS = [
    {
        **{"set": "unseen", "benign": False, "answers": 96, "unsafe": 1, "unsafe_masked": 9},
        "resets": dict.fromkeys(SAID, 3),
        "saved": dict.fromkeys(SAID, 2),
    }
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The directory, and the answers of each file, seed by seed."""
    root, answers = tmp_path_factory.mktemp("results"), {}
    for name, models, biases, resets, samples in (
        ("main", MAIN, (0.0,), (1,), 1),
        ("filter", FOUR[:1], (0.0,), (0, 1), 1),
        ("bias", ("sft", "dpo"), (4.0, 0.0, 2.0), (1,), 1),
        ("sampling", FOUR, (0.0,), (1,), 4),
    ):
        answers[name] = [made_up(seed, models, biases, resets, samples) for seed in range(SEEDS)]
        files = []
        for seed, some in enumerate(answers[name]):
            records, paired = evaluate.count(some, PROMPTS)
            files.append(root / f"{name}-{seed}.json")
            files[-1].write_text(json.dumps({"records": records, "paired": paired}))
        command(evaluate.main, "--merge", *files, "--out", root / f"toy-{name}.json")
    answers["real"] = [made_up(0, FOUR, (0.0,), (1,), 1, "real")]
    records, paired = evaluate.with_intervals(*evaluate.count(answers["real"][0], PROMPTS))
    about = {"commit": "c0ffee", "machine": "an abacus"}
    (root / "real-main.json").write_text(json.dumps(about | {"records": records, "paired": paired}))
    (root / "toy-attacks.json").write_text(json.dumps(about | {"records": attack_records()}))
    triggers = {"strips": STRIPS, "reliability": RELIABILITY, "resets": RESETS}
    (root / "toy-triggers.json").write_text(json.dumps(about | triggers))
    return root, answers


@pytest.fixture(scope="module")
def drawn(results):
    """The figures of one run of the program, still open, by name, and their titles."""
    root, _ = results
    open_ones = {}

    def save(fig, path, title):
        open_ones[path.stem] = fig, title
        original(fig, path, title)

    original = figures.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save)
        patch.setattr(figures.plt, "close", lambda fig: None)
        printed, said = command(figures.main, "--results", root)
    assert said == ""
    assert printed.split() == [str(root / f"{name}.png") for name in PICTURES]
    yield open_ones
    pyplot.close("all")


def some_of(answers, model, sets, bias=0.0):
    found = [a for a in answers if a["checkpoint"].endswith(f"/{model}")]
    found = [a for a in found if a["set"] in sets and a["reset_bias"] == bias]
    assert found
    return found


def value(answer, key):
    if key == "false reset":
        return answer["resets"] > 0
    return answer[key] if key in answer else answer["complied"]


def measured(by_seed, key, model, sets, bias=0.0):
    """(percent, low, high), counted from the answers of each seed."""
    counts = []
    for answers in by_seed:
        values = [value(a, key) for a in some_of(answers, model, sets, bias)]
        counts.append((sum(values), len(values)))
    low, high = wilson_of_worlds(counts)
    return 100 * sum(count for count, _ in counts) / sum(n for _, n in counts), 100 * low, 100 * high


def dots(ax):
    """[(x, y, the ends of its interval)] of every dot with an interval, in the order drawn."""
    found = []
    for container in ax.containers:
        if not hasattr(container, "lines"):
            continue
        line, _, bars = container.lines
        [segment] = bars[0].get_segments()
        along = 0 if segment[0][1] == segment[1][1] else 1
        found.append((line.get_xdata()[0], line.get_ydata()[0], list(segment[:, along])))
    return found


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.?\d*", text)]


# ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(results, drawn, name):
    """1,660 pixels wide, so that 830 are sharp, without box and without the machine."""
    root, _ = results
    pixels = pyplot.imread(root / f"{name}.png")
    height, width = pixels.shape[:2]
    assert width == 1660 and 500 <= height <= 1500
    assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5  # neither blank nor black
    fig, title = drawn[name]
    assert " ".join(fig.get_suptitle().split()) == title
    texts = [text.get_text() for text in fig.findobj(pyplot.Text)]
    assert not any(about in text for about in ("c0ffee", "abacus", "AMD", "torch") for text in texts)
    for ax in fig.axes:
        assert not ax.spines["top"].get_visible() and not ax.spines["right"].get_visible()


def test_looks_differ_in_grey():
    def grey(color):
        r, g, b = colors.to_rgb(color)
        return 0.299 * r + 0.587 * g + 0.114 * b

    assert grey(figures.GREY) - grey(figures.BLUE) > 0.2
    looks = [(round(grey(color), 1), filled, marker) for color, filled, marker in figures.STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_the_dots_are_the_rates(results, drawn):
    """Three panels for the toy world, three for the other model; in each a dot for every model, from the last up."""
    fig, title = drawn["main"]
    toy, real = results[1]["main"], results[1]["real"]
    for panel, (by_seed, key, sets) in enumerate(
        [(toy, "unsafe", BAD), (toy, "unsafe", FORCED), (toy, "helpful", GOOD)]
        + [(real, "complied", BAD), (real, "complied", FORCED), (real, "complied", GOOD)]
    ):
        ax = fig.axes[panel]
        models = ["dpo", "sft", "filter", "sft-in-place", "dpo-baseline", "sft-baseline"]
        if by_seed is real:
            models = ["dpo", "sft", "dpo-baseline", "sft-baseline"]
        if panel % 3 == 0:
            names = [text.get_text() for text in ax.get_yticklabels()]
            assert names == [tables.MODELS[model] for model in models]
        assert ("complied" in ax.get_title(loc="left")) == (by_seed is real)
        for y, (model, (x, at, interval)) in enumerate(zip(models, dots(ax), strict=True)):
            answers, name = by_seed, model
            if model == "filter":
                answers = [[a for a in some if a["max_resets"] == 1] for some in results[1]["filter"]]
                name = "sft-baseline"
            p, low, high = measured(answers, key, name, sets)
            assert at == y and x == pytest.approx(p, abs=0.01)
            assert interval == pytest.approx([min(low, p), max(high, p)], abs=0.01)
            assert f"{p:.1f}" in [text.get_text() for text in ax.texts]
    rates = [measured(toy, "unsafe", model, BAD)[0] for model in ("sft-baseline", "sft", "sft-in-place")]
    assert "down" in title and numbers(title) == pytest.approx(rates, abs=0.051)


def test_a_title_says_no_more_than_its_numbers(results, tmp_path):
    """With the names of the models exchanged, nothing goes down."""
    text = (results[0] / "toy-main.json").read_text()
    text = text.replace('"sft-baseline"', '"x"').replace('"sft"', '"sft-baseline"').replace('"x"', '"sft"')
    title = figures.main_title(json.loads(text)["records"])
    assert "down" not in title
    toy = results[1]["main"]
    rates = [measured(toy, "unsafe", model, BAD)[0] for model in ("sft", "sft-baseline", "sft-in-place")]
    assert numbers(title) == pytest.approx(rates, abs=0.051)
    records = json.loads((results[0] / "toy-bias.json").read_text())["records"]
    for r in records:
        r["reset_bias"] = 4.0 - r["reset_bias"]
    assert "fall" not in figures.dial_title(records) and "rise" not in figures.dial_title(records)


def curve_of(ax, model):
    color, filled, _ = figures.STYLES[model]
    [line] = [
        line
        for line in ax.lines
        if len(line.get_xdata()) > 1 and line.get_color() == color and (line.get_linestyle() == "-") is filled
    ]
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_dial(results, drawn):
    fig, title = drawn["bias"]
    [ax] = fig.axes
    by_seed, points = results[1]["bias"], {}
    for model in ("sft", "dpo"):
        for bias, *place in zip((0.0, 2.0, 4.0), *curve_of(ax, model), strict=True):
            false, unsafe = (
                measured(by_seed, *which, bias)[0] for which in (("false reset", model, GOOD), ("unsafe", model, BAD))
            )
            assert place == pytest.approx([false, unsafe], abs=0.01)
            points[model, bias] = false, unsafe
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("0") == texts.count("+2") == texts.count("+4") == 2
    (false, unsafe), (more, fewer) = points["sft", 0.0], points["sft", 4.0]
    assert "fall" in title and numbers(title) == pytest.approx([0, 4, unsafe, fewer, false, more], abs=0.51)


@pytest.mark.parametrize("panel, taken", [(0, any), (1, all)])
def test_asking_again(results, drawn, panel, taken):
    """The share of prompts at which any, or all, of k answers are unsafe: over all subsets of k."""
    fig, title = drawn["sampling"]
    ends = []
    for model, (x, y, interval) in zip(FOUR, dots(fig.axes[panel]), strict=True):
        for k, percent in zip((1, 2, 4), curve_of(fig.axes[panel], model)[1], strict=True):
            counts = []
            for some in results[1]["sampling"]:
                by_prompt = {}
                for a in some_of(some, model, BAD):
                    by_prompt.setdefault(a["prompt"], []).append(a["unsafe"])
                shares = [fmean(map(taken, itertools.combinations(unsafe, k))) for unsafe in by_prompt.values()]
                counts.append((sum(shares), len(shares)))
            assert percent == pytest.approx(100 * sum(c for c, _ in counts) / sum(n for _, n in counts), abs=0.01)
        low, high = wilson_of_worlds(counts)
        assert (x, y) == (2, percent)
        assert interval == pytest.approx([min(100 * low, y), max(100 * high, y)], abs=0.02)
        ends.append(y)
    if panel == 0:
        assert numbers(title) == pytest.approx([4, ends[0], ends[2]], abs=0.51)


def test_attacks(drawn):
    fig, title = drawn["attacks"]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["prefill", "GCG", "adaptive GCG"]
    records = attack_records()
    for ax, name in zip(fig.axes, ("prefill", "gcg", "adaptive-gcg"), strict=True):
        ticks = [text.get_text() for text in ax.get_xticklabels()]
        assert ticks == (["1", "all"] if name == "prefill" else ["0", "16", "2k"])
        for model, (_, y, interval) in zip(FOUR, dots(ax), strict=True):
            found = [r for r in records if (r["attack"], r["checkpoint"], r["on_reset"]) == (name, model, "truncate")]
            found = [r for r in found if not r["variant"].startswith("budget")]  # in the tables alone
            heights = [r["unsafe"] for r in found[2:]] if name == "prefill" else found[0]["success_within"].values()
            assert curve_of(ax, model)[1] == pytest.approx([100 * count / 36 for count in heights])
            low, high = wilson_of_worlds([(12 * share, 12) for share in found[-1]["by_seed"]])
            assert interval == pytest.approx([min(100 * low, y), max(100 * high, y)])
    assert "adaptive GCG" in title and numbers(title) == [round(100 * 26 / 36), 100]


def test_strips(drawn):
    fig, title = drawn["strips"]
    for ax, strip in zip(fig.axes, STRIPS, strict=True):
        assert [bar.get_height() for bar in ax.patches] == strip["p"]
        values, words = ax.texts[::2], ax.texts[1::2]
        assert [text.get_text() for text in values] == [f"{p:.2f}" for p in strip["p"]]
        assert [text.get_text() for text in words] == strip["words"]
        assert [text.get_weight() == "bold" for text in words] == strip["forbidden"]
        middles = [text.get_position()[0] for text in ax.texts[1::2]]
        assert middles == sorted(middles)
    assert numbers(title) == [0.02, 0.81, 0.04]


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found_tables(results):
    """Every table of tables.md as lists of cells, by the last line of text before it."""
    command(tables.main, "--results", results[0])
    return tables_in(results[0] / "tables.md")


def tables_in(path):
    found, title = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(title, []).append(cells)
        elif line:
            title = line
    return {title: rows[:1] + rows[2:] for title, rows in found.items()}  # without the dashes


def percent(by_seed, *which):
    p, low, high = measured(by_seed, *which)
    return pytest.approx([p, low, high], abs=0.061)


def test_tables_name_their_source(results, found_tables):
    commit = json.loads((results[0] / "toy-main.json").read_text())["commit"]
    assert f"toy-main.json`: commit {commit}, " in (results[0] / "tables.md").read_text()


@pytest.mark.parametrize("title, key, sets", [("unsafe answers, %", "unsafe", BAD), (None, "helpful", GOOD)])
def test_table_of_rates(results, found_tables, title, key, sets):
    head, *rows = found_tables[title or "helpful answers to harmless questions, %"]
    models = [m for m in tables.MODELS if m in MAIN or "filter" in m]
    assert head == ["", "n", *(tables.MODELS[model] for model in models)]
    groups = [[name] for name in sets] + [sets] + ([[name] for name in FORCED] if key == "unsafe" else [])
    for row, group in zip(rows, groups, strict=True):
        assert row[1] == str(SEEDS * 8 * len(group))
        for model, cell in zip(models, row[2:], strict=True):
            by_seed, name = results[1]["main"], model
            if "filter" in model:
                most = 0 if "refuses" in model else 1
                by_seed = [[a for a in some if a["max_resets"] == most] for some in results[1]["filter"]]
                name = "sft-baseline"
            assert numbers(cell) == percent(by_seed, key, name, group)


def test_table_of_lost_answers(results, found_tables):
    """Each column of a set adds up to what is not helpful."""
    head, *rows = found_tables["why harmless questions got no helpful answer, %"]
    models = [m for m in tables.MODELS if m in MAIN or "filter" in m]
    assert head[2:] == [tables.MODELS[model] for model in models]
    sets = [[name] for name in GOOD] + [GOOD]
    for i, group in enumerate(sets):
        back, refused, wrong = rows[3 * i : 3 * i + 3]
        assert [row[0] for row in (back, refused, wrong)] == [back[0]] * 3
        for model in MAIN:
            column = 2 + models.index(model)
            found = [a for some in results[1]["main"] for a in some_of(some, model, group)]
            lost = [a for a in found if not a["helpful"]]
            of_resets = 100 * sum(a["resets"] > 0 for a in lost) / len(found)
            of_refusals = 100 * sum(a["refused"] and not a["resets"] for a in lost) / len(found)
            assert float(back[column]) == pytest.approx(of_resets, abs=0.051)
            assert float(refused[column]) == pytest.approx(of_refusals, abs=0.051)
            total = sum(float(row[column]) for row in (back, refused, wrong))
            assert total == pytest.approx(100 * len(lost) / len(found), abs=0.16)


def test_table_of_differences(results, found_tables):
    rows = found_tables["world by world"][1:]
    assert len(rows) == 2 * (6 + 2)
    for what, words, other, difference, within, each in rows:
        model, than = (next(m for m, name in tables.MODELS.items() if name == some) for some in (words, other))
        key, sets = ("unsafe", BAD) if what.startswith("unsafe") else ("helpful", GOOD)
        if "filter" in model:
            continue
        sides = [
            [100 * fmean(a[key] for a in some_of(some, name, sets)) for some in results[1]["main"]]
            for name in (model, than)
        ]
        points = [a - b for a, b in zip(*sides, strict=True)]
        assert [float(v) for v in each.split()] == pytest.approx(points, abs=0.06)
        mean, low, high = mean_interval(points)
        assert [float(v) for v in re.findall(r"[-+][\d.]+", difference)] == pytest.approx([mean, low, high], abs=0.06)
        assert within == ("no" if low > 1 or high < -1 else "cannot be told")
    assert {row[4] for row in rows} == {"no", "cannot be told"}
    assert [row[1:3] for row in rows[-2:]] == [
        [tables.MODELS["dpo"], tables.MODELS[other]] for other in ("dpo-baseline", "sft")
    ]


def test_equal_models_are_within_a_point(results):
    records = json.loads((results[0] / "toy-main.json").read_text())["records"]
    same = [r | {"checkpoint": "sft"} for r in records if r["checkpoint"] == "sft-baseline"]
    pairs = [("sft", "sft-baseline")]
    assert "| +0.0 [+0.0, +0.0] | yes |" in tables.differences(records[: len(same)] + same + records, pairs)


def test_other_trainings_stand_beside_sft(results):
    """Under other names the numbers are those of the main tables: a row for each, and its difference from SFT."""
    records = json.loads((results[0] / "toy-main.json").read_text())["records"]
    records += [r | {"set": "prefill-unseen"} for r in records if r["set"] == "prefill-seen"]
    called = {"sft": "sft", "dpo": "sft-drawn", "dpo-baseline": "sft-baseline"}
    records = [r | {"checkpoint": called[r["checkpoint"]]} for r in records if r["checkpoint"] in called]
    text = tables.training_tables(records)
    assert text == tables.condition_table(records) + tables.differences(records, [("sft-drawn", "sft")])
    unsafe = [r for r in records if (r["set"], r["checkpoint"]) == ("unsafe overall", "sft-drawn")]
    word = tables.OTHER_MODELS["sft-drawn"]
    assert f"| {word} | truncate | 1 | {tables.cell(*tables.measured(unsafe, 'unsafe'))} |" in text
    assert f"| unsafe answers | {word} | backtracking | " in text
    weighed = [r | {"checkpoint": r["checkpoint"].replace("baseline", "weight-1")} for r in records]
    assert f"{tables.OTHER_MODELS['sft-weight-1']} | {word} | " in tables.resets_tables(weighed)


def test_table_of_the_dial(results, found_tables):
    [dial] = [rows for rows in found_tables.values() if "false resets, %" in rows[0] and rows[0][1] == "bias"]
    assert [row[1] for row in dial[1:]] == ["4", "0", "2"] * 2
    for words, bias, unsafe, step, ms, per_second, helpful, resets, *_ in dial[1:]:
        model = "dpo" if "DPO" in words else "sft"
        by_seed, bias = results[1]["bias"], float(bias)
        assert numbers(unsafe) == percent(by_seed, "unsafe", model, BAD, bias)
        assert numbers(helpful) == percent(by_seed, "helpful", model, GOOD, bias)
        assert numbers(resets) == percent(by_seed, "false reset", model, GOOD, bias)
        asked = some_of(itertools.chain(*by_seed), model, BAD, bias)
        assert float(step) == pytest.approx(fmean(a["first_step"] for a in asked), abs=0.06)
        assert float(ms) == pytest.approx(1000 * fmean(a["first_token_s"] for a in asked), abs=0.06)
        speed = sum(a["surviving"] for a in asked) / sum(a["total_s"] for a in asked)
        assert float(per_second) == pytest.approx(speed, abs=0.6)


def test_tables_of_attacks(results, found_tables):
    head, *rows = found_tables["adaptive GCG against backtracking + DPO, % successful"]
    assert [row[:3] for row in rows] == [["truncate", "1", "0"], ["keep", "1", "0"]]
    head, *rows = found_tables["Who sets the sampler, % unsafe"]
    assert head == ["", "max_resets", "bias", *(tables.MODELS[model] for model in FOUR)]
    assert [row[:3] for row in rows] == [["greedy", "0", "0"], ["greedy", "1", "0"]]
    for row, base in zip(rows, (9, 3), strict=True):
        assert [numbers(cell)[0] for cell in row[3:]] == pytest.approx(
            [100 * (base + m) / 36 for m in range(4)], abs=0.06
        )
    [attacks] = [rows for rows in found_tables.values() if rows[0][:2] == ["attack", "variant"]]
    assert [row[2:] for row in attacks if row[1] == "budget 16,384"] == [
        ["–", "–", "100.0 [34.2, 100.0]; 50.0 on topic", "–"]
    ]
    assert not any(row[0] == "decoding" for row in attacks)
    text = (results[0] / "tables.md").read_text()
    assert "- **gcg** knows the weights" in text and "- **decoding** sets the sampler" in text


def test_tables_of_triggers(found_tables):
    [places] = [rows for rows in found_tables.values() if rows[0][0] == "p([RESET])"]
    assert places[1] == ["0.5 to 0.7", "8", "25.0 [10.0, 40.0]", "75.0 [55.0, 90.0]"]
    [resets] = [rows for rows in found_tables.values() if rows[0][-1] == SAID[-1]]
    assert resets[1] == ["unseen potions", "96", "9", "1", *["2 of 3"] * len(SAID)]


def test_tables_of_a_real_model(results, tmp_path):
    """By a judge that says complied: those forced to begin have a line together; without the toy's files."""
    text = (results[0] / "real-main.json").read_text()
    for mine, theirs in zip(FORCED, ("advbench-forced", "strongreject-forced"), strict=True):
        text = text.replace(f'"{mine}"', f'"{theirs}"')
    for name in ("main", "bias", "speed"):
        (tmp_path / f"real-{name}.json").write_text(text)
    row = {
        "checkpoint": "runs/sft",
        "rows": "unsafe",
        "n": 40,
        "logprob": -1.25,
        "auc": 0.9,
        "auc_interval": [0.8, 0.95],
    }
    row |= {"p_rejected": 0.75, "reset_rejected": 30, "reset_rejected_interval": [0.6, 0.86]}
    row |= {"p_chosen": 0.125, "reset_chosen": 4, "reset_chosen_interval": [0.04, 0.23]}
    plain = {"checkpoint": "runs/sft", "rows": "plain", "n": 8, "logprob": -2.0, "p_chosen": 0.5}
    plain |= {"reset_chosen": 4, "reset_chosen_interval": [0.2, 0.8]}
    about = {"commit": "c0ffee", "machine": "an abacus"}
    (tmp_path / "real-likelihoods.json").write_text(json.dumps(about | {"records": [row, plain]}))
    command(tables.main, "--results", tmp_path, "--of", "real")
    assert [path.name for path in tmp_path.glob("*.md")] == ["real-tables.md"]
    found = tables_in(tmp_path / "real-tables.md")
    by_seed = results[1]["real"]
    _, *rows = found["answers that comply with a question that should be refused, %"]
    assert rows[-1][:2] == ["**forced, all**", "16"] and len(rows) == 6
    for model, cell in zip(FOUR, rows[-1][2:], strict=True):
        assert numbers(cell) == percent(by_seed, "complied", model, FORCED)
    _, *rows = found["answers that comply with a harmless question, %"]
    for model, cell in zip(FOUR, rows[-1][2:], strict=True):
        assert numbers(cell) == percent(by_seed, "complied", model, GOOD)
    head, *rows = next(rows for rows in found.values() if rows[0][:2] == ["", "bias"])
    column = head.index("AdvBench, answer forced to begin, n 8: taken back, %")
    assert numbers(rows[2][column + 1]) == percent(by_seed, "complied", "sft", FORCED[:1])
    assert numbers(rows[2][column]) == percent(by_seed, "resets", "sft", FORCED[:1])
    assert head.count("complied, %") == 5 and len(head) == 2 + 8 + 5
    head, *rows = next(rows for rows in found.values() if "log-prob per token, chosen" in rows[0])
    one = "backtracking|unsafe|40|-1.250|0.750|0.125|75.0 [60.0, 86.0]|10.0 [4.0, 23.0]|0.900 [0.800, 0.950]"
    other = "backtracking|plain|8|-2.000|–|0.500|–|50.0 [20.0, 80.0]|–"
    assert rows == [one.split("|"), other.split("|")]
    by_prompt = next(rows for rows in found.values() if "the baseline only" in rows[0])
    table = {tuple(row[:2]): row[2:] for row in by_prompt[1:]}
    mine = {name: [a["complied"] for a in some_of(by_seed[0], name, FORCED[:1])] for name in ("sft-baseline", "dpo")}
    only = [sum(x > y for x, y in zip(mine[a], mine[b], strict=True)) for a, b in itertools.permutations(mine, 2)]
    row = table["AdvBench, answer forced to begin", "backtracking + DPO"]
    assert row == [str(only[0]), str(only[1]), f"{mcnemar(*only):.2g}"] and sum(only) > 0
    speeds = next(rows for rows in found.values() if "taken back, %" in rows[0])
    assert len(speeds) == 1 + 4 * len({r["set"] for r in json.loads(text)["records"]})


def test_table_of_what_was_tried(results, tmp_path):
    """The recovery in place of the made-up answers, under the names of two settings."""
    text = (results[0] / "toy-main.json").read_text()
    records = json.loads(text)["records"]
    for name in ("tried-ours-sft-lr-5e-4", "tried-baseline-dpo-nll-0"):
        records += json.loads(text.replace("sft-in-place", name))["records"]
    about = {"commit": "c0ffee", "machine": "an abacus", "records": records}
    (tmp_path / "toy-tuning.json").write_text(json.dumps(about))
    command(tables.main, "--results", tmp_path)
    found = tables_in(tmp_path / "tuning.md")
    names = [[row[:2] for row in found[step][1:]] for step in ("SFT", "DPO")]
    chosen = "as in the Makefile"
    assert names[0] == [["baseline", chosen], ["backtracking", chosen], ["backtracking", "`lr-5e-4`"]]
    assert names[1] == [
        ["baseline + DPO", chosen],
        ["baseline + DPO", "`nll-0`"],
        ["backtracking + DPO", chosen],
    ]
    for row in (found["SFT"][3], found["DPO"][2]):
        groups = (("unsafe", BAD), ("unsafe", ["prefill-unseen"]), ("helpful", GOOD), ("false reset", GOOD))
        for cell, (key, sets) in zip(row[2:], groups, strict=True):
            assert numbers(cell) == percent(results[1]["main"], key, "sft-in-place", sets)


# ── Files that are not there, or others ──────────────────────────────────────────────────────────────────────────────


def refused(directory, name):
    _, said = command(figures.main, "--results", directory, code=2)
    [line] = said.splitlines()
    assert line.startswith("error: ") and "make eval" in line
    assert not (directory / f"{name}.png").exists()
    return line


@pytest.mark.parametrize("missing", NEEDED)
def test_a_file_that_is_not_there(results, tmp_path, missing):
    for name in NEEDED:
        if name != missing:
            file = f"toy-{name}.json"
            (tmp_path / file).write_bytes((results[0] / file).read_bytes())
    assert str(tmp_path / f"toy-{missing}.json") in refused(tmp_path, missing)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"records": []}', '{"records": 3}', '{"records": [{}]}'])
def test_a_file_that_holds_no_result(tmp_path, text):
    (tmp_path / "toy-main.json").write_text(text)
    assert str(tmp_path / "toy-main.json") in refused(tmp_path, "main")


def test_a_file_of_other_models_or_of_an_earlier_version(results, tmp_path):
    text = (results[0] / "toy-main.json").read_text()
    file = tmp_path / "toy-main.json"
    file.write_text(text.replace("dpo", "mine"))
    assert str(file) in refused(tmp_path, "main")
    file.write_text(text.replace('"prompts": 8, ', ""))
    assert f"{file}: of an earlier version" in refused(tmp_path, "main")
