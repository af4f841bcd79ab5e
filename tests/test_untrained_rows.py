"""Which rows count as untrained, on tables laid out like those of real models, and where [RESET]'s row starts."""

from types import SimpleNamespace

import pytest
import torch
from models import GEMMA, LLAMA, network_of, random_ids

from backtrack import reset_row
from backtrack.examples import View
from backtrack.reset_row import set_level, set_untrained_rows
from backtrack.trees import make_batch, view_tree

D, ORDINARY = 64, 400
EOS, BOS, RESET, TURN, END = 1, 2, 6, 7, 8  # and from 9 on spare tokens, then ordinary ones


def table_of(seed=0, spare=(), **others):
    """Rows at these distances from one place: `spare` of [RESET] first, others by name; ordinary ones ± 10%."""
    generator = torch.Generator().manual_seed(seed)
    far = others.pop("ordinary")
    distance = torch.empty(9 + len(spare) - 1 + ORDINARY).uniform_(0.9 * far, 1.1 * far, generator=generator)
    distance[RESET], distance[9 : 8 + len(spare)] = spare[0], torch.tensor(spare[1:])
    for name, value in others.items():
        distance[globals()[name]] = value
    direction = torch.nn.functional.normalize(torch.randn(len(distance), D, generator=generator), dim=1)
    return torch.randn(D, generator=generator) + distance[:, None] * direction


def tokenizer(spares, template=None):
    return SimpleNamespace(
        reset_id=RESET,
        text_start_id=BOS,
        text_end_id=EOS,
        stop_ids=(EOS, END),
        template_ids=[BOS, RESET, TURN, END],
        special_ids={EOS, BOS, RESET, TURN, END, *range(9, 8 + spares)},
        chat_template=template,
    )


GEMMA3 = [0.85, *[0.015, 0.019] * 28, *torch.linspace(0.2, 0.84, 44).tolist()]  # half of the spare rows, and the others
GEMMA3_FEW = torch.linspace(0.75, 0.2, 94).tolist()  # <unused0> to <unused93> alone
SMOLLM2 = [0.0, *[0.0014, 0.008] * 5, 1.2, 1.3, 4.9]  # three spare tokens are trained
GEMMA3_ROWS = dict(ordinary=1.3, BOS=1.32, EOS=1.65, TURN=0.38, END=0.14)
SMOLLM2_ROWS = dict(ordinary=3.1, BOS=4.8, EOS=4.8, TURN=0.395, END=0.463)
CASES = {
    "Gemma-3, a base": (GEMMA3, GEMMA3_ROWS, None, [TURN, END]),
    "Gemma-3, few spare tokens": (GEMMA3_FEW, GEMMA3_ROWS | dict(TURN=0.25, END=0.2), None, [TURN, END]),
    "Gemma-3, a chat model": (GEMMA3, GEMMA3_ROWS, "{{ chat }}", []),
    "Gemma-3, a chat model with few": (GEMMA3_FEW, GEMMA3_ROWS, "{{ chat }}", []),
    "SmolLM2-Instruct": (SMOLLM2, SMOLLM2_ROWS, "{{ chat }}", []),
    "SmolLM2-Instruct, its template lost": (SMOLLM2, SMOLLM2_ROWS, None, []),
    "Llama-3": ([0.01] * 250, dict(ordinary=1.0, BOS=0.9, EOS=0.9, TURN=0.011, END=0.009), None, [TURN, END]),
    "Llama-3, <bos> with them": ([0.01] * 250, dict(ordinary=1.0, BOS=0.01, EOS=0.01, TURN=0.5, END=0.6), None, []),
    "the toy": ([0.065] * 3, dict(ordinary=2.8, TURN=0.065, END=0.065), "{{ chat }}", [TURN, END]),
    "no spare token": ([0.0], dict(ordinary=1.0), None, []),
    "never trained": ([1.0] * 20, dict(ordinary=1.0), None, []),
}


@pytest.mark.parametrize("case", CASES)
def test_untrained_rows_are_told_from_trained_ones(case):
    """[RESET] is always set, BOS and EOS never are, and in doubt a row stays."""
    spare, rows, template, expected = CASES[case]
    for seed in range(3):
        table = table_of(seed, spare, **rows)
        before, tok = table.clone(), tokenizer(len(spare), template)
        fresh, left, measured = set_untrained_rows(table, tok)
        assert fresh == [RESET, *expected] and set(left) == {*tok.template_ids} - {*fresh}
        assert (table != before).any(dim=1).nonzero()[:, 0].tolist() == fresh
        assert "distance from the unused rows" in measured
        mean = before[-ORDINARY:].mean(dim=0)
        assert ((table[fresh] - mean).norm(dim=1) < 0.5 * rows["ordinary"]).all()


def test_what_the_user_names_is_set():
    spare, rows, template, _ = CASES["SmolLM2-Instruct"]
    tok = tokenizer(len(spare), template)
    for named in ([], [TURN], [TURN, END]):
        assert set_untrained_rows(table_of(0, spare, **rows), tok, named)[0] == [RESET, *named]


@pytest.mark.parametrize("fields", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_the_level_is_found_with_few_logits_at_once(monkeypatch, capsys, fields):
    """1% ± little, whatever the size of the chunks."""
    found = []
    for logits in (2**28, 3 * 1024):
        monkeypatch.setattr(reset_row, "LOGITS", logits)
        model = network_of(fields, tie_word_embeddings=False)
        views = [View("answer", ids, 5, 1.0) for ids in random_ids(30, 20, vocab=1024)]
        set_level(model, 7, [make_batch([view_tree([view], 64)]) for view in views])
        found.append(model.lm_head.weight[7].detach())
        expected = "-4.6" if fields is LLAMA else "-5"  # a cap of 10 bends
        assert f"log p([RESET]) starts at {expected}" in capsys.readouterr().err
    assert torch.allclose(*found, atol=1e-4)
