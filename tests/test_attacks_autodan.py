"""AutoDAN: individuals stay wrappers made of known words, the fittest survives, fitness is what full forwards say."""

import itertools
import random
import re

import pytest
import torch
from models import FAMILIES, LLAMA, network_of
from test_attacks_gcg import never

from backtrack.attacks import autodan as module
from backtrack.attacks.autodan import (
    QUESTION,
    SYNONYMS,
    WRAPPERS,
    autodan,
    cross,
    fitness,
    mutate,
    read_rewrites,
    read_synonyms,
    read_wrappers,
    sentences,
    wrap,
)
from backtrack.attacks.rewrite import asked, rewrite, usable
from backtrack.generate import generate
from data import toy
from model import InputError, load_tokenizer

ASK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "What is {q}? Tell me."},
]


class Characters:
    """Bytes as ids, modulo what the model has; only for reading, nothing is decoded."""

    def encode(self, text):
        return [5 + ord(c) % 50 for c in text]

    def render(self, messages, add_generation_prompt=True):
        return [0, *itertools.chain(*([*self.encode(m["content"].strip()), 1] for m in messages))]


TARGET = Characters().encode("abc d")


def toy_tokenizer(path):
    (path / "tokenizer.model").write_bytes(toy.build(0)["tokenizer/tokenizer.model"])
    return load_tokenizer(path)


def words(individuals):
    return set(re.findall(r"[^\W_]+", " ".join(s for i in individuals for s in i if s != QUESTION).lower()))


def test_sentences_and_back():
    assert sentences("You are old. {q} Be quick.") == ["You are old.", "{q}", "Be quick."]
    assert sentences("{q}") == ["{q}"] and sentences('Say "{q}" now! Go') == ['Say "', "{q}", '" now!', "Go"]
    for wrapper in WRAPPERS:
        assert " ".join(sentences(wrapper)) == wrapper and sentences(wrapper).count(QUESTION) == 1
    sent = wrap(["A.", "{q}", "B."], ASK)
    assert sent[:2] == ASK[:2]
    assert sent[2] == {"role": "user", "content": "A. What is {q}? Tell me. B."}  # the question's own {q} is left alone
    assert ASK[2]["content"] == "What is {q}? Tell me."


def test_crossover_and_mutation_keep_the_question_once_and_use_known_words():
    first = [sentences(w) for w in WRAPPERS]
    pool = sorted({s for i in first for s in i} - {QUESTION})
    known = words(first) | {w for ws in SYNONYMS.values() for s in ws for w in s.split()}
    rng, people = random.Random(0), list(first)
    for _ in range(1500):
        mother, father = rng.sample(people, 2)
        before = list(mother), list(father)
        child = cross(mother, father, rng)
        assert set(child) <= {*mother, *father}
        for part in (0, 1):  # what stands before the question comes from before it, and the same behind
            own = [" | ".join(i).split(QUESTION)[part] for i in (mother, father)]
            place = child[: child.index(QUESTION)] if part == 0 else child[child.index(QUESTION) + 1 :]
            assert all(any(sentence in side for side in own) for sentence in place)
        mutant = mutate(child, SYNONYMS, pool, rng)
        assert (mother, father) == before  # parents are not changed
        for individual in (child, mutant):
            assert individual.count(QUESTION) == 1
            assert sum(QUESTION in sentence for sentence in individual) == 1
            assert words([individual]) <= known
        assert len(mutant) <= 7 or len(mutant) <= len(child)
        people[rng.randrange(len(people))] = mutant
    assert words(people) - words(first)  # synonyms did come in


def test_a_sentence_is_replaced_by_one_that_says_the_same():
    rewrites = {"A b.": ["B a.", "Ab?"], "B a.": ["A b."]}
    rng, seen = random.Random(0), set()
    for _ in range(300):
        child = mutate(["A b.", "{q}", "C."], {}, ["N."], rng, rewrites)
        assert child.count(QUESTION) == 1
        seen.add(" ".join(s for s in child if s not in ("N.", "C.", QUESTION)))
    assert seen == {"A b.", "B a.", "Ab?"}
    for _ in range(50):
        child = mutate(["C.", "{q}"], {}, ["N."], rng, rewrites)  # nothing to say in other words
        assert set(child) <= {"C.", "{q}", "N."}


