"""The sizes of a built model, read back from its weights: after pruning they differ from those it was built with."""

from collections.abc import Sequence
from typing import Any, Literal

import nemo_opt._stack

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig, RopeScaling

__all__ = ["CONFIG_ATTRIBUTE", "Spec", "check_vocabulary", "model_config_of", "spec_of", "unwrap"]

Spec = Literal["te", "local"]
"""Which modules a layer is made of: Transformer Engine's (or its reference on CPU), or Megatron-Core's own."""

CONFIG_ATTRIBUTE = "nemo_opt_config"
"""Of a GPTModel: the ModelConfig that it was built from, for what its weights do not say."""


def unwrap(model: Any) -> GPTModel:
    """The GPTModel inside DDP, Float16Module and a list of one chunk.

    Raises:
        ConfigError: There are several chunks, or no GPTModel inside.

    """
    if isinstance(model, list | tuple):
        if len(model) != 1:
            raise ConfigError(f"expected one model chunk, got {len(model)}: choose a chunk, or use vp=1")
        model = model[0]
    while not isinstance(model, GPTModel):
        if not hasattr(model, "module"):
            raise ConfigError(f"no GPTModel inside {type(model).__name__}")
        model = model.module
    return model


def model_config_of(model: Any) -> ModelConfig:
    """The true sizes of a built model, from the shapes of its weights.

    Args:
        model: A GPTModel, a wrapper of one (see `unwrap`), or this rank's chunks. Under pipeline parallelism, where a rank does not
            see all layers, their number is taken from Megatron-Core's config.

    """
    gpt_model = _any_chunk(model)
    sizes = _sizes_from_weights(gpt_model)
    known: ModelConfig | None = getattr(gpt_model, CONFIG_ATTRIBUTE, None)
    if known is not None:
        return known.with_(**sizes)
    # Built elsewhere: GPTModel keeps all but the tokenizer's vocabulary and the parameters of RoPE scaling, whose defaults are Llama 3.1's.
    return ModelConfig(
        vocab_size=gpt_model.vocab_size,
        max_position_embeddings=gpt_model.max_sequence_length,
        rotary_base=float(gpt_model.rotary_base),
        rope_scaling=RopeScaling() if gpt_model.rotary_scaling else None,
        norm_epsilon=gpt_model.config.layernorm_epsilon,
        tie_embeddings=gpt_model.share_embeddings_and_output_weights,
        init_method_std=gpt_model.config.init_method_std,
        moe_router_topk=gpt_model.config.moe_router_topk,
        **sizes,
    )


def spec_of(model: Any) -> Spec:
    """The layer spec that a model was built with."""
    return "te" if _any_chunk(model).config.transformer_impl == "transformer_engine" else "local"


def check_vocabulary(config: ModelConfig, tokenizer_vocab_size: int, *, allow_unused_rows: bool = False) -> None:
    """Refuses a tokenizer that does not belong to the model.

    Args:
        config: The model's sizes.
        tokenizer_vocab_size: Number of tokens, added ones included.
        allow_unused_rows: Accept embeddings with more rows than there are tokens, as some published models have.

    Raises:
        ConfigError: Names both sizes.

    """
    if tokenizer_vocab_size == config.vocab_size or (allow_unused_rows and tokenizer_vocab_size < config.vocab_size):
        return
    raise ConfigError(
        f"the tokenizer has {tokenizer_vocab_size} tokens, the model's vocabulary has {config.vocab_size}: "
        "use the tokenizer that the model was trained with"
    )


def _any_chunk(model: Any) -> GPTModel:
    return unwrap(model[0] if isinstance(model, Sequence) and model else model)


def _sizes_from_weights(model: GPTModel) -> dict[str, Any]:
    mcore_config = model.config
    if not len(model.decoder.layers):  # a pipeline stage that pruning has emptied
        return _sizes_from_config(mcore_config)
    tp = mcore_config.tensor_model_parallel_size
    layer = model.decoder.layers[0]
    projection_HA = layer.self_attention.linear_proj.weight
    head_dim = mcore_config.kv_channels
    heads = projection_HA.shape[1] * tp // head_dim
    qkv_heads = layer.self_attention.linear_qkv.weight.shape[0] * tp // head_dim
    hidden = projection_HA.shape[0]
    return {
        "num_layers": len(model.decoder.layers) if mcore_config.pipeline_model_parallel_size == 1 else mcore_config.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": _ffn_hidden_size(layer, mcore_config),
        "num_attention_heads": heads,
        "num_query_groups": (qkv_heads - heads) // 2,
        "kv_channels": None if head_dim * heads == hidden else head_dim,
        "num_moe_experts": mcore_config.num_moe_experts,
    }


def _sizes_from_config(mcore_config: TransformerConfig) -> dict[str, Any]:
    heads, head_dim, hidden = mcore_config.num_attention_heads, mcore_config.kv_channels, mcore_config.hidden_size
    return {
        "num_layers": mcore_config.num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": mcore_config.ffn_hidden_size if mcore_config.num_moe_experts is None else mcore_config.moe_ffn_hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": mcore_config.num_query_groups,
        "kv_channels": None if head_dim * heads == hidden else head_dim,
        "num_moe_experts": mcore_config.num_moe_experts,
    }


def _ffn_hidden_size(layer: torch.nn.Module, mcore_config: TransformerConfig) -> int:
    mlp: Any = layer.mlp
    if mcore_config.num_moe_experts is None:
        return int(mlp.linear_fc2.weight.shape[1]) * mcore_config.tensor_model_parallel_size
    experts = mlp.experts
    weight = experts.local_experts[0].linear_fc2.weight if hasattr(experts, "local_experts") else experts.linear_fc2.weight0
    return int(weight.shape[1]) * mcore_config.expert_tensor_parallel_size
