"""data/prepare/: every rule with rows written out by hand, and the real files where ../shared/data has them."""

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from command import command

from backtrack.judge import Verdict
from data.prepare import __main__ as program
from data.prepare import judged, words_of
from model.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not in ../shared/data")


def prepare(*words, code=0):
    """The command, run within this process; returns what it says on stderr."""
    return command(program.main, *words, code=code)[1]


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
    assert report.splitlines() == ["hh: 1 pairs read, 1 rows written, 0 skipped", f"        1  written to {out}"]
    rows, _ = convert(tmp_path, "hh", GOOD, flags=["--helpful"])
    assert rows == [{key: value for key, value in GOOD_ROW.items() if key != "unsafe"}]
    words = ("hh", "--in", write_lines(tmp_path / "helpful-base.jsonl", GOOD), "--out")
    assert "marked unsafe" in prepare(*words, out) and "marked unsafe" not in prepare(*words, out, "--helpful")


Q = H + "Hi"
NO, YES = Q + A + "no", Q + A + "yes"
SKIPPED = {  # reason -> pairs of chosen and rejected
    "speakers do not alternate from Human to Assistant": [
        ("Note." + NO, "Note." + YES),
        ("", ""),
        (NO, YES + A + "sure"),
        (Q + H + "Hello?" + A + "no", Q + H + "Hello?" + A + "yes"),
        (NO, YES + H + "more"),
    ],
    "chosen and rejected have different prompts": [(NO, H + "Hi!" + A + "yes"), (NO, YES + H + "more" + A + "ok")],
    "empty turn": [(H + A + "no", H + A + "yes"), (Q + A, YES), (NO, Q + A + " \n ")],
    "chosen and rejected are the same": [(NO, NO + " ")],
    "speaker label inside an answer": [(Q + A + "Human: no", YES), (NO, YES + ".  Human: more")],
    "broken Unicode (half a surrogate pair)": [(NO, YES + " \ud800")],
}


def test_hh_skips(tmp_path):
    pairs = [{"chosen": chosen, "rejected": rejected} for some in SKIPPED.values() for chosen, rejected in some]
    # Labels may stand in prompts, and a word may end in one.
    start = H + "Say Human: x" + A
    labels = {"chosen": start + "subHuman: no", "rejected": start + "the Human says (Human: x)"}
    rows, report = convert(tmp_path, "hh", GOOD, *pairs, labels)
    assert rows[0] == GOOD_ROW and rows[1]["prompt"] == [user("Say Human: x")] and len(rows) == 2
    expected = {f"skipped: {reason}": len(some) for reason, some in SKIPPED.items()}
    found = (line.strip().split("  ") for line in report.splitlines()[2:])
    assert {reason: int(count) for count, reason in found} == expected


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

    monkeypatch.setattr(judged, "load_judge", lambda *args: judge)
    return seen


def test_guard_keeps_safe_against_unsafe_and_counts_the_others(tmp_path, guard, monkeypatch):
    pairs = [
        pair("fine", "poison 1"),
        pair("poison", "worse poison"),
        pair("good", "merely bad"),
        pair("no", "no"),  # skipped before the guard is asked
        GOOD | {"rejected": START + "poison 2"},
        pair("unreadable", "poison"),
        pair("ok", "unreadable poison"),
    ]
    rows, report = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path])
    assert [row["rejected"] for row in rows] == [[assistant("poison 1")], [assistant("poison 2")]]
    assert rows[1] == GOOD_ROW | {"rejected": [assistant("poison 2")]}
    assert report.splitlines()[-6:] == [
        "hh: 7 pairs read, 2 rows written, 5 skipped",
        f"        2  written to {tmp_path / 'out'}",
        "        2  skipped: no verdict of the judge",
        "        1  skipped: chosen and rejected are the same",
        "        1  skipped: chosen is unsafe, says the judge",
        "        1  skipped: rejected is safe, says the judge",
    ]
    assert "judge: cannot read 'unreadable'" in report and "judge: 6 of 6 pairs judged" in report
    # Where chosen is unsafe, rejected does not matter and costs nothing. The guard sees whole conversations.
    assert "worse poison" not in [response for _, response in guard] and len(guard) == 6 + 4
    assert (GOOD_ROW["prompt"], "Fine, “you”?") in guard and (GOOD_ROW["prompt"], "poison 2") in guard
    monkeypatch.setattr(judged, "AT_ONCE", 4)  # no more is judged than --limit needs
    pairs = [pair("fine", f"poison {i}") for i in range(20)]
    guard.clear()
    rows, _ = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path, "--limit", 5])
    assert len(rows) == 5 and len(guard) == 2 * 8


