"""What a Llama is, independent of any framework: sizes, presets and their validation.

`ModelConfig` travels in checkpoints as JSON, so it holds plain values only and refuses unknown keys.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nemo_opt.errors import ConfigError

__all__ = ["PRESETS", "VOCAB_MULTIPLE", "ModelConfig", "RopeScaling", "preset"]

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to this multiple at every TP, so that checkpoints reshard without touching the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3` in Hugging Face configs)."""

    factor: float = 8.0
    """By how much low frequencies are stretched."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: int = 8192
    """Context length of the model before scaling."""

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_position_embeddings < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(f"rope_scaling needs factor > 0, 0 < low_freq_factor < high_freq_factor and a context length, got {self}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Llama-like decoder (RMSNorm, SwiGLU, RoPE, no biases), dense or mixture-of-experts."""

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP (of one expert's MLP when num_moe_experts is set)."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads (grouped-query attention); equal to num_attention_heads for multi-head attention."""
    vocab_size: int
    """Tokens of the tokenizer, without padding."""
    kv_channels: int | None = None
    """Channels of one head; None means hidden_size // num_attention_heads."""
    max_position_embeddings: int = 2048
    """Longest sequence."""
    rotary_base: float = 10000.0
    """RoPE theta."""
    rope_scaling: RopeScaling | None = None
    """Llama 3 frequency scaling; None for plain RoPE."""
    norm_epsilon: float = 1e-5
    """Added to the variance in RMSNorm."""
    tie_embeddings: bool = False
    """Share the embedding with the output head."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights."""
    num_moe_experts: int | None = None
    """Experts of every layer; None for a dense model."""
    moe_router_topk: int = 2
    """Experts a token is routed to."""

    def __post_init__(self) -> None:
        positive = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_query_groups:
            sizes = f"num_attention_heads {self.num_attention_heads} % num_query_groups {self.num_query_groups}"
            raise ConfigError(f"{sizes} != 0: choose groups that divide the heads")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} % num_attention_heads {self.num_attention_heads} != 0: set kv_channels")
        if self.kv_channels is not None and (not isinstance(self.kv_channels, int) or self.kv_channels < 1):
            raise ConfigError(f"kv_channels must be a positive integer or None, got {self.kv_channels!r}")
        if self.head_dim % 2:
            raise ConfigError(f"head dimension {self.head_dim} is odd, and RoPE rotates pairs: set an even kv_channels")
        if self.norm_epsilon <= 0:
            raise ConfigError(f"norm_epsilon must be positive, got {self.norm_epsilon}")
        if self.num_moe_experts is not None and not 1 <= self.moe_router_topk <= self.num_moe_experts:
            raise ConfigError(f"moe_router_topk {self.moe_router_topk} is not in 1..num_moe_experts {self.num_moe_experts}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; raises `ConfigError` on unknown or missing keys."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"unknown model settings {unknown}; known are {sorted(known)}")
        scaling = values.get("rope_scaling")
        if not isinstance(scaling, dict | None):
            raise ConfigError(f"rope_scaling must be settings of llama3 scaling or None, got {scaling!r}")
        try:
            return cls(**{**values, "rope_scaling": scaling and RopeScaling(**scaling)})
        except TypeError as error:
            raise ConfigError(f"incomplete model settings, or unknown ones in rope_scaling: {error}") from None

    def with_(self, **changes: Any) -> "ModelConfig":
        """A validated copy with some fields changed."""
        return replace(self, **changes)


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        num_layers=4, hidden_size=128, ffn_hidden_size=256, num_attention_heads=8, num_query_groups=4, vocab_size=2048,
        max_position_embeddings=512,
    ),
    "68m": ModelConfig(num_layers=2, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, num_query_groups=12, vocab_size=32000),
    "llama3.2-1b": ModelConfig(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8, vocab_size=128256,
        max_position_embeddings=131072, rotary_base=500000.0, rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True,
    ),
    "llama3.1-8b": ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, vocab_size=128256,
        max_position_embeddings=131072, rotary_base=500000.0, rope_scaling=RopeScaling(factor=8.0),
    ),
}  # fmt: skip
"""Known Llamas by name; `68m` has the sizes of NeMo's CI model (llama_68M)."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called `name`, with fields changed; raises `ConfigError` naming the known presets."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}; known are {sorted(PRESETS)}")
    return PRESETS[name].with_(**changes)
