"""Where each row of a Megatron weight lies in Hugging Face's weights: one table, read forwards by import and backwards by export.

The two keep the same rows under other names and in another order: the attention input interleaves, for each query group, the group's
query heads, its key head and its value head; the embedding is padded. Columns are the same, so a tensor is a list of row ranges.
"""

from dataclasses import dataclass

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.safetensors_dir import SafetensorsReader

__all__ = ["Piece", "check_weights", "hf_pieces", "hf_shapes"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of rows that a Megatron weight and a Hugging Face weight have in common."""

    name: str
    """Of the Hugging Face weight."""
    row: int
    """First row in the Megatron weight."""
    hf_row: int
    """First row in the Hugging Face weight."""
    num_rows: int


_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight_w": "mlp.gate_proj.weight",
    "mlp.linear_fc1.weight_v": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_LAYERS = "decoder.layers."


def hf_pieces(key: str, config: ModelConfig) -> list[Piece]:
    """The Hugging Face rows that make up the Megatron weight `key` (a `Shard.key`); rows in no piece are padding.

    Raises:
        ConfigError: A Llama has no such weight.

    """
    shapes = hf_shapes(config)
    if key.startswith(_LAYERS):
        layer, _, rest = key.removeprefix(_LAYERS).partition(".")
        prefix = f"model.layers.{layer}."
        if rest == "self_attention.linear_qkv.weight":
            return _qkv_pieces(prefix + "self_attn.", config)
        name = prefix + _IN_LAYER.get(rest, rest)
    else:
        name = _TOP.get(key, key)
    if name not in shapes:
        raise ConfigError(f"{key} has no place in LlamaForCausalLM")
    return [Piece(name=name, row=0, hf_row=0, num_rows=shapes[name][0])]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model in Hugging Face's form."""
    hidden, ffn, head_dim = config.hidden_size, config.ffn_hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_query_groups * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_rows, hidden),
            prefix + "self_attn.k_proj.weight": (kv_rows, hidden),
            prefix + "self_attn.v_proj.weight": (kv_rows, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q_rows),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_weights(reader: SafetensorsReader, config: ModelConfig) -> None:
    """Refuses a directory whose weights are not those of `config`, before anything is read.

    Raises:
        CheckpointError: Weights are missing, unexpected, quantised or of another shape; names them.

    """
    # Transformers ignore these too: the head of a tied model, and the RoPE tables that old versions saved.
    tied_head = {"lm_head.weight"} if config.tie_embeddings else set()
    tables = {name for name in reader.names if name.endswith("rotary_emb.inv_freq")}
    reader.check(hf_shapes(config), optional=frozenset(tied_head | tables))


def _qkv_pieces(prefix: str, config: ModelConfig) -> list[Piece]:
    head_dim = config.head_dim
    q_rows = config.num_attention_heads // config.num_query_groups * head_dim
    pieces, row = [], 0
    for group in range(config.num_query_groups):
        for name, rows in (("q_proj", q_rows), ("k_proj", head_dim), ("v_proj", head_dim)):
            pieces.append(Piece(name=f"{prefix}{name}.weight", row=row, hf_row=group * rows, num_rows=rows))
            row += rows
    return pieces
