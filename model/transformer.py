"""The whole network: a decoder-only transformer of any family in config.py, from Llama to Gemma-3.

Token ids become vectors; every block adds to them what its attention found in earlier positions and
what its MLP made of that; the last norm and one matrix turn them into scores of the next token:

    x = embed(tokens)
    for each block:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = lm_head(norm(x))

    model = Transformer(ModelConfig(...))
    logits = model(tokens)                    # (B, T) int64 -> (B, T, V) fp32: scoring
    logits = model(tokens, cache)             # the same, reading and writing a KVCache: decoding
    logits = model(tokens, positions=…, visible=…, at=…)    # a tree of tokens: training

Read from the top down: Transformer, Decoder, Block, Attention, MLP, RMSNorm, RoPE. Parameter names
are Hugging Face's, so loading a checkpoint renames nothing. No dropout, no attention weights
returned.

Shapes: B batch, T tokens of this call, S keys (cached and new), D model width (hidden_size), H
query heads, K key/value heads, G = H / K query heads per key/value head, hd head_dim, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.cache import KVCache
from model.config import ModelConfig
from model.linear import Linear
from model.slices import own_rows

LOGITS = 2**28  # so many are in memory at once, 1 GiB, where callers cut their `at` into parts


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

    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        *,
        positions: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        at: torch.Tensor | None = None,
        read: Callable | None = None,
    ) -> torch.Tensor:
        """(B, T) int64 -> logits (B, T, V) fp32: those at t are the scores of the token after t.

        positions  (B, T) int64: where each token stands in its sequence. Default: in a row.
        visible    (B, T, T) bool: does token t see token s? Default: all s ≤ t. Not with a cache.
        at         (N,) int64, indices into the flattened B·T: logits are (N, V), of these alone.
                   With a vocabulary of 128,000 they take more memory than all the rest.
        read       what to return instead of logits, a function of the hidden states (…, D). It may
                   call `logits`: a model in slices (model/slices.py) is whole only in here.
        """
        hidden = self.model(tokens, cache, positions, visible)  # (B, T, D)
        if at is not None:
            hidden = hidden.flatten(0, 1)[at]  # (N, D)
        return self.logits(hidden) if read is None else read(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, D) -> logits (…, V) fp32."""
        logits = self.lm_head(hidden).float()
        if self.config.final_logit_softcapping is not None:
            logits = softcap(logits, self.config.final_logit_softcapping)
        return logits

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Weights to pretrain from: N(0, 0.02), output projections smaller by depth (GPT-2)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:  # norms and biases start as if they were not there
                is_gain = not name.endswith(".bias") and not self.config.norm_plus_one
                p.fill_(1.0 if is_gain else 0.0)
                continue
            adds_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * self.config.num_hidden_layers if adds_to_stream else 1
            # Drawn as a whole, whatever part of it is kept here: so the numbers are the same.
            drawn = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            drawn.normal_(0.0, 0.02 / math.sqrt(depth), generator=generator)
            rows, first = own_rows(p)
            rows.copy_(drawn[first : first + len(rows)])


