"""What Transformer Engine shares between frameworks: the FP8 recipes' descriptions."""

from nemo_opt.cpu.transformer_engine.common import recipe

__all__ = ["recipe"]
