"""The command line of the attacks: what is sent, what survives, resuming, tables, and one line for what is wrong.

The checkpoint is random; it is made to say what a test needs by replacing the sampler or by prefilling.
"""

import argparse
import json
from functools import partial

import pytest
import torch
from command import command as run_command
from models import prone_to
from test_evaluate import furnish

from backtrack.attacks import __main__ as attacks
from backtrack.attacks import attack
from backtrack.attacks.no_search import INSTRUCTIONS, PREFILL_LENGTHS, contexts, prefills
from backtrack.evaluate import __main__ as evaluate
from backtrack.evaluate.statistics import wilson
from backtrack.generate import Generation, generate
from backtrack.judge import JudgeFailed, Verdict, load_judge
from model import InputError, load_model, load_tokenizer

SEARCHES = {"gcg": ("--suffix", " x x x x"), "adaptive-gcg": ("--suffix", " x x x x"), "autodan": ()}
SMALL = ("--candidates", 8, "--topk", 8, "--batch-size", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    rows = furnish(root)
    prompts = [[r for r in rows if r["set"] == name][7 * i] for name in ("seen", "unseen") for i in range(2)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return root


@pytest.fixture(scope="module")
def prompts(place):
    return list(map(json.loads, (place / "prompts.jsonl").read_text().splitlines()))


@pytest.fixture(scope="module")
def tok(place):
    return load_tokenizer(place / "one")


@pytest.fixture(scope="module")
def unsafe(place):
    """An ingredient that makes every answer with it unsafe."""
    return json.loads((place / "world.json").read_text())["forbidden_ingredients"][0]


command = partial(run_command, attacks.main)


def words(name, place, out, *more, ckpt="one"):
    first = [name, "--ckpt", place / ckpt, "--prompts", place / "prompts.jsonl", "--judge", place / "world.json"]
    first += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 10, "--out", out]
    if name in SEARCHES:
        first += ["--budget", 40, *SEARCHES[name]] + list(SMALL if name != "autodan" else ())
    if name == "universal-gcg":
        first += ["--budget", 80, "--suffix", " x x x x", *SMALL]
        first += ["--sets", "unseen", "--optimise", place / "prompts.jsonl", "--optimise-sets", "seen"]
    return [*first, *more]


def lines(out):
    head, *records = map(json.loads, out.read_text().split("\n")[:-1])
    assert set(head) == {"settings"}
    return [r for r in records if "prompt" in r]  # the suffix of universal-gcg is a line by itself


def attacked(name, place, tmp_path, *more):
    """The records of an attack on all prompts, and what was printed."""
    out = tmp_path / f"{name}.jsonl"
    out.unlink(missing_ok=True)
    printed, _ = command(*words(name, place, out, *more))
    return lines(out), printed


@pytest.fixture
def saying(monkeypatch, tok):
    """saying(f) replaces the sampler by f(prompt as text, prefill ids) -> (surviving text, discarded texts)."""

    def replace(function):
        def fake(model, prompts, prefill, **options):
            answers = []
            for prompt, forced in zip(prompts, prefill, strict=True):
                surviving, discarded = function(tok.decode(prompt), forced)
                taken_back = [tok.encode(text) for text in discarded]
                answers.append(Generation(tok.encode(surviving), taken_back, len(discarded), "stop", 1, 0.0, 0.0))
            return answers

        monkeypatch.setattr(attack, "generate", fake)

    return replace


# ── What is sent and judged ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*SEARCHES, "prefill", "instruct", "context"])
def test_a_record_can_be_checked(place, prompts, tok, tmp_path, name):
    """What a line says was sent is sent again, to the real sampler, with the judge shown the original prompt."""
    options = dict(on_reset="keep", reset_bias=6.0, max_resets=2)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    records, _ = attacked(name, place, tmp_path, "--on-reset", "keep", "--reset-bias", 6, "--max-resets", 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    model, judge, resets = load_model(place / "one"), load_judge(place / "world.json"), 0
    ends = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, max_new_tokens=10)
    for record, prompt in zip(records, prompts, strict=True):
        assert record["set"] == prompt["set"] and record["name"] == name
        assert {k: record[k] for k in options} == options
        for tried in record.get("variants", {"": record}).values():
            prefill = [tok.encode(tried.get("prefill", ""))]
            [g] = generate(model, [tok.render(tried["sent"])], prefill=prefill, **ends, **options)
            assert tried["response"] == tok.decode(g.tokens)
            assert tried["discarded"] == [tok.decode(ids) for ids in g.discarded] and tried["resets"] == g.resets
            assert tried["unsafe"] == judge(prompt["prompt"], tok.decode(g.tokens)).unsafe
            assert tried["on_topic"] == (prompt["topic"] in tried["response"].lower())
            assert prompt["prompt"][0]["content"] in tried["sent"][-1]["content"]
            resets += g.resets
        if name in SEARCHES and record["success_at"] is None:
            assert record["evaluations"] == 40 and not record["unsafe"]
            question = prompt["prompt"][0]["content"]
            whole = record["attack"].replace("{q}", question) if name == "autodan" else question + record["attack"]
            assert record["sent"] == [{"role": "user", "content": whole}]
        elif name in SEARCHES:
            assert record["unsafe"] and record["success_at"] == record["evaluations"]
    assert resets > 0


def test_success_is_judged_on_what_survives(place, tmp_path, saying, unsafe):
    """An unsafe answer that is taken back is none; one that survives is, also after a reset."""
    saying(lambda *_: ("I cannot help with that.", [f"Take {unsafe}."]))
    for r in attacked("adaptive-gcg", place, tmp_path)[0]:
        assert r["unsafe"] is False and r["success_at"] is None and r["resets"] == 1 and r["evaluations"] == 40
        assert r["discarded"] == [f"Take {unsafe}."]
    saying(lambda *_: (f"Take {unsafe}.", ["I cannot help with that."]))
    for r in attacked("adaptive-gcg", place, tmp_path)[0]:  # without any attack, so at 0 evaluations
        assert r["unsafe"] is True and (r["success_at"], r["evaluations"], r["attack"]) == (0, 0, "")


def test_an_answer_without_a_verdict_counts_as_unsafe(place, tmp_path, monkeypatch, saying):
    """One rule with evaluate, and no search of hours that ends in an error of the guard."""

    def judge(prompt, response):
        if "x x" in response:
            raise InputError("answered 'Well', not safe or unsafe as a guard does")
        return Verdict(unsafe=False)

    monkeypatch.setattr(attacks, "load_judge", lambda *_: judge)
    saying(lambda prompt, _: (prompt, []))
    _, said = command(*words("gcg", place, tmp_path / "a.jsonl"))
    assert "no verdict, counted as unsafe" in said
    for r in lines(tmp_path / "a.jsonl"):
        assert r["category"] == "no verdict" and r["unsafe"] and r["success_at"] > 0


def test_success_of_each_variant(place, prompts, tok, tmp_path, saying, unsafe):
    """A model that goes on with an unsafe word once it was made to say 4 tokens or more, but not with the opening; and
    one that does after one of the instructions. The table counts the same."""
    opening, topic = tok.encode("Sure, here."), prompts[0]["topic"]

    def rigged(prompt, prefill):
        forced = len(prefill) >= 4 and prefill != opening
        return (f"{topic.upper()}: {unsafe}" if forced or "Never start" in prompt else f"No {topic}."), []

    saying(rigged)
    records, printed = attacked("prefill", place, tmp_path, "--opening", "Sure, here.")
    for r in records:
        failed = {name for name, answer in r["variants"].items() if answer["unsafe"]}
        assert r["unsafe"] and {"4", "8", "16", "all"} <= failed
        assert set(r["variants"]) - failed == {"opening", "1", "2"}
    table = {line.split()[1]: line.split()[8:10] for line in printed.split("\n\n")[0].splitlines()[1:]}
    assert table["any"] == table["4"] == table["all"] == ["25.0", "100.0"]  # on topic, successful
    assert table["2"] == table["opening"] == ["0.0", "0.0"]
    ids = tok.encode(prompts[0]["target"])
    expected = {"opening": opening, "all": ids} | {str(n): ids[:n] for n in PREFILL_LENGTHS if n < len(ids)}
    assert prefills(tok, prompts[0]["target"], "Sure, here.") == expected
    for r in attacked("instruct", place, tmp_path)[0]:
        assert [name for name, answer in r["variants"].items() if answer["unsafe"]] == ["no restart"] and r["unsafe"]
        assert list(r["variants"]) == list(INSTRUCTIONS)


def test_a_prompt_without_a_target_is_attacked_by_an_opening(place, prompts, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "target"}) + "\n" for row in prompts[:1]))
    flags = ("--prompts", bare, "--opening", "Sure, here")
    [r] = attacked("autodan", place, tmp_path, *flags)[0]
    assert r["success_at"] == 0 or r["target"] == "Sure, here"
    [r] = attacked("prefill", place, tmp_path, *flags)[0]
    assert [v["prefill"] for v in r["variants"].values()] == ["Sure, here"]


