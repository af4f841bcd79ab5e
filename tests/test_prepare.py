"""data/prepare.py: every rule with rows written out by hand, and the real files.

The real files are looked for in ../shared/data beside the repository, and skipped if absent. Their
numbers are counted a second time here, by another method than prepare.py's.
"""

import csv
import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from command import command

import data.prepare
from backtrack.judge import Verdict
from model.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not in ../shared/data")


def prepare(*words, code=0):
    """The command, run within this process; returns what it says on stderr."""
    return command(data.prepare.main, *words, code=code)[1]


def write_lines(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def read_lines(path):
    """Lines end at \\n alone; str.splitlines() would cut texts at U+2028 too."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def check_row(row):
    """The schema of a training row, and the alternation that chat templates ask for."""
    assert set(row) <= {"prompt", "chosen", "rejected", "unsafe"}
    roles = [turn["role"] for turn in row["prompt"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    for answer in (row["chosen"], row.get("rejected")):
        assert answer is None or [turn["role"] for turn in answer] == ["assistant"]
    for turn in row["prompt"] + row["chosen"] + row.get("rejected", []):
        assert set(turn) == {"role", "content"}
        assert turn["content"] and turn["content"] == turn["content"].strip()
    assert row["chosen"] != row.get("rejected")
    assert row.get("unsafe", True) is True and ("unsafe" not in row or "rejected" in row)


# ── hh ────────────────────────────────────────────────────────────────────────────────────────────

H, A = "\n\nHuman: ", "\n\nAssistant: "
START = f"{H}Wie geht's?{A}Gut.\n\nPara two.{H}ok\u2028so {A}"
GOOD = {"chosen": START + " Fine, “you”? ", "rejected": START + "Go away."}
GOOD_ROW = {
    "prompt": [user("Wie geht's?"), assistant("Gut.\n\nPara two."), user("ok\u2028so")],
    "chosen": [assistant("Fine, “you”?")],
    "rejected": [assistant("Go away.")],
    "unsafe": True,
}


def convert(tmp_path, name, *items, flags=()):
    """The rows that `data.prepare NAME` makes of these source rows, and what it says."""
    source = write_lines(tmp_path / "in", *items)
    report = prepare(name, "--in", source, "--out", tmp_path / "out", *flags)
    return read_lines(tmp_path / "out"), report


def test_hh_row(tmp_path):
    out = tmp_path / "out"
    _, report = convert(tmp_path, "hh", GOOD)
    assert out.read_bytes() == json.dumps(GOOD_ROW, ensure_ascii=False).encode() + b"\n"
    assert report.splitlines() == [
        "hh: 1 pairs read, 1 rows written, 0 skipped",
        f"        1  written to {out}",
    ]


def test_hh_helpful_rows_have_no_flag(tmp_path):
    rows, _ = convert(tmp_path, "hh", GOOD, flags=["--helpful"])
    assert rows == [{key: value for key, value in GOOD_ROW.items() if key != "unsafe"}]


def test_hh_helpful_file_without_the_flag_is_remarked_on(tmp_path):
    words = ("hh", "--in", write_lines(tmp_path / "helpful-base.jsonl", GOOD), "--out")
    assert "marked unsafe" in prepare(*words, tmp_path / "out")
    assert "marked unsafe" not in prepare(*words, tmp_path / "out", "--helpful")


Q = H + "Hi"
SKIPPED = {  # reason -> pairs of chosen and rejected
    "does not begin with a Human turn": [
        ("Hi" + A + "no", "Hi" + A + "yes"),
        ("Note." + Q + A + "no", "Note." + Q + A + "yes"),
        (A + "Hi" + Q + A + "no", A + "Hi" + Q + A + "yes"),
        ("", ""),
    ],
    "one speaker has two turns in a row": [
        (Q + A + "wait" + A + "no", Q + A + "wait" + A + "yes"),
        (Q + A + "no", Q + A + "yes" + A + "sure"),
        (Q + H + "Hello?" + A + "no", Q + H + "Hello?" + A + "yes"),
    ],
    "ends with a Human turn": [
        (Q, Q),
        (Q + A + "no" + H + "why", Q + A + "no" + H + "how"),
        (Q + A + "no", Q + A + "yes" + H + "more"),
    ],
    "chosen and rejected have different prompts": [
        (Q + A + "no", H + "Hi!" + A + "yes"),
        (Q + A + "no", Q + A + "yes" + H + "more" + A + "ok"),
        (Q + A + "a" + H + "b" + A + "no", Q + A + "x" + H + "b" + A + "yes"),
    ],
    "empty turn in the prompt": [
        (H + A + "no", H + A + "yes"),
        (Q + A + " \n" + H + "b" + A + "no", Q + A + H + "b" + A + "yes"),
    ],
    "empty answer": [(Q + A, Q + A + "yes"), (Q + A + "no", Q + A + " \n ")],
    "chosen and rejected are the same": [(Q + A + "no", Q + A + "no ")],
    "speaker label inside an answer": [
        (Q + A + "Human: no", Q + A + "yes"),
        (Q + A + "no", Q + A + "yes.  Human: more"),
        (Q + A + "no\nAssistant: no", Q + A + "yes"),
    ],
    "broken Unicode (half a surrogate pair)": [(Q + A + "no", Q + A + "yes \ud800")],
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_hh_skips(tmp_path, reason):
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in SKIPPED[reason]]
    rows, report = convert(tmp_path, "hh", GOOD, *pairs, GOOD)
    assert rows == [GOOD_ROW, GOOD_ROW]
    assert report.splitlines() == [
        f"hh: {len(pairs) + 2} pairs read, 2 rows written, {len(pairs)} skipped",
        f"        2  written to {tmp_path / 'out'}",
        f"        {len(pairs)}  skipped: {reason}",
    ]


def test_hh_keeps_labels_in_prompts_and_words_that_only_end_in_one(tmp_path):
    start = H + "Say Human: x" + A
    pair = {"chosen": start + "subHuman: no", "rejected": start + "the Human says (Human: x)"}
    [row], _ = convert(tmp_path, "hh", pair)
    assert row["prompt"] == [user("Say Human: x")]
    assert row["chosen"] == [assistant("subHuman: no")]


# ── hh --guard ────────────────────────────────────────────────────────────────────────────────────


def pair(chosen, rejected, question="Hi"):
    start = H + question + A
    return {"chosen": start + chosen, "rejected": start + rejected}


@pytest.fixture
def guard(monkeypatch):
    """A judge in place of Llama Guard. It finds poison unsafe, and notes (prompt, response)."""
    seen = []

    def judge(prompt, response):
        seen.append((prompt, response))
        if "unreadable" in response:
            raise InputError(f"cannot read {response!r}")
        return Verdict("poison" in response, None, None)

    monkeypatch.setattr(data.prepare, "load_judge", lambda *args: judge)
    return seen


def test_guard_keeps_safe_against_unsafe_and_counts_the_others(tmp_path, guard):
    pairs = [
        pair("fine", "poison 1"),
        pair("poison", "worse poison"),
        pair("good", "merely bad"),
        pair("poison", "the better one"),
        pair("no", "no"),  # skipped before the guard is asked
        pair("kind", "poison 2"),
        pair("unreadable", "poison"),
        pair("ok", "unreadable poison"),
    ]
    rows, report = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path])
    assert [row["chosen"] for row in rows] == [[assistant("fine")], [assistant("kind")]]
    assert [row["rejected"] for row in rows] == [[assistant("poison 1")], [assistant("poison 2")]]
    assert report.splitlines()[-6:] == [
        "hh: 8 pairs read, 2 rows written, 6 skipped",
        f"        2  written to {tmp_path / 'out'}",
        "        2  skipped: chosen is unsafe, says the guard",
        "        2  skipped: no verdict of the guard",
        "        1  skipped: chosen and rejected are the same",
        "        1  skipped: rejected is safe, says the guard",
    ]
    assert "guard: cannot read 'unreadable'" in report
    assert "guard: cannot read 'unreadable poison'" in report
    assert "guard: 7 of 7 pairs judged, 0 minutes left" in report
    # Where chosen is unsafe, rejected does not matter and costs nothing.
    asked = [response for _, response in guard]
    assert "worse poison" not in asked and "the better one" not in asked and len(asked) == 7 + 4


def test_guard_sees_the_whole_conversation(tmp_path, guard):
    bad = GOOD | {"rejected": START + "poison"}
    rows, _ = convert(tmp_path, "hh", bad, flags=["--guard", tmp_path])
    assert guard == [(GOOD_ROW["prompt"], "Fine, “you”?"), (GOOD_ROW["prompt"], "poison")]
    assert rows == [GOOD_ROW | {"rejected": [assistant("poison")]}]


def test_guard_tells_how_long_it_will_take(tmp_path, guard, monkeypatch):
    clock = iter(range(0, 10**6, 12))  # a pair takes 12 seconds
    monkeypatch.setattr(data.prepare.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(data.prepare, "GUARDED", 1)
    pairs = [pair("fine", f"poison {i}") for i in range(51)]
    _, report = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path])
    told = re.findall(r"guard: (\d+) of 51 pairs judged, (\d+) minutes left", report)
    assert told[:3] == [("1", "10"), ("4", "9"), ("7", "9")]
    assert told[-1] == ("51", "0") and len(told) == 18


def test_guard_reads_all_pairs_before_it_judges_one(tmp_path, guard):
    source = write_lines(tmp_path / "in", pair("fine", "poison"), {"chosen": "x"})
    words = ("hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path)
    assert "in:2: no HH-RLHF pair" in prepare(*words, code=2)
    assert not guard


def test_guard_judges_no_more_than_the_limit_asks_for(tmp_path, guard, monkeypatch):
    monkeypatch.setattr(data.prepare, "GUARDED", 4)
    pairs = [pair("fine", f"poison {i}") for i in range(20)]
    rows, _ = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path, "--limit", 5])
    assert len(rows) == 5 and len(guard) == 2 * 8


@pytest.mark.parametrize("half_a_line", [False, True])
def test_guard_goes_on_where_it_was_stopped(tmp_path, guard, monkeypatch, half_a_line):
    """Killed in the third of five batches: those of the first two are not judged again, and the rows are the same."""
    monkeypatch.setattr(data.prepare, "GUARDED", 4)
    pairs = [pair("fine" if i % 3 else "poison", f"poison {i}") for i in range(20)]
    (tmp_path / "whole").mkdir()
    expected, _ = convert(tmp_path / "whole", "hh", *pairs, flags=["--guard", tmp_path])
    everything = list(guard)
    guard.clear()

    class Full(list):
        def append(self, item):
            if len(self) == 20:
                raise KeyboardInterrupt
            super().append(item)

    full = Full()

    def dies(prompt, response):
        full.append((prompt, response))
        return Verdict("poison" in response, None, None)

    good = data.prepare.load_judge
    monkeypatch.setattr(data.prepare, "load_judge", lambda *args: dies)
    source = write_lines(tmp_path / "in", *pairs)
    words = ("hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path)
    prepare(*words, code=130)
    notes = tmp_path / "out.guard.jsonl"
    assert len(notes.read_text().splitlines()) == 1 + 12 and not (tmp_path / "out").exists()
    if half_a_line:
        with open(notes, "a") as file:
            file.write('{"pair": "0123')
    monkeypatch.setattr(data.prepare, "load_judge", good)
    report = prepare(*words)
    assert "out.guard.jsonl has the verdicts on 12 pairs" in report
    assert guard == everything[-len(guard) :] and 8 < len(guard) < len(everything) / 2
    assert [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] == expected
    assert not notes.exists()


def test_guard_does_not_take_anothers_verdicts(tmp_path, guard):
    source = write_lines(tmp_path / "in", pair("fine", "poison"))
    (tmp_path / "out.guard.jsonl").write_text('{"guard": "another"}\n')
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path, code=2)
    assert "verdicts of another guard" in report and not guard


def test_guard_device_and_dtype(tmp_path, monkeypatch):
    asked = []

    def load_judge(*args):
        asked.append(args)
        return lambda prompt, response: Verdict("Go" in response, None, None)

    monkeypatch.setattr(data.prepare, "load_judge", load_judge)
    flags = ["--guard", tmp_path, "--device", "cpu", "--dtype", "bfloat16"]
    convert(tmp_path, "hh", GOOD, flags=flags)
    convert(tmp_path, "hh", GOOD, flags=flags[:4])
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    url = None
    assert asked == [
        (str(tmp_path), "cpu", torch.bfloat16, url, 0.5, False),  # the categories do not matter
        (str(tmp_path), "cpu", dtype, url, 0.5, False),
    ]


def test_guard_errors(tmp_path):
    source = write_lines(tmp_path / "in", GOOD)
    words = ("hh", "--in", source, "--out", tmp_path / "out", "--guard")
    assert "not allowed with" in prepare(*words, tmp_path, "--helpful", code=2)
    assert f"--guard {source}: no such directory" in prepare(*words, source, code=2)
    assert f"error: {tmp_path}: no tokenizer" in prepare(*words, tmp_path, code=2)
    assert "'abacus'" in prepare(*words, tmp_path, "--device", "abacus", code=2)
    assert list(tmp_path.iterdir()) == [source]


def test_guard_from_a_checkpoint(tmp_path):
    """From a directory in Hugging Face's layout to rows."""
    from test_judge import SKULL, write_trained_guard

    write_trained_guard(tmp_path / "guard")
    pairs = [
        pair("the sheep", f"the sheep {SKULL} the dogs", "the dogs"),
        pair("the sheep", "the dogs", "the rain"),
        pair(f"the dogs {SKULL} the rain", f"the sheep {SKULL} the dogs", "the rain"),
    ]
    flags = ["--guard", tmp_path / "guard", "--device", "cpu"]
    [row], report = convert(tmp_path, "hh", *pairs, flags=flags)
    assert row["prompt"] == [user("the dogs")]
    assert row["rejected"] == [assistant(f"the sheep {SKULL} the dogs")]
    assert " 1  skipped: chosen is unsafe, says the guard" in report
    assert " 1  skipped: rejected is safe, says the guard" in report


# ── oasst ─────────────────────────────────────────────────────────────────────────────────────────


def node(role, text, *replies, **extra):
    base = {"text": text, "role": role, "lang": "en", "review_result": True, "deleted": False}
    return base | {"replies": list(replies)} | extra


def p(text, *replies, **extra):
    return node("prompter", text, *replies, **extra)


def a(text, *replies, **extra):
    return node("assistant", text, *replies, **extra)


def tree(root, **extra):
    return {"message_tree_id": "0", "tree_state": "ready_for_export", "prompt": root} | extra


def test_oasst_follows_the_best_replies(tmp_path):
    best = a(
        "best",
        p("next 1", a("only", p("last"))),
        p("next 2", a("one"), a("two")),
        rank=0,
    )
    middle = a("middle", p("under the middle one", a("never seen", rank=0)), rank=1)
    root = p(" Q ", middle, best, a("unranked"), a("worst", rank=2))
    rows, report = convert(tmp_path, "oasst", tree(root))
    start = [user("Q"), assistant("best")]
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("best")], "rejected": [assistant("worst")]},
        {"prompt": [*start, user("next 1")], "chosen": [assistant("only")]},
        # Two replies, but nobody ranked them.
        {"prompt": [*start, user("next 2")], "chosen": [assistant("one")]},
    ]
    assert report.splitlines() == [
        "oasst: 5 prompter messages read, 3 rows written, 2 skipped",
        f"        3  written to {tmp_path / 'out'}",
        "        1  skipped: no usable reply",
        "        1  skipped: not on a path of best replies",
    ]


