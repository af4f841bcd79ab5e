"""Files as people have them, against stored tensors, the sentencepiece library and Meta's code for Llama 2's chats."""

import importlib
import io
import json
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from command import command
from models import GEMMA, LLAMA, network_of
from safetensors.torch import load_file, save_file
from samples import HEADER, llama_tokenizer, row_of, said, user, write

from backtrack.generate import generate
from backtrack.rows import read_rows
from model import InputError, load_model, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[1]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(12).reshape(1, 12)


@pytest.mark.parametrize("fields", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_a_head_is_tied_or_its_own_whatever_the_config_says(tmp_path, fields, capsys, monkeypatch):
    monkeypatch.setattr("model.checkpoint.CHUNK_BYTES", 8 * 32 * 7)  # rows come in several parts
    model = network_of(fields, vocab_size=61, tie_word_embeddings=True)
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    embedding = stored.pop(EMBEDDING)

    # Stored under the head's name alone: tied.
    save_file(stored | {HEAD: embedding}, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS)) and capsys.readouterr().err == ""

    # Different in the last row: a head of its own, and one line says so.
    head = embedding.clone()
    head[-1] += 1
    save_file(stored | {HEAD: head, EMBEDDING: embedding}, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "tie_word_embeddings" in line and "not tied" in line
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, head) and torch.equal(loaded.model.embed_tokens.weight, embedding)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


