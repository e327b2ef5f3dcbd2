"""Checkpoints: written atomically, verified by checksum, loaded without running what they say, resharded to any layout.

A checkpoint is one directory that describes itself::

    DIR/nemo_opt.json    model sizes, topology, layer spec, iteration, versions; plain JSON
    DIR/manifest.json    size and SHA-256 of every other file
    DIR/weights/         Megatron-Core distributed checkpoint: model, optimizer, RNG states [+ modelopt_state/]
    DIR/tokenizer/       the tokenizer's files, if one was given
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.checkpoint.info import CheckpointInfo, read_info, verify
    from nemo_opt.checkpoint.load import load_checkpoint, restore_model
    from nemo_opt.checkpoint.save import save_checkpoint

__all__ = ["CheckpointInfo", "load_checkpoint", "read_info", "restore_model", "save_checkpoint", "verify"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "info": ["CheckpointInfo", "read_info", "verify"],
        "load": ["load_checkpoint", "restore_model"],
        "save": ["save_checkpoint"],
    },
)