def test_guard_goes_on_where_it_was_stopped(tmp_path, guard, monkeypatch):
    """Killed in the third of five batches, in the middle of a line: two are not judged again, the rows are the same."""
    monkeypatch.setattr(judged, "AT_ONCE", 4)
    pairs = [pair("fine" if i % 3 else "poison", f"poison {i}") for i in range(20)]
    expected, _ = convert(tmp_path, "hh", *pairs, flags=["--guard", tmp_path])
    everything = list(guard)
    guard.clear()

    def dies(prompt, response):
        if "poison 10" in response:
            raise KeyboardInterrupt
        return Verdict("poison" in response)

    words = ("hh", "--in", tmp_path / "in", "--out", tmp_path / "new", "--guard")
    with monkeypatch.context() as patch:
        patch.setattr(judged, "load_judge", lambda *args: dies)
        prepare(*words, tmp_path, code=130)
    notes = tmp_path / "new.guard.jsonl"
    assert len(notes.read_text().splitlines()) == 1 + 8 and not (tmp_path / "new").exists()
    with open(notes, "a") as file:
        file.write('{"pair": "0123')
    assert "was begun with judge" in prepare(*words, tmp_path / "another", code=2)
    assert "new.guard.jsonl has the verdicts on 8 pairs" in prepare(*words, tmp_path)
    assert guard == everything[-len(guard) :] and 12 < len(guard) < len(everything)
    assert read_lines(tmp_path / "new") == expected and not notes.exists()
    guard.clear()
    write_lines(tmp_path / "in", pair("fine", "poison"), {"chosen": "x"})
    assert "in:2: no HH-RLHF pair" in prepare(*words, tmp_path, code=2) and not guard
    asked = []
    monkeypatch.setattr(judged, "load_judge", lambda *args: asked.append(args) or dies)
    flags = ("--device", "cpu", "--dtype", "bfloat16", "--judge-url", "http://localhost:1")
    prepare(*words, tmp_path, *flags, code=2)
    assert asked == [(str(tmp_path), "cpu", torch.bfloat16, "http://localhost:1", 0.5, False)]  # no categories
    assert "not allowed with" in prepare(*words, tmp_path, "--helpful", code=2)


def test_rows_of_ones_own_are_labelled(tmp_path, guard, monkeypatch):
    """In any of TRL's forms. One answer without a verdict does not end the run."""
    system = {"role": "system", "content": "S"}
    rows = [
        {"prompt": [system, user("a")], "chosen": [assistant("no")], "rejected": [assistant("poison")], "mine": 1},
        {"prompt": "b", "chosen": "no", "rejected": "yes", "unsafe": True},
        {"prompt": "c", "chosen": "poison", "rejected": "no"},
        {"prompt": "d", "chosen": "no", "rejected": "unreadable"},
        {"prompt": "e", "chosen": "only"},
        {"text": "plain"},
    ]
    found, report = convert(tmp_path, "rows", *rows, flags=["--judge", tmp_path])
    assert found[0] == rows[0] | {"unsafe": True}
    assert found[1] == {
        "prompt": [user("b")], "chosen": [assistant("no")], "rejected": [assistant("yes")], "unsafe": False,
    }  # fmt: skip
    assert [row.get("prompt", row.get("text")) for row in found[2:]] == [[user("e")], "plain"]
    assert "unsafe" not in found[2] and "rows: 6 rows read, 4 rows written, 2 skipped" in report
    assert " 1  skipped: chosen is unsafe" in report and " 1  skipped: no verdict" in report

    # A judge that only tells who complies: where chosen does, the question may be answered.
    monkeypatch.setattr(judged, "load_judge", lambda *_: lambda _, text: Verdict(None, complied="no" not in text))
    rows = [{"prompt": text, "chosen": text, "rejected": "sure"} for text in ("no", "sure thing")]
    found, _ = convert(tmp_path, "rows", *rows, flags=["--judge", "any:judge"])
    assert [row["unsafe"] for row in found] == [True, False]
    assert "--judge" in prepare("rows", "--in", tmp_path / "in", "--out", tmp_path / "out", code=2)


def p(text, *replies, role="prompter", **extra):
    base = {"text": text, "role": role, "lang": "en", "review_result": True, "deleted": False}
    return base | {"replies": list(replies)} | extra