def test_pointers_and_other_formats_are_named_and_how_to_convert_them(tmp_path):
    save_model(network_of(LLAMA), tmp_path)
    for name in ("tokenizer.model", "model.safetensors", "config.json"):
        path = tmp_path / name
        path.write_bytes(POINTER)
        with pytest.raises(InputError, match=re.escape(f"{path}: ") + ".*git lfs pull"):
            (load_tokenizer if "tokenizer" in name else load_model)(tmp_path)
        path.unlink()
    for name, content, way_out in (
        ("rows.jsonl.gz", POINTER, "git lfs pull"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "unzstd"),
        ("rows.zip", b"PK\x03\x04\x14", "unzip"),
        ("rows.json", b'[\n  {"prompt": "a", "chosen": "b"}\n]', "jq -c '.[]'"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(way_out.format(path))) as error:
            list(read_rows(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


ASKED = [*user("Hi"), *said("Hello"), *user("How?")]
ROW = {"prompt": ASKED, "chosen": said("no"), "rejected": said("yes"), "unsafe": True}
WHOLE = ROW | {"chosen": ASKED + said("no"), "rejected": ASKED + said("yes")}
SAME = [  # as ROW
    {key: value for key, value in WHOLE.items() if key != "prompt"},
    WHOLE,
    WHOLE | {"prompt": "How?"},  # the last question besides
    ROW | {"chosen": "no", "rejected": "yes"},
    ROW | {"score_chosen": 1.0, "messages": ASKED},
]


def test_the_same_row_in_other_shapes(tmp_path):
    for _, row in read_rows(write(tmp_path / "rows.jsonl", *SAME)):
        assert {key: row[key] for key in ROW} == ROW
    texts, only_chosen = {"prompt": "Hi", "chosen": "no", "rejected": None}, {"chosen": user("Hi") + said("no")}
    rows = [row for _, row in read_rows(write(tmp_path / "rows.jsonl", texts, only_chosen))]
    assert rows == [row_of("Hi", "no") | {"rejected": None}, row_of("Hi", "no")]


HH = {side: f"\n\nHuman: Hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
GUESSES = [
    ({"messages": ASKED + said("no")}, ["'messages'", "'chosen'", "'prompt'"]),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, ["'conversations'", "'role' and 'content'"]),
    (HH, ["data.prepare hh"]),
    ({"chosen": "The sky is blue", "rejected": "The sky is red"}, ["'prompt' is missing", "does not show its end"]),
    ({"chosen": user("a") + said("no"), "rejected": user("b") + said("yes")}, ["in their last message alone"]),
    (WHOLE | {"prompt": "other"}, ["'chosen'"]),
]


def test_what_could_only_be_guessed_is_named(tmp_path):
    for row, words in GUESSES:
        path = write(tmp_path / "rows.jsonl", row_of(), row)
        with pytest.raises(InputError, match=re.escape(f"{path}:2: ")) as error:
            list(read_rows(path))
        assert all(word in str(error.value) for word in words), error.value


def checkpoint_with(directory, files: dict):
    """A little Llama-3 tokenizer, and files that say how its chats end."""
    llama_tokenizer().save(directory)
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return load_tokenizer(directory)


RESERVED = HEADER + 40  # a spare token of the little Llama-3 tokenizer
END, EOM, TURN = 256 + 1, 256 + 8, 256 + 9  # <|end_of_text|>, <|eom_id|>, <|eot_id|>
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"


def ends(ids, **more):
    return {"eos_token_id": ids, **more}


FOREIGN = [
    {CONFIG: ends([END, RESERVED])},
    {CONFIG: ends(END), GENERATION: ends([RESERVED])},
    {"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}},
    {TEMPLATE: "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"},
]
KNOWN = [
    {CONFIG: ends(None)},
    {CONFIG: ends(END)},  # a base model
    {CONFIG: ends([END, EOM, TURN])},  # 3.1: <|eom_id|> belongs to tools
    {CONFIG: ends(RESERVED), GENERATION: ends([TURN])},
    {CONFIG: ends(2)},  # ordinary text: a default that nobody looked at
    {CONFIG: ends([TURN, 256 + 255], reset_token_id=256 + 255)},  # for a server
    {CONFIG: ends([TURN, RESERVED])},  # one more token to stop at
    {TEMPLATE: "<|start_header_id|>", CONFIG: ends(RESERVED)},
]


def test_chats_stop_where_the_checkpoint_says_and_foreign_ones_are_an_error(tmp_path):
    for i, files in enumerate(FOREIGN + KNOWN):
        (tmp_path / str(i)).mkdir()
        tok = checkpoint_with(tmp_path / str(i), files)
        if files in KNOWN:
            assert tok.stop_ids == (END, TURN, *([RESERVED] if KNOWN.index(files) >= 6 else []))
            assert tok.render(user("Hi")) == llama_tokenizer().render(user("Hi"))
            continue
        assert tok.decode(tok.encode("Hi")) == "Hi"  # plain text is as it was
        with pytest.raises(InputError, match=r"not written as\s+known here"):
            tok.render(user("Hi"))


@cache
def llama2_model() -> bytes:
    """A SentencePiece model of Llama 2's layout: BPE, byte pieces, a space in front of every text, no spare piece."""
    texts = ["the farmer counted the sheep [INST] before the rain [/INST] began and wrote it down."]
    texts += [f"<<SYS>> word{i} other{i * 7} <</SYS>> thing{i * i}" for i in range(300)]
    model = io.BytesIO()
    layout = {"model_type": "bpe", "vocab_size": 460, "byte_fallback": True, "split_digits": True}
    layout |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **layout)
    return model.getvalue()


@pytest.fixture
def llama2(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama2_model())
    return tmp_path


def library():
    """The tokenizer as the sentencepiece library reads it."""
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(llama2_model())
    return sp


def test_llama2s_chats(llama2):
    """As written down here from Meta's code; 200 random ones are in test_chats.py."""
    tok, sp = load_tokenizer(llama2), library()
    system = {"role": "system", "content": "wrote it down."}
    chat = [system, *user("word1"), *said("  other7 "), *user("漢 the rain")]
    first = sp.encode("[INST] <<SYS>>\nwrote it down.\n<</SYS>>\n\nword1 [/INST] other7 ")
    written = [1, *first, 2, 1, *sp.encode("[INST] 漢 the rain [/INST]")]
    assert tok.render(chat) == written
    *before, answer, last = chat  # history, as the chat of sample.py keeps it
    ids = tok.render(before) + tok.encode(answer["content"].strip()) + tok.turn_end
    assert ids + tok.render([last], continues=True) == written
    for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"):  # typed by a user
        for chat in (user(f"a {mark} b"), [*user("a"), *said(f"b {mark}"), *user("c")]):
            with pytest.raises(InputError, match=re.escape(mark)):
                tok.render(chat)
    (llama2 / "chat_template.jinja").write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"no \[INST\]"):
        load_tokenizer(llama2).render(user("Hi"))


def test_llama2_has_no_spare_token_so_reset_is_the_one_that_text_never_makes(llama2):
    tok = load_tokenizer(llama2)
    assert tok.reset_id == 0 and tok.template_ids == [0]
    model, size = network_of(LLAMA, vocab_size=tok.vocab_size), tok.vocab_size
    save_model(model, llama2 / "saved", tokenizer=tok)
    again, loaded = load_tokenizer(llama2 / "saved"), load_model(llama2 / "saved")
    assert (again.reset_id, again.stop_ids) == (0, (2,)) and type(again) is type(tok)
    ends = {"reset_id": again.reset_id, "stop_ids": again.stop_ids, "max_new_tokens": 4}
    [answer] = generate(loaded, [again.render(user("the farmer"))], **ends, reset_bias=1000)
    assert answer.resets == 1

    config = llama2 / "config.json"
    config.write_text(json.dumps({"reset_token_id": size + 3, "vocab_size": size + 8}))  # a row that was added
    tok = load_tokenizer(llama2)
    assert (tok.reset_id, tok.vocab_size) == (size + 3, size + 4)
    assert tok.decode([*tok.encode("the rain"), size + 3]) == "the rain"
    for wrong in (1, 2, 300, size + 8, -1, True):
        config.write_text(json.dumps({"reset_token_id": wrong, "vocab_size": size + 8}))
        with pytest.raises(InputError, match="reset_token_id"):
            load_tokenizer(llama2)


def test_every_package_and_module_is_installed():
    """What pyproject.toml lists is what there is: setuptools guesses nothing where several directories lie together."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = [Path(name) for name in tracked.stdout.split()]
    packages = {".".join(file.parent.parts) for file in files if file.name == "__init__.py"}
    assert set(listed["packages"]) == packages - {"tests"}
    assert set(listed["py-modules"]) == {file.stem for file in files if len(file.parts) == 1}
    for name in ("toy.json", "llama3-tiny.json"):
        assert (ROOT / "data" / name).is_file() and listed["package-data"]["data"] == ["*.json"]


PROGRAMS = ["sample", "data.toy", "backtrack.evaluate.__main__", "backtrack.collect"]
PROGRAMS += ["train sft", "train dpo", "data.base"]
PROGRAMS += [f"data.prepare.__main__ {name}" for name in ("rows", "prompts")]
PROGRAMS += [f"backtrack.attacks.__main__ {name}" for name in ("prefill", "autodan", "adaptive-gcg", "universal-gcg")]
LEAST = {"sample": 6, "backtrack.evaluate.__main__": 9, "train sft": 12, "backtrack.attacks.__main__ adaptive-gcg": 10}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_has_a_range(program):
    """Every flag whose value must be a number refuses NaN and numbers that are too large, by its name."""
    name, *sub = program.split()
    main = importlib.import_module(name).main
    text, _ = command(main, *sub, "--help")
    numbers = []
    for flag in sorted(set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}):
        twice = flag == "--prefix"  # takes two values
        if re.search(rf"argument {flag}: invalid \w+ value: 'x'", complaint(main, [*sub, flag, *["x"] * (1 + twice)])):
            numbers.append(flag)
            for value in ("nan", "9" * 30):
                said = complaint(main, [*sub, flag, *[value] * (1 + twice)])
                assert re.search(rf"error: (argument )?{flag}\b", said), (flag, value, said)
    assert len(numbers) >= LEAST.get(program, 0), numbers


def complaint(main, words: list[str]) -> str:
    """The line that says what is wrong with the words; --help makes an end where nothing is."""
    try:
        return command(main, *words, "--help", code=2)[1].splitlines()[-1]
    except AssertionError:  # exit code 0: it was the help
        return ""