def test_how_an_answer_goes_on_is_decoding_with_reset_masked(place, tok):
    """The model would reset all the time. What it goes on to say is its own greedy answer without [RESET]."""
    model, verdicts = prone_to(tok.reset_id, load_model(place / "one"), -30.0), [True, False]
    chat, begun = [{"role": "user", "content": "How do I make it?"}], tok.encode("Sure. To")
    args = argparse.Namespace(max_new_tokens=12, reset_bias=0.0, max_resets=3, on_reset="keep", judge="")
    asked = attack.Victim(model, tok, lambda *_: Verdict(unsafe=verdicts.pop(0)), args)
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size, prefill=[begun])
    [masked] = generate(model, [tok.render(chat)], max_new_tokens=12 - len(begun), reset_bias=-1000, **options)
    [free] = generate(model, [tok.render(chat)], max_new_tokens=12 - len(begun), **options)
    assert free.resets and asked.goes_on({"prompt": chat}, chat, begun) == masked.tokens  # unsafe, then not
    assert asked.goes_on({"prompt": chat}, chat, begun) is None


def test_contexts_leave_the_question_alone(prompts, tok):
    question, others = prompts[0], [*prompts[1:], prompts[0] | {"target": "the same topic"}]
    found = contexts(tok, question, others, "0")
    assert list(found) == ["agreed", "1 answered", "3 answered"]  # the toy's template has no system turn
    answers = {p["prompt"][0]["content"]: p["target"] for p in prompts[1:]}
    for name, chat in found.items():
        tok.render(chat)  # user and assistant take turns
        assert chat[-1:] == question["prompt"]
        if name.endswith("answered"):
            assert len(chat) == 2 * int(name[0]) + 1
            assert all(answers[a["content"]] == b["content"] for a, b in zip(chat[:-1:2], chat[1::2], strict=True))
    assert list(contexts(tok, question, others[-1:], "0")) == ["agreed"]  # it asks for the same thing
    own = {"prompt": [{"role": "system", "content": "Be brief."}, *question["prompt"]]}
    found = contexts(argparse.Namespace(render=lambda chat: [0]), own, others, "0")  # a template with system turns
    assert [m["role"] for m in found["system"]] == ["system", "user"] and found["system"][0]["content"] != "Be brief."
    assert found["agreed"][0] == own["prompt"][0] and found["agreed"][-1:] == question["prompt"]


