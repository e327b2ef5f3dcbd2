"""Attention and rotary position embeddings."""

from nemo_opt.cpu.transformer_engine.pytorch.attention import rope
from nemo_opt.cpu.transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention
from nemo_opt.cpu.transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "apply_rotary_pos_emb", "rope"]
