"""Quantised models as Hugging Face directories that engines read; docs/exports.md says which engine reads which."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.quantize.export.unified import ExportPlan, export_quantized_hf, plan_export

__all__ = ["ExportPlan", "export_quantized_hf", "plan_export"]

__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs={"unified": ["ExportPlan", "export_quantized_hf", "plan_export"]})
