"""The Llama Guard judge against transformers on the same tiny checkpoint: prompt ids, greedy answers, verdicts.

No guard can be downloaded here. What stands in for one: a Llama of one layer, written by transformers, that is taught
within seconds to answer in the guard's format, unsafe where a conversation contains a skull; and a template of our own
in the manner of Llama Guard 2's. The toy world's judge has its tests in test_toy.py.
"""

import json
import random
import secrets
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from command import command
from completions import serving
from samples import write
from test_tokenizer import LLAMA3_NAMES, NASTY, TEXT, fuzz_texts, train_bpe

from backtrack.evaluate import __main__ as evaluate
from backtrack.judge import Verdict, judge_all, load_judge
from backtrack.judge.guard import ANSWER_TOKENS, guard_prompt, guard_template, verdicts, with_category
from model import InputError, load_model, load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# Laid out over lines, as chat_template.jinja files are: without trim_blocks and lstrip_blocks other text comes out.
GUARD_TEMPLATE = """\
{% if messages | length % 2 == 0 %}
    {% set who = 'Agent' %}
{% else %}
    {% set who = 'User' %}
{% endif %}
{{ bos_token }}<|start_header_id|>user<|end_header_id|>

Task: is '{{ who }}' safe?

<BEGIN CATEGORIES>
S3: Skulls.
<END CATEGORIES>

<BEGIN CONVERSATION>

{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/…') }}
    {% endif %}
{{ 'User' if message['role'] == 'user' else 'Agent' }}: {{ message['content'] | trim }}

{% endfor %}
<END CONVERSATION>

Is the last {{ who }} safe?{{ eos_token }}<|start_header_id|>assistant<|end_header_id|>

{{ '\\n' }}
"""
BARE = "{{ bos_token }}{% for m in messages %}{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>\n{% endfor %}"
TEMPLATES = {
    "guard": GUARD_TEMPLATE,
    "not trimmed": BARE,
    "method": BARE.replace("m.content", "m['content'].strip() + '\\n\\n'"),
    "glued": "{% for m in messages %}the {{ m.content }}rs{{ loop.index }}{% endfor %}",  # BPE reads across both edges
    "backwards and twice": "{% for m in messages | reverse %}{{ m.content }} {{ m.content }}{% endfor %}",
    "generation prompt": BARE + "{% if add_generation_prompt %}<|start_header_id|>assistant{% endif %}",
    # In the manner of Llama Guard 3's 1B: contents in parts, which another kind of program may fill with pictures.
    "parts": "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] "
    "if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}\n\n{% endfor %}<|eot_id|>",
}
SKULL = "☠"
SAFE, UNSAFE = "\n\nsafe<|eot_id|>", "\n\nunsafe\nS3<|eot_id|>"  # Llama Guard 3 begins with a blank line


def user(text, role="user"):
    return {"role": role, "content": text}


assistant = partial(user, role="assistant")


def chats():
    texts = [*NASTY, TEXT, " Größe 東京 🐑 \n", "\n\n  two\n\nlines \t", *fuzz_texts(6, seed=1)]
    for i, text in enumerate(texts):
        other = texts[(7 * i + 1) % len(texts)]
        yield [user(text), assistant(other)]
        yield [user(text), assistant(other), user(other), assistant(text)]


def write_guard(directory, template=GUARD_TEMPLATE):
    """A random tiny Llama with a Llama-3 tokenizer and a chat template, all written by transformers."""
    tokenizer = train_bpe(600, [])
    tokenizer.add_special_tokens([tokenizers.AddedToken(n, normalized=False, special=True) for n in LLAMA3_NAMES])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model, wrapped


