"""Attacks on every chat template, with the ids that the template gives. The vocabularies are tiny."""

import base64
import io
import json
from functools import partial

import pytest
import sentencepiece
from command import command
from models import LLAMA, network_of

from backtrack.attacks import __main__ as attacks
from backtrack.attacks.suffix import Scorer, make_slots, survives, with_suffix
from backtrack.judge import Verdict
from data import toy
from model import load_tokenizer, save_model

QUESTION = {"role": "user", "content": "Tell me how to make it"}
CHATS = [[QUESTION], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, QUESTION]]
INST = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"  # tells which family it is, no more
PIECES = {"llama-2": [], "mistral-1": [], "mistral-3": ["[INST]", "[/INST]", "[control_8]"]}
TEMPLATES = ["toy", "llama-3", "chatml", *PIECES]


def write_tokenizer(name, directory):
    directory.mkdir()
    if name == "toy":  # Gemma's template
        (directory / "tokenizer.model").write_bytes(toy.build(0)["tokenizer/tokenizer.model"])
    elif name == "llama-3":
        tokens = [*(bytes([b]) for b in range(256)), b" x", b"in", b" m", b"ak"]
        lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
        (directory / "tokenizer.model").write_bytes(b"".join(lines))
    elif name == "chatml":
        tokenizers = pytest.importorskip("tokenizers")
        bpe, alphabet = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel.alphabet()
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
        options = dict(vocab_size=280, special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=False)
        bpe.train_from_iterator(["x x Tell me how to make it x x"], tokenizers.trainers.BpeTrainer(**options))
        bpe.save(str(directory / "tokenizer.json"))
    else:
        model, texts = io.BytesIO(), ["[INST] Tell me how to make it x x [/INST] Sure, here is how"] * 9
        options = dict(model_type="bpe", vocab_size=320, byte_fallback=True, normalization_rule_name="identity")
        options |= dict(hard_vocab_limit=False, remove_extra_whitespaces=False, control_symbols=PIECES[name])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **options
        )
        (directory / "tokenizer.model").write_bytes(model.getvalue())
        if name != "llama-2":
            (directory / "chat_template.jinja").write_text(INST)
            (directory / "config.json").write_text(json.dumps({"model_type": "mistral"}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_attacks_on_every_template(tmp_path, monkeypatch, name):
    write_tokenizer(name, tmp_path / "tokenizer")
    tok = load_tokenizer(tmp_path / "tokenizer")
    network = network_of(LLAMA, vocab_size=tok.vocab_size, max_position_embeddings=1024)
    save_model(network, tmp_path / "model", tokenizer=tok)
    monkeypatch.setattr(attacks, "load_judge", lambda *_: lambda prompt, answer: Verdict(unsafe=False))
    prompts = [{"prompt": chat, "target": "Sure", "set": s, "topic": s} for s, chat in zip("ab", CHATS, strict=True)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    scored, losses = [], Scorer.losses

    def logged(self, suffixes, *rest):
        scored.extend(self.slots.before + suffix + self.slots.after for suffix in suffixes)
        return losses(self, suffixes, *rest)

    monkeypatch.setattr(Scorer, "losses", logged)
    for attack in ("context", "autodan", "adaptive-gcg", "universal-gcg"):  # the others send what these do
        words = [attack, "--ckpt", tmp_path / "model", "--prompts", tmp_path / "p.jsonl", "--judge", "nobody"]
        words += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4, "--out", tmp_path / attack]
        words += ["--budget", 60] if attack != "context" else []
        words += ["--suffix", " x x x", "--candidates", 8, "--topk", 300] if "gcg" in attack else []
        words += ["--sets", "a", "--optimise", tmp_path / "p.jsonl", "--optimise-sets", "b"] if "uni" in attack else []
        command(attacks.main, *words)
        records = [r for r in map(json.loads, (tmp_path / attack).read_text().splitlines()) if "prompt" in r]
        assert [r["set"] for r in records] == ["a", "b"]
        for r in records if "gcg" in attack else ():
            assert r["sent"][-1]["content"] == QUESTION["content"] + r["attack"]
            assert tok.render(r["sent"]) in scored or (attack == "universal-gcg" and r["set"] == "a")
    send = partial(with_suffix, CHATS[1])
    slots = make_slots(tok, send, [], " x x x")
    assert slots.before + slots.after == tok.render(CHATS[1])
    if name in ("llama-2", "mistral-1"):  # a mark of turns is no candidate, and no error either
        assert not survives(tok, send, slots, tok.encode("[INST]"))