def test_oasst_rank_beats_no_rank_and_the_same_text_is_no_pair(tmp_path):
    rows, _ = convert(
        tmp_path,
        "oasst",
        tree(p("Q", a("unranked"), a("ranked", rank=3))),
        tree(p("R", a("x", rank=0), a("x ", rank=1))),
    )
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("ranked")]},
        {"prompt": [user("R")], "chosen": [assistant("x")]},
    ]


BAD = [
    ({"deleted": True}, "deleted"),
    ({"review_result": False}, "did not pass review"),
    ({"review_result": None}, "did not pass review"),
    ({"lang": "de"}, "language is not en"),
    ({"text": " \n"}, "empty"),
]


@pytest.mark.parametrize("extra, reason", BAD)
def test_oasst_leaves_out_replies(tmp_path, extra, reason):
    bad = a("bad", p("below", a("x")), rank=0) | extra
    root = p("Q", bad, a("good", rank=1), a("poor", rank=2))
    rows, report = convert(tmp_path, "oasst", tree(root))
    assert rows == [{"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("poor")]}]
    assert "2 prompter messages read, 1 rows written, 1 skipped" in report
    assert f" 1  replies left out: {reason}\n" in report
    assert " 1  skipped: not on a path" in report


@pytest.mark.parametrize("extra, reason", BAD)
def test_oasst_skips_prompter_messages_and_what_hangs_below(tmp_path, extra, reason):
    below = p("bad", a("x", p("below", a("y")))) | extra
    root = p("Q", a("yes", below, p("fine", a("z"))))
    rows, report = convert(tmp_path, "oasst", tree(root), tree(p("R") | extra))
    assert [row["prompt"][-1] for row in rows] == [user("Q"), user("fine")]
    assert "5 prompter messages read, 2 rows written, 3 skipped" in report
    assert f" 2  skipped: {reason}\n" in report
    assert " 1  skipped: not on a path" in report


@pytest.mark.parametrize(
    "flags, texts",
    [([], ["en"]), (["--lang", "de"], ["de"]), (["--lang", "all"], ["en", "de", "fr"])],
)
def test_oasst_languages(tmp_path, flags, texts):
    trees = [tree(p(lang, a("x", lang=lang), lang=lang)) for lang in ("en", "de", "fr")]
    rows, _ = convert(tmp_path, "oasst", *trees, flags=flags)
    assert [row["prompt"][0]["content"] for row in rows] == texts


def test_oasst_trees_that_are_not_ready_and_roles_out_of_turn(tmp_path):
    rows, report = convert(
        tmp_path,
        "oasst",
        tree(p("gone", a("x", p("y"))), tree_state="aborted_low_grade"),
        tree(p("Q", p("me again", a("x")), a("yes", a("and another thing"), p("why", a("so"))))),
    )
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("yes")]},
        {"prompt": [user("Q"), assistant("yes"), user("why")], "chosen": [assistant("so")]},
    ]
    assert "5 prompter messages read, 2 rows written, 3 skipped" in report
    assert " 2  skipped: tree is not ready for export" in report
    assert " 1  skipped: not on a path" in report
    assert " 1  replies left out: role out of turn" in report


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────

