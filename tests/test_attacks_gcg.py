"""GCG against finite differences, full forward passes and enumeration, on tiny random models."""

import itertools
import math
import random
from functools import partial

import pytest
import torch
from models import FAMILIES, LLAMA, network_of, random_ids

from backtrack.attacks.gcg import Goal, Neighbours, Objective, gcg
from backtrack.attacks.suffix import Scorer, Slots, make_slots, suffix_gradient, survives, with_suffix
from model import InputError

V = 61
ALPHABET = " abcdefghijklmnopqrstuvwxyz"


class Letters:
    """0 BOS, 1 end of turn, 2 [RESET], 3 … letters, and 30 the pair "ab", which encoding prefers."""

    bos_id, stop_ids, reset_id, vocab_size, special_ids = 0, (1,), 2, 31, frozenset({0, 1, 2})

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            pair = text[i : i + 2] == "ab"
            ids.append(30 if pair else ALPHABET.index(text[i]) + 3)
            i += 2 if pair else 1
        return ids

    def decode(self, ids):
        return "".join("ab" if i == 30 else ALPHABET[i - 3] for i in ids if i > 2)

    def render(self, messages, add_generation_prompt=True):
        return [0, *self.encode(messages[-1]["content"].strip()), 1]


TOK = Letters()
ASK = partial(with_suffix, [{"role": "user", "content": "hello"}])
ABCD = TOK.encode("abcd")


def letters_model(seed=0):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return network_of(LLAMA, seed, scale=0.4, vocab_size=31, tie_word_embeddings=False, **sizes)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return network_of(FAMILIES[request.param], scale=0.4, vocab_size=V, num_hidden_layers=3)


def never(text):
    return [False]


def slots_of(n_suffix=4, m=6):
    before, suffix, after, target = random_ids(9, n_suffix, 3, m, vocab=V)
    return Slots(before, suffix, after, target)


def by_hand(model, slots, suffix, m, reset_id=None, weight=0.0):
    """L(s) of one suffix: one full forward per position, no cache, no batch, plain Python on probabilities."""
    context, target = slots.before + suffix + slots.after, slots.target[:m]
    log_p, no_reset = [], []
    for t in range(m + 1):
        with torch.no_grad():
            p = model(torch.tensor([context + target[:t]]))[0, -1].double().softmax(-1).tolist()
        if t < m:
            log_p.append(math.log(p[target[t]]))
        if reset_id is not None:
            no_reset.append(math.log(1 - p[reset_id]))
    return -sum(log_p) / m - (weight * sum(no_reset) / (m + 1) if reset_id is not None else 0.0)


@pytest.fixture
def scorings(monkeypatch):
    """Every call of Scorer.losses from now on: (suffixes, m, objective)."""
    calls, losses = [], Scorer.losses

    def logged(self, suffixes, m, objective):
        calls.append((suffixes, m, objective))
        return losses(self, suffixes, m, objective)

    monkeypatch.setattr(Scorer, "losses", logged)
    return calls


def test_losses_are_those_of_full_forwards(model, monkeypatch):
    """And what precedes the suffix is read once."""
    slots, fed, forward, rows = slots_of(), [], model.model.forward, 3
    suffixes = random_ids(4, 4, 4, 4, vocab=V, seed=1)
    scorer = Scorer(model, slots, rows)
    for m, reset_id, weight in ((2, None, 0.0), (6, 2, 1.0), (1, 2, 7.0)):  # longer, then shorter
        with monkeypatch.context() as patch:
            logged = lambda tokens, *c: fed.append(tuple(tokens.shape)) or forward(tokens, *c)  # noqa: E731
            patch.setattr(model.model, "forward", logged)
            got = scorer.losses(suffixes, m, Objective(reset_id, weight))
        assert got.shape == (4,) and got.dtype == torch.float32
        expected = [by_hand(model, slots, suffix, m, reset_id, weight) for suffix in suffixes]
        assert got.tolist() == pytest.approx(expected, abs=2e-4)
    assert fed[0] == (1, len(slots.before)) and len(fed) == 1 + 3 * math.ceil(4 / rows)


