"""Tiny random models, for any test to import.

    model = network_of(LLAMA, vocab_size=61)
    model = prone_to(7, network_of(GEMMA, tie_word_embeddings=False))      # says 7 every now and then

No fixtures: which models a test runs on is the test's affair.
"""

import torch

from model import ModelConfig, Transformer

# config.json of each family, with what makes it different in little: grouped queries; softcaps that bend, a window
# shorter than most sequences, in every other layer.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,  # the toy tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
GEMMA = LLAMA | {
    "model_type": "gemma2",
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
    "sliding_window": 6,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 6}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3"}
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 2,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
FAMILIES = {"llama": LLAMA, "gemma": GEMMA}  # what most tests run on: between them they take every path
OTHERS = {"mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma3": GEMMA3}


def network_of(fields: dict, seed=1, scale=0.3, mean=0.0, **changes) -> Transformer:
    """Random weights, large enough that every token and every position matters."""
    return randomize(Transformer(ModelConfig.from_hf(fields | changes)).eval(), seed, scale, mean)


@torch.no_grad()
def randomize(model, seed=1, scale=0.3, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.normal_(mean, scale, generator=generator)
    return model


@torch.no_grad()
def prone_to(id: int, model: Transformer, times: float = 2.0) -> Transformer:
    """Raise the id's row of the head: whether it is the best token then hangs on the context, and often it is."""
    model.lm_head.weight[id] *= times
    return model


def random_ids(*lengths: int, vocab: int, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