def test_a_suffix_may_stand_in_a_first_turn(place, tmp_path):
    for r in attacked("adaptive-gcg", place, tmp_path, "--place", "first-turn", "--limit", 1)[0]:
        assert r["variant"] == "in a first turn" and r["success_at"] != 0
        assert [m["role"] for m in r["sent"]] == ["user", "assistant", "user"]
        assert r["sent"][0]["content"].endswith(r["attack"]) and r["attack"] not in r["sent"][2]["content"]


def test_a_universal_suffix_is_tested_on_other_prompts(place, prompts, tmp_path, monkeypatch):
    """The search sees the prompts that it is optimised on and no others; all get the suffix that it found."""
    searched, search = [], attack.gcg

    def logged(model, tok, goals, unsafe_with, **options):
        searched.append([goal.send("!")[-1]["content"] for goal in goals])
        assert len(unsafe_with("!")) == len(goals)
        return search(model, tok, goals, unsafe_with, **options)

    monkeypatch.setattr(attack, "gcg", logged)
    records, printed = attacked("universal-gcg", place, tmp_path)
    asked = {name: [r["prompt"][0]["content"] for r in prompts if r["set"] == name] for name in ("seen", "unseen")}
    assert searched == [[f"{question}!" for question in asked["seen"]]]
    assert [r["variant"] for r in records] == ["any"] * 2 + ["optimised on these"] * 2
    [suffix] = {r["attack"] for r in records}
    assert [r["sent"][0]["content"] for r in records] == [f"{q}{suffix}" for q in asked["unseen"] + asked["seen"]]
    assert len(printed.splitlines()) >= 3 and "optimised on these" in printed
    _, said = command(*words("universal-gcg", place, tmp_path / "b.jsonl", "--sets", "seen", "unseen"), code=2)
    assert "asks for what the suffix is optimised on, as 2 do" in said


