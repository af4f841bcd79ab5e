"""AutoDAN: individuals stay wrappers made of known words, the fittest survives, fitness is what full forwards say."""

import itertools
import random
import re

import pytest
import torch
from models import FAMILIES, network_of

from backtrack.attacks import autodan
from backtrack.attacks.autodan import QUESTION, SYNONYMS, WRAPPERS, cross, fitness, mutate, sentences, wrap
from model import InputError

TURNS = (("user", "Hi"), ("assistant", "Yes?"), ("user", "What is {q}? Tell me."))
ASK = [{"role": role, "content": content} for role, content in TURNS]


class Characters:
    """Characters as ids, modulo what the model has; only for reading, nothing is decoded."""

    def encode(self, text):
        return [5 + ord(c) % 50 for c in text]

    def render(self, messages, add_generation_prompt=True):
        return [0, *itertools.chain(*([*self.encode(m["content"].strip()), 1] for m in messages))]


TARGET = Characters().encode("abc d")


def words(individuals):
    return set(re.findall(r"[^\W_]+", " ".join(s for i in individuals for s in i if s != QUESTION).lower()))


# ── Individuals ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
    known = words(first) | {w for ws in SYNONYMS.values() for s in ws for w in s.split()}
    rng, people, pool = random.Random(0), list(first), [s for i in first for s in i if s != QUESTION]
    for _ in range(500):
        mother, father = rng.sample(people, 2)
        before = list(mother), list(father)
        child = cross(mother, father, rng)
        assert set(child) <= {*mother, *father}
        for part in (0, 1):  # what stands before the question comes from before it, and the same behind
            own = [" | ".join(i).split(QUESTION)[part] for i in (mother, father)]
            side = child[: child.index(QUESTION)] if part == 0 else child[child.index(QUESTION) + 1 :]
            assert all(any(sentence in half for half in own) for sentence in side)
        mutant = mutate(child, SYNONYMS, pool, rng)
        assert (mother, father) == before  # parents are not changed
        for individual in (child, mutant):
            assert sum(QUESTION in sentence for sentence in individual) == individual.count(QUESTION) == 1
            assert words([individual]) <= known
        assert len(mutant) <= 7 or len(mutant) <= len(child)
        people[rng.randrange(len(people))] = mutant
    assert words(people) - words(first)  # synonyms did come in


def test_a_word_becomes_a_synonym():
    """Apart from swaps and the new sentence N: whole words alone, in their own case, never the question."""

    def mutants(individual, synonyms):
        rng = random.Random(0)
        children = [mutate(individual, synonyms, ["N."], rng) for _ in range(300)]
        return {" ".join(sorted(s for s in child if s not in ("N.", QUESTION))) for child in children}

    assert mutants(["Old gold is old.", "{q}"], {"old": ("wise", "good"), "q": ("z",)}) == {
        f"{a} gold is {b}."
        for a, b in (("Old", "old"), ("Wise", "old"), ("Good", "old"), ("Old", "wise"), ("Old", "good"))
    }


# ── The search ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fitness_is_the_targets_mean_log_likelihood(family):
    """Padded in a batch, against one full forward per individual."""
    model, tok = network_of(FAMILIES[family], scale=0.4, vocab_size=61, max_position_embeddings=512), Characters()
    individuals = [sentences(w) for w in WRAPPERS[:7]]
    expected = []
    for individual in individuals:
        x = tok.render(wrap(individual, ASK))
        with torch.no_grad():
            log_p = model(torch.tensor([x + TARGET]))[0].log_softmax(-1)
        expected.append(sum(log_p[len(x) - 1 + t, id].item() for t, id in enumerate(TARGET)) / len(TARGET))
    for rows in (3, 32):
        assert fitness(model, tok, ASK, TARGET, individuals, rows) == pytest.approx(expected, abs=2e-4)


@pytest.fixture
def scored(monkeypatch):
    """(fitness, individual) of every one that is scored from now on: many different words are fit."""
    scored = []

    def function(model, tok, messages, target, individuals, rows):
        values = [len(words([i])) / 5 + len(" ".join(i)) / 1000 for i in individuals]
        scored.extend(zip(values, individuals, strict=True))
        return values

    monkeypatch.setattr(autodan, "fitness", function)
    return scored


def search(unsafe_with=lambda individual: False, **changed):
    options = dict(seed="3", wrappers=list(WRAPPERS), synonyms=SYNONYMS, fits=lambda individual: True)
    return autodan.autodan(None, None, ASK, TARGET, unsafe_with, **options | changed)


def test_the_fittest_is_never_lost(scored):
    found = search(budget=400)
    assert len(scored) == found.evaluations == 400 and found.success_at is None
    assert all(b <= a for a, b in itertools.pairwise(found.losses)) and found.losses[-1] < found.losses[0]
    best = max(scored, key=lambda pair: pair[0])
    assert found.losses[-1] == pytest.approx(-best[0], abs=1e-4) and found.text == " ".join(best[1])
    assert search(budget=400) == found != search(budget=400, seed="4")
    for budget in (1, 31, 33):
        scored.clear()
        assert search(budget=budget).evaluations == len(scored) == budget


def test_success_ends_the_search_and_is_dated(scored):
    asked_about = []

    def second(individual):
        asked_about.append(individual)
        return len(asked_about) == 2

    found = search(second, budget=1000)
    assert found.success_at == found.evaluations == len(scored) < 1000
    assert found.text == " ".join(asked_about[-1]) and asked_about[0] != asked_about[1]


def test_children_that_do_not_fit_are_left_out(scored, monkeypatch):
    monkeypatch.setattr(autodan, "POPULATION", len(WRAPPERS))
    lengths = lambda: [len(" ".join(individual)) for _, individual in scored]  # noqa: E731
    search(budget=300, fits=lambda individual: len(" ".join(individual)) <= 75)
    assert max(lengths()) <= 75
    search(budget=300)
    assert max(lengths()) > 75


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files(tmp_path):
    """With a byte-order mark or without: it is no part of the first word. What is wrong is named by file and line."""
    file = tmp_path / "f.txt"
    synonyms = {"old": ("wise", "very good"), "new": ("fresh",)}
    for reader, text, expected in (
        (autodan.read_wrappers, "A story. {q}\n\n  {q} Go.  \n", ["A story. {q}", "{q} Go."]),
        (autodan.read_synonyms, "Old\twise\tvery good\n\nnew\tfresh\n", synonyms),
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            file.write_text(text, encoding=encoding)
            assert reader(str(file)) == expected
    assert (autodan.read_wrappers(None), autodan.read_synonyms(None)) == (list(WRAPPERS), SYNONYMS)
    for reader, content, complaint in (
        (autodan.read_wrappers, b"{q}\n", "f.txt: holds no wrappers"),
        (autodan.read_wrappers, b"A. {q}\n\n{q} {q}\n", "f.txt:3: needs {q} exactly once"),
        (autodan.read_wrappers, b"\xff{q}\n", "f.txt: is not UTF-8"),
        (autodan.read_synonyms, b"old\twise\nnew\n", "f.txt:2: needs a word and its synonyms"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(complaint)):
            reader(str(file))