def a(text, *replies, **extra):
    return p(text, *replies, role="assistant", **extra)


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


def test_oasst_leaves_out_messages_and_what_hangs_below(tmp_path):
    for extra, reason in (
        ({"deleted": True}, "deleted"),
        ({"review_result": None}, "did not pass review"),
        ({"lang": "de"}, "language is not en"),
        ({"text": " \n"}, "empty"),
    ):
        reply = a("bad", p("below", a("x")), rank=0) | extra
        below = p("bad", a("x", p("below", a("y")))) | extra
        trees = [
            tree(p("Q", reply, a("good", rank=1), a("poor", rank=2))),
            tree(p("Q2", a("yes", below, p("fine", a("z"))))),
            tree(p("R") | extra),
        ]
        rows, report = convert(tmp_path, "oasst", *trees)
        assert rows[0] == {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("poor")]}
        assert [row["prompt"][-1] for row in rows[1:]] == [user("Q2"), user("fine")]
        assert "7 prompter messages read, 3 rows written, 4 skipped" in report
        assert f" 2  skipped: {reason}\n" in report and " 2  skipped: not on a path" in report


def test_oasst_trees_that_are_not_ready_roles_out_of_turn_and_ranks(tmp_path):
    trees = [
        tree(p("gone", a("x", p("y"))), tree_state="aborted_low_grade"),
        tree(p("Q", p("me again", a("x")), a("yes", a("and another thing"), p("why", a("so"))))),
        tree(p("R", a("unranked"), a("x", rank=3), a("x ", rank=4))),  # a rank beats none; the same text is no pair
    ]
    rows, report = convert(tmp_path, "oasst", *trees)
    assert rows == [
        {"prompt": [user("Q")], "chosen": [assistant("yes")]},
        {"prompt": [user("Q"), assistant("yes"), user("why")], "chosen": [assistant("so")]},
        {"prompt": [user("R")], "chosen": [assistant("x")]},
    ]
    assert "6 prompter messages read, 3 rows written, 3 skipped" in report
    assert " 2  skipped: tree is not ready for export" in report and " 1  skipped: not on a path" in report


def bad(text, name, **more):
    return {"prompt": [user(text)], "set": name, "benign": False, **more}


def fine(text, name, **more):
    return bad(text, name, **more) | {"benign": True}


TEA = [  # in the format of safety_only_data_Instructions.json
    {"instruction": " Spill the tea. ", "input": "", "output": "Better not.\n"},
    {"instruction": "Drop this:", "input": " a cup ", "output": ""},
    {"instruction": " ", "output": "?"},
]
ALPACA_EVAL = [{"dataset": "koala", "instruction": "Brew.", "output": out, "generator": "x"} for out in (" Boil. ", "")]
QUESTION = {"question_id": 81, "category": "writing", "turns": ["One. ", "Two."]}
JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source\n0,Do x,Sure: x ,X,Privacy,Original\n"
JAILBROKEN = {"id": "0", "category": "Privacy", "target": "Sure: x"}
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
HARMBENCH += (
    'Do x,standard,bad,,,x\n"Do x, y",contextual,bad,context,"It is y.\nSo it is.",xy\nSing,copyright,c,"a, b",,s\n'
)
SETS = {  # name of a file -> its text, and the rows made of it
    "advbench.csv": ('goal,target\n"Do ""x"", now",Yes\n" \n ",Yes\n', bad('Do "x", now', "advbench", target="Yes")),
    "I-Malicious.json": (  # some texts are there twice, in the original, too
        '{"instructions": ["Do x", "Do x"],\n "tags": ["a", "b"], "inputs": []}',
        *(bad("Do x", "malicious_instructions", category=category) for category in "ab"),
    ),
    "SimpleSafetyTests - test cases.csv": (
        "id,harm_area,counter,category,prompts_final\r\nsst_1,Scams,1,Advice,How do I x? \r\n",
        bad("How do I x?", "simple_safety_tests", id="sst_1", category="Scams"),
    ),
    "strongreject.csv": (
        "\ufeffcategory,source,forbidden_prompt\nViolence,DAN,Do x\n",
        bad("Do x", "strongreject", category="Violence"),
    ),
    "xstest.csv": (
        "id,prompt,type,label,note\n1,Kill a job?,homonyms,safe,\n26,Kill me?,contrast,unsafe,\n",
        fine("Kill a job?", "xstest", id="1", category="homonyms"),
        bad("Kill me?", "xstest", id="26", category="contrast"),
    ),
    "harmbench.csv": (
        HARMBENCH,
        bad("Do x", "harmbench", id="x", category="bad"),
        bad("It is y.\nSo it is.\n\n---\n\nDo x, y", "harmbench-contextual", id="xy", category="bad"),
        bad("Sing", "harmbench-copyright", id="s", category="c"),
    ),
    "harmful-behaviors.csv": (JAILBREAKBENCH, bad("Do x", "jailbreakbench", **JAILBROKEN)),
    "benign-behaviors.csv": (JAILBREAKBENCH, fine("Do x", "jailbreakbench-benign", **JAILBROKEN)),
    "question.jsonl": (
        json.dumps(QUESTION | {"reference": []}) + "\n\n" + json.dumps(QUESTION),
        *[fine("One.", "mt_bench", **QUESTION) | {"turns": ["One.", "Two."]}] * 2,
    ),
    "safety_only_data_Instructions.json": (
        json.dumps(TEA),
        bad("Spill the tea.", "safety_tuned", safe_answer="Better not."),
        bad("Drop this:\n\na cup", "safety_tuned"),
    ),
    "I-Alpaca.json": ('{"instructions": ["Brew tea.\\n"], "inputs": []}', fine("Brew tea.", "i_alpaca")),
    "Q-Harm.json": ('{"instructions": ["Is tea bad?", " "]}', bad("Is tea bad?", "q_harm")),
    "text_davinci_003.json": (
        json.dumps(ALPACA_EVAL, indent=2),
        fine("Brew.", "alpaca_eval", category="koala", reference="Boil."),
        fine("Brew.", "alpaca_eval", category="koala"),
    ),
    "more.csv": (",goal,target,lang\n7,make x,Sure,en\n", bad("make x", "advbench", target="Sure")),
}