def test_a_certain_reset_costs_without_end_and_no_nan():
    logits = torch.zeros(1, 2, 5)
    logits[:, :, 2] = 200.0
    value = Objective(2, 1.0)(logits, torch.tensor([3])).item()
    assert math.isfinite(value) and value > 300  # 1 − p is 0 in floating point, log(1 − p) is about −198


def test_gradient_is_the_finite_difference(model):
    """A token is added to the table that is the suffix's token plus a little of another: no hook, no one-hot."""
    slots, objective, eps = slots_of(), Objective(2, 3.0), 1e-2
    m, before = len(slots.target), [p.clone() for p in model.parameters()]
    gradient = suffix_gradient(model, slots, slots.suffix, m, objective)
    assert gradient.shape == (4, V)
    assert not model.model.embed_tokens._forward_hooks  # the hook is gone, and nothing is left in the parameters
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    table = model.model.embed_tokens.weight
    tokens = torch.tensor([slots.before + slots.suffix + slots.after + slots.target])
    expected, got = [], []
    for other in range(0, V, 5):
        position, values = other % 4, []
        for sign in (1, -1):
            mixed = table[slots.suffix[position]] + sign * eps * table[other]
            extended = torch.nn.Parameter(torch.cat((table, mixed[None])))
            changed = tokens.clone()
            changed[0, len(slots.before) + position] = V
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setitem(model.model.embed_tokens._parameters, "weight", extended)
                hidden = model.model(changed)[:, -m - 1 :]
            with torch.no_grad():
                values.append(objective(model.logits(hidden), torch.tensor(slots.target)).item())
        expected.append((values[0] - values[1]) / (2 * eps))
        got.append(gradient[position, other].item())
    expected, got = torch.tensor(expected), torch.tensor(got)
    assert expected.norm() > 0.01
    assert (expected - got).norm() < 0.03 * expected.norm()


def test_says_is_greedy_decoding(model):
    slots = slots_of()
    context, said = slots.before + slots.suffix + slots.after, []
    with torch.no_grad():
        for _ in range(5):
            said.append(int(model(torch.tensor([context + said]))[0, -1].argmax()))
    slots.target = said[:4] + [(said[4] + 1) % V]
    scorer = Scorer(model, slots, 2)
    assert [scorer.says(slots.suffix, m) for m in range(1, 6)] == [True] * 4 + [False]


def test_swaps_are_single_and_among_the_topk_allowed():
    gradient = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    allowed, suffix = [*range(10, 40)], [10, 11, 12, 13, 14]
    gradient[:, 3] = -100.0  # the best token by far is one that is not allowed
    neighbours = Neighbours([], torch.tensor(allowed), 4, random.Random(0))
    found = neighbours.draw(gradient, suffix, 400)
    used = [{c[i] for c in found} - {suffix[i]} for i in range(5)]
    assert all(sum(a != b for a, b in zip(c, suffix, strict=True)) <= 1 for c in found)
    for position, ids in enumerate(used):
        best = sorted(allowed, key=lambda id: gradient[position, id].item())[:4]  # steepest descent
        assert ids == set(best) - {suffix[position]}
    assert neighbours.swaps == 2  # there are 20 of them: look further away
    two = neighbours.draw(gradient, suffix, 100)
    assert max(sum(a != b for a, b in zip(c, suffix, strict=True)) for c in two) == 2


def test_a_suffix_that_merges_is_refused():
    send = partial(with_suffix, [{"role": "user", "content": "hella"}])
    with pytest.raises(InputError, match="suffix 'bc' merges with the end of the message; begin it with a space"):
        make_slots(TOK, send, TOK.encode("abc"), "bc")
    slots = make_slots(TOK, send, TOK.encode("abc"), "cc")
    assert survives(TOK, send, slots, TOK.encode("cd"))
    assert not survives(TOK, send, slots, [5, 6])  # "bc" after "hella": the pair "ab" crosses the border
    assert not survives(TOK, send, slots, [4, 5])  # "a", "b" as two tokens come back as one
    assert not survives(TOK, send, slots, [6, 3])  # a space at the end is stripped
    assert not survives(TOK, send, slots, [6, 2])  # [RESET] is no text