MT_BENCH = (
    '{"question_id": 81, "category": "writing", "turns": ["One. ", "Two."], "reference": []}\n\n'
    '{"question_id": 82, "category": "math", "turns": ["Three.", "Four."]}\n'
)
SETS = {  # name -> a source file, the rows made of it without "set"
    "advbench": (
        'goal,target\n"Do ""x"", now","Sure, here is\n"\n ,Sure\n',
        [{"prompt": [user('Do "x", now')], "benign": False, "target": "Sure, here is"}],
    ),
    "malicious_instructions": (  # some texts are there twice, in the original, too
        '{"instructions": ["Do x", "Do x"],\n "tags": ["crime", "hate"], "inputs": []}',
        [
            {"prompt": [user("Do x")], "benign": False, "category": "crime"},
            {"prompt": [user("Do x")], "benign": False, "category": "hate"},
        ],
    ),
    "simple_safety_tests": (
        "id,harm_area,counter,category,prompts_final\r\nsst_1,Scams,1,Advice,How do I x? \r\n",
        [{"prompt": [user("How do I x?")], "benign": False, "id": "sst_1", "category": "Scams"}],
    ),
    "strongreject": (
        "\ufeffcategory,source,forbidden_prompt\nViolence,DAN,Do x\n",
        [{"prompt": [user("Do x")], "benign": False, "category": "Violence"}],
    ),
    "xstest": (
        "id,prompt,type,label,note\n1,Kill a job?,homonyms,safe,\n26,Kill me?,contrast,unsafe,\n",
        [
            {"prompt": [user("Kill a job?")], "benign": True, "id": "1", "category": "homonyms"},
            {"prompt": [user("Kill me?")], "benign": False, "id": "26", "category": "contrast"},
        ],
    ),
    "mt_bench": (
        MT_BENCH,
        [
            {
                "prompt": [user("One.")],
                "benign": True,
                "question_id": 81,
                "category": "writing",
                "turns": ["One.", "Two."],
            },
            {
                "prompt": [user("Three.")],
                "benign": True,
                "question_id": 82,
                "category": "math",
                "turns": ["Three.", "Four."],
            },
        ],
    ),
}

