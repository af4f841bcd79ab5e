"""Tiny random models, for any test to import.

    model = network_of(LLAMA, vocab_size=61)
    model = prone_to(7, network_of(GEMMA, tie_word_embeddings=False))      # says 7 every now and then

No fixtures: which models a test runs on is the test's affair.
"""

import torch

from model import ModelConfig, Transformer

# config.json of either family, with what makes it different in little: grouped queries; softcaps that bend, a window
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
FAMILIES = {"llama": LLAMA, "gemma": GEMMA}


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