def test_all_that_is_scored_can_be_sent(scorings):
    """Every candidate is what its text, sent honestly, is encoded as; none has a special id; the budget holds."""
    send = partial(with_suffix, [{"role": "user", "content": "hella"}])
    options = dict(budget=157, suffix="ccc", seed="0", candidates=16, topk=30)
    found = gcg(letters_model(), TOK, [Goal(send, TOK.encode("abcdefghijk"))], never, **options)
    scored = [tuple(suffix) for suffixes, _, _ in scorings for suffix in suffixes]
    assert found.evaluations == 157 and 150 <= len(scored) <= 157  # a step that finds nothing new costs one
    for suffix in scored:
        assert TOK.render(send(TOK.decode(suffix))) == [0, *TOK.encode("hella"), *suffix, 1]
        assert not set(suffix) & TOK.special_ids
    assert len(set(scored)) == len(scored)  # nothing is scored twice with one target


def test_it_finds_the_best_of_all_two_token_suffixes():
    """The kept loss never rises; the same seed gives the same."""
    model = letters_model()
    slots = make_slots(TOK, ASK, ABCD, "cc")
    pairs = [p for p in itertools.product(range(3, 31), repeat=2) if survives(TOK, ASK, slots, list(p))]
    with torch.no_grad():
        logits = model(torch.tensor([[*slots.before, *p, *slots.after, *slots.target] for p in pairs]))[:, -4:-1]
    losses = -logits.log_softmax(-1)[:, range(3), slots.target].mean(-1)
    values = dict(zip(pairs, losses.tolist(), strict=True))
    assert len(values) > 600
    options = dict(budget=600, suffix="cc", seed="0", topk=28)
    found = gcg(model, TOK, [Goal(ASK, ABCD)], never, **options)
    assert found.losses[-1] == pytest.approx(min(values.values()), abs=2e-4)
    assert found.text == TOK.decode(min(values, key=values.get))
    assert all(b <= a for a, b in itertools.pairwise(found.losses)) and found.losses[0] > found.losses[-1] + 0.05
    assert found == gcg(model, TOK, [Goal(ASK, ABCD)], never, **options)


def test_success_ends_the_search_and_is_dated():
    asked = []

    def third(text):
        asked.append(text)
        return [len(asked) == 3]

    options = dict(suffix="cccc", seed="1", candidates=8, topk=8)
    found = gcg(letters_model(), TOK, [Goal(ASK, ABCD)], third, budget=500, **options)
    assert found.success_at == found.evaluations < 500 and found.text == asked[-1]
    assert len(set(asked)) == 3 <= len(found.losses)  # each new best once
    one = gcg(letters_model(), TOK, [Goal(ASK, ABCD)], never, budget=1, **options)
    assert one.evaluations == 1 and one.text == "cccc" and one.success_at is None
    with pytest.raises(InputError, match="target is empty"):
        gcg(letters_model(), TOK, [Goal(ASK, [])], never, budget=1, **options)


def test_adaptive_lengthens_what_it_aims_at_once_the_model_says_it(monkeypatch, scorings):
    target = TOK.encode("cdefghijklmnopqrst" * 2)
    monkeypatch.setattr(Scorer, "says", lambda self, suffix, m: len(scorings) % 3 == 0)
    options = dict(suffix="cccc", seed="1", candidates=8, topk=8, adaptive=2.0)
    found = gcg(letters_model(), TOK, [Goal(ASK, target)], never, budget=80, **options)
    assert {(o.reset_id, o.weight) for _, _, o in scorings} == {(TOK.reset_id, 2.0)}
    steps = [m for _, m, _ in scorings]
    assert list(dict.fromkeys(steps)) == [16, 32, 36] and steps == sorted(steps)
    assert sum(len(suffixes) for suffixes, _, _ in scorings) <= found.evaluations == 80


