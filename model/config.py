"""ModelConfig: the numbers that tell the families apart, read from a Hugging Face config.json.

    config = ModelConfig.load("path/to/Meta-Llama-3-8B")       # reads config.json
    config = ModelConfig(vocab_size=1024, hidden_size=128, ...)  # or by hand

The families are those of FAMILIES below. What differs between them is a field here, never a class. Field names are
Hugging Face's, so that a config can be read beside the file it came from. A setting that this code would compute
wrongly (YaRN, experts, other activations) is an error and never ignored.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from model.errors import InputError, read_json

FAMILIES = {  # model_type -> what transformers calls the network
    "llama": "LlamaForCausalLM",  # 2, 3, 3.1, 3.2, and SmolLM2
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # and Qwen2.5
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",  # and the text part of a gemma3
}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_plus_one": True,
    "scale_embeddings": True,
    "post_norms": True,
}
NETWORKS = {  # what a family has that Llama has not: fields of ModelConfig
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"qk_norm": True},
}
DEFAULTS = {  # what a file may leave out: the values of transformers' configuration classes
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072},
    "qwen2": {"max_position_embeddings": 32_768, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32_768, "max_window_layers": 28},
    "gemma2": {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    "gemma3_text": {  # with images, text_config leaves out all that has these values
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
}
NOT_KEPT = ("rope_parameters", "torch_dtype", "dtype", "vision_config")  # said in other words, or not true any more
LOCAL = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE beyond the context of pretraining: all of it by `factor` (linear), or its slow turns (llama3)."""

    factor: float
    low_freq_factor: float | None = None  # None: linear
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


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
    model_type: str = "llama"
    # The fields below are where other families differ; their defaults are Llama.
    qkv_bias: bool = False  # Qwen2: queries, keys and values have biases
    qk_norm: bool = False  # Qwen3, Gemma-3: RMSNorm of each query and key before RoPE
    hidden_act: str = "silu"  # Gemma: gelu_pytorch_tanh
    norm_plus_one: bool = False  # Gemma: RMSNorm multiplies by (1 + w) instead of w
    scale_embeddings: bool = False  # Gemma: token embeddings times sqrt(D)
    post_norms: bool = False  # Gemma: a norm after attention and MLP too, four per block
    query_pre_attn_scalar: float | None = None  # Gemma: attention scale is this^-1/2; None: head_dim^-1/2
    attn_logit_softcapping: float | None = None  # Gemma-2: cap * tanh(scores / cap), before the mask
    final_logit_softcapping: float | None = None  # Gemma-2: the same on the output logits
    sliding_window: int | None = None  # local layers see this many positions, their own included
    local_layers: tuple[bool, ...] = ()  # which layers are local; (): none
    rope_local_theta: float | None = None  # Gemma-3: RoPE's base in local layers, unscaled; None: the same
    # Ours: the id of [RESET], stored as an extra key that transformers carries along and ignores.
    reset_token_id: int | None = None
    # Keys of config.json that mean nothing to the network (bos_token_id, ...), kept for save_model.
    other: dict = field(default_factory=dict, compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)  # what load_model tells the user

    @staticmethod
    def load(path: str | Path) -> "ModelConfig":
        """Read `path`/config.json, or a config file by its name. Raises InputError naming the file and field."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path}: no such file; a model directory holds config.json beside its *.safetensors")
        raw = read_json(path)
        try:
            return ModelConfig.from_hf(raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @staticmethod
    def from_hf(raw: dict) -> "ModelConfig":
        """A config.json as a dict, in the dialect of any release of transformers -> ModelConfig."""
        raw = _text_part(raw)
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"model_type {family!r} is not supported; use one of {', '.join(FAMILIES)}")
        if raw.get("quantization_config"):
            raise InputError("the weights are quantized (quantization_config); use the bf16, fp16 or fp32 release")
        gemma, network, given = family.startswith("gemma"), NETWORKS.get(family, {}), _Fields(DEFAULTS[family], raw)
        for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
            given.one_of(name, (False,))
        # Gemma's activation has two names; transformers lets hidden_activation win.
        name = "hidden_activation" if gemma and raw.get("hidden_activation") else "hidden_act"
        given.one_of(name, (network.get("hidden_act", "silu"),))
        reset, vocab_size = raw.get("reset_token_id"), given.need("vocab_size")
        if reset is not None and (type(reset) is not int or not 0 <= reset < vocab_size):
            raise InputError(f"reset_token_id {reset!r} is not a token id below vocab_size {vocab_size}")
        window, local = _window(given, family)
        softcaps = ("attn_logit_softcapping", "final_logit_softcapping") if gemma else ()
        return ModelConfig(
            model_type=family,
            vocab_size=vocab_size,
            **{name: given.need(name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            **_heads(given, family),
            max_position_embeddings=given.need("max_position_embeddings"),
            rms_norm_eps=given.need("rms_norm_eps", float),
            tie_word_embeddings=given.one_of("tie_word_embeddings", (False, True)),
            query_pre_attn_scalar=given.need("query_pre_attn_scalar", float) if gemma else None,
            **{name: given.optional(name, None, float) for name in softcaps},
            sliding_window=window,
            local_layers=local,
            **_rope(raw, family),
            **network,
            reset_token_id=reset,
            other=raw,
            notes=_notes(raw, given),
        )

    def to_hf(self) -> dict:
        """The config.json that transformers reads, 4.50 as well as 5: our fields over what else the file held."""
        out = {k: v for k, v in self.other.items() if k not in NOT_KEPT}
        same = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        same += " num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings"
        out |= {name: getattr(self, name) for name in [*same.split(), "rope_theta"]}
        out["architectures"] = [FAMILIES[self.model_type]]
        # The older dialect of RoPE: every release reads it.
        out["rope_scaling"] = self.rope_scaling
        if self.rope_scaling is not None:
            kind = "linear" if self.rope_scaling.low_freq_factor is None else "llama3"
            numbers = {name: x for name, x in asdict(self.rope_scaling).items() if x is not None}
            out["rope_scaling"] = {"rope_type": kind, **numbers}
        local = list(self.local_layers) or [False] * self.num_hidden_layers
        if self.model_type not in ("llama", "mistral"):
            names = {is_local: name for name, is_local in LOCAL.items()}
            out["layer_types"] = [names[x] for x in local]
        if self.model_type == "mistral" or any(local):
            out["sliding_window"] = self.sliding_window
        if self.model_type.startswith("qwen"):
            first = local.index(True) if any(local) else self.num_hidden_layers
            out |= {"use_sliding_window": any(local), "max_window_layers": first}
        if self.model_type.startswith("gemma"):
            out["hidden_activation"] = self.hidden_act
            for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
                out[name] = getattr(self, name)
        if self.model_type == "gemma3_text":  # releases before layer_types go by the pattern: the n-th layer is global
            out["rope_local_base_freq"] = self.rope_local_theta
            out["sliding_window_pattern"] = local.index(False) + 1 if False in local else len(local) + 1
        if self.reset_token_id is not None:
            out["reset_token_id"] = self.reset_token_id
        return out


def _text_part(raw: dict) -> dict:
    """Of a gemma3 with images, the config of its text model."""
    if raw.get("model_type") != "gemma3" or not isinstance(raw.get("text_config"), dict):
        return raw
    ours = ("bos_token_id", "eos_token_id", "pad_token_id", "reset_token_id", "tie_word_embeddings")
    outer = {name: raw[name] for name in (*ours, "quantization_config") if name in raw}
    outer["vision_config"] = raw.get("vision_config")  # for load_model, which refuses its tensors
    return outer | raw["text_config"] | {"model_type": "gemma3_text"}


class _Fields:
    """The fields of a config.json, each checked as it is read. What is null counts as left out."""

    def __init__(self, *parts: dict):
        """Each part goes before those to its left."""
        self.raw = {name: value for part in parts for name, value in part.items() if value is not None}

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
        return self.need(name, kind) if name in self.raw else default

    def one_of(self, name: str, good: tuple):
        """Its value, by default the first of the good ones. Nothing else is implemented."""
        value = self.raw.get(name, good[0])
        if value not in good:
            raise InputError(f"{name} {value!r} is not supported (only {' or '.join(map(repr, good))})")
        return value


def _notes(raw: dict, given: _Fields) -> tuple[str, ...]:
    """What the user should know of a file that is taken all the same."""
    notes, family = [], raw["model_type"]
    if raw.get("max_position_embeddings") is None:
        default = DEFAULTS[family]["max_position_embeddings"]
        notes.append(f"no max_position_embeddings: taken to be {default}, as transformers does for {family}")
    width, heads = given.need("hidden_size"), given.need("num_attention_heads")
    if width % heads and family in ("llama", "gemma2", "gemma3_text"):
        why = "transformers 5 refuses such a model, this one and what is saved of it"
        notes.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}: {why}")
    return tuple(notes)


def _heads(given: _Fields, family: str) -> dict[str, int]:
    """How many query heads and key/value heads there are, and their width."""
    heads, width = given.need("num_attention_heads"), given.need("hidden_size")
    kv_heads = given.optional("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    must_say = family in ("gemma2", "qwen3") or width % heads
    head_dim = given.need("head_dim") if must_say else given.optional("head_dim", width // heads)
    if head_dim % 2:
        raise InputError(f"head_dim {head_dim} is odd; rotary embeddings need pairs")
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _window(given: _Fields, family: str) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window, and which layers have it."""
    layers = range(given.need("num_hidden_layers"))
    if family == "llama":
        return None, ()
    window = given.need("sliding_window") if family.startswith("gemma") else given.optional("sliding_window", None)
    if family.startswith("qwen") and not given.one_of("use_sliding_window", (False, True)):
        window = None
    if window is None:
        local = [False for i in layers]
    elif family.startswith("qwen"):
        first = given.raw["max_window_layers"]
        if not isinstance(first, int):
            raise InputError(f"max_window_layers {first!r} is not a number of layers")
        local = [i >= first for i in layers]
    elif family == "gemma3_text":
        every = given.need("sliding_window_pattern")  # every so many-th layer is global
        local = [(i + 1) % every > 0 for i in layers]
    else:
        local = [family == "mistral" or i % 2 == 0 for i in layers]
    names = given.raw.get("layer_types")
    if names is not None:
        names = names[: len(layers)] if isinstance(names, list) else []
        if len(names) < len(layers) or not all(isinstance(name, str) and name in LOCAL for name in names):
            raise InputError(f"layer_types must name sliding_attention or full_attention for {len(layers)} layers")
        named = [LOCAL[name] for name in names]
        if named != local and (family == "mistral" or window is None):
            raise InputError(f"layer_types and sliding_window of this {family} contradict each other")
        local = named
    return (window, tuple(local)) if any(local) else (None, ())


