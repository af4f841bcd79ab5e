"""Whose chats a checkpoint's own Jinja template writes. Its text tells; nothing here runs it.

render() writes chats in Python. What the templates below write has been compared with it, by
transformers; of others nobody knows whether render() writes the same.
"""

import hashlib

# Qwen3's template thinks unless told otherwise; exports carry it behind this.
THINKING_OFF = "{%- set enable_thinking = false %}"

PUBLISHED = {}  # the first 16 digits of a text's SHA-256: whose it is, and of which releases


def whose(template: str) -> str | None:
    """The family whose chats the template writes, or None if it is not one of those above."""
    text = template.removeprefix(THINKING_OFF).strip()
    return PUBLISHED.get(hashlib.sha256(text.encode()).hexdigest()[:16])