class Decoder(nn.Module):
    """Token ids -> hidden states after the last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Given its weight, Embedding skips its own initialisation, which on the meta device imports
        # half a compiler.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)
        # A plain attribute, not a buffer: model.to(bfloat16) must not round the frequencies.
        kinds = (False, True) if config.rope_local_theta else (False,)
        self.rope_freqs = [rope_frequencies(config, local) for local in kinds]  # (hd / 2,) each
        # Gemma scales embeddings by sqrt(D) rounded to the model's dtype: in bf16 55.5 where
        # sqrt(3072) is 55.4256.
        self.embed_scale = {
            dtype: torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }

    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        positions: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) -> (B, T, D). With a cache, row b's tokens are appended to its lengths[b].

        Rows of different length are padded on the right and read at their own last token. Padding
        is then cut off the cache (`truncate`): no mask reaches it, the next tokens overwrite it.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
            if cache is not None:
                positions = cache.lengths[:, None] + positions  # (B, T)
        if self.rope_freqs[0].device != tokens.device:
            self.rope_freqs = [freqs.to(tokens.device) for freqs in self.rope_freqs]
        angles = [positions[:, None, :, None] * freqs for freqs in self.rope_freqs]
        ropes = [(a.cos(), a.sin()) for a in angles]  # (B or 1, 1, T, hd / 2): global, then local
        mask, local_mask = self.masks(positions, visible, cache)

        x = self.embed_tokens(tokens)  # (B, T, D)
        if self.config.scale_embeddings:
            x = x * self.embed_scale[x.dtype]
        for i, layer in enumerate(self.layers):
            is_local = bool(self.config.local_layers) and self.config.local_layers[i]
            context = (ropes[-1], local_mask) if is_local else (ropes[0], mask)
            x = layer(x, *context, positions, cache)
        if cache is not None:
            cache.grow(T)
        return self.norm(x)

    def masks(self, positions, visible, cache: KVCache | None):
        """What is added to the scores, 0 or -inf, in global and in local layers: (B or 1, 1, T, S).

        A token sees what `visible` says, or else all that stands before it and itself. In a local
        layer it sees the last `sliding_window` positions of that, its own included. None for both
        means plain causal attention, which needs no mask.
        """
        config = self.config
        S = positions.shape[-1] if cache is None else cache.visible
        shows_all = not config.local_layers or config.sliding_window >= S  # the window does
        plain = visible is None and cache is None
        if plain and shows_all and config.attn_logit_softcapping is None:
            return None, None
        dtype = self.embed_tokens.weight.dtype
        position = positions[:, None, :, None]  # (B or 1, 1, T, 1)
        key = positions if cache is None else torch.arange(S, device=positions.device)[None]
        key = key[:, None, None, :]  # where the keys stand, (B or 1, 1, 1, S)

        blocked = key > position if visible is None else ~visible[:, None]
        mask = as_mask(blocked, dtype)
        if shows_all:
            return mask, mask
        too_far = key <= position - config.sliding_window
        return mask, as_mask(blocked | too_far, dtype)


def as_mask(blocked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """True -> -inf, False -> 0."""
    zeros = torch.zeros(blocked.shape, dtype=dtype, device=blocked.device)
    return zeros.masked_fill_(blocked, float("-inf"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma also norms what it is about to add."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm():
            return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_plus_one)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer)
        # One name in all families, in Gemma in another place: see add.
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config)
        self.post_norms = config.post_norms
        self.recompute = False  # in the backward pass, so that only the input of a block is kept
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x, *context) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            keep_rng = False  # nothing here is random
            return checkpoint(
                self.add, x, *context, use_reentrant=False, preserve_rng_state=keep_rng
            )
        return self.add(x, *context)

    def add(self, x, *context) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), *context)
        if self.post_norms:  # Gemma
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Each token looks, with H heads, for what it needs among the tokens it may see."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, hd = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, H, K, hd
        self.q_proj = Linear(D, H * hd, config.qkv_bias)
        self.k_proj = Linear(D, K * hd, config.qkv_bias)
        self.v_proj = Linear(D, K * hd, config.qkv_bias)
        self.o_proj = Linear(H * hd, D)
        self.qk_norm = config.qk_norm
        if config.qk_norm:  # of every head's queries and keys
            self.q_norm = RMSNorm(hd, config.rms_norm_eps, config.norm_plus_one)
            self.k_norm = RMSNorm(hd, config.rms_norm_eps, config.norm_plus_one)
        self.scale = (config.query_pre_attn_scalar or hd) ** -0.5
        self.cap = config.attn_logit_softcapping

    def forward(self, x, rope, mask, positions, cache: KVCache | None) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, hd)
        if self.qk_norm:  # Qwen3, Gemma-3
            q, k = self.q_norm(q), self.k_norm(k)
        # Queries and keys are rotated alike, so in one go.
        qk = torch.cat((q, k), dim=2).transpose(1, 2)  # (B, H + K, T, hd)
        q, k = rotate(qk, *rope).split((self.heads, self.kv_heads), dim=1)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # (B, K, S, hd)
        y = attend(q, k, v, mask, self.scale, self.cap)  # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask, scale: float, cap: float | None) -> torch.Tensor:
    """softmax(q·kᵀ·scale + mask)·v. q (B, H, T, hd), k and v (B, K, S, hd) -> (B, H, T, hd).

    Query head h reads key/value head h // G. mask (B or 1, 1, T, S); None means causal attention.
    """
    B, H, T, hd = q.shape
    K, S = k.shape[1], k.shape[2]
    G = H // K
    # The fused kernel never builds the scores. It knows no softcap; and on a CPU it takes more
    # than twice as long in bf16 as two products and scores in memory, too many for long texts.
    unfused = cap is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= 768)
    if mask is None and not unfused:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=G > 1
        )
    if T > 1 and not unfused:
        # Copied keys cost little here; with both a mask and enable_gqa CUDA has no fused kernel.
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    # With the G heads of a group stacked along T, one product serves them all and no key is copied.
    if T == 1 and cap is None:  # the G queries of a group share its one mask
        q = q.reshape(B, K, G, hd)
        # On CUDA the result is laid out in another order than on a CPU: reshape, not view.
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(B, H, T, hd)
    q, k, v = q.reshape(B * K, G * T, hd), k.reshape(B * K, S, hd), v.reshape(B * K, S, hd)
    if mask is None:
        mask = as_mask(torch.ones(1, 1, T, S, device=q.device).triu(1).bool(), q.dtype)
    mask = mask.type_as(q)[:, :, None].expand(B, K, G, T, S).reshape(B * K, G * T, S)
    if cap is None:
        scores = torch.baddbmm(mask, q, k.mT, alpha=scale)  # mask + scale · q·kᵀ, rounded once
    else:
        scores = softcap((q * scale) @ k.mT, cap)
        scores = scores + mask
    return (scores.softmax(dim=-1) @ v).view(B, H, T, hd)  # softmax adds up in fp32, in bf16 too


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), act SiLU in Llama, tanh-GELU in Gemma (arXiv 2002.05202)."""

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


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), then a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float, plus_one: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if plus_one else torch.ones(dim))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # F.rms_norm computes the same, on a CPU in three times as many operations.
        normed = x.float()
        normed = normed * torch.rsqrt(normed.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.plus_one:  # Gemma: x̂ · (1 + w) in fp32, then round
            return (normed * (1.0 + self.weight.float())).type_as(x)
        return self.weight * normed.type_as(x)  # Llama: round, then multiply


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Squash x smoothly into (-cap, cap)."""
    return torch.tanh(x / cap) * cap


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: turn each pair (x1, x2) by its angle (arXiv 2104.09864), in Hugging Face's layout.

    There dimension i is paired with i + hd/2. x (B, heads, T, hd); cos, sin (B or 1, 1, T, hd/2)
    fp32.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return turned.type_as(x)


def rope_frequencies(config: ModelConfig, local: bool = False) -> torch.Tensor:
    """Angle per position of each of the hd/2 pairs: theta^(-2i/hd), fp32. local: Gemma-3's own."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    theta = config.rope_local_theta if local else config.rope_theta
    freqs, s = 1.0 / theta ** (exponent / config.head_dim), config.rope_scaling
    if local or s is None:
        return freqs
    if s.low_freq_factor is None:  # linear: as if positions lay closer together
        return freqs / s.factor
    # Turns longer than the context of pretraining are slowed by `factor`, short ones are left
    # alone, and in between the two are blended (github.com/meta-llama/llama-models, apply_scaling).
    turns = s.original_max_position_embeddings * freqs / (2 * math.pi)  # within that context
    blend = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return freqs * blend + freqs / s.factor * (1.0 - blend)
