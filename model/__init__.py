"""The transformer, its cache, its files and its tokenizers. Knows nothing of training; of [RESET] only
what custom_generate.py needs, the file that exports carry.
"""

from model.cache import KVCache
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.errors import InputError
from model.tokenizers import load_tokenizer
from model.transformer import Transformer

__all__ = ["InputError", "KVCache", "ModelConfig", "Transformer", "load_model", "load_tokenizer", "save_model"]