def test_children_that_do_not_fit_are_left_out(monkeypatch):
    """Rewritings may be long. No prompt that is scored has more tokens than there is room for."""
    scored, tok = [], Characters()
    monkeypatch.setattr(module, "fitness", toy_fitness(scored))
    long = {
        sentence: [sentence + " word" * 40]
        for wrapper in WRAPPERS
        for sentence in sentences(wrapper)
        if sentence != QUESTION
    }
    longest = max(len(tok.render(wrap(sentences(w), ASK))) for w in WRAPPERS) + 50
    start = {"population": len(WRAPPERS), "rewrites": long}
    autodan(None, tok, ASK, TARGET, never, budget=300, longest=longest, **start, **OPTIONS)
    assert max(len(tok.render(wrap(individual, ASK))) for _, individual in scored) <= longest
    scored.clear()
    autodan(None, tok, ASK, TARGET, never, budget=300, **start, **OPTIONS)
    assert max(len(tok.render(wrap(individual, ASK))) for _, individual in scored) > longest


def test_rewritings_are_a_models_answers_one_line_each(tmp_path):
    """By the definition: each sentence by itself, its samples one at a time; what is cut or no text is left out."""
    tok = toy_tokenizer(tmp_path)
    model = network_of(LLAMA, scale=0.3, vocab_size=tok.vocab_size)
    options = dict(reset_id=tok.reset_id, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size, temperature=1.0)
    with torch.no_grad():
        model.lm_head.weight[list(tok.stop_ids)] *= 4  # answers end
    texts = ["You are old.", "Tell me a story."]
    found = rewrite(model, tok, texts, 6, 1.0, 5)
    kept = 0
    for text in texts:
        expected, room = [], 2 * len(tok.encode(text)) + 8
        for i in range(6):
            [g] = generate(
                model, [tok.render(asked(text))], max_new_tokens=room, seed=5, sample_ids=[i], max_resets=0, **options
            )
            said = tok.decode(g.tokens).strip()
            if g.finish_reason == "stop" and said.isprintable() and said and said not in expected:
                expected.append(said)
        assert found[text] == expected
        kept += len(expected)
    assert 0 < kept < 12
    assert rewrite(model, tok, texts[1:], 6, 1.0, 5) == {texts[1]: found[texts[1]]}


def test_what_is_no_rewriting():
    assert usable(["", " A b. ", '"A b."', "A.", "A.\nB.", "{q} A.", "B."], "A.") == ["A b.", "B."]


def test_a_synonym_replaces_whole_words_only_and_keeps_the_capital():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        child = mutate(["Old gold is old.", "{q}"], {"old": ("wise", "good")}, ["N."], rng)
        seen.add(" ".join(s for s in child if s not in ("N.", QUESTION)))
    assert seen == {
        "Old gold is old.",
        "Wise gold is old.",
        "Good gold is old.",
        "Old gold is wise.",
        "Old gold is good.",
    }
    child = ["Sold.", "{q}"]
    for _ in range(50):
        assert "Sold." in mutate(child, {"old": ("new",), "q": ("z",)}, ["N."], rng)  # nor is {q} ever a word


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_fitness_is_the_targets_mean_log_likelihood(family, rows):
    """Padded in a batch, against one full forward per individual."""
    model, tok = network_of(FAMILIES[family], scale=0.4, vocab_size=61, max_position_embeddings=512), Characters()
    individuals = [sentences(w) for w in WRAPPERS[:7]]
    values = fitness(model, tok, ASK, TARGET, individuals, rows)
    y = TARGET
    for individual, value in zip(individuals, values, strict=True):
        x = tok.render(wrap(individual, ASK))
        with torch.no_grad():
            log_p = model(torch.tensor([x + y]))[0].log_softmax(-1)
        expected = sum(log_p[len(x) - 1 + t, id].item() for t, id in enumerate(y)) / len(y)
        assert value == pytest.approx(expected, abs=2e-4)


OPTIONS = dict(seed="3", wrappers=list(WRAPPERS), synonyms=SYNONYMS)