def test_prompt_sets(tmp_path):
    """Each set in a file of its own, every other one packed, all in one command."""
    files = [tmp_path / (f"{name}.gz" if i % 2 else name) for i, name in enumerate(SETS)]
    for file, (text, *_) in zip(files, SETS.values(), strict=True):
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    report = prepare("prompts", "--in", *files, "--out", tmp_path / "out")
    assert read_lines(tmp_path / "out") == [row for _, *rows in SETS.values() for row in rows]
    assert "3  skipped: empty prompt" in report  # AdvBench's second, and one in each of two lists


def test_what_does_not_say_whether_it_is_harmless(tmp_path):
    files = [tmp_path / name for name in ("my.own.json", "texts.json", "I-CoNa.json", "jbb.csv")]
    texts = json.dumps(TEA[:1]), '{"instructions": ["Brew."]}', '{"instructions": ["Say."]}', JAILBREAKBENCH
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    words = ("prompts", "--out", tmp_path / "out", "--in")
    for file in (*files[:2], files[3]):
        assert f"{file}: does not say whether it is harmless; add --benign or" in prepare(*words, file, code=2)
    for flag, as_told, key in (("--benign", fine, "reference"), ("--unsafe", bad, "safe_answer")):
        prepare(*words, *files, flag)
        mine = [as_told("Spill the tea.", "my", **{key: "Better not."}), as_told("Brew.", "texts")]
        jailbreak = as_told("Do x", "jbb", **JAILBROKEN)
        assert read_lines(tmp_path / "out") == [*mine, bad("Say.", "i_cona"), jailbreak]


def test_first_messages_of_trees(tmp_path):
    trees = [
        tree(p(" Q ", a("worst", rank=1), a(" best ", p("next", a("x")), rank=0))),
        tree(p("nobody answers")),
        tree(p("Frage", a("ja"), lang="de")),
    ]
    chat = [{"role": "system", "content": "S"}, user("a "), assistant("b"), user("c")]
    written = [{"prompt": chat, "set": "x", "mine": 1}]  # by this program: read as it is
    assert convert(tmp_path, "prompts", *written)[0] == written
    rows, report = convert(tmp_path, "prompts", *trees)
    assert rows == [fine("Q", "oasst", reference="best"), fine("nobody answers", "oasst")]
    assert " 1  skipped: language is not en\n" in report


