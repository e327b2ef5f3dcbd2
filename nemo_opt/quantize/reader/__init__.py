"""Quantised Hugging Face directories, whoever wrote them, read and run independently of the code that writes them."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.quantize.reader.description import is_quantized, read_description
    from nemo_opt.quantize.reader.model import ExportedModel, open_export

__all__ = ["ExportedModel", "is_quantized", "open_export", "read_description"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__, submod_attrs={"description": ["is_quantized", "read_description"], "model": ["ExportedModel", "open_export"]}
)
