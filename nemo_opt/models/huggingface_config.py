"""Llama's `config.json`: Hugging Face's vocabulary into `ModelConfig` and back. Torch-free, so that a wrong directory is refused at once.

Both spellings of RoPE are read: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of transformers 5. The first is
written, since both versions and the inference engines read it. What a Llama here cannot express is refused, never dropped.
"""

import json
from pathlib import Path
from typing import Any

from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import ModelConfig, RopeScaling

__all__ = ["config_from_hf", "config_to_hf", "is_huggingface", "read_json", "special_token_ids"]

_SUPPORTED = "only LlamaForCausalLM is supported (RMSNorm, SwiGLU, RoPE with or without llama3 scaling, no biases)"
_REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Settings with the one value that is supported, which is also their default in transformers."""


def is_huggingface(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face model directory."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / "nemo_opt.json").is_file()


def config_from_hf(directory: str | Path) -> ModelConfig:
    """The sizes of the Llama in a Hugging Face directory.

    Raises:
        CheckpointError: There is no readable `config.json`.
        ConfigError: It describes something else than a Llama, or one with settings that are not supported; names them.

    """
    directory = Path(directory)
    hf = read_json(directory / "config.json")
    architectures = hf.get("architectures") or (["LlamaForCausalLM"] if hf.get("model_type") == "llama" else [])
    if architectures != ["LlamaForCausalLM"]:
        raise ConfigError(f"{directory} holds {architectures or hf.get('model_type')}: {_SUPPORTED}")
    if quantization := hf.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(f"{directory} is quantised (quant_method {method!r}): give the model that it was made from")
    for name, supported in _FIXED.items():
        if (value := hf.get(name, supported)) != supported:
            raise ConfigError(f"{directory}: {name} is {value!r}: {_SUPPORTED}")
    if missing := sorted(name for name in _REQUIRED if hf.get(name) is None):
        raise ConfigError(f"{directory}/config.json lacks {missing}")
    try:
        return _sizes(directory, hf)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{directory}/config.json holds a value of another type than a Llama's: {error}") from None


def _sizes(directory: Path, hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        **{ours: hf[theirs] for theirs, ours in _REQUIRED.items()},
        num_query_groups=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        kv_channels=_kv_channels(hf),
        max_position_embeddings=int(hf.get("max_position_embeddings", 2048)),
        **_rope(directory, hf),
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        init_method_std=hf.get("initializer_range", 0.02),
    )


def config_to_hf(config: ModelConfig, *, dtype: str, special_tokens: dict[str, int | None] | None = None) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
        config: Sizes; dense only.
        dtype: Name of the weights' dtype, for instance `bfloat16`.
        special_tokens: See `special_token_ids`; transformers would otherwise assume Llama 2's.

    Raises:
        ConfigError: LlamaForCausalLM cannot express the model.

    """
    if config.num_moe_experts is not None:
        raise ConfigError(f"the model has {config.num_moe_experts} experts: {_SUPPORTED}")
    if config.hidden_size % config.num_attention_heads:
        sizes = f"hidden_size {config.hidden_size} % num_attention_heads {config.num_attention_heads}"
        raise ConfigError(f"{sizes} != 0: transformers' LlamaConfig refuses that, prune to sizes that divide")
    hf: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        **{theirs: getattr(config, ours) for theirs, ours in _REQUIRED.items()},
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rotary_base,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_method_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **(special_tokens or {"bos_token_id": None, "eos_token_id": None}),
    }
    if (scaling := config.rope_scaling) is not None:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return hf


def special_token_ids(tokenizer_dir: str | Path) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a Hugging Face tokenizer directory; None where it names no such token."""
    settings = read_json(Path(tokenizer_dir) / "tokenizer_config.json")
    added = read_json(Path(tokenizer_dir) / "tokenizer.json").get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    names = {f"{kind}_id": settings.get(kind) for kind in ("bos_token", "eos_token", "pad_token")}
    return {kind: ids.get(name["content"] if isinstance(name, dict) else name) for kind, name in names.items()}


def _kv_channels(hf: dict[str, Any]) -> int | None:
    """None where the head dimension is the usual one, so that equal models have equal configs."""
    head_dim = hf.get("head_dim")
    return None if head_dim is None or head_dim * hf["num_attention_heads"] == hf["hidden_size"] else head_dim


def _rope(directory: Path, hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    base = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if kind not in ("default", "llama3") or partial != 1.0:
        raise ConfigError(f"{directory}: RoPE of type {kind!r} with partial_rotary_factor {partial}: {_SUPPORTED}")
    if kind == "default":
        return {"rotary_base": base}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [name for name in names if name not in rope]:
        raise ConfigError(f"{directory}: llama3 RoPE scaling lacks {missing}")
    original = rope.get("original_max_position_embeddings", hf.get("max_position_embeddings", 2048))
    scaling = RopeScaling(**{name: float(rope[name]) for name in names}, original_max_position_embeddings=original)
    return {"rotary_base": base, "rope_scaling": scaling}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; `CheckpointError`, naming it, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON (truncated?): {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values
