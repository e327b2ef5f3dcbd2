"""A pure-torch reference of the Transformer Engine modules that Megatron-Core and ModelOpt use.

Same module paths, class names, argument names and state-dict keys as Transformer Engine, so that Megatron-Core's `te` layer spec, its
checkpoints and ModelOpt's Transformer Engine plugins run where there is no GPU. Decisions:

- The files here are the modules: `install` only makes the name `transformer_engine` (and everything below it) an alias of this package.
  A module that does not exist here does not exist under that name either, and the `except ImportError` branches of Megatron-Core apply.
- Nothing is faked. FP8, communication overlap and the other options that only a GPU can honour are refused by name (`ConfigError`), since
  ignoring them would change numbers or report speed that is not there.
- `__version__` decides which features Megatron-Core asks for. It is the lowest that unlocks everything implemented here; see `__version__`.
- This package imports neither megatron nor modelopt: both import it.
"""

from nemo_opt.cpu.transformer_engine._alias import install, is_installed

__all__ = ["__version__", "install", "is_installed"]

__version__ = "2.9.0"
"""The announced version. With it Megatron-Core offers what is implemented here: interleaved fused RoPE (from 2.3), the fused router (2.7),
attention sinks (`softmax_type`, 2.8), the largest attention logit for QK clip (2.9). From 2.10 on it asks for `num_splits`, from 2.12 for
padding inside the token permutation, from 2.14 for grouped weights in one tensor, none of which is here."""
