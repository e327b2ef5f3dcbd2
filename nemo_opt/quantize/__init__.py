"""PTQ: the Quantizer, its configurations, calibration over any layout, and a view of amax that is independent of the layout."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
    from nemo_opt.quantize.quantizer import QUANT_CFG_CHOICES, Quantizer, get_quant_cfg_choices
    from nemo_opt.quantize.recipes import load_quant_cfg, save_quant_cfg
    from nemo_opt.quantize.tensors import QuantizerSettings, amax_by_name, quantizer_settings, quantizer_tensors

__all__ = [
    "QUANT_CFG_CHOICES",
    "ExportConfig",
    "QuantizationConfig",
    "Quantizer",
    "QuantizerSettings",
    "amax_by_name",
    "calibration_loop",
    "get_quant_cfg_choices",
    "load_quant_cfg",
    "quantizer_settings",
    "quantizer_tensors",
    "save_quant_cfg",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "tensors": ["QuantizerSettings", "amax_by_name", "quantizer_settings", "quantizer_tensors"],
        "calibration": ["calibration_loop"],
        "config": ["ExportConfig", "QuantizationConfig"],
        "quantizer": ["QUANT_CFG_CHOICES", "Quantizer", "get_quant_cfg_choices"],
        "recipes": ["load_quant_cfg", "save_quant_cfg"],
    },
)
