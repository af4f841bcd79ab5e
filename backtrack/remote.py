"""The sampler behind a server's URL, under the name that programs import: see backtrack/serve/remote.py."""

from backtrack.serve.remote import Server, generate, look_for, stream

__all__ = ["Server", "generate", "look_for", "stream"]