def _rope(raw: dict, family: str) -> dict:
    """RoPE's base, its scaling, and the base in local layers, from any of the dialects: `rope_theta` and `rope_scaling`
    (published files), one `rope_parameters` (newer), or one for each layer type (Gemma-3)."""
    gemma3 = family == "gemma3_text"
    whole, local = raw.get("rope_parameters") or {}, {}
    if isinstance(whole, dict) and whole.keys() & LOCAL.keys() and gemma3:
        whole, local = whole.get("full_attention") or {}, whole.get("sliding_attention") or {}
    whole = whole or raw.get("rope_scaling") or {}
    for part in (whole, local):
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise InputError(f"rope_parameters or rope_scaling {part!r} is not what a {family} has")
    if gemma3 and raw.get("rope_parameters") and not local:
        raise InputError("rope_parameters lacks an object for 'sliding_attention' or for 'full_attention'")
    # Llama 2's first config.json has no base; 10000 is its default.
    theta = _Fields({"rope_theta": 1e4}, DEFAULTS[family], raw, whole).need("rope_theta", float)
    found = {"rope_theta": float(theta), "rope_scaling": _scaling(whole)}
    if gemma3:
        local_theta = {"rope_local_base_freq": local.get("rope_theta")}
        theta = _Fields(DEFAULTS[family], raw, local_theta).need("rope_local_base_freq", float)
        found["rope_local_theta"] = float(theta)
    if _scaling(local) is not None:
        raise InputError("RoPE scaling in local layers is not supported")
    return found


def _scaling(part: dict) -> RopeScaling | None:
    kind = part.get("rope_type") or part.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise InputError(f"RoPE scaling {kind!r} is not supported (only 'llama3', 'linear', or none)")
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    given = _Fields(part)
    found = RopeScaling(*(given.need(name, float) for name in names))
    if kind == "llama3" and found.high_freq_factor <= found.low_freq_factor:
        raise InputError("high_freq_factor of the 'llama3' RoPE scaling must exceed its low_freq_factor")
    return found
