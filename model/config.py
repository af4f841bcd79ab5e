"""ModelConfig: the few numbers that tell Llama and Gemma-2 apart, read from a Hugging Face config.json.

    config = ModelConfig.load("path/to/Meta-Llama-3-8B")       # reads config.json
    config = ModelConfig(vocab_size=1024, hidden_size=128, ...)  # or by hand, as `train.py base` does

Field names are Hugging Face's, so that a config can be read beside the file it came from. Only `llama` (2, 3, 3.1,
3.2) and `gemma2` are known; a setting that this code would compute wrongly (biases, other RoPE scalings, other
activations) is an error and never ignored.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import InputError, refuse_pointer


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow RoPE frequencies beyond the context of pretraining."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K: each key/value head serves H / K query heads
    head_dim: int  # not always D / H
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    # The fields below are where Gemma-2 differs; their defaults are Llama.
    model_type: str = "llama"
    hidden_act: str = "silu"  # Gemma: gelu_pytorch_tanh
    norm_plus_one: bool = False  # RMSNorm multiplies by (1 + w) instead of w
    scale_embeddings: bool = False  # token embeddings times sqrt(D)
    post_norms: bool = False  # a norm after attention and MLP too: four per block
    query_pre_attn_scalar: float | None = None  # attention scale is this^-1/2; None: head_dim^-1/2
    attn_logit_softcapping: float | None = None  # cap * tanh(scores / cap), before the mask
    final_logit_softcapping: float | None = None  # the same on the output logits
    sliding_window: int | None = None  # local layers see this many positions, their own included
    local_layers: tuple[bool, ...] = ()  # which layers are local; (): none
    # Ours: the id of [RESET], stored as an extra key that transformers carries along and ignores.
    reset_token_id: int | None = None
    # Keys of config.json that mean nothing to the network (bos_token_id, ...), kept for save_model.
    other: dict = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def load(path: str | Path) -> "ModelConfig":
        """Read `path`/config.json, or a config file by its name. Raises InputError naming the file and field."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path}: no such file; a model directory holds config.json beside its *.safetensors")
        refuse_pointer(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); download it again") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path}: expected a JSON object; download it again")
        try:
            return ModelConfig.from_hf(raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @staticmethod
    def from_hf(raw: dict) -> "ModelConfig":
        """A config.json as a dict, in either RoPE dialect -> ModelConfig."""
        model_type = raw.get("model_type")
        if model_type not in ("llama", "gemma2"):
            raise InputError(f"model_type {model_type!r} is not supported; use a 'llama' or 'gemma2' checkpoint")
        gemma = model_type == "gemma2"
        given = _Fields(raw)
        given.refuse("attention_bias", (False,), False)
        given.refuse("mlp_bias", (False,), False)
        given.refuse("use_bidirectional_attention", (False,), False)
        tied = given.refuse("tie_word_embeddings", (False, True), gemma)
        if raw.get("quantization_config"):
            raise InputError("the weights are quantized (quantization_config); use the bf16, fp16 or fp32 release")

        heads, kv_heads, head_dim = _heads(given, gemma)
        rope_theta, rope_scaling = _rope(raw)
        reset = raw.get("reset_token_id")
        vocab_size = given.need("vocab_size")
        if reset is not None and (isinstance(reset, bool) or not isinstance(reset, int) or not 0 <= reset < vocab_size):
            raise InputError(f"reset_token_id {reset!r} is not a token id below vocab_size {vocab_size}")
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=given.need("hidden_size"),
            intermediate_size=given.need("intermediate_size"),
            num_hidden_layers=given.need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=given.need("max_position_embeddings"),
            rms_norm_eps=given.need("rms_norm_eps", float),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(tied),
            model_type=model_type,
            reset_token_id=reset,
            other=raw,
            **(_only_gemma(given) if gemma else {"hidden_act": given.refuse("hidden_act", ("silu",), "silu")}),
        )

    def to_hf(self) -> dict:
        """The config.json that transformers reads: our fields over whatever else the original file held."""
        out = {k: v for k, v in self.other.items() if k not in ("rope_parameters", "torch_dtype", "dtype")}
        gemma = self.model_type == "gemma2"
        out.update(
            architectures=["Gemma2ForCausalLM" if gemma else "LlamaForCausalLM"],
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            hidden_act=self.hidden_act,
            tie_word_embeddings=self.tie_word_embeddings,
            # The older RoPE dialect: every release of transformers reads it.
            rope_theta=self.rope_theta,
            rope_scaling=None if self.rope_scaling is None else {"rope_type": "llama3", **vars(self.rope_scaling)},
        )
        if gemma:
            local = {True: "sliding_attention", False: "full_attention"}
            out.update(
                hidden_activation=self.hidden_act,
                query_pre_attn_scalar=self.query_pre_attn_scalar,
                attn_logit_softcapping=self.attn_logit_softcapping,
                final_logit_softcapping=self.final_logit_softcapping,
                sliding_window=self.sliding_window,
                layer_types=[local[x] for x in self.local_layers],
            )
        if self.reset_token_id is not None:
            out["reset_token_id"] = self.reset_token_id
        return out