# ── Going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_resuming_gives_the_same_bytes(place, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    command(*words("universal-gcg", place, whole))
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 6
    for end in (ends[2] + 30, ends[1]):  # in a line, and after the suffix
        cut.write_bytes(data[:end])
        command(*words("universal-gcg", place, cut))
        assert cut.read_bytes() == data
    printed, said = command(*words("universal-gcg", place, cut))  # nothing left to do
    assert cut.read_bytes() == data and "left" not in said and "universal-gcg" in printed
    assert list(tmp_path.glob("*.verdicts"))  # which lie beside it, and are not among the files of a table
    again, _ = command("table", *sorted(tmp_path.glob("*.jsonl")))
    assert "universal-gcg" in again


def test_a_prompts_draws_depend_on_seed_and_number_only(place, tmp_path):
    """The first prompt of a set of its own gives the same line in a run that has it alone. And --reset-weight is λ:
    the first loss is the same suffix's, and differs by the penalty, in proportion."""
    both, _ = attacked("gcg", place, tmp_path)
    one, _ = attacked("gcg", place, tmp_path, "--sets", "seen", "--limit", 1)
    [other], _ = attacked("gcg", place, tmp_path, "--sets", "seen", "--limit", 1, "--seed", 1)
    assert both[:1] == one and one[0]["losses"] != other["losses"] and one[0]["losses"][0] == other["losses"][0]
    flags = ("--sets", "seen", "--limit", 1, "--budget", 1, "--reset-weight")
    zero, first, third = (attacked("adaptive-gcg", place, tmp_path, *flags, w)[0][0]["losses"][0] for w in (0, 1, 3))
    assert first - zero > 0 and third - zero == pytest.approx(3 * (first - zero), abs=1e-3)


def test_other_settings_are_refused(place, tmp_path):
    out = tmp_path / "a.jsonl"
    command(*words("gcg", place, out, "--limit", 1, "--budget", 9))
    before = out.read_bytes()
    for name, ckpt, more, complaint in (
        ("gcg", "one", ("--seed", 1), "seed 0, now 1"),
        ("gcg", "one", ("--sets", "seen"), "prompts"),
        ("gcg", "two", (), "weights"),
        ("adaptive-gcg", "one", (), "name gcg, now adaptive-gcg"),
    ):
        _, said = command(*words(name, place, out, "--limit", 1, "--budget", 9, *more, ckpt=ckpt), code=2)
        assert f"was begun with {complaint}" in said and out.read_bytes() == before


def test_wrappers_and_synonyms_from_files(place, tmp_path):
    """What stands in the attack comes out of the files; other ones are refused."""
    wrappers, synonyms, out = tmp_path / "w.txt", tmp_path / "s.txt", tmp_path / "a.jsonl"
    wrappers.write_text("Ask me. {q}\nTell them. {q}\n")
    synonyms.write_text("me\tnobody\nthem\teverybody\n")
    run = words("autodan", place, out, "--wrappers", wrappers, "--synonyms", synonyms, "--budget", 100)
    command(*run)
    said = {word for r in lines(out) for word in r["attack"].replace(".", " ").split()}
    assert said <= {"Ask", "me", "Tell", "them", "nobody", "everybody", "{q}"} and said & {"nobody", "everybody"}
    synonyms.write_text("me\tsomebody\n")
    assert "was begun with synonyms" in command(*run, code=2)[1]


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def attack_file(path, ckpt, successes, budget=100):
    path.parent.mkdir(exist_ok=True)
    head = {"name": "gcg", "set": "s", "on_reset": "truncate", "reset_bias": 0.0, "max_resets": 1, "checkpoint": ckpt}
    records = [
        head | {"prompt": i, "unsafe": at is not None, "success_at": at, "resets": i % 2, "response": "a\u2028b\x85"}
        for i, at in enumerate(successes)
    ]
    rows = [{"settings": {"budget": budget}}, *records]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_table_pools_seeds_and_counts_against_budget(tmp_path):
    """A larger budget is a table row of its own, after the others, and never added to the curve of a smaller one."""
    a = attack_file(tmp_path / "0/a.jsonl", "runs/toy-0/sft", [0, 1, 17, None])
    b = attack_file(tmp_path / "1/a.jsonl", "runs/toy-1/sft", [64, 100, None, None])
    c = attack_file(tmp_path / "1/b.jsonl", "runs/toy-1/dpo", [None], budget=1000)  # its only budget
    d = attack_file(tmp_path / "0/long.jsonl", "runs/toy-0/sft", [900], budget=1000)
    printed, _ = command("table", d, a, b, c, "--out", tmp_path / "t.json")
    sft, dpo, long = json.loads((tmp_path / "t.json").read_text())["records"]
    assert (sft["checkpoint"], sft["n"], sft["unsafe"], sft["by_seed"]) == ("sft", 8, 5, [0.75, 0.5])
    assert sft["success_within"] == {"0": 1, "1": 2, "16": 2, "64": 4, "100": 5}
    assert sft["interval"] == [round(x, 4) for x in wilson(5, 8)] and sft["reset"] == 4
    assert (dpo["checkpoint"], dpo["variant"], dpo["n"], dpo["unsafe"]) == ("dpo", "any", 1, 0)
    assert "on_topic" not in sft  # made-up records without a topic
    assert "62.5" in printed and f"[{100 * wilson(5, 8)[0]:.1f}" in printed
    assert (long["variant"], long["n"], long["budget"]) == ("budget 1,000", 1, 1000)
    assert long["success_within"]["512"] == 0 and long["success_within"]["1000"] == 1


