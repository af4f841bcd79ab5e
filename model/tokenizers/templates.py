"""Whose chats a checkpoint's own Jinja template writes. Its text tells; nothing here runs it.

render() writes chats in Python. What the templates below write has been compared with it, by
transformers; of others nobody knows whether render() writes the same.
"""

import hashlib

# Qwen3's template thinks unless told otherwise; exports carry it behind this.
THINKING_OFF = "{%- set enable_thinking = false %}"

# The first 16 hex digits of a text's SHA-256: whose chats it writes.
PUBLISHED = {
    "e8d5b5a546d3f19d": "Llama 2",
    "7fcbb4353f3f4841": "Llama 2",
    "ba03a121d097859c": "Llama-3",
    "b48c47f644389271": "Llama-3",
    "93c0e9aa3629bbd7": "Llama-3",  # 3.1 and 3.3; render() leaves out the date, which these write
    "d82792f95932f1c9": "Llama-3",  # 3.2
    "ecd6ae513fe103f0": "Gemma",  # 2
    "8d9e3a3c114fb205": "Gemma",  # 3
    # mistral-common writes a space where the first has none, and trims answers; so does render().
    "26a59556925c9873": "Mistral v1",
    "bbc58aad99454df6": "Mistral v1",
    "872be49dbb638044": "ChatML",  # SmolLM2
    "fcf7a096fe99a48f": "ChatML",  # without a default system turn
    "55b2f4a26ac9ee71": "ChatML",  # Qwen2.5
    "a55ee1b1660128b7": "ChatML",  # Qwen3
    "87a2728cb8dc9fe4": "ChatML",  # Qwen3
    "64f85b198065d0fb": "ChatML",  # Qwen3-Instruct-2507
    # These share ChatML's markers and write other chats: they trim contents, or always think.
    "273d8e0e683b8850": "Qwen3.5",
    "a4aee8afcf2e0711": "Qwen3.5",
    "e84f32a23fdda276": "Qwen3.6",
    "c3cf9e34abf4f9e3": "Qwen3.8",
    # And these share Mistral's.
    "e7deee034838db2b": "Mistral Nemo",
    "3c4ad5fa60dd8c7c": "Mistral v7",
}


def whose(template: str) -> str | None:
    """The family whose chats the template writes, or None if it is not one of those above."""
    text = template.removeprefix(THINKING_OFF).strip()
    return PUBLISHED.get(hashlib.sha256(text.encode()).hexdigest()[:16])