HARMBENCH = """Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Do x,standard,illegal,,,do_x
"Do x, with y",contextual,cybercrime_intrusion,context,"It is y.
So it is.",do_x_y
Sing the song,copyright,copyright,"lyrics, hash_check",,sing
"""
JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source\n0,Do x,Sure: x ,X,Privacy,Original\n"


def test_harmbench(tmp_path):
    (tmp_path / "harmbench_behaviors_text_all.csv").write_text(HARMBENCH)
    prepare("prompts", "--in", tmp_path / "harmbench_behaviors_text_all.csv", "--out", tmp_path / "out")
    harm = {"benign": False}
    assert read_lines(tmp_path / "out") == [
        {"prompt": [user("Do x")], "set": "harmbench", **harm, "id": "do_x", "category": "illegal"},
        {
            "prompt": [user("It is y.\nSo it is.\n\n---\n\nDo x, with y")],
            "set": "harmbench-contextual",
            **harm,
            "id": "do_x_y",
            "category": "cybercrime_intrusion",
        },
        {
            "prompt": [user("Sing the song")],
            "set": "harmbench-copyright",
            **harm,
            "id": "sing",
            "category": "copyright",
        },
    ]


def test_jailbreakbench_and_its_harmless_twins(tmp_path):
    files = [tmp_path / "harmful-behaviors.csv", tmp_path / "benign-behaviors.csv"]
    for file in files:
        file.write_text(JAILBREAKBENCH)
    prepare("prompts", "--in", *files, "--out", tmp_path / "out", "--forced")
    both = {"id": "0", "category": "Privacy", "target": "Sure: x"}
    bad = {"prompt": [user("Do x")], "set": "jailbreakbench", "benign": False, **both}
    assert read_lines(tmp_path / "out") == [
        bad,
        bad | {"set": "jailbreakbench-forced", "prefill": "Sure: x"},
        {"prompt": [user("Do x")], "set": "jailbreakbench-benign", "benign": True, **both},
    ]
    (tmp_path / "jbb.csv").write_text(JAILBREAKBENCH)
    words = ("prompts", "--in", tmp_path / "jbb.csv", "--out", tmp_path / "jbb.jsonl")
    assert "add --benign or --unsafe" in prepare(*words, code=2)
    prepare(*words, "--benign")
    assert read_lines(tmp_path / "jbb.jsonl")[0]["set"] == "jailbreakbench-benign"