def test_forced_prompts(tmp_path):
    """Twice, the second time with the beginning of the answer: the target, or words that say yes."""
    files = [tmp_path / "advbench.csv", tmp_path / "xstest.csv"]
    files[0].write_text("goal,target\nDo x,Sure: x\n")
    files[1].write_text("id,prompt,type,label\n1,Kill a process,homonyms,safe\n2,Kill him,c,unsafe\n")
    prepare("prompts", "--in", *files, "--out", tmp_path / "out", "--forced")
    x, forced_x, _, unsafe, forced = read_lines(tmp_path / "out")
    assert forced_x == x | {"set": "advbench-forced", "prefill": "Sure: x"}
    assert forced == unsafe | {"set": "xstest-forced", "prefill": "Sure, here is what you asked for:"}


def test_exclude(tmp_path):
    """Questions of any file that `prompts` reads, whatever their case and punctuation."""
    ours = write_lines(tmp_path / "ours", {"prompt": [user("brew TEA")], "set": "x"})
    advbench, unknown, source = (tmp_path / name for name in ("advbench.csv", "unknown.json", "I-Alpaca.json"))
    advbench.write_text("goal,target\nBrew: “more”?,Sure\nBrew tea,Sure\n")
    unknown.write_text('{"instructions": ["Brew\\nless"]}')  # harmless or not makes no difference here
    source.write_text(
        json.dumps({"instructions": ["Brew tea!", "Brew tea please.", "Brew more", "brew less.", "Brew"]})
    )
    words = ("prompts", "--in", source, "--out", tmp_path / "out", "--exclude")
    report = prepare(*words, ours, advbench, unknown)
    assert [row["prompt"][0]["content"] for row in read_lines(tmp_path / "out")] == ["Brew tea please.", "Brew"]
    assert all(f" 1  skipped: also in {path}\n" in report for path in (ours, advbench, unknown))
    # Of a conversation the first question counts.
    elsewhere = write_lines(tmp_path / "r", {"prompt": [user("r?")]}, {"prompt": [user("WIE GEHT’S")]})
    trees = [tree(p("Q", a("A", p("more", a("B"))))), tree(p("R", a("A")))]
    rows, report = convert(tmp_path, "oasst2", *trees, flags=["--exclude", elsewhere])
    assert [row["prompt"][0] for row in rows] == [user("Q")] * 2 and " 1  skipped: also in" in report


# One letter, vowel sign or emoji apart: Hindi, Thai, Arabic with vowels, emoji. Then: the same to a reader.
APART = [("कि", "का"), ("ที่", "ทำ"), ("عِلم", "عَلَم"), ("😀", "😡"), ("Is 🍵 safe?", "Is 🍺 safe?"), ("?", "!")]
ALIKE = [("कि?", " कि"), ("Cafe\u0301!", "CAFÉ"), ("１２ Ｔea", "12 tea"), ("ma\u00adny", "many"), ("❤\ufe0f", "❤")]


def test_words_are_compared_with_their_marks():
    assert all(words_of(a) != words_of(b) for a, b in APART)
    assert all(words_of(a) == words_of(b) for a, b in ALIKE)


def test_held_out_prompts(tmp_path):
    """However a question is written, it is on one side."""
    source = tmp_path / "I-Alpaca.json"
    source.write_text(json.dumps({"instructions": [text for i in range(100) for text in (f"Brew {i}", f"brew: {i}!")]}))
    paths = tmp_path / "rest", tmp_path / "part"
    prepare("prompts", "--in", source, "--out", paths[0], "--valid", paths[1], "--valid-percent", 30)
    sides = [Counter(re.sub(r"\D", "", row["prompt"][0]["content"]) for row in read_lines(path)) for path in paths]
    assert all(count == 2 for side in sides for count in side.values())
    assert len(sides[0] | sides[1]) == 100 and 20 <= len(sides[1]) <= 40


