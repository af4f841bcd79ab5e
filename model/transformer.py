"""The whole network: Llama (2, 3, 3.1, 3.2) and Gemma-2, for training and for cached decoding alike.

    model = Transformer(ModelConfig(...))
    logits = model(tokens)             # (B, T) int64 -> (B, T, V) fp32: training, scoring
    logits = model(tokens, cache)      # the same, reading and writing a KVCache: decoding

Read from the bottom up: Transformer, Decoder, Block, Attention. Parameter names are Hugging Face's, so loading a
checkpoint renames nothing. No dropout, no biases, no attention weights returned, no parallelism.

Shapes: B batch, T time (tokens of this call), S positions attended to (cached and new), D model width (hidden_size),
H query heads, K key/value heads, G = H / K query heads per key/value head, hd head_dim, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.cache import KVCache
from model.config import ModelConfig


class Linear(nn.Linear):
    """y = x·Wᵀ, no bias. x (…, in) -> (…, out)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        # The most blocks that still hold 2^16 weights each: see forward.
        self.blocks = next((b for b in (32, 16, 8, 4, 2) if n_out % b == 0 and n_in * n_out >= b * 2**16), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.blocks == 1 or x.device.type != "cpu" or x.numel() > 32 * x.shape[-1]:
            return F.linear(x, self.weight)
        # Decoding on a CPU: the BLAS reads W with one thread when x has so few rows. Cut into blocks of outputs, as a
        # batch of products, W is read by all threads, up to twice as fast (make bench).
        weight = self.weight.view(self.blocks, -1, x.shape[-1])  # (blocks, out / blocks, in)
        y = torch.bmm(x.reshape(-1, x.shape[-1]).expand(self.blocks, -1, -1), weight.mT)  # (blocks, rows, out / blocks)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), then a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float, plus_one: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if plus_one else torch.ones(dim))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float()  # F.rms_norm computes the same, on CPU in three times as many steps
        normed = normed * torch.rsqrt(normed.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.plus_one:  # Gemma: x̂ · (1 + w) in fp32, then round
            return (normed * (1.0 + self.weight.float())).type_as(x)
        return self.weight * normed.type_as(x)  # Llama: round, then multiply


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each of the hd/2 pairs, fp32: theta^(-2i/hd), Llama-3.1-scaled where the config says so."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return freqs
    # Llama 3.1: turns longer than the pretraining context are slowed by `factor`, short ones are left alone, and in
    # between the two are blended (github.com/meta-llama/llama-models, apply_scaling).
    s = config.rope_scaling
    turns = s.original_max_position_embeddings * freqs / (2 * math.pi)  # full turns within the original context
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0.0, 1.0)
    return freqs * blend + freqs / s.factor * (1.0 - blend)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in Hugging Face's layout, where dimension i is paired with i + hd/2 ("rotate half").

    (x1, x2) -> (x1·cos − x2·sin, x2·cos + x1·sin). Rolling x by hd/2 gives (x2, x1); `sin` carries the minus sign in
    its first half. x (B, heads, T, hd); cos, sin (B or 1, 1, T, hd) fp32.
    """
    rolled = x.roll(x.shape[-1] // 2, dims=-1)
    return (x.float() * cos + rolled.float() * sin).type_as(x)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Squash x smoothly into (-cap, cap)."""
    return torch.tanh(x / cap) * cap


def as_mask(blocked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """True -> -inf, False -> 0: what is added to the scores."""
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill_(blocked, float("-inf"))


def attend(q, k, v, mask, scale: float, cap: float | None) -> torch.Tensor:
    """softmax(q·kᵀ·scale + mask)·v with grouped heads. q (B, H, T, hd), k and v (B, K, S, hd) -> (B, H, T, hd).

    mask (B or 1, 1, T, S) is -inf where a key may not be seen, else 0; None means causal attention without a cache.
    """
    B, H, T, hd = q.shape
    K, S = k.shape[1], k.shape[2]
    if cap is None and (T > 1 or mask is None):  # the fused kernel never builds the scores; it knows no softcap
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=H != K)
    # Query head h reads key/value head h // G. With the G heads of a group stacked along T, one product serves them
    # all and no key is copied.
    q = q.reshape(B, K, (H // K) * T, hd)
    if cap is None:  # T is 1, and the G queries of a group share its one mask
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).view(B, H, T, hd)
    scores = softcap((q * scale) @ k.transpose(-1, -2), cap)  # (B, K, G·T, S)
    scores = scores.view(B, K, H // K, T, S) + mask[:, None]
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(v)
    return (weights.view(B, K, (H // K) * T, S) @ v).view(B, H, T, hd)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, H, K, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, H, K, hd
        self.q_proj = Linear(D, H * hd)
        self.k_proj = Linear(D, K * hd)
        self.v_proj = Linear(D, K * hd)
        self.o_proj = Linear(H * hd, D)
        self.scale = (config.query_pre_attn_scalar or hd) ** -0.5
        self.cap = config.attn_logit_softcapping

    def forward(self, x, cos, sin, mask, positions, cache: KVCache | None) -> torch.Tensor:
        B, T, _ = x.shape
        # Queries and keys are rotated alike, so in one go: (B, H + K, T, hd)
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # (B, K, S, hd)
        y = attend(q, k, v, mask, self.scale, self.cap)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)): SwiGLU in Llama, tanh-GELU-gated in Gemma (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.gelu = config.hidden_act == "gelu_pytorch_tanh"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); Gemma-2 also norms what it is about to add."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm():
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()  # the same name in both families, in different places: see forward
        self.mlp = MLP(config)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x, *context) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), *context)
        if self.post_norms:  # Gemma-2
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids -> hidden states after the last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Given its weight, Embedding skips its own initialisation, which on the meta device imports half a compiler.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)
        # A plain attribute, not a buffer: model.to(bfloat16) must not round the RoPE frequencies. The first half of a
        # head turns backwards, which leaves the cosine as it is and gives the sine its minus sign: see rotate.
        freqs = rope_frequencies(config)
        self.rope_freqs = torch.cat((-freqs, freqs))  # (hd,)
        # Gemma scales embeddings by sqrt(D) rounded to the model's dtype: in bf16 55.5 where sqrt(3072) is 55.4256.
        self.embed_scale = {
            dtype: torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """tokens (B, T) -> (B, T, D). With a cache, row b's tokens stand at positions lengths[b] + 0 … T-1.

        Rows of different length are padded on the right and read at their own last token: padding is written past a
        row's end, where no mask reaches, and the next tokens overwrite it. Positions stay what they were in training.
        """
        config, T, device = self.config, tokens.shape[1], tokens.device
        positions = torch.arange(T, device=device)[None]  # (1, T)
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
        if self.rope_freqs.device != device:
            self.rope_freqs = self.rope_freqs.to(device)
        query = positions[:, None, :, None]  # (B or 1, 1, T, 1)
        angles = query * self.rope_freqs  # (B or 1, 1, T, hd)
        cos, sin = angles.cos(), angles.sin()

        x = self.embed_tokens(tokens)  # (B, T, D)
        if config.scale_embeddings:
            x = x * self.embed_scale[x.dtype]

        # Query t may not see key s where s lies after t (causal) or, in a local layer, outside the window.
        mask = mask_local = None
        if cache is not None or config.attn_logit_softcapping is not None or config.local_layers:
            keys = torch.arange(T if cache is None else cache.visible, device=device)  # (S,)
            later = keys > query
            mask = mask_local = as_mask(later, x.dtype)  # (B or 1, 1, T, S)
            if config.local_layers and len(keys) > config.sliding_window:  # the window counts the query itself
                mask_local = as_mask(later | (keys <= query - config.sliding_window), x.dtype)
        for i, layer in enumerate(self.layers):
            local = bool(config.local_layers) and config.local_layers[i]
            x = layer(x, cos, sin, mask_local if local else mask, positions, cache)
        return self.norm(x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """(B, T) int64 -> (B, T, V) fp32: position t holds the scores of the token at t + 1."""
        return self.logits(self.model(tokens, cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, D) -> logits (…, V) fp32. Apart from forward, for callers who need few positions only."""
        logits = self.lm_head(hidden).float()
        if self.config.final_logit_softcapping is not None:
            logits = softcap(logits, self.config.final_logit_softcapping)
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fresh weights for pretraining: N(0, 0.02), output projections scaled down by depth (GPT-2's recipe)."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the norms keep their ones (Llama) or zeros (Gemma)
                adds_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if adds_to_stream else 1
                p.normal_(0.0, 0.02 / math.sqrt(depth), generator=generator)