class _Fields:
    """The fields of a config.json, each checked as it is read."""

    def __init__(self, raw: dict):
        self.raw = raw

    def need(self, name: str, kind=int):
        """A positive number, as it is written: transformers insists on an int here and there."""
        value = self.raw.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = f"is {value!r}, expected a number" if name in self.raw else "is missing"
            raise InputError(f"field {name!r} {found}; take config.json from the original checkpoint")
        if not 0 < value < math.inf or (kind is int and value != int(value)):  # json reads NaN and Infinity
            raise InputError(f"field {name!r} is {value!r}, expected a positive {kind.__name__}")
        return int(value) if kind is int else value

    def optional(self, name: str, default, kind=int):
        return default if self.raw.get(name) is None else self.need(name, kind)

    def refuse(self, name: str, good: tuple, default):
        """Its value, which must be one of the good ones: nothing else is implemented here."""
        value = default if self.raw.get(name) is None else self.raw[name]
        if value not in good:
            raise InputError(f"{name} {value!r} is not supported (only {' or '.join(map(repr, good))})")
        return value


def _heads(given: _Fields, gemma: bool) -> tuple[int, int, int]:
    """How many query heads and key/value heads, and their width."""
    heads, width = given.need("num_attention_heads"), given.need("hidden_size")
    kv_heads = given.optional("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if given.raw.get("head_dim") is None and (gemma or width % heads):
        raise InputError("field 'head_dim' is missing; take config.json from the original checkpoint")
    head_dim = given.optional("head_dim", width // heads)
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd; rotary embeddings need pairs")
    return heads, kv_heads, head_dim


def _only_gemma(given: _Fields) -> dict:
    """What a Gemma-2 file has besides a Llama's."""
    raw, layers = given.raw, given.need("num_hidden_layers")
    # The activation has two names there; transformers lets hidden_activation win.
    name = "hidden_activation" if raw.get("hidden_activation") else "hidden_act"
    local = {"sliding_attention": True, "full_attention": False}
    layer_types = raw.get("layer_types") or ["sliding_attention", "full_attention"] * layers  # even: local
    layer_types = layer_types[:layers] if isinstance(layer_types, list) else []
    if len(layer_types) < layers or not all(t in list(local) for t in layer_types):
        raise InputError(f"layer_types must name sliding_attention or full_attention for {layers} layers")
    return {
        "hidden_act": given.refuse(name, ("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
        "norm_plus_one": True,
        "scale_embeddings": True,
        "post_norms": True,
        "query_pre_attn_scalar": given.need("query_pre_attn_scalar", float),
        "attn_logit_softcapping": given.optional("attn_logit_softcapping", None, float),
        "final_logit_softcapping": given.optional("final_logit_softcapping", None, float),
        "sliding_window": given.need("sliding_window"),
        "local_layers": tuple(local[t] for t in layer_types),
    }


def _rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling from `rope_theta` + `rope_scaling` (published files) or `rope_parameters` (newer)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"rope_scaling {scaling!r} is not an object")
    theta = raw.get("rope_theta") if scaling.get("rope_theta") is None else scaling["rope_theta"]
    theta = 10000.0 if theta is None else theta  # Llama 2's first config.json has none; 10000 is its default
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise InputError(f"rope_theta {theta!r} is not a positive number")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise InputError(f"RoPE scaling {kind!r} is not supported (only 'llama3', or none)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        if isinstance(scaling.get(name), bool) or not isinstance(scaling.get(name), (int, float)):
            raise InputError(f"the 'llama3' RoPE scaling lacks a number for {name!r}")
        if not 0 < scaling[name] < math.inf:
            raise InputError(f"{name} {scaling[name]!r} of the RoPE scaling is not a positive number")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise InputError("high_freq_factor of the 'llama3' RoPE scaling must exceed its low_freq_factor")
    return float(theta), RopeScaling(*(scaling[name] for name in names))