def test_held_out_rows_and_the_same_bytes(tmp_path):
    """200 pairs about 100 questions, two for each, in two conversations."""
    starts = [f"{H}Q{i // 2}{A}a{H}b{i}{A}" for i in range(200)]
    pairs = ({"chosen": start + "no", "rejected": start + "yes"} for start in starts)
    source, packed = write_lines(tmp_path / "many", *pairs), tmp_path / "many.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    valid = ("--valid", tmp_path / "valid", "--valid-percent", 30)
    report = prepare("hh", "--in", source, "--out", tmp_path / "deep" / "train", *valid)
    train, valid = read_lines(tmp_path / "deep" / "train"), read_lines(tmp_path / "valid")
    assert f" {len(train)}  written to" in report and f" {len(valid)}  written to" in report
    assert {row["prompt"][2]["content"] for row in train + valid} == {f"b{i}" for i in range(200)}
    seen, held_out = ({row["prompt"][0]["content"] for row in rows} for rows in (train, valid))
    assert not seen & held_out and 20 <= len(held_out) <= 40
    # Which questions those are follows from the stated rule, whatever else is in the file.
    for question in seen | held_out:
        digest = hashlib.sha256(question.encode()).hexdigest()
        assert (int(digest[:8], 16) / 2**32 < 0.3) == (question in held_out)
    prepare("hh", "--in", source, packed, "--out", tmp_path / "twice")
    twice = (tmp_path / "twice").read_bytes()
    assert twice == twice[: len(twice) // 2] * 2
    prepare("hh", "--in", source, "--out", tmp_path / "three", "--limit", 3)
    assert (tmp_path / "three").read_bytes() == b"".join(twice.splitlines(keepends=True)[:3])


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "out").write_text("old")
    source = write_lines(tmp_path / "in", GOOD)
    with open(source, "a") as file:
        file.write('{"chosen": ')
    report = prepare("hh", "--in", source, "--out", tmp_path / "out", code=2)
    assert report.startswith(f"error: {source}:2: not a line of JSON")
    assert (tmp_path / "out").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


ERRORS = [  # command, text of the input, what is said after its name
    ("hh", "", ": no usable row"),
    ("hh", '\n{"chosen": "x", "rejected": null}\n', ":2: no HH-RLHF pair"),
    ("oasst", json.dumps(tree(p("Q", a("x", rank="best")))), ":1: no OpenAssistant tree"),
    ("prompts", "question,answer\nx,y\n", ": columns question, answer of no known set"),
    ("prompts", 'goal,target\n"x,y\n', ":2: not CSV"),
    ("prompts", "id,prompt,type,label\n1,x,homonyms,maybe\n", ":2: 'maybe' is no label"),
    ("prompts", '{"instructions": ["x"], "tags": []}', ': "instructions" are no texts'),
    ("prompts", '[{"instruction": 1}]', ": item 1 has no texts"),
    ("prompts", '{"prompt": [{"role": "user"}]}', ':1: "prompt" is no list of messages'),
]


def test_bad_input(tmp_path):
    source = tmp_path / "in"
    for name, text, said in ERRORS:
        source.write_text(text)
        report = prepare(name, "--in", source, "--out", tmp_path / "out", code=2)
        assert f"error: {source}{said}" in report.splitlines()[-1], text
    assert list(tmp_path.iterdir()) == [source]


def test_bad_paths_and_flags(tmp_path):
    source, out = write_lines(tmp_path / "in", GOOD), tmp_path / "out"

    def error(source, out, *flags):
        return prepare("hh", "--in", source, "--out", out, *flags, code=2)

    assert "nowhere: no such file; `hh --help` says where to download" in error("nowhere", out)
    assert "is a directory" in error(source, tmp_path)
    assert "without .gz" in error(source, tmp_path / "out.gz")
    for paths in ((source, source), (source, out, "--valid", out), (source, out, "--valid", source)):
        assert "read or written twice" in error(*paths)
    assert list(tmp_path.iterdir()) == [source]


HH = REAL / "hh-rlhf" / "harmless-base_test.jsonl.gz"
OASST = REAL / "oasst" / "en_100_tree.jsonl"


@real
def test_real_rows(tmp_path):
    """The counts are README's; every word of a pair that is kept is in its row."""
    out = tmp_path / "out.jsonl"
    assert prepare("hh", "--in", HH, "--out", out).splitlines()[2:] == [
        "       32  skipped: speaker label inside an answer",
        "        9  skipped: speakers do not alternate from Human to Assistant",
        "        4  skipped: empty turn",
    ]
    pairs = (json.loads(line) for line in gzip.decompress(HH.read_bytes()).splitlines())
    sources = {json.dumps([pair[side].split() for side in ("chosen", "rejected")]) for pair in pairs}
    labels, rows = {"user": "Human", "assistant": "Assistant"}, read_lines(out)
    for row in rows:
        chats = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        texts = ["".join(f" {labels[turn['role']]}: {turn['content']}" for turn in chat) for chat in chats]
        assert json.dumps([text.split() for text in texts]) in sources
    assert len(rows) == 2267
    assert prepare("oasst", "--in", OASST, "--out", out).splitlines()[2:] == [
        "      276  skipped: not on a path of best replies",
        "       57  skipped: no usable reply",
    ]
    rows = read_lines(out)
    assert sum("rejected" in row for row in rows) == 139 and len(set(map(json.dumps, rows))) == 147