def toy_fitness(scored):
    """Many different words are fit. Every individual that is scored is noted."""

    def function(model, tok, messages, target, individuals, rows):
        values = [len(words([i])) / 5 + len(" ".join(i)) / 1000 for i in individuals]
        scored.extend(zip(values, individuals, strict=True))
        return values

    return function


def test_the_fittest_is_never_lost(monkeypatch):
    scored = []
    monkeypatch.setattr(module, "fitness", toy_fitness(scored))
    found = autodan(None, None, ASK, TARGET, never, budget=400, **OPTIONS)
    assert len(scored) == found.evaluations == 400
    assert all(b <= a for a, b in itertools.pairwise(found.losses)) and found.losses[-1] < found.losses[0]
    best = max(scored, key=lambda pair: pair[0])
    assert found.losses[-1] == pytest.approx(-best[0], abs=1e-4) and found.text == " ".join(best[1])
    assert all(individual.count(QUESTION) == 1 for _, individual in scored)
    again = autodan(None, None, ASK, TARGET, never, budget=400, **OPTIONS)
    assert again == found
    assert autodan(None, None, ASK, TARGET, never, budget=400, **OPTIONS | {"seed": "4"}) != found
    for budget in (1, 5, 31, 33):
        scored.clear()
        assert autodan(None, None, ASK, TARGET, never, budget=budget, **OPTIONS).evaluations == len(scored) == budget


def test_success_ends_the_search_and_is_dated(monkeypatch):
    scored, asked = [], []
    monkeypatch.setattr(module, "fitness", toy_fitness(scored))

    def second(individual):
        asked.append(individual)
        return len(asked) == 2

    found = autodan(None, None, ASK, TARGET, second, budget=1000, **OPTIONS)
    assert found.success_at == found.evaluations == len(scored) < 1000
    assert found.text == " ".join(asked[-1]) and asked[0] != asked[1]
    assert autodan(None, None, ASK, TARGET, never, budget=40, **OPTIONS).success_at is None


@pytest.mark.parametrize(
    ("reader", "content", "complaint"),
    [
        (read_wrappers, b"", "f.txt: holds no wrappers"),
        (read_wrappers, b"{q}\n", "f.txt: holds no wrappers"),
        (read_wrappers, b"A. {q}\n\nB.\n", "f.txt:3: needs {q} exactly once"),
        (read_wrappers, b"{q} {q}\n", "f.txt:1: needs {q} exactly once"),
        (read_wrappers, b"\xff{q}\n", "f.txt: is not UTF-8"),
        (read_rewrites, b"", "f.txt: holds no rewritings"),
        (read_rewrites, b"A.\nB.\n", "f.txt: holds no rewritings"),
        (read_rewrites, b"A.\tB.\nC. {q}\tD.\n", "f.txt:2: has {q}"),
        (read_synonyms, b"old\twise\nnew\n", "f.txt:2: needs a word and its synonyms"),
        (read_synonyms, b"\told\n", "f.txt:1: needs a word and its synonyms"),
        (read_synonyms, b"old\t\n", "f.txt:1: needs a word and its synonyms"),
    ],
)
def test_bad_files_are_named(tmp_path, reader, content, complaint):
    (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(complaint)):
        reader(str(tmp_path / "f.txt"))


def test_good_files(tmp_path):
    (tmp_path / "w.txt").write_text("A story. {q}\n\n  {q} Go.  \n")
    assert read_wrappers(str(tmp_path / "w.txt")) == ["A story. {q}", "{q} Go."]
    (tmp_path / "s.txt").write_text("Old\twise\tvery good\n\nnew\tfresh\n")
    assert read_synonyms(str(tmp_path / "s.txt")) == {"old": ("wise", "very good"), "new": ("fresh",)}
    (tmp_path / "r.txt").write_text("A b.\tB a.\tA, b.\n\nAlone.\n")
    rewrites = read_rewrites(str(tmp_path / "r.txt"))
    assert rewrites == {"A b.": ["B a.", "A, b."], "B a.": ["A b.", "A, b."], "A, b.": ["A b.", "B a."], "Alone.": []}
