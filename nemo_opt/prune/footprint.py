"""What sizes cost: parameters, parameters that one token uses, and bytes at inference, from a `ModelConfig` alone; needs no torch.

The definitions are ModelOpt's (`nas/plugins/megatron_model_stats.py`), for what is built here: RMSNorm, gated MLP, no biases, rows that pad
the vocabulary counted. Tested against built models and against ModelOpt's own functions.
"""

from nemo_opt.models.config import ModelConfig

__all__ = ["METRICS", "active_parameters", "footprint", "memory_mb", "parameters"]

METRICS = ("active_params", "params", "memory_mb")
"""What a search may be limited by; the first one that is given orders its candidates (ModelOpt's order)."""

_BYTES = 2  # of a weight and of a cached key or value: bfloat16, whatever the model is computed in here
_MIB = 1024**2


def parameters(model: ModelConfig) -> int:
    """Parameters of one copy of the model."""
    return _count(model, model.num_moe_experts)


def active_parameters(model: ModelConfig) -> int:
    """Parameters that take part in one token's forward pass: of the experts, those that a token is routed to."""
    return _count(model, None if model.num_moe_experts is None else model.moe_router_topk)


def memory_mb(model: ModelConfig, *, sequence_length: int = 4096, batch_size: int = 1) -> float:
    """MiB (2**20 bytes) of weights and of a full key/value cache in bfloat16."""
    cached = 2 * batch_size * sequence_length * model.num_query_groups * model.head_dim * model.num_layers
    return _BYTES * (parameters(model) + cached) / _MIB


def footprint(model: ModelConfig, *, sequence_length: int = 4096, batch_size: int = 1) -> dict[str, float]:
    """All of `METRICS` by name."""
    return {
        "active_params": active_parameters(model),
        "params": parameters(model),
        "memory_mb": memory_mb(model, sequence_length=sequence_length, batch_size=batch_size),
    }


def _count(model: ModelConfig, experts: int | None) -> int:
    embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + model.hidden_size + model.num_layers * (_attention(model) + _mlp(model, experts))


def _attention(model: ModelConfig) -> int:
    """Norm, the fused projection to queries, keys and values, and the projection back."""
    query_channels = model.num_attention_heads * model.head_dim
    key_channels = model.num_query_groups * model.head_dim
    return model.hidden_size * (1 + 2 * query_channels + 2 * key_channels)


def _mlp(model: ModelConfig, experts: int | None) -> int:
    """Norm, then gate, up and down, once or for each of `experts` beside a router that always knows all of them."""
    one = 3 * model.hidden_size * model.ffn_hidden_size
    if experts is None:
        return model.hidden_size + one
    assert model.num_moe_experts is not None
    return model.hidden_size * (1 + model.num_moe_experts) + experts * one