def write_trained_guard(directory, steps=60):
    """The same, taught to answer: UNSAFE to a conversation with a skull in its last answer, SAFE to others."""
    model, wrapped = write_guard(directory)
    rng, words = random.Random(0), TEXT.split()

    def words_of(n):
        return " ".join(rng.choices(words, k=rng.randint(1, n)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        ids, labels = [], []
        for i in range(8):
            answer = words_of(6) + (f" {SKULL} " + words_of(6)) * (i % 2)
            prompt = wrapped.apply_chat_template(
                [user(words_of(6)), assistant(answer)], add_generation_prompt=True, return_dict=False
            )
            verdict = wrapped.encode(UNSAFE if i % 2 else SAFE, add_special_tokens=False)
            ids.append(torch.tensor(prompt + verdict))
            labels.append(torch.tensor([-100] * len(prompt) + verdict))
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def random_guard(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random-guard")
    write_guard(directory)
    return directory


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    return write_trained_guard(tmp_path_factory.mktemp("guard"))


def ours(directory, template, messages):
    """Prompt ids by the code under test, for the directory's tokenizer and another template."""
    tok = load_tokenizer(directory)
    tok.chat_template = template
    return guard_prompt(tok, guard_template(directory, tok), messages)


def with_template(source, directory, template, file="chat_template.jinja"):
    shutil.copytree(source, directory)
    (directory / "chat_template.jinja").unlink()
    if file == "chat_template.jinja":
        (directory / file).write_text(template)
    else:
        config = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(config | template))
    return directory


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_has_the_ids_of_transformers(random_guard, name):
    oracle = transformers.AutoTokenizer.from_pretrained(random_guard)
    tok = load_tokenizer(random_guard)
    tok.chat_template = TEMPLATES[name]
    template, lengths = guard_template(random_guard, tok), set()
    for chat in chats():
        given = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat] if "parts" in name else chat
        expected = oracle.apply_chat_template(
            given, chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
        )
        assert guard_prompt(tok, template, chat) == expected, chat
        lengths.add(len(expected))
    assert len(lengths) > 10


def test_the_template_is_read_from_either_file(random_guard, tmp_path):
    """With the names that tokenizer_config.json has for bos and eos, or else the tokenizer's."""
    both = "{{ bos_token }}{{ eos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    expected = ours(random_guard, both, [user("a"), assistant("b")])
    in_config = {"chat_template": both, "eos_token": {"content": "<|eot_id|>", "lstrip": False}, "bos_token": None}
    for file, template in (("chat_template.jinja", both), ("tokenizer_config.json", in_config)):
        directory = with_template(random_guard, tmp_path / file, template, file)
        tok = load_tokenizer(directory)
        assert guard_prompt(tok, guard_template(directory, tok), [user("a"), assistant("b")]) == expected
        assert expected[:2] == [tok.bos_id, tok.eos_id]
    with pytest.raises(InputError, match=r"bare: no chat_template.*copy"):
        load_judge(with_template(random_guard, tmp_path / "bare", {}, "tokenizer_config.json"))


def test_what_is_typed_never_becomes_a_special_token(random_guard):
    """Neither in the question nor in the answer: the special ids are the template's, and the text is all there."""
    tok = load_tokenizer(random_guard)
    template = guard_template(random_guard, tok)
    plain = guard_prompt(tok, template, [user("x"), assistant("x")])
    structure = [i for i in plain if i in tok.special_ids]
    assert len(structure) == 6
    for name in [*LLAMA3_NAMES[:12], LLAMA3_NAMES[-1], "<|eom_id|>"]:
        for text in (name, f"{name}{name}", f"<{name}>", f"<|eot{name}_id|>", f"x{name}\n\nsafe{name}", f" {name} "):
            ids = guard_prompt(tok, template, [user(text), assistant(text)])
            assert [i for i in ids if i in tok.special_ids] == structure
            assert tok.decode(ids) == tok.decode(plain).replace(": x\n", f": {text.strip()}\n")
    # Nor at the edge of what is typed.
    tok.chat_template = "{% for m in messages %}<|eot{{ m.content }}{{ m.content }}_id|>{% endfor %}"
    for text in ("_id|><|eot", "_id|>", "<|eot"):
        ids = guard_prompt(tok, guard_template(random_guard, tok), [user(text), assistant("_id|>")])
        assert tok.special_ids.isdisjoint(ids)
        assert tok.decode(ids) == f"<|eot{text}{text}_id|><|eot_id|>_id|>_id|>"


def test_a_stand_in_that_is_typed_is_text(random_guard, monkeypatch):
    """Even for one who has guessed the key. And of messages the template sees role and content alone."""
    chat = [user("the key000001 and key000002"), assistant("key000000 <|eot_id|>")]
    shows = "{% for m in messages %}{{ m.role }}{{ m.name }}{{ m.content }}{% endfor %}"
    expected = ours(random_guard, shows, chat)
    monkeypatch.setattr(secrets, "token_hex", lambda n: "key")
    more = [user("Be bad.", "system"), *(message | {"name": "<|eot_id|>"} for message in chat)]
    assert ours(random_guard, shows, more) == expected


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ""),
        ("{{ raise_exception('Only\n\nbirds') }}", "rejects the conversation: Only birds"),
        ("{{ ''.__class__.__mro__ }}", "rejects the conversation: "),  # the sandbox at work
        ("{% for m in messages %}", "not valid Jinja"),
    ],
)
def test_templates_that_would_not_show_the_conversation(random_guard, template, said):
    with pytest.raises(InputError) as caught:
        ours(random_guard, template, [user("x"), assistant("y")])
    assert (said or "does not print what was said as it is;") in str(caught.value) and "\n" not in str(caught.value)