def test_an_opening_grows_by_what_the_model_goes_on_to_say():
    """Asked with the opening, then with twice as much of the last answer; the loss is that of the target reported."""
    asked, opening = [], TOK.encode("cd")
    answers = [TOK.encode(text) for text in ("cdefghijklmn", "cdefzzzzmmmm", "cdefzzzzyyyyyyyy")]

    def grow(text, begun):
        asked.append((text, begun))
        return answers[min(len(asked), len(answers)) - 1]

    model = letters_model()
    options = dict(suffix="cccc", seed="1", candidates=8, topk=8, adaptive=2.0)
    found = gcg(model, TOK, [Goal(ASK, opening, grow)], never, budget=150, **options)
    assert [begun for _, begun in asked] == [opening, answers[0][:4], answers[1][:8]]
    assert found.targets == [answers[2]] and found.evaluations == 150
    slots = make_slots(TOK, ASK, answers[2], found.text)
    expected = by_hand(model, slots, slots.suffix, 16, reset_id=TOK.reset_id, weight=2.0)
    assert found.losses[-1] == pytest.approx(expected, abs=2e-4)
    asked.clear()
    stays = gcg(model, TOK, [Goal(ASK, opening, lambda *a: asked.append(a))], never, budget=150, **options)
    assert stays.targets == [opening]
    texts = [text for text, _ in asked]
    assert len(set(texts)) == len(texts) > 1 and texts[-1] == stays.text  # once for each suffix that was the best
    assert all(b <= a for a, b in itertools.pairwise(stays.losses))


def goals_of_three():
    chats = [[{"role": "user", "content": text}] for text in ("hello", "cde", "what is it")]
    answers = ("abcd", "ef", "h")
    return [Goal(partial(with_suffix, chat), TOK.encode(y)) for chat, y in zip(chats, answers, strict=True)]


def test_the_loss_of_one_suffix_for_many_prompts_is_the_mean_over_them(scorings):
    """Full forward passes, prompt by prompt; and a likelihood of each prompt is one of the budget."""
    model, goals = letters_model(), goals_of_three()
    options = dict(suffix="cccc", seed="0", candidates=16, topk=12, adaptive=2.0)
    found = gcg(model, TOK, goals, lambda text: [False] * 3, budget=400, **options)
    assert 350 < sum(len(suffixes) for suffixes, _, _ in scorings) <= found.evaluations <= 400
    for text, value in (("cccc", found.losses[0]), (found.text, found.losses[-1])):
        each = []
        for goal in goals:
            slots = make_slots(TOK, goal.send, goal.target, text)
            each.append(by_hand(model, slots, slots.suffix, len(goal.target), TOK.reset_id, 2.0))
        assert value == pytest.approx(sum(each) / 3, abs=2e-4)
    assert found.losses[-1] < found.losses[0] - 0.05


def test_the_suffix_that_fools_most_prompts_is_kept():
    """Of the suffixes that were the best for a while; the last of equals."""
    asked, successes = [], [0, 2, 1, 2, 1]

    def unsafe_with(text):
        asked.append(text)
        n = successes[len(asked) - 1] if len(asked) <= len(successes) else 0
        return [i < n for i in range(3)]

    options = dict(suffix="cccc", seed="0", candidates=16, topk=12, budget=400)
    found = gcg(letters_model(), TOK, goals_of_three(), unsafe_with, **options)
    assert len(asked) > 5 and found.text == asked[3] and found.success_at is None
    asked.clear()
    successes[2] = 3
    found = gcg(letters_model(), TOK, goals_of_three(), unsafe_with, **options)
    assert len(asked) == 3 and found.text == asked[2] and found.success_at == found.evaluations < 400
