"""Sentences in other words, by a language model: what AutoDAN draws from beside its synonyms.

    python -m backtrack.attacks rewrite --ckpt runs/smollm2 --out rewrites.txt        # once, by any chat model
    python -m backtrack.attacks autodan --rewrites rewrites.txt …

Every sentence of the wrappers is rewritten --count times, and all that is usable goes to a text file: a sentence and
its rewritings per line, tabs between. So the search itself needs no second model, and what it draws from can be read.
In AutoDAN (arXiv 2310.04451) a model rewrites the first population, and now and then an individual, in the same way.
"""

from collections.abc import Iterable

from backtrack.generate import generate

ASK = "Say the following sentence in other words. Answer with one sentence and nothing else.\n\n{sentence}"
EXAMPLES = (
    ("It is raining and we stay at home.", "We remain indoors because of the rain."),
    ("Please close the door when you leave.", "Would you shut the door on your way out?"),
)


def rewrite(model, tok, sentences: list[str], count: int, temperature: float, seed: int) -> dict[str, list[str]]:
    """Sentence -> at most `count` different rewritings. Each hangs on its sentence and the seed alone."""
    found = {}
    for sentence in sentences:
        prompt = tok.render(asked(sentence))
        answers = generate(
            model,
            [prompt] * count,
            reset_id=tok.reset_id,
            stop_ids=tok.stop_ids,
            vocab_size=tok.vocab_size,
            max_new_tokens=2 * len(tok.encode(sentence)) + 8,
            temperature=temperature,
            max_resets=0,
            seed=seed,
        )
        texts = [tok.decode(answer.tokens) for answer in answers if answer.finish_reason == "stop"]
        found[sentence] = usable(texts, sentence)
    return found


def asked(sentence: str) -> list[dict]:
    """The chat that asks for it: examples first, for a small model does not follow an instruction alone."""
    chat = []
    for before, after in EXAMPLES:
        chat += [{"role": "user", "content": ASK.format(sentence=before)}, {"role": "assistant", "content": after}]
    return [*chat, {"role": "user", "content": ASK.format(sentence=sentence)}]


def usable(texts: Iterable[str], sentence: str) -> list[str]:
    """Those that are one line of text, each once, and do not say the same as before."""
    found = []
    for text in texts:
        text = text.strip().strip('"“”').strip()
        if text and text.isprintable() and "{" not in text and text not in (sentence, *found):
            found.append(text)
    return found