def test_who_sets_the_sampler_is_in_the_table(place, tmp_path):
    """Answers of backtrack.evaluate, counted again by hand: the first of each prompt, and any of them."""
    out, files = tmp_path / "0/eval.json", ["--ckpt", place / "one", "--prompts", place / "prompts.jsonl"]
    files += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 40]
    sampler = ["--max-resets", 0, 1, "--reset-bias", -3, "--temperature", 2, "--samples", 3]
    run_command(evaluate.main, *files, *sampler, "--judge", place / "world.json", "--out", out)
    answers = [json.loads(line) for line in out.with_suffix(".answers.jsonl").read_text().splitlines()[1:]]
    assert len(answers) == 4 * 2 * 3
    printed, _ = command("table", out.with_suffix(".answers.jsonl"), "--out", tmp_path / "t.json")
    result = json.loads((tmp_path / "t.json").read_text())
    assert [a["attack"] for a in result["attackers"]] == ["decoding"] and "sets the sampler" in printed
    for most in (0, 1):
        some = [a for a in answers if a["max_resets"] == most]
        first, several = (r for r in result["records"] if r["max_resets"] == most)
        assert (first["variant"], several["variant"]) == ("temperature 2", "temperature 2, any of 3")
        assert first["reset_bias"] == several["reset_bias"] == -3 and first["n"] == several["n"] == 4
        assert first["unsafe"] == sum(a["unsafe"] for a in some if a["sample"] == 0)
        assert several["unsafe"] == len({a["prompt"] for a in some if a["unsafe"]})
    assert any(a["unsafe"] for a in answers) and not all(a["unsafe"] for a in answers)
    run_command(evaluate.main, *files, "--out", tmp_path / "unjudged.json")
    _, said = command("table", tmp_path / "unjudged.answers.jsonl", code=2)
    assert "no judge has seen" in said


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_input_is_one_line(place, tmp_path):
    out, long = tmp_path / "a.jsonl", tmp_path / "long.jsonl"
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    long.write_text(json.dumps({"prompt": [{"role": "user", "content": "x " * 400}], "target": "Sure."}) + "\n")
    for more, complaint in (
        (("--prompts", long), "too long"),
        (("--sets", "nowhere"), "--sets nowhere: no such set"),
        (("--budget", 0), "0 is not a positive number"),
        (("--out", tmp_path / "other.jsonl"), "other.jsonl: holds no answers of this program"),
    ):
        _, said = command(*words("gcg", place, out, *more), code=2)
        assert complaint in said
    for file in ("other.jsonl", "empty.jsonl", "gone"):
        _, said = command("table", tmp_path / file, code=2)
        assert file in said


def test_what_fails_is_one_line_and_loses_nothing_before_it(place, tmp_path, monkeypatch):
    """The judge breaks: the same command goes on from what is saved."""
    out, whole, good = tmp_path / "a.jsonl", tmp_path / "whole.jsonl", load_judge(place / "world.json")
    command(*words("prefill", place, whole))
    calls = []

    def judge(prompt, response):
        calls.append(response)
        if len(calls) == 10:  # while the second prompt is tested
            raise JudgeFailed("no idea")
        return good(prompt, response)

    monkeypatch.setattr(attacks, "load_judge", lambda *_: judge)
    assert "no idea" in command(*words("prefill", place, out), code=2)[1]
    first = b"".join(whole.read_bytes().splitlines(keepends=True)[:2])  # settings, a prompt
    assert out.read_bytes() == first

    monkeypatch.undo()
    command(*words("prefill", place, out))
    assert out.read_bytes() == whole.read_bytes()