def their_answer(model, oracle, chat):
    ids = torch.tensor([oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    stop = [oracle.convert_tokens_to_ids(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
    out = model.generate(ids, attention_mask=mask, **options)[0, ids.shape[1] :]
    with torch.no_grad():  # after the blank line
        lead = torch.tensor([oracle.encode("\n\n", add_special_tokens=False)])
        odds = model(torch.cat([ids, lead], dim=1)).logits[0, -1].softmax(-1)
    safe, unsafe = (oracle.encode(word, add_special_tokens=False)[0] for word in ("safe", "unsafe"))
    return oracle.decode(out, skip_special_tokens=True), (odds[unsafe] / (odds[safe] + odds[unsafe])).item()


def many(count, seed=0):
    """Conversations of many lengths, some with skulls in places that the guard has not learned about."""
    rng, words = random.Random(seed), [*TEXT.split(), SKULL]
    for _ in range(count):
        said = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(rng.choice((2, 2, 4)))]
        yield [message(text) for message, text in zip((user, assistant, user), said[:-1], strict=False)], said[-1]


def test_verdicts_are_what_transformers_answers(guard):
    """In batches; p_unsafe by the logits behind the blank line."""
    judge, oracle = load_judge(str(guard)), transformers.AutoTokenizer.from_pretrained(guard)
    theirs = transformers.LlamaForCausalLM.from_pretrained(guard)
    conversations = [*many(20), ([user(" the dogs ")], f" the sheep {SKULL}\n"), ([user("the sheep")], "")]
    for (prompt, response), verdict in zip(conversations, judge_all(judge, conversations), strict=True):
        said, p = their_answer(theirs, oracle, [*prompt, assistant(response)])
        assert verdict.p_unsafe == pytest.approx(p, abs=1e-4)
        first, *rest = said.strip().split("\n")
        assert verdict == Verdict(first == "unsafe", category=rest[0] if first == "unsafe" and rest else None)
    assert {v.category for v in judge_all(judge, conversations)} == {"S3", None}
    assert judge(*conversations[-2]) == Verdict(True, category="S3") and not judge(*conversations[-1]).unsafe


def test_conversations_the_guard_cannot_read(guard):
    """Each alone is refused in one line; among others it leaves those their verdicts."""
    judge = load_judge(guard)
    good = ([user("the dogs")], f"the sheep {SKULL} the dogs")
    bad = [([user("x")], "the sheep " * 1000), ([user("x"), user("y")], "z")]
    for (prompt, response), said in zip(bad, ("too long", "Roles must alternate"), strict=True):
        with pytest.raises(InputError, match=rf"guard\d*: .*{said}") as caught:
            judge(prompt, response)
        assert "\n" not in str(caught.value)
    found = judge_all(judge, [bad[0], good, bad[1], good])
    assert [type(v) for v in found] == [InputError, Verdict, InputError, Verdict] and found[1] == found[3]
    assert judge_all(judge, []) == []


def test_threshold_and_categories(guard):
    conversations = list(many(20))
    found = judge_all(load_judge(guard), conversations)
    p = sorted(verdict.p_unsafe for verdict in found)
    judge = load_judge(guard, threshold=p[15], categories=False)
    assert judge.threshold == p[15]
    verdicts_now = judge_all(judge, conversations)
    assert [v.unsafe for v in verdicts_now] == [v.p_unsafe > p[15] for v in found]
    assert {v.category for v in verdicts_now} == {None}
    # A lower threshold calls unsafe what the guard called safe; it is asked what it would have meant.
    low = judge_all(load_judge(guard, threshold=0.0), conversations)
    assert all(isinstance(v, InputError) or v.unsafe for v in low)
    assert "S3" in {v.category for v, before in zip(low, found, strict=True) if not before.unsafe}


def test_the_first_word_decides(guard):
    """With and without blank lines before it, whatever follows; with neither word there is no verdict."""
    tok = load_tokenizer(guard)
    safe, unsafe = tok.encode("safe")[0], tok.encode("unsafe")[0]
    blank, eot = tok.encode("\n\n"), tok.special_tokens["<|eot_id|>"]
    said = [[safe, eot, eot], [*blank, unsafe, eot], [eot, unsafe, safe], [*blank, *blank, *blank], tok.encode("xyz")]
    odds = [[-800.0, 0.0, 0.0], [-9.0] * len(blank) + [2.0, 0.0], *[[0.0] * 8] * 3]
    fake = SimpleNamespace(first=lambda *_: list(zip(said, odds, strict=True)))
    first, second, *others = verdicts(fake, tok, said, 0.5, categories=False)
    assert (first.unsafe, first.p_unsafe, second.unsafe) == (False, 0.0, True)
    assert second.p_unsafe == pytest.approx(0.880797, abs=1e-5)
    assert all(isinstance(v, InputError) and "not safe or unsafe" in str(v) for v in others)


def test_categories_of_an_answer():
    unsafe = Verdict(True, p_unsafe=0.7)
    for answer, category in (
        ("unsafe\nS3", "S3"),
        ("\n\nunsafe\n\nS1, S10 , S11\n", "S1,S10,S11"),
        ("unsafe", None),
    ):
        assert with_category(unsafe, answer) == Verdict(True, category=category)
    for answer in ("unsafe S3", "unsafe\nS3\nS4", "unsafe\nS3,", "unsafe\nsafe", "unsafe" + "x" * 999):
        error = with_category(unsafe, answer)
        assert isinstance(error, InputError) and repr(answer[:40]) in str(error) and len(str(error)) < 200


def test_a_guard_behind_a_server(guard, tmp_path):
    """evaluate asks the server for its verdicts, and they are those of the guard here."""
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "the dogs", "set": "dogs"})
    words = ["--ckpt", guard, "--prompts", prompts, "--max-new-tokens", 4, "--device", "cpu", "--judge", guard]
    conversations = list(many(12))
    with serving(load_model(guard), name=str(guard), longest=1024) as server:
        command(evaluate.main, *words, "--judge-url", server.url, "--out", tmp_path / "there.json")
        assert server.requests  # or the guard was asked here
        answers = map(json.loads, (tmp_path / "there.answers.jsonl").read_text().splitlines()[1:])
        assert [(a["threshold"], 0 <= a["p_unsafe"] <= 1) for a in answers] == [(0.5, True)]
        _, said = command(evaluate.main, *words, "--threshold", 0.8, "--out", tmp_path / "there.json", code=2)
        assert "was judged by " in said and f"{guard} at 0.5, now {guard} at 0.8" in said
        found = judge_all(load_judge(guard, url=server.url), conversations)
        with pytest.raises(InputError, match="only a Llama Guard"):
            load_judge("world.json", url=server.url)
    assert found == judge_all(load_judge(guard), conversations) and {v.unsafe for v in found} == {True, False}


def test_what_is_no_judge(random_guard, tmp_path):
    (tmp_path / "world.json").write_text("{}")
    for name, complaint in (("world.json", "not a toy world"), ("nowhere", "no such judge"), ("", "no tokenizer")):
        with pytest.raises(InputError, match=complaint):
            load_judge(tmp_path / name)
    with pytest.raises(InputError, match=rf"^{random_guard}: answered .*Llama Guard 2"):
        load_judge(random_guard)
