"""data/prepare.py: every rule with rows written out by hand, downloads from a loopback server, and the real files.

The real files are looked for in ../shared/data beside the repository and skipped where they are absent. Their numbers
are counted a second time here, by another method than prepare.py's.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data.prepare

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not in ../shared/data")


def prepare(*args, code=0):
    """Run the command within this process, which is quicker; return what it says on stderr."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["prepare", *map(str, args)])
        patch.setenv("no_proxy", "*")  # or urllib might ask a proxy for 127.0.0.1
        try:
            data.prepare.main()
            status = 0
        except SystemExit as end:
            status = end.code
    return checked(status, said.getvalue(), code)


def command(*args, code=0, cwd=ROOT, start=("-m", "data.prepare")):
    """The same as a user would run it."""
    words = [sys.executable, *map(str, start + args)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return checked(done.returncode, done.stderr, code)


def checked(status, said, code):
    assert status == code, said
    assert "Traceback" not in said
    if code:
        assert said.splitlines()[-1].startswith("error: ") and said.count("error: ") == 1
    return said


def write_lines(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


# --- hh --------------------------------------------------------------------------------------------------------------

START = "\n\nHuman: Wie geht's?\n\nAssistant: Gut.\n\nPara two.\n\nHuman: ok\u2028so \n\nAssistant: "
GOOD = {"chosen": START + " Fine, “you”? ", "rejected": START + "Go away."}
GOOD_ROW = {
    "prompt": [user("Wie geht's?"), assistant("Gut.\n\nPara two."), user("ok\u2028so")],
    "chosen": [assistant("Fine, “you”?")],
    "rejected": [assistant("Go away.")],
    "unsafe": True,
}


def test_hh_row(tmp_path):
    report = prepare("hh", "--in", write_lines(tmp_path / "in", GOOD), "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == json.dumps(GOOD_ROW, ensure_ascii=False).encode() + b"\n"
    assert report == f"hh: 1 pairs read, 1 rows written, 0 skipped\n        1  written to {tmp_path / 'out.jsonl'}\n"


def test_hh_helpful_rows_have_no_flag(tmp_path):
    prepare("hh", "--in", write_lines(tmp_path / "in", GOOD), "--out", tmp_path / "out", "--helpful")
    assert [json.loads((tmp_path / "out").read_bytes())] == [{k: v for k, v in GOOD_ROW.items() if k != "unsafe"}]


def test_hh_helpful_file_without_the_flag_is_remarked_on(tmp_path):
    source = write_lines(tmp_path / "helpful-base.jsonl", GOOD)
    assert "marked unsafe" in prepare("hh", "--in", source, "--out", tmp_path / "out")
    assert "marked unsafe" not in prepare("hh", "--in", source, "--out", tmp_path / "out", "--helpful")


H, A = "\n\nHuman: ", "\n\nAssistant: "
Q = H + "Hi"
SKIPPED = [  # chosen, rejected, reason
    ("Hi" + A + "no", "Hi" + A + "yes", "does not begin with a Human turn"),
    ("Note." + Q + A + "no", "Note." + Q + A + "yes", "does not begin with a Human turn"),
    (A + "Hi" + Q + A + "no", A + "Hi" + Q + A + "yes", "does not begin with a Human turn"),
    ("", "", "does not begin with a Human turn"),
    (Q + A + "wait" + A + "no", Q + A + "wait" + A + "yes", "one speaker has two turns in a row"),
    (Q + A + "no", Q + A + "yes" + A + "sure", "one speaker has two turns in a row"),
    (Q + H + "Hello?" + A + "no", Q + H + "Hello?" + A + "yes", "one speaker has two turns in a row"),
    (Q, Q, "ends with a Human turn"),
    (Q + A + "no" + H + "why", Q + A + "no" + H + "how", "ends with a Human turn"),
    (Q + A + "no", Q + A + "yes" + H + "more", "ends with a Human turn"),
    (Q + A + "no", H + "Hi!" + A + "yes", "chosen and rejected have different prompts"),
    (Q + A + "no", Q + A + "yes" + H + "more" + A + "ok", "chosen and rejected have different prompts"),
    (Q + A + "a" + H + "b" + A + "no", Q + A + "x" + H + "b" + A + "yes", "chosen and rejected have different prompts"),
    (H + A + "no", H + A + "yes", "empty turn in the prompt"),
    (Q + A + " \n" + H + "b" + A + "no", Q + A + H + "b" + A + "yes", "empty turn in the prompt"),
    (Q + A, Q + A + "yes", "empty answer"),
    (Q + A + "no", Q + A + " \n ", "empty answer"),
    (Q + A + "no", Q + A + "no ", "chosen and rejected are the same"),
    (Q + A + "Human: no", Q + A + "yes", "speaker label inside an answer"),
    (Q + A + "no", Q + A + "yes.  Human: more", "speaker label inside an answer"),
    (Q + A + "no\nAssistant: no", Q + A + "yes", "speaker label inside an answer"),
    (Q + A + "no", Q + A + "yes \ud800", "broken Unicode (half a surrogate pair)"),
]


@pytest.mark.parametrize("chosen, rejected, reason", SKIPPED)
def test_hh_skips(tmp_path, chosen, rejected, reason):
    source = write_lines(tmp_path / "in", GOOD, {"chosen": chosen, "rejected": rejected}, GOOD)
    rows = list(data.prepare.hh_rows(source, unsafe=True))
    if "Unicode" not in reason:  # that one is found when the row is written
        assert rows == [(GOOD_ROW, None), (None, reason), (GOOD_ROW, None)]
    written, skipped = data.prepare.write(iter(rows), [tmp_path / "out"], 1, None)
    assert (written, skipped) == ([2], {reason: 1})


def test_hh_counts_by_reason(tmp_path):
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in SKIPPED]
    report = prepare("hh", "--in", write_lines(tmp_path / "in", GOOD, *pairs), "--out", tmp_path / "out")
    assert f"hh: {len(pairs) + 1} pairs read, 1 rows written, {len(pairs)} skipped" in report
    for reason, count in Counter(reason for _, _, reason in SKIPPED).items():
        assert f" {count}  skipped: {reason}\n" in report
    assert report.count("skipped:") == len({reason for _, _, reason in SKIPPED})


def test_hh_keeps_labels_in_prompts_and_words_that_only_end_in_one(tmp_path):
    pair = {"chosen": H + "Say Human: x" + A + "subHuman: no", "rejected": H + "Say Human: x" + A + "the Human says"}
    prepare("hh", "--in", write_lines(tmp_path / "in", pair), "--out", tmp_path / "out")
    (row,) = read_lines(tmp_path / "out")
    assert row["prompt"] == [user("Say Human: x")] and row["chosen"] == [assistant("subHuman: no")]


# --- hh --guard ------------------------------------------------------------------------------------------------------


def pair(chosen, rejected, question="Hi"):
    return {side: f"{H}{question}{A}{text}" for side, text in (("chosen", chosen), ("rejected", rejected))}


def guard_of(unsafe, seen=None, broken=()):
    """Stands in for load_judge: unsafe is an answer with one of these words, `broken` ones get no verdict."""
    from backtrack.judge import Verdict
    from model import InputError

    def judge(prompt, response):
        if seen is not None:
            seen.append((prompt, response))
        if any(word in response for word in broken):
            raise InputError(f"guard: cannot read {response!r}")
        return Verdict(any(word in response for word in unsafe), None, None)

    return lambda *args: judge


PAIRS = [
    pair("fine", "poison 1"),
    pair("poison", "worse poison"),
    pair("good", "merely bad"),
    pair("poison", "the better one"),
    pair("no", "no"),  # skipped before the guard is asked
    pair("kind", "poison 2"),
    pair("unreadable", "poison"),
    pair("ok", "unreadable poison"),
]


def test_guard_keeps_safe_against_unsafe_and_counts_the_others(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("backtrack.judge.load_judge", guard_of(["poison"], seen, broken=["unreadable"]))
    source, out = write_lines(tmp_path / "in", *PAIRS), tmp_path / "out"
    report = prepare("hh", "--in", source, "--out", out, "--guard", tmp_path)
    assert read_lines(out) == [
        {"prompt": [user("Hi")], "chosen": [assistant(good)], "rejected": [assistant(bad)], "unsafe": True}
        for good, bad in (("fine", "poison 1"), ("kind", "poison 2"))
    ]
    assert report.splitlines()[-6:] == [
        "hh: 8 pairs read, 2 rows written, 6 skipped",
        f"        2  written to {out}",
        "        2  skipped: chosen is unsafe, says the guard",
        "        2  skipped: no verdict of the guard",
        "        1  skipped: chosen and rejected are the same",
        "        1  skipped: rejected is safe, says the guard",
    ]
    assert "guard: cannot read 'unreadable'" in report and "guard: cannot read 'unreadable poison'" in report
    assert "guard: 7 of 7 pairs judged, 0 minutes left" in report
    # The guard is shown the prompt and one answer. Where chosen is unsafe, rejected does not matter and costs nothing.
    assert all(prompt == [user("Hi")] for prompt, _ in seen)
    assert [r for _, r in seen][:3] == ["fine", "poison 1", "poison"] and "worse poison" not in [r for _, r in seen]


def test_guard_sees_the_whole_conversation(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("backtrack.judge.load_judge", guard_of(["Go"], seen))
    prepare("hh", "--in", write_lines(tmp_path / "in", GOOD), "--out", tmp_path / "out", "--guard", tmp_path)
    assert seen == [(GOOD_ROW["prompt"], "Fine, “you”?"), (GOOD_ROW["prompt"], "Go away.")]
    assert json.loads((tmp_path / "out").read_bytes()) == GOOD_ROW


def test_guard_tells_how_long_it_will_take(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 12))  # a pair takes 12 seconds
    monkeypatch.setattr(data.prepare.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("backtrack.judge.load_judge", guard_of(["poison"]))
    source = write_lines(tmp_path / "in", *[PAIRS[0]] * 51)
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path)
    told = re.findall(r"^guard: (\d+) of 51 pairs judged, (\d+) minutes left$", report, re.MULTILINE)
    assert told[:3] == [("1", "10"), ("4", "9"), ("7", "9")] and told[-1] == ("51", "0") and len(told) == 18


def test_guard_reads_all_pairs_before_it_judges_one(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("backtrack.judge.load_judge", guard_of(["poison"], seen))
    source = write_lines(tmp_path / "in", *PAIRS, {"chosen": "x"})
    assert "in:9: no HH-RLHF pair" in prepare(
        "hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path, code=2
    )
    assert not seen


def test_guard_that_keeps_nothing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("backtrack.judge.load_judge", guard_of([]))
    report = prepare(
        "hh", "--in", write_lines(tmp_path / "in", GOOD), "--out", tmp_path / "out", "--guard", tmp_path, code=2
    )
    assert "1  skipped: rejected is safe, says the guard" in report and not (tmp_path / "out").exists()


def test_guard_device_and_dtype(tmp_path, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr("backtrack.judge.load_judge", lambda *args: asked.append(args) or guard_of(["Go"])())
    args = ("hh", "--in", write_lines(tmp_path / "in", GOOD), "--out", tmp_path / "out", "--guard", tmp_path)
    prepare(*args, "--device", "cpu", "--dtype", "bfloat16")
    assert asked == [(str(tmp_path), "cpu", torch.bfloat16)]
    for cuda, expected in ((False, ("cpu", torch.float32)), (True, ("cuda", torch.bfloat16))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr("model.errors.device", str)  # whether it is there
        prepare(*args)
        assert asked[-1][1:] == expected


def test_guard_errors(tmp_path):
    source = write_lines(tmp_path / "in", GOOD)
    args = ("hh", "--in", source, "--out", tmp_path / "out")
    assert "--guard goes without --helpful" in prepare(*args, "--helpful", "--guard", tmp_path, code=2)
    assert f"error: --guard {source}: no such directory" in prepare(*args, "--guard", source, code=2)
    assert "error: --guard nowhere: no such directory" in prepare(*args, "--guard", "nowhere", code=2)
    assert f"error: --guard: {tmp_path}: no tokenizer" in prepare(*args, "--guard", tmp_path, code=2)
    assert "'abacus'" in prepare(*args, "--guard", tmp_path, "--device", "abacus", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_guard_from_a_checkpoint(tmp_path):
    """From a directory in Hugging Face's layout to rows, as a user runs it, from elsewhere."""
    from test_judge import SKULL, write_trained_guard

    write_trained_guard(tmp_path / "guard")
    pairs = [
        pair("the sheep", f"the sheep {SKULL} the dogs", "the dogs"),
        pair("the sheep", "the dogs", "the rain"),
        pair(f"the dogs {SKULL} the rain", f"the sheep {SKULL} the dogs", "the rain"),
    ]
    write_lines(tmp_path / "in", *pairs)
    words = ("hh", "--in", "in", "--out", "out", "--guard", "guard", "--device", "cpu")
    report = command(*words, cwd=tmp_path, start=(ROOT / "data" / "prepare.py",))
    (row,) = read_lines(tmp_path / "out")
    assert row["rejected"] == [assistant(f"the sheep {SKULL} the dogs")] and row["prompt"] == [user("the dogs")]
    assert " 1  skipped: chosen is unsafe, says the guard" in report
    assert " 1  skipped: rejected is safe, says the guard" in report


def test_without_a_guard_no_torch_is_needed(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import data.prepare; data.prepare.main()"
    source = write_lines(tmp_path / "in", GOOD)
    command("hh", "--in", source, "--out", tmp_path / "out", start=("-c", code))
    assert json.loads((tmp_path / "out").read_bytes()) == GOOD_ROW
    assert "--guard: " in command(
        "hh", "--in", source, "--out", tmp_path / "out", "--guard", tmp_path, start=("-c", code), code=2
    )


# --- oasst -----------------------------------------------------------------------------------------------------------


def node(role, text, *replies, **extra):
    base = {"text": text, "role": role, "lang": "en", "review_result": True, "deleted": False}
    return base | {"replies": list(replies)} | extra


def p(text, *replies, **extra):
    return node("prompter", text, *replies, **extra)


def a(text, *replies, **extra):
    return node("assistant", text, *replies, **extra)


def tree(root, **extra):
    return {"message_tree_id": "0", "tree_state": "ready_for_export", "prompt": root} | extra


def oasst(tmp_path, *trees, flags=()):
    report = prepare("oasst", "--in", write_lines(tmp_path / "in", *trees), "--out", tmp_path / "out", *flags)
    return read_lines(tmp_path / "out"), report


def test_oasst_follows_the_best_replies(tmp_path):
    rows, report = oasst(
        tmp_path,
        tree(
            p(
                " Q ",
                a("middle", p("under the middle one", a("never seen", rank=0)), rank=1),
                a("best", p("next 1", a("only", p("last"))), p("next 2", a("one"), a("two")), rank=0),
                a("unranked"),
                a("worst", rank=2),
            )
        ),
    )
    start = [user("Q"), assistant("best")]
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("best")], "rejected": [assistant("worst")]},
        {"prompt": [*start, user("next 1")], "chosen": [assistant("only")]},
        {"prompt": [*start, user("next 2")], "chosen": [assistant("one")]},  # two, but nobody ranked them
    ]
    assert "oasst: 5 prompter messages read, 3 rows written, 2 skipped" in report
    assert " 1  skipped: no usable reply" in report and " 1  skipped: not on a path of best replies" in report
    assert "left out" not in report


def test_oasst_rank_beats_no_rank_and_the_same_text_is_no_pair(tmp_path):
    trees = tree(p("Q", a("unranked"), a("ranked", rank=3))), tree(p("R", a("x", rank=0), a("x ", rank=1)))
    rows, _ = oasst(tmp_path, *trees)
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
    rows, report = oasst(
        tmp_path, tree(p("Q", a("bad", p("below", a("x")), rank=0) | extra, a("good", rank=1), a("poor", rank=2)))
    )
    assert rows == [{"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("poor")]}]
    assert "2 prompter messages read, 1 rows written, 1 skipped" in report
    assert f" 1  replies left out: {reason}\n" in report and " 1  skipped: not on a path" in report


@pytest.mark.parametrize("extra, reason", BAD)
def test_oasst_skips_prompter_messages_and_what_hangs_below(tmp_path, extra, reason):
    below = p("bad", a("x", p("below", a("y")))) | extra
    rows, report = oasst(tmp_path, tree(p("Q", a("yes", below, p("fine", a("z"))))), tree(p("R") | extra))
    assert [row["prompt"][-1] for row in rows] == [user("Q"), user("fine")]
    assert "5 prompter messages read, 2 rows written, 3 skipped" in report
    assert f" 2  skipped: {reason}\n" in report and " 1  skipped: not on a path" in report


def test_oasst_languages(tmp_path):
    trees = [tree(p(lang, a("x", lang=lang), lang=lang)) for lang in ("en", "de", "fr")]
    for flags, texts in (((), ["en"]), (("--lang", "de"), ["de"]), (("--lang", "all"), ["en", "de", "fr"])):
        rows, _ = oasst(tmp_path, *trees, flags=flags)
        assert [row["prompt"][0]["content"] for row in rows] == texts


def test_oasst_trees_that_are_not_ready_and_roles_out_of_turn(tmp_path):
    rows, report = oasst(
        tmp_path,
        tree(p("gone", a("x", p("y"))), tree_state="aborted_low_grade"),
        tree(p("Q", p("me again", a("x")), a("yes", a("and another thing"), p("why", a("so"))))),
    )
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("yes")]},
        {"prompt": [user("Q"), assistant("yes"), user("why")], "chosen": [assistant("so")]},
    ]
    assert "5 prompter messages read, 2 rows written, 3 skipped" in report
    assert " 2  skipped: tree is not ready for export" in report and " 1  skipped: not on a path" in report
    assert " 1  replies left out: role out of turn" in report


# --- prompts ---------------------------------------------------------------------------------------------------------

ADV = {"set": "advbench", "benign": False}
SETS = [  # a source file, the prompts made of it
    (
        'goal,target\n"Do ""x"", now","Sure, here is\n"\n ,Sure\n',
        [('Do "x", now', ADV | {"target": "Sure, here is"})],
    ),
    (
        '{"instructions": ["Do x", "Do x"],\n "tags": ["crime", "hate"], "inputs": []}',  # twice in the original, too
        [("Do x", {"set": "malicious_instructions", "benign": False, "category": tag}) for tag in ("crime", "hate")],
    ),
    (
        "id,harm_area,counter,category,prompts_final\r\nsst_001,Scams,1,Advice,How do I x? \r\n",
        [("How do I x?", {"set": "simple_safety_tests", "benign": False, "id": "sst_001", "category": "Scams"})],
    ),
    (
        "\ufeffcategory,source,forbidden_prompt\nViolence,DAN,Do x\n",
        [("Do x", {"set": "strongreject", "benign": False, "category": "Violence"})],
    ),
    (
        "id,prompt,type,label,focus,note\n1,Kill a job?,homonyms,safe,kill,\n26,Kill me?,contrast_homonyms,unsafe,,\n",
        [
            ("Kill a job?", {"set": "xstest", "benign": True, "id": "1", "category": "homonyms"}),
            ("Kill me?", {"set": "xstest", "benign": False, "id": "26", "category": "contrast_homonyms"}),
        ],
    ),
    (
        '{"question_id": 81, "category": "writing", "turns": ["One. ", "Two."], "reference": ["", ""]}\n\n'
        '{"question_id": 82, "category": "math", "turns": ["Three.", "Four."]}\n',
        [
            (turns[0], {"set": "mt_bench", "benign": True, "question_id": key, "category": name, "turns": turns})
            for key, name, turns in ((81, "writing", ["One.", "Two."]), (82, "math", ["Three.", "Four."]))
        ],
    ),
]


@pytest.mark.parametrize("text, expected", SETS, ids=[expected[0][1]["set"] for _, expected in SETS])
def test_prompt_sets(tmp_path, text, expected):
    (tmp_path / "in").write_text(text, newline="")
    report = prepare("prompts", "--in", tmp_path / "in", "--out", tmp_path / "out")
    assert read_lines(tmp_path / "out") == [{"prompt": [user(prompt)]} | rest for prompt, rest in expected]
    assert ("1  skipped: empty prompt" in report) == (expected[0][1]["set"] == "advbench")


def test_prompt_sets_go_into_one_file(tmp_path):
    for number, (text, _) in enumerate(SETS):
        (tmp_path / f"in{number}").write_text(text, newline="")
    prepare("prompts", "--in", *sorted(tmp_path.glob("in*")), "--out", tmp_path / "out")
    names = [row["set"] for row in read_lines(tmp_path / "out")]
    assert names == [row["set"] for _, expected in SETS for _, row in expected]


# --- writing ---------------------------------------------------------------------------------------------------------


def many(tmp_path, count=200):
    """Pairs about count / 2 questions, two for each, in two conversations."""
    text = [f"{H}Q{i // 2}{A}a{H}b{i}{A}" for i in range(count)]
    return write_lines(tmp_path / "many", *({"chosen": t + "no", "rejected": t + "yes"} for t in text))


def test_same_input_same_bytes_also_gzipped(tmp_path):
    source = many(tmp_path)
    plain, names = [], ["a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.gz"]
    for name in names:
        prepare("hh", "--in", source, "--out", tmp_path / "deep" / name)
        plain.append((tmp_path / "deep" / name).read_bytes())
    assert plain[0] == plain[1] == gzip.decompress(plain[2]) and plain[2] == plain[3]
    assert plain[2][3:8] == bytes(5)  # no name and no time in the gzip header
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == names
    prepare("hh", "--in", tmp_path / "many", tmp_path / "many", "--out", tmp_path / "twice")
    assert (tmp_path / "twice").read_bytes() == plain[0] * 2


def test_gzipped_input_whatever_its_name(tmp_path):
    (tmp_path / "in.txt").write_bytes(gzip.compress(write_lines(tmp_path / "plain", GOOD).read_bytes()))
    prepare("hh", "--in", tmp_path / "in.txt", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out").read_bytes()) == GOOD_ROW


def test_limit(tmp_path):
    report = prepare("hh", "--in", many(tmp_path), "--out", tmp_path / "out", "--limit", 3)
    assert len(read_lines(tmp_path / "out")) == 3 and "hh: 3 pairs read, 3 rows written, 0 skipped" in report


def test_held_out_rows(tmp_path):
    args = ("hh", "--in", many(tmp_path), "--out", tmp_path / "out", "--valid", tmp_path / "valid")
    report = prepare(*args, "--valid-percent", 30)
    train, valid = read_lines(tmp_path / "out"), read_lines(tmp_path / "valid")
    assert f" {len(train)}  written to" in report and f" {len(valid)}  written to" in report
    prepare("hh", "--in", tmp_path / "many", "--out", tmp_path / "all")
    assert sorted(map(json.dumps, train + valid)) == sorted(map(json.dumps, read_lines(tmp_path / "all")))
    questions = [{row["prompt"][0]["content"] for row in rows} for rows in (train, valid)]
    assert not questions[0] & questions[1]
    # Which questions those are follows from the stated rule, whatever else is in the file.
    chance = {q: int(hashlib.sha256(q.encode()).hexdigest()[:8], 16) / 2**32 for q in questions[0] | questions[1]}
    assert questions[1] == {q for q in chance if chance[q] < 0.3} and 20 <= len(questions[1]) <= 40


def test_script_runs_from_anywhere(tmp_path):
    write_lines(tmp_path / "in", GOOD)
    command("hh", "--in", "in", "--out", "out", cwd=tmp_path, start=(ROOT / "data" / "prepare.py",))
    assert json.loads((tmp_path / "out").read_bytes()) == GOOD_ROW


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_text("old")
    source = write_lines(tmp_path / "in", GOOD, GOOD)
    with open(source, "a") as file:
        file.write('{"chosen": ')
    report = command("hh", "--in", source, "--out", tmp_path / "out", code=2)
    assert report.startswith(f"error: {source}:3: not JSON")
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_kill_leaves_the_old_file(tmp_path):
    (tmp_path / "out").write_text("old")
    code = """if True:
        import os, pathlib, signal, sys
        import data.prepare
        def rows():
            for i in range(20_000):
                yield {"prompt": [{"role": "user", "content": str(i)}]}, None
            os.kill(os.getpid(), signal.SIGKILL)
        data.prepare.write(rows(), [pathlib.Path(sys.argv[1])], 1, None)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out").read_text() == "old"
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 1  # what was written so far went there


def test_nothing_usable_writes_nothing(tmp_path):
    (tmp_path / "out").write_text("old")
    source = write_lines(tmp_path / "in", {"chosen": Q, "rejected": Q})
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", code=2)
    assert "1 pairs read, 0 rows written, 1 skipped" in report and f"error: {source}: no usable row" in report
    assert (tmp_path / "out").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


PAIR, LABELS = json.dumps(GOOD), "id,prompt,type,label\n1,x,homonyms,"
GZIP = gzip.compress(PAIR.encode() * 99)
ERRORS = [  # command, bytes of the input, what is said after its name
    ("hh", b"", ": no usable row"),
    ("hh", PAIR.encode() + b"\n\xff\n", ":2: not JSON"),
    ("hh", b"[1]\n", ":1: not a JSON object"),
    ("hh", b"[" * 100_000, ":1: not JSON"),
    ("hh", b"\n" + b'{"chosen": "x"}\n', ":2: no HH-RLHF pair"),
    ("hh", b'{"chosen": "x", "rejected": null}\n', ":1: no HH-RLHF pair"),
    ("hh", GZIP[:-20], ": the gzip file is damaged"),
    ("hh", GZIP[:12] + b"\xff\xff\xff" + GZIP[15:], ": the gzip file is damaged"),
    ("oasst", PAIR.encode(), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(p("flat")).encode(), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(tree(p("Q", a("x"), {"role": "assistant"}))).encode(), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(tree(p("Q", a("x", rank="best")))).encode(), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(tree(node("system", "Q"))).encode(), ":1: no OpenAssistant tree"),
    ("oasst", json.dumps(tree(p("Q") | {"replies": 5})).encode(), ":1: no OpenAssistant tree"),
    ("prompts", b"question,answer\nx,y\n", ": columns question, answer of no known set"),
    ("prompts", b"goal,target\nx,y\nx\n", ":3: 2 columns expected"),
    ("prompts", b"goal,target\nx,y,z\n", ":2: 2 columns expected"),
    ("prompts", b'goal,target\n"x,y\n', ":2: not CSV"),
    ("prompts", b"goal,target\n\xe9,y\n", ": not UTF-8"),
    ("prompts", LABELS.encode() + b"maybe\n", ":2: label 'maybe'"),
    ("prompts", b'{"instructions": ["x"], "tags": []}', ': "instructions" and "tags"'),
    ("prompts", b'{"instructions": [1], "tags": ["x"]}', ': "instructions" and "tags"'),
    ("prompts", b'{"instructions": ["x"', ":1: not JSON"),
    ("prompts", b'{"question_id": 1, "turns": []}', ":1: no MT-Bench question"),
    ("prompts", b'{"question_id": 1, "turns": ["x", 2]}', ":1: no MT-Bench question"),
    ("prompts", b'{"turns": ["x"]}\n', ":1: no MT-Bench question"),
]


@pytest.mark.parametrize("name, content, said", ERRORS, ids=[f"{name}{said}" for name, _, said in ERRORS])
def test_bad_input(tmp_path, name, content, said):
    source = tmp_path / "in"
    source.write_bytes(content)
    report = prepare(name, "--in", source, "--out", tmp_path / "out", code=2)
    assert f"error: {source}{said}" in report.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [source]


def test_bad_paths(tmp_path):
    source = write_lines(tmp_path / "in", GOOD)
    out = tmp_path / "out"
    assert "nowhere: no such file" in prepare("hh", "--in", "nowhere", "--out", out, code=2)
    assert prepare("hh", "--in", "no\nwhere", "--out", out, code=2).count("\n") == 1
    assert f"{tmp_path}: no such file" in prepare("hh", "--in", tmp_path, "--out", out, code=2)
    assert "not an ordinary file" in prepare("hh", "--in", source, "--out", tmp_path, code=2)
    assert "not an ordinary file" in prepare("hh", "--in", source, "--out", "/dev/full", code=2)
    assert "read or written twice" in prepare("hh", "--in", source, "--out", source, code=2)
    assert "read or written twice" in prepare("hh", "--in", source, "--out", out, "--valid", out, code=2)
    assert "read or written twice" in prepare("hh", "--in", source, "--out", out, "--valid", source, code=2)
    assert str(source) in prepare("hh", "--in", source, "--out", source / "out", code=2)
    assert "this is not the file" in prepare("hh", "--in", source, "--out", out, "--sha256", "0" * 64, code=2)
    digest = hashlib.sha256(source.read_bytes()).hexdigest().upper()
    prepare("hh", "--in", source, "--out", out, "--sha256", digest)


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--valid-percent", "100"], ["--sha256", "0", "--in", "a", "b"]])
def test_bad_flags(flags):
    assert prepare("hh", "--in", "a", "--out", "out", *flags, code=2).startswith(f"error: {flags[0]} ")


# --- downloads -------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves server.content, as badly as the server's other attributes say."""

    def do_GET(self):
        server, content = self.server, self.server.content
        server.asked.append((self.headers["Range"], self.headers["If-Range"]))
        if server.status:
            return self.send_error(server.status)
        start, total = 0, len(content)
        if self.headers["Range"] and server.ranges and self.headers["If-Range"] in server.validators.values():
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + server.shift}-{total - 1}/{total}")
        else:
            self.send_response(200)
        for name, value in server.validators.items():
            self.send_header(name, value)
        if server.length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(content[start : server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = many(tmp_path, 500).read_bytes()
    server.asked, server.status, server.ranges, server.length, server.cut, server.shift = [], None, True, True, None, 0
    server.validators = {"ETag": '"one"'}
    server.url = f"http://127.0.0.1:{server.server_port}/hh/test.jsonl"
    server.sha256 = hashlib.sha256(server.content).hexdigest()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def expected(tmp_path, server):
    """The rows that the served file gives when it is read from disk."""
    list_of = data.prepare.write(data.prepare.hh_rows(tmp_path / "many", True), [tmp_path / "expected"], 1, None)
    assert list_of == ([500], {})
    return (tmp_path / "expected").read_bytes()


def fetch(tmp_path, server, *flags, code=0):
    out, cache = tmp_path / "out" / "rows.jsonl", tmp_path / "cache"
    report = prepare("hh", "--in", server.url, "--out", out, "--cache", cache, *flags, code=code)
    if code:
        assert not out.exists() and not list(out.parent.iterdir())
    else:
        assert [path.name[8:] for path in cache.iterdir()] == ["-test.jsonl"]
        assert next(cache.iterdir()).read_bytes() == server.content
    return report


def rows_of(tmp_path):
    return (tmp_path / "out" / "rows.jsonl").read_bytes()


def test_download_then_cache(tmp_path, server, expected):
    report = fetch(tmp_path, server)
    assert f"sha256 {server.sha256}, not checked" in report and rows_of(tmp_path) == expected
    report = fetch(tmp_path, server, "--sha256", server.sha256)
    assert "already in" in report and "not checked" not in report and rows_of(tmp_path) == expected
    assert server.asked == [(None, None)]
    # A cached file is checked as well.
    cached = next((tmp_path / "cache").iterdir())
    cached.write_bytes(server.content[:-1])
    assert "delete it and run again" in prepare(
        "hh", "--in", server.url, "--out", tmp_path / "x", "--cache", cached.parent, "--sha256", server.sha256, code=2
    )


def test_cache_is_beside_the_output(tmp_path, server):
    prepare("hh", "--in", server.url, "--out", tmp_path / "o" / "rows.jsonl")
    prepare("hh", "--in", server.url.replace("/hh/", "/other/"), "--out", tmp_path / "o" / "rows.jsonl")
    names = sorted(path.name[8:] for path in (tmp_path / "o").iterdir())
    assert names == ["-test.jsonl", "-test.jsonl", "nl"] and len(server.asked) == 2  # two addresses, two files


DATE = "Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("validators", [{"ETag": '"one"'}, {"ETag": 'W/"1"', "Last-Modified": DATE}])
def test_download_resumes(tmp_path, server, expected, validators):
    server.validators = validators
    cut = server.cut = len(server.content) // 3
    report = fetch(tmp_path, server, code=2)
    assert f"lost after {cut} of {len(server.content)} bytes; run the same command again" in report
    server.cut = 2 * cut
    fetch(tmp_path, server, code=2)
    server.cut = None
    report = fetch(tmp_path, server, "--sha256", server.sha256)
    assert f"resuming at byte {2 * cut}" in report and rows_of(tmp_path) == expected
    strong = validators.get("Last-Modified", '"one"')
    assert server.asked == [(None, None), (f"bytes={cut}-", strong), (f"bytes={2 * cut}-", strong)]


def test_download_starts_again_when_the_file_has_changed(tmp_path, server, expected):
    server.content, good = server.content.replace(b"no", b"NO"), server.content
    server.cut = len(server.content) // 2
    fetch(tmp_path, server, code=2)
    server.content, server.cut, server.validators = good, None, {"ETag": '"two"'}
    assert "resuming" not in fetch(tmp_path, server)
    assert server.asked[1] == (f"bytes={len(good) // 2}-", '"one"') and rows_of(tmp_path) == expected


def test_download_without_ranges(tmp_path, server, expected):
    server.ranges, server.cut = False, 1000
    fetch(tmp_path, server, code=2)
    server.cut = None
    assert "resuming" not in fetch(tmp_path, server) and server.asked[1] == ("bytes=1000-", '"one"')
    assert rows_of(tmp_path) == expected


def test_download_without_a_validator_is_not_resumed(tmp_path, server, expected):
    server.validators, server.cut = {}, 1000
    fetch(tmp_path, server, code=2)
    server.cut = None
    fetch(tmp_path, server)
    assert server.asked == [(None, None)] * 2 and rows_of(tmp_path) == expected


def test_download_without_a_length(tmp_path, server, expected):
    server.length = False
    fetch(tmp_path, server)
    assert rows_of(tmp_path) == expected


def test_download_that_was_complete_when_the_run_was_killed(tmp_path, server, expected):
    server.cut = 1000
    fetch(tmp_path, server, code=2)
    server.cut = None
    (part,) = (tmp_path / "cache").glob("*.part")
    part.write_bytes(server.content)
    fetch(tmp_path, server)  # the server answers 416: there is nothing beyond the end
    assert rows_of(tmp_path) == expected


def test_download_refuses_the_wrong_part(tmp_path, server):
    server.cut = 1000
    fetch(tmp_path, server, code=2)
    server.cut, server.shift = None, 7
    assert "another part of the file" in fetch(tmp_path, server, code=2)


def test_download_with_the_wrong_sha256(tmp_path, server):
    report = fetch(tmp_path, server, "--sha256", "0" * 64, code=2)
    assert f"sha256 is {server.sha256}, not {'0' * 64}" in report
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_errors(tmp_path, server):
    server.status = 404
    assert f"error: {server.url}: the server answers 404" in fetch(tmp_path, server, code=2)
    server.url = "http://127.0.0.1:1/test.jsonl"
    assert "Connection refused; run the same command again" in fetch(tmp_path, server, code=2).replace(">", "")
    for url in ("http://", "http://[1/x", "http://a b/c"):
        server.url = url
        assert f"error: {url}: " in fetch(tmp_path, server, code=2)


def test_known_names_are_downloaded_and_checked(tmp_path, server, monkeypatch):
    monkeypatch.setitem(data.prepare.KNOWN, "hh-harmless-test", server.url)
    monkeypatch.setitem(data.prepare.SHA256, server.url, server.sha256)
    args = ("hh", "--in", "hh-harmless-test", "--out", tmp_path / "out")
    assert "not checked" not in prepare(*args)
    assert len(read_lines(tmp_path / "out")) == 500
    next(tmp_path.glob("*-test.jsonl")).unlink()
    monkeypatch.setitem(data.prepare.SHA256, server.url, "0" * 64)
    assert f"sha256 is {server.sha256}" in prepare(*args, code=2)
    # A file of that name is meant before the data set.
    write_lines(tmp_path / "hh-harmless-test", GOOD)
    monkeypatch.chdir(tmp_path)
    assert "hh: 1 pairs read" in prepare(*args)


def test_table_of_known_files():
    assert set(data.prepare.SHA256) < set(data.prepare.KNOWN.values())
    assert all(url.startswith("https://") for url in data.prepare.KNOWN.values())
    assert all(len(digest) == 64 for digest in data.prepare.SHA256.values())


# --- the real files --------------------------------------------------------------------------------------------------

REAL_FILES = {
    "hh-harmless-test": "hh-rlhf/harmless-base_test.jsonl.gz",
    "advbench": "safety/advbench/harmful_behaviors.csv",
    "malicious_instructions": "safety/malicious_instructions/I-MaliciousInstructions.json",
    "simple_safety_tests": "safety/simple_safety_tests/SimpleSafetyTests_test_cases.csv",
    "strongreject": "safety/strongreject/strongreject_dataset.csv",
    "xstest": "safety/xstest/xstest_prompts.csv",
    "mt_bench": "mt_bench/mt_bench_question.jsonl",
}


@real
def test_real_files_are_the_known_ones():
    for name, path in REAL_FILES.items():
        digest = hashlib.sha256((REAL / path).read_bytes()).hexdigest()
        assert data.prepare.SHA256[data.prepare.KNOWN[name]] == digest, name


def squeeze(text):
    return " ".join(text.split())


@real
def test_real_hh(tmp_path):
    source, out = REAL / REAL_FILES["hh-harmless-test"], tmp_path / "out.jsonl"
    report = command("hh", "--in", source, "--out", out)
    assert report.splitlines() == [
        "hh: 2312 pairs read, 2267 rows written, 45 skipped",
        f"     2267  written to {out}",
        "       32  skipped: speaker label inside an answer",
        "        9  skipped: one speaker has two turns in a row",
        "        4  skipped: empty answer",
    ]

    # Again, without looking at turns: by string cuts alone.
    kept, lost = [], Counter()
    for line in gzip.decompress(source.read_bytes()).decode().split("\n")[:-1]:
        pair = json.loads(line)
        cuts = [pair[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        words = [cut[2].split() for cut in cuts]
        exchanges = [text.split("\n\nHuman:") for text in pair.values()]
        if any(text[0] or any(part.count("\n\nAssistant:") != 1 for part in text[1:]) for text in exchanges):
            lost["turns"] += 1
        elif cuts[0][0] != cuts[1][0]:
            lost["prompt"] += 1
        elif not all(words):
            lost["empty"] += 1
        elif any(word.startswith(("Human:", "Assistant:")) for answer in words for word in answer):
            lost["label"] += 1
        else:
            kept.append(pair)
    assert lost == {"turns": 9, "empty": 4, "label": 32}

    rows = read_lines_exactly(out)
    assert len(rows) == len(kept) == 2267
    for row, pair in zip(rows, kept, strict=True):
        check_row(row)
        assert row["unsafe"] is True
        for side in ("chosen", "rejected"):
            turns = row["prompt"] + row[side]
            label = {"user": "Human", "assistant": "Assistant"}
            text = "".join(f"\n\n{label[turn['role']]}: {turn['content']}" for turn in turns)
            assert squeeze(text) == squeeze(pair[side])


def read_lines_exactly(path):
    """Lines end at \\n alone; str.splitlines() would cut texts at U+2028 too."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@real
def test_real_oasst(tmp_path):
    source, out = REAL / "oasst" / "en_100_tree.jsonl", tmp_path / "out.jsonl"
    report = command("oasst", "--in", source, "--out", out)
    assert report.splitlines() == [
        "oasst: 480 prompter messages read, 147 rows written, 333 skipped",
        f"      147  written to {out}",
        "      276  skipped: not on a path of best replies",
        "       57  skipped: no usable reply",
    ]

    # Again, from a flat table of messages and their parents, looking upwards from each prompter message.
    messages, children = {}, {}

    def flatten(message, parent):
        messages[message["message_id"]] = message | {"parent": parent}
        children.setdefault(parent, []).append(message)
        for reply in message["replies"]:
            flatten(reply, message["message_id"])

    for item in read_lines_exactly(source):
        flatten(item["prompt"], None)
    assert all(m["lang"] == "en" and m["review_result"] and not m["deleted"] for m in messages.values())

    def best(replies):
        return min(replies, key=lambda reply: reply.get("rank", 99))["message_id"]

    wanted, counts = [], Counter()
    for key, message in messages.items():
        if message["role"] != "prompter":
            continue
        path, above = [message["text"]], message["parent"]
        on_path = True
        while above is not None:
            parent = messages[above]
            if parent["role"] == "assistant":
                on_path &= best(children[parent["parent"]]) == above
            path.insert(0, parent["text"])
            above = parent["parent"]
        if not on_path:
            counts["off"] += 1
        elif key not in children:
            counts["leaf"] += 1
        else:
            ranks = sorted((reply["rank"], reply["text"]) for reply in children[key] if "rank" in reply)
            wanted.append((path, messages[best(children[key])]["text"], ranks[-1][1] if len(ranks) > 1 else None))
    assert counts == {"off": 276, "leaf": 57}

    rows = read_lines_exactly(out)
    assert len(rows) == 147 and sum("rejected" in row for row in rows) == 139
    for row in rows:
        check_row(row)
        assert "unsafe" not in row
    found = [
        ([turn["content"] for turn in row["prompt"]], row["chosen"][0]["content"], row.get("rejected")) for row in rows
    ]
    strip = [
        ([text.strip() for text in path], good.strip(), bad and [assistant(bad.strip())]) for path, good, bad in wanted
    ]
    assert sorted(map(repr, found)) == sorted(map(repr, strip))
    assert len({row["prompt"][-1]["content"] + row["chosen"][0]["content"] for row in rows}) == 147  # no duplicates


@real
def test_real_prompts(tmp_path):
    files = [REAL / path for name, path in REAL_FILES.items() if not name.startswith("hh")]
    report = command("prompts", "--in", *files, "--out", tmp_path / "out")
    assert "prompts: 1563 prompts read, 1563 rows written, 0 skipped" in report
    rows = read_lines_exactly(tmp_path / "out")
    counts = {"advbench": 520, "malicious_instructions": 100, "simple_safety_tests": 100, "strongreject": 313}
    assert Counter(row["set"] for row in rows) == counts | {"xstest": 450, "mt_bench": 80}
    assert Counter(row["set"] for row in rows if row["benign"]) == {"xstest": 250, "mt_bench": 80}
    for row in rows:
        (turn,) = row["prompt"]
        assert turn == user(turn["content"].strip()) and turn["content"]
        assert ("target" in row) == (row["set"] == "advbench")
        assert ("category" in row) == (row["set"] != "advbench")
        # XSTest's types say the same as its labels.
        assert row["set"] != "xstest" or row["benign"] == (not row["category"].startswith("contrast"))
        assert row["set"] != "mt_bench" or (len(row["turns"]) == 2 and row["turns"][0] == turn["content"])
    by_set = {name: [row for row in rows if row["set"] == name] for name in REAL_FILES}
    assert [row["question_id"] for row in by_set["mt_bench"]] == list(range(81, 161))
    assert [row["id"] for row in by_set["xstest"]] == [str(i + 1) for i in range(450)]
    with open(REAL / REAL_FILES["advbench"], newline="", encoding="utf-8") as file:
        goals = list(csv.reader(file))[1:]
    assert [[row["prompt"][0]["content"], row["target"]] for row in by_set["advbench"]] == goals