def test_oasst2_is_oasst_with_more_fields_and_its_held_out_questions_are_prompts(tmp_path):
    """Its messages say more, which is not looked at; false resets are counted on questions that no row has."""
    more = {"synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.1}, "rank": None}
    trees = []
    for i in range(40):
        answers = [node("assistant", f"good {i}", rank=0), node("assistant", f"bad {i}", rank=1)]
        root = node("prompter", f"question {i}", *answers, **more)
        trees.append({"message_tree_id": str(i), "tree_state": "ready_for_export", "prompt": root})
    source = write_lines(tmp_path / "2023-11-05_oasst2_ready.trees.jsonl", *trees)
    rows, valid = tmp_path / "oasst2.jsonl", tmp_path / "valid.jsonl"
    how = ("--in", source, "--out", rows, "--valid", valid, "--valid-percent", 30)
    report = prepare("oasst2", *how)
    assert "oasst2: 40 prompter messages read, 40 rows written, 0 skipped" in report
    written = rows.read_bytes()
    prepare("oasst", *how)
    assert rows.read_bytes() == written
    prepare("prompts", "--in", source, "--exclude", rows, "--out", tmp_path / "prompts.jsonl")
    found = read_lines(tmp_path / "prompts.jsonl")
    assert 4 < len(found) < 25 and {(p["set"], p["benign"]) for p in found} == {("oasst2", True)}
    assert [p["prompt"] for p in found] == [row["prompt"] for row in read_lines(valid)]
    assert all(p["reference"].startswith("good ") for p in found)


def test_prompt_sets(tmp_path):
    """Each set in a file of its own, plain or gzipped; all in one command."""
    files = []
    for name, (text, _) in SETS.items():
        plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
        plain.write_text(text, newline="")
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        files += [plain, packed]
    report = prepare("prompts", "--in", *files, "--out", tmp_path / "out")
    expected = []
    for name, (_, rows) in SETS.items():
        expected += [{"set": name} | row for row in rows] * 2
    assert read_lines(tmp_path / "out") == expected
    assert "2  skipped: empty prompt" in report  # AdvBench's second


# ── prompts: lists of instructions, first messages of trees ───────────────────────────────────────

TEA = [  # in the format of safety_only_data_Instructions.json
    {"instruction": " Spill the tea. ", "input": "", "output": "Better not.\n"},
    {"instruction": "Drop this:", "input": " a cup ", "output": ""},
    {"instruction": " ", "output": "?"},
]
ALPACA_EVAL = [
    {"dataset": "koala", "instruction": "Brew tea.", "output": " Boil water. ", "generator": "x"},
    {"dataset": "vicuna", "instruction": "Brew more.", "output": "", "generator": "x"},
]


def forbidden(text, **more):
    return {"prompt": [user(text)], "benign": False, **more}


def harmless(text, **more):
    return {"prompt": [user(text)], "benign": True, **more}


LISTS = {  # name of a file -> its content, the rows made of it
    "safety_only_data_Instructions.json": (
        TEA,
        [
            forbidden("Spill the tea.", set="safety_tuned", safe_answer="Better not."),
            forbidden("Drop this:\n\na cup", set="safety_tuned"),
        ],
    ),
    "I-Alpaca.json": ({"instructions": ["Brew tea.\n"], "inputs": []}, [harmless("Brew tea.", set="i_alpaca")]),
    "I-CoNa.json": ({"instructions": ["Say tea is bad."]}, [forbidden("Say tea is bad.", set="i_cona")]),
    "Q-Harm.json": ({"instructions": ["Is tea bad?", " "]}, [forbidden("Is tea bad?", set="q_harm")]),
    "text_davinci_003.json": (
        ALPACA_EVAL,
        [
            harmless("Brew tea.", set="alpaca_eval", category="koala", reference="Boil water."),
            harmless("Brew more.", set="alpaca_eval", category="vicuna"),
        ],
    ),
}


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_instructions(tmp_path, packed):
    files, expected = [], []
    for name, (content, rows) in LISTS.items():
        text = json.dumps(content, indent=2)
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        files.append(path)
        expected += rows
    report = prepare("prompts", "--in", *files, "--out", tmp_path / "out")
    rows = read_lines(tmp_path / "out")
    assert rows == expected
    assert " 2  skipped: empty prompt" in report


def test_other_lists_are_harmless_or_not_as_one_says(tmp_path):
    mine, texts = tmp_path / "my.own.json", tmp_path / "texts.json"
    mine.write_text(json.dumps(TEA[:1]))
    texts.write_text('{"instructions": ["Brew."]}')
    known = tmp_path / "I-CoNa.json"
    known.write_text('{"instructions": ["Say."]}')
    words = ("prompts", "--in", mine, texts, known, "--out", tmp_path / "out")
    report = prepare(*words, code=2)
    assert report == f"error: {mine}: does not say whether its instructions are harmless; add --benign or --unsafe\n"
    prepare(*words, "--benign")
    expected = [harmless("Spill the tea.", set="my", reference="Better not."), harmless("Brew.", set="texts")]
    assert read_lines(tmp_path / "out") == [*expected, forbidden("Say.", set="i_cona")]
    prepare(*words, "--unsafe")
    expected = [forbidden("Spill the tea.", set="my", safe_answer="Better not."), forbidden("Brew.", set="texts")]
    assert read_lines(tmp_path / "out") == [*expected, forbidden("Say.", set="i_cona")]
    assert "not allowed with" in prepare(*words, "--unsafe", "--benign", code=2)


def test_first_messages_of_trees(tmp_path):
    trees = [
        tree(p(" Q ", a("worst", rank=1), a(" best ", p("next", a("x")), rank=0))),
        tree(p("nobody answers")),
        tree(p("Frage", a("ja"), lang="de")),
        tree(p("gone", a("x")), tree_state="aborted_low_grade"),
        tree(p("deleted", a("x"), deleted=True)),
    ]
    rows, report = convert(tmp_path, "prompts", *trees)
    assert rows == [harmless("Q", set="oasst", reference="best"), harmless("nobody answers", set="oasst")]
    for reason in ("language is not en", "tree is not ready for export", "deleted"):
        assert f" 1  skipped: {reason}\n" in report
    rows, _ = convert(tmp_path, "prompts", *trees[2:3], flags=["--lang", "all"])  # one line only
    assert rows == [harmless("Frage", set="oasst", reference="ja")]


def test_what_it_has_written_is_read_as_it_is(tmp_path):
    mine = {
        "prompt": [{"role": "system", "content": "S"}, user("a "), assistant("b"), user("c")],
        "set": "x",
        "mine": 1,
    }
    rows, _ = convert(tmp_path, "prompts", mine, {"prompt": [user("d")], "set": "y"})
    assert rows == [mine, {"prompt": [user("d")], "set": "y"}]


# ── Rows that are also elsewhere ──────────────────────────────────────────────────────────────────


def test_exclude(tmp_path):
    """Questions of any file that `prompts` reads, whatever their case and punctuation."""
    others = [write_lines(tmp_path / "ours", {"prompt": [user("brew TEA")], "set": "x"}), tmp_path / "advbench.csv"]
    others[1].write_text("goal,target\nBrew: “more”?,Sure\nBrew tea,Sure\n")
    others.append(tmp_path / "unknown.json")  # harmless or not makes no difference here
    others[2].write_text('{"instructions": ["Brew\\nless"]}')
    texts = ["Brew tea!", "Brew tea please.", "Brew more", "brew less.", "Brew"]
    source = tmp_path / "I-Alpaca.json"
    source.write_text(json.dumps({"instructions": texts}))
    words = ("prompts", "--in", source, "--out", tmp_path / "out", "--exclude")
    report = prepare(*words, *others)
    assert [row["prompt"][0]["content"] for row in read_lines(tmp_path / "out")] == ["Brew tea please.", "Brew"]
    assert report.splitlines()[0] == "prompts: 5 prompts read, 2 rows written, 3 skipped"
    assert [line.split("  ")[-1] for line in report.splitlines()[2:]] == [
        f"skipped: also in {path}" for path in sorted(map(str, [others[1], others[0], others[2]]))
    ]
    # Nor may it be written to, or be absent.
    assert "read or written twice" in prepare(*words[:3], "--out", others[0], "--exclude", others[0], code=2)
    assert "nowhere: no such file" in prepare(*words, "nowhere", code=2)


def test_exclude_keeps_training_rows_apart(tmp_path):
    """Of a conversation the first question counts."""
    elsewhere = write_lines(tmp_path / "eval", {"prompt": [user("wie gehts")], "set": "x"})
    trees = [tree(p("Q", a("A", p("more", a("B"))))), tree(p("R", a("A")))]
    rows, report = convert(
        tmp_path, "oasst", *trees, flags=["--exclude", write_lines(tmp_path / "r", {"prompt": [user("r?")]})]
    )
    assert [row["prompt"][0] for row in rows] == [user("Q")] * 2 and " 1  skipped: also in" in report
    _, report = convert(tmp_path, "hh", GOOD, pair("no", "yes"), flags=["--exclude", elsewhere])
    assert "2 rows written" in report  # "Wie geht's?" is not "wie gehts": an apostrophe parts words
    write_lines(elsewhere, {"prompt": [user("WIE GEHT’S")], "set": "x"})
    rows, _ = convert(tmp_path, "hh", GOOD, pair("no", "yes"), flags=["--exclude", elsewhere])
    assert [row["prompt"] for row in rows] == [[user("Hi")]]


def test_held_out_prompts(tmp_path):
    """However a question is written, it is on one side; a smaller part of it is held out of the held-out ones."""
    texts = [text for i in range(100) for text in (f"Brew tea {i}", f"brew: tea {i}!")]
    source = tmp_path / "I-Alpaca.json"
    source.write_text(json.dumps({"instructions": texts}))

    def split(source, percent, name):
        paths = tmp_path / f"{name}-rest", tmp_path / f"{name}-part"
        words = ("--out", paths[0], "--valid", paths[1], "--valid-percent", percent)
        prepare("prompts", "--in", source, *words)
        sides = [[row["prompt"][0]["content"] for row in read_lines(path)] for path in paths]
        assert sorted(sides[0] + sides[1]) == sorted(row["prompt"][0]["content"] for row in rows_in(source))
        return paths, [{re.sub(r"\D", "", text) for text in side} for side in sides]

    def rows_in(source):
        prepare("prompts", "--in", source, "--out", tmp_path / "all")
        return read_lines(tmp_path / "all")

    (_, held_out), (rest, part) = split(source, 30, "a")
    assert not rest & part and len(rest | part) == 100 and 20 <= len(part) <= 40
    _, (dev, test) = split(held_out, 15, "b")
    assert not dev & test and dev | test == part and 5 <= len(test) <= 25


def test_forced_prompts(tmp_path):
    """Twice, the second time with the beginning of the answer: the target, or words that say yes."""
    advbench = tmp_path / "harmful.csv"
    advbench.write_text("goal,target\nDo x,Sure: x\n")
    xstest = tmp_path / "xs.csv"
    xstest.write_text("id,prompt,type,label,focus,note\n1,Kill a process,homonyms,safe,,\n2,Kill him,c,unsafe,,\n")
    plain, forced = tmp_path / "plain.jsonl", tmp_path / "forced.jsonl"
    prepare("prompts", "--in", advbench, xstest, "--out", plain)
    prepare("prompts", "--in", advbench, xstest, "--out", forced, "--forced")
    x, safe, unsafe = read_lines(plain)
    opening = "Sure, here is what you asked for:"
    forced_x = x | {"set": "advbench-forced", "prefill": "Sure: x"}
    assert read_lines(forced) == [x, forced_x, safe, unsafe, unsafe | {"set": "xstest-forced", "prefill": opening}]


# ── Reading and writing ───────────────────────────────────────────────────────────────────────────


def many(tmp_path):
    """200 pairs about 100 questions, two for each, in two conversations."""
    starts = [f"{H}Q{i // 2}{A}a{H}b{i}{A}" for i in range(200)]
    pairs = [{"chosen": start + "no", "rejected": start + "yes"} for start in starts]
    return write_lines(tmp_path / "many", *pairs)


def test_same_input_same_bytes_also_gzipped(tmp_path):
    source, names = many(tmp_path), ["a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.gz"]
    for name in names:
        prepare("hh", "--in", source, "--out", tmp_path / "deep" / name)
    a, b, c, d = [(tmp_path / "deep" / name).read_bytes() for name in names]
    assert a == b == gzip.decompress(c) and c == d
    assert c[3:8] == bytes(5)  # no name and no time in the gzip header
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == names
    packed = tmp_path / "many.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    prepare("hh", "--in", source, packed, "--out", tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == a * 2


def test_limit(tmp_path):
    report = prepare("hh", "--in", many(tmp_path), "--out", tmp_path / "out", "--limit", 3)
    assert len(read_lines(tmp_path / "out")) == 3
    assert "hh: 3 pairs read, 3 rows written, 0 skipped" in report


def test_held_out_rows(tmp_path):
    words = ("hh", "--in", many(tmp_path), "--out")
    prepare(*words, tmp_path / "all")
    flags = ("--valid", tmp_path / "valid", "--valid-percent", 30)
    report = prepare(*words, tmp_path / "train", *flags)
    train, valid = read_lines(tmp_path / "train"), read_lines(tmp_path / "valid")
    assert f" {len(train)}  written to" in report and f" {len(valid)}  written to" in report
    everything = read_lines(tmp_path / "all")
    assert sorted(map(json.dumps, train + valid)) == sorted(map(json.dumps, everything))
    seen = {row["prompt"][0]["content"] for row in train}
    held_out = {row["prompt"][0]["content"] for row in valid}
    assert not seen & held_out and 20 <= len(held_out) <= 40
    # Which questions those are follows from the stated rule, whatever else is in the file.
    for question in seen | held_out:
        digest = hashlib.sha256(question.encode()).hexdigest()
        assert (int(digest[:8], 16) / 2**32 < 0.3) == (question in held_out)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_text("old")
    source = write_lines(tmp_path / "in", GOOD, GOOD)
    with open(source, "a") as file:
        file.write('{"chosen": ')
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", code=2)
    assert report.startswith(f"error: {source}:3: not a line of JSON")
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_full_disk_leaves_both_old_files(tmp_path, monkeypatch):
    """The second file cannot be finished: the first, which was whole, must not come alone."""
    files = {tmp_path / "out": [b"new\n"], tmp_path / "valid": [b"new\n"]}
    for path in files:
        path.write_text("old")
    syncs = []

    def fsync(descriptor):
        assert [path.read_text() for path in files] == ["old", "old"]  # as after a kill
        syncs.append(descriptor)
        if len(syncs) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.prepare.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        data.prepare.write(files)
    assert [path.read_text() for path in files] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_nothing_usable_writes_nothing(tmp_path):
    (tmp_path / "out").write_text("old")
    source = write_lines(tmp_path / "in", {"chosen": Q, "rejected": Q})
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", code=2)
    assert "1 pairs read, 0 rows written, 1 skipped" in report
    assert f"error: {source}: no usable row" in report
    assert (tmp_path / "out").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


PAIR = json.dumps(GOOD)
LABELS = "id,prompt,type,label\n1,x,homonyms,"
FLAT, NO_TEXT = p("flat"), tree(p("Q", a("x"), {"role": "assistant"}))
NO_RANK, NO_ROLE = tree(p("Q", a("x", rank="best"))), tree(node("system", "Q"))
NO_LIST = tree(p("Q") | {"replies": 5})
ERRORS = [  # command, text of the input, what is said after its name
    ("hh", "", ": no usable row"),
    ("hh", "[1]\n", ":1: not a JSON object"),
    ("hh", '\n{"chosen": "x"}\n', ":2: no HH-RLHF pair"),
    ("hh", '{"chosen": "x", "rejected": null}\n', ":1: no HH-RLHF pair"),
    ("oasst", PAIR, ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(FLAT), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(NO_TEXT), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(NO_RANK), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(NO_ROLE), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(NO_LIST), ":1: no OpenAssistant tree"),
    ("prompts", "question,answer\nx,y\n", ": columns question, answer of no known set"),
    ("prompts", "goal,target\nx,y\nx\n", ":3: 2 columns expected"),
    ("prompts", "goal,target\nx,y,z\n", ":2: 2 columns expected"),
    ("prompts", 'goal,target\n"x,y\n', ":2: not CSV"),
    ("prompts", LABELS + "maybe\n", ":2: 'maybe' is no label"),
    ("prompts", '{"instructions": ["x"], "tags": []}', ': "instructions" and "tags"'),
    ("prompts", '{"instructions": [1], "tags": ["x"]}', ': "instructions" and "tags"'),
    ("prompts", '{"instructions": ["x"', ":1: not a line of JSON"),
    ("prompts", '{"question_id": 1, "turns": []}', ":1: no MT-Bench question"),
    ("prompts", '{"question_id": 1, "turns": ["x", 2]}', ":1: no MT-Bench question"),
    ("prompts", '{"turns": ["x"]}\n', ":1: no MT-Bench question"),
    ("prompts", '{"instructions": "x"}', ': "instructions" is no list of texts'),
    ("prompts", '{"instructions": ["x"]}', ": does not say whether"),
    ("prompts", '[{"instruction": "x"}]', ": does not say whether"),
    ("prompts", '[{"instruction": "x"', ": not JSON"),
    (
        "prompts",
        '[{"dataset": "", "generator": "", "instruction": "x"}, {"output": "y"}]',
        ': item 2 has no text "instru',
    ),
    ("prompts", '[{"instruction": "x", "output": 3}]', ": item 1 has no text"),
    ("prompts", "[3]", ": item 1 has no text"),
    ("prompts", json.dumps(tree(p("Q"))) + "\n" + json.dumps(NO_TEXT), ":2: no OpenAssistant tree"),
    ("prompts", '{"prompt": [{"role": "user"}]}', ':1: "prompt" is no list of messages'),
    (
        "prompts",
        '{"prompt": [{"role": "user", "content": "x"}]}\n{"prompt": []}',
        ':2: "prompt" is no list of messages',
    ),
]


@pytest.mark.parametrize("name, text, said", ERRORS)
def test_bad_input(tmp_path, name, text, said):
    source = tmp_path / "in"
    source.write_text(text)
    report = prepare(name, "--in", source, "--out", tmp_path / "out", code=2)
    assert f"error: {source}{said}" in report.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [source]


def test_damaged_files(tmp_path):
    packed = gzip.compress(PAIR.encode() * 99)
    damaged = packed[:12] + b"\xff\xff\xff" + packed[15:]
    for content in (packed[:-20], damaged):
        source = tmp_path / "in.gz"
        source.write_bytes(content)
        for name in ("hh", "prompts"):
            report = prepare(name, "--in", source, "--out", tmp_path / "out", code=2)
            assert f"error: {source}: not a whole gzip file" in report
    source.with_name("in").write_bytes(b"goal,target\n\xe9,y\n")
    words = ("prompts", "--in", source.with_name("in"), "--out", tmp_path / "out")
    assert "in: not UTF-8" in prepare(*words, code=2)


def test_bad_paths(tmp_path):
    source, out = write_lines(tmp_path / "in", GOOD), tmp_path / "out"

    def error(source, out, *flags):
        return prepare("hh", "--in", source, "--out", out, *flags, code=2)

    assert "nowhere: no such file" in error("nowhere", out)
    assert f"{tmp_path}: no such file" in error(tmp_path, out)
    assert "not an ordinary file" in error(source, tmp_path)
    assert "not an ordinary file" in error(source, "/dev/full")
    assert "read or written twice" in error(source, source)
    assert "read or written twice" in error(source, out, "--valid", out)
    assert "read or written twice" in error(source, out, "--valid", source)
    assert str(source) in error(source, source / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("flag, value", [("--limit", 0), ("--valid-percent", 100)])
def test_bad_flags(flag, value):
    assert flag in prepare("hh", "--in", "a", "--out", "out", flag, value, code=2)


def test_an_address_is_to_be_downloaded_first(tmp_path):
    """As a user runs it."""
    url = "https://example.org/train.jsonl.gz"
    words = [sys.executable, "-m", "data.prepare", "hh", "--in", url, "--out", tmp_path / "out"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --in takes files; download it first: curl -LO {url}\n"


# ── The real files ────────────────────────────────────────────────────────────────────────────────

HH = REAL / "hh-rlhf" / "harmless-base_test.jsonl.gz"
OASST = REAL / "oasst" / "en_100_tree.jsonl"
ADVBENCH = REAL / "safety" / "advbench" / "harmful_behaviors.csv"
PROMPT_FILES = [
    ADVBENCH,
    REAL / "safety" / "malicious_instructions" / "I-MaliciousInstructions.json",
    REAL / "safety" / "simple_safety_tests" / "SimpleSafetyTests_test_cases.csv",
    REAL / "safety" / "strongreject" / "strongreject_dataset.csv",
    REAL / "safety" / "xstest" / "xstest_prompts.csv",
    REAL / "mt_bench" / "mt_bench_question.jsonl",
]


def cut_by_hand(pairs):
    """Which HH-RLHF pairs to keep, without looking at turns: by string cuts alone."""
    kept, lost = [], Counter()
    for pair in pairs:
        cuts = [pair[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        (prompt, _, good), (other, _, bad) = cuts
        good, bad = good.split(), bad.split()
        exchanges = [text.split("\n\nHuman:") for text in pair.values()]
        alternating = all(
            before == "" and all(part.count("\n\nAssistant:") == 1 for part in parts) for before, *parts in exchanges
        )
        if not alternating:
            lost["turns"] += 1
        elif prompt != other:
            lost["prompt"] += 1
        elif not good or not bad:
            lost["empty"] += 1
        elif any(word.startswith(("Human:", "Assistant:")) for word in good + bad):
            lost["label"] += 1
        else:
            kept.append(pair)
    return kept, lost


@real
def test_real_hh(tmp_path):
    out = tmp_path / "out.jsonl"
    report = prepare("hh", "--in", HH, "--out", out)
    assert report.splitlines() == [
        "hh: 2312 pairs read, 2267 rows written, 45 skipped",
        f"     2267  written to {out}",
        "       32  skipped: speaker label inside an answer",
        "        9  skipped: one speaker has two turns in a row",
        "        4  skipped: empty answer",
    ]

    lines = gzip.decompress(HH.read_bytes()).decode().split("\n")[:-1]
    kept, lost = cut_by_hand(json.loads(line) for line in lines)
    assert lost == {"turns": 9, "empty": 4, "label": 32}
    labels = {"user": "Human", "assistant": "Assistant"}
    for row, pair in zip(read_lines(out), kept, strict=True):
        check_row(row)
        assert row["unsafe"] is True
        for side in ("chosen", "rejected"):
            text = ""
            for turn in row["prompt"] + row[side]:
                text += f"\n\n{labels[turn['role']]}: {turn['content']}"
            assert text.split() == pair[side].split()


def walk_by_hand(trees):
    """What oasst should become: from a flat table of messages, upwards from each prompter."""
    parents, children, messages = {}, {}, {}

    def flatten(message, parent):
        key = message["message_id"]
        messages[key], parents[key] = message, parent
        children.setdefault(parent, []).append(message)
        for reply in message["replies"]:
            flatten(reply, key)

    def best(parent):
        return min(children[parent], key=lambda reply: reply.get("rank", 99))

    for tree in trees:
        flatten(tree["prompt"], None)
    found, lost = [], Counter()
    for key, message in messages.items():
        assert message["lang"] == "en" and message["review_result"] and not message["deleted"]
        if message["role"] != "prompter":
            continue
        path, on_path, above = [message["text"].strip()], True, parents[key]
        while above is not None:
            if messages[above]["role"] == "assistant":
                on_path &= best(parents[above]) is messages[above]
            path.insert(0, messages[above]["text"].strip())
            above = parents[above]
        if not on_path:
            lost["off"] += 1
        elif key not in children:
            lost["leaf"] += 1
        else:
            ranked = [(r["rank"], r["text"].strip()) for r in children[key] if "rank" in r]
            worst = max(ranked)[1] if len(ranked) > 1 else None
            found.append((path, best(key)["text"].strip(), worst))
    return found, lost


@real
def test_real_oasst(tmp_path):
    out = tmp_path / "out.jsonl"
    report = prepare("oasst", "--in", OASST, "--out", out)
    assert report.splitlines() == [
        "oasst: 480 prompter messages read, 147 rows written, 333 skipped",
        f"      147  written to {out}",
        "      276  skipped: not on a path of best replies",
        "       57  skipped: no usable reply",
    ]

    expected, lost = walk_by_hand(read_lines(OASST))
    assert lost == {"off": 276, "leaf": 57}
    found = []
    for row in read_lines(out):
        check_row(row)
        assert "unsafe" not in row
        path = [turn["content"] for turn in row["prompt"]]
        rejected = row["rejected"][0]["content"] if "rejected" in row else None
        found.append((path, row["chosen"][0]["content"], rejected))
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert sum(rejected is not None for _, _, rejected in found) == 139
    assert len({(path[-1], chosen) for path, chosen, _ in found}) == 147  # no duplicates


@real
def test_real_prompts(tmp_path):
    report = prepare("prompts", "--in", *PROMPT_FILES, "--out", tmp_path / "out")
    assert "prompts: 1563 prompts read, 1563 rows written, 0 skipped" in report
    rows = read_lines(tmp_path / "out")
    assert Counter(row["set"] for row in rows) == {
        "advbench": 520,
        "malicious_instructions": 100,
        "simple_safety_tests": 100,
        "strongreject": 313,
        "xstest": 450,
        "mt_bench": 80,
    }
    assert Counter(row["set"] for row in rows if row["benign"]) == {"xstest": 250, "mt_bench": 80}
    by_set = {}
    for row in rows:
        [turn] = row["prompt"]
        assert turn == user(turn["content"].strip()) and turn["content"]
        assert ("target" in row) == (row["set"] == "advbench")
        assert ("category" in row) == (row["set"] != "advbench")
        by_set.setdefault(row["set"], []).append(row)
    for row in by_set["xstest"]:  # its types say the same as its labels
        assert row["benign"] == (not row["category"].startswith("contrast"))
    for row in by_set["mt_bench"]:
        assert len(row["turns"]) == 2 and row["turns"][0] == row["prompt"][0]["content"]
    assert [row["question_id"] for row in by_set["mt_bench"]] == list(range(81, 161))
    assert [row["id"] for row in by_set["xstest"]] == [str(i + 1) for i in range(450)]
    with open(ADVBENCH, newline="", encoding="utf-8") as file:
        goals = list(csv.reader(file))[1:]
    assert [[row["prompt"][0]["content"], row["target"]] for row in by_set["advbench"]] == goals


SAFETY_TUNED = sorted((REAL / "safety_tuned").glob("*.json"))
ALPACA_EVAL_FILE = REAL / "alpaca_eval" / "text_davinci_003.json"


@real
def test_real_instructions(tmp_path):
    """No question of an evaluation set but two of MT-Bench's; every safe answer is kept."""
    prepare("prompts", "--in", *PROMPT_FILES, "--out", tmp_path / "eval")
    files = [*SAFETY_TUNED, ALPACA_EVAL_FILE, OASST]
    report = prepare("prompts", "--in", *files, "--exclude", tmp_path / "eval", "--out", tmp_path / "out")
    assert "prompts: 3716 prompts read, 3714 rows written, 2 skipped" in report
    rows = read_lines(tmp_path / "out")
    assert Counter((row["set"], row["benign"]) for row in rows) == {
        ("safety_tuned", False): 2483,
        ("i_cona", False): 178,
        ("q_harm", False): 100,
        ("i_alpaca", True): 50,
        ("alpaca_eval", True): 803,
        ("oasst", True): 100,
    }
    items = json.loads((REAL / "safety_tuned" / "safety_only_data_Instructions.json").read_text())
    pairs = {(item["instruction"].strip(), item["output"].strip()) for item in items}
    found = [row for row in rows if row["set"] == "safety_tuned"]
    assert {(row["prompt"][0]["content"], row["safe_answer"]) for row in found} == pairs
    assert all("reference" in row for row in rows if row["set"] == "oasst")
    assert sum("reference" in row for row in rows if row["set"] == "alpaca_eval") == 801
    # The same count by another way: words in lower case.
    evaluated = [re.findall(r"[a-z0-9]+", row["prompt"][0]["content"].lower()) for row in read_lines(tmp_path / "eval")]
    trained = [re.findall(r"[a-z0-9]+", row["prompt"][0]["content"].lower()) for row in rows]
    assert not set(map(tuple, evaluated)) & set(map(tuple, trained))
