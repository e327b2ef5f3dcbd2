"""Quantizer: PTQ through ModelOpt with NeMo's interface, on any layout and with both layer specs.

Decisions: ModelOpt does the quantizing; ours are the checks before it and the copies around it (ModelOpt's configurations are module-level
dicts, which NeMo changes in place, so that one Quantizer alters the next). `mtq` and `dist` are module-level names because NeMo's tests
patch them here.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.utils import is_quantized

from nemo_opt.checkpoint.amax_sharding import repair_amax_sharding
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.collective import on_each
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.build import unwrap
from nemo_opt.parallel import Topology, current_topology
from nemo_opt.quantize.config import ALGORITHMS, ExportConfig, QuantizationConfig
from nemo_opt.training.forward import ForwardLoop

__all__ = ["QUANT_CFG_CHOICES", "Quantizer", "get_quant_cfg_choices"]

_log = logging.getLogger(__name__)


def get_quant_cfg_choices() -> dict[str, dict[str, Any]]:
    """ModelOpt's configuration of each supported algorithm, as fresh copies."""
    return copy.deepcopy({"fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_DEFAULT_CFG})


QUANT_CFG_CHOICES = get_quant_cfg_choices()
"""ModelOpt's configuration by algorithm name; read only, the Quantizer works on copies."""

assert set(QUANT_CFG_CHOICES) == set(ALGORITHMS)


class Quantizer:
    """Post-training quantization of a Megatron-Core GPTModel and export of the result."""

    def __init__(self, quantization_config: Any = None, export_config: Any = None) -> None:
        """Read and check both configurations.

        Args:
            quantization_config: a `QuantizationConfig`, or a mapping or OmegaConf node as NeMo's; None quantizes nothing.
            export_config: likewise for `ExportConfig`; None if nothing will be exported.

        Raises:
            ConfigError: naming the setting, its value and the choices.

        """
        if quantization_config is None:
            quantization_config = QuantizationConfig(algorithm=None)
        self.quantization_config = QuantizationConfig.from_any(quantization_config)
        self.export_config = None if export_config is None else ExportConfig.from_any(export_config)
        algorithm = self.quantization_config.algorithm
        self.quant_cfg: dict[str, Any] | None = None if algorithm is None else copy.deepcopy(QUANT_CFG_CHOICES[algorithm])

    def quantize(self, model: Any, forward_loop: ForwardLoop | None = None) -> Any:
        """Quantize `model` in place and calibrate it; collective.

        Args:
            model: a GPTModel, wrapped or not, or a list that holds one; returned untouched when the algorithm is None.
            forward_loop: shows calibration data to the model it is called with (`calibration_loop`).

        Returns:
            the model that was passed.

        Raises:
            ConfigError: if there is no forward loop, or the model is quantized already, cut into several chunks, or has experts.
            DataError: if calibration left a quantizer without a finite amax.

        """
        if self.quant_cfg is None:
            return model
        if forward_loop is None:
            raise ConfigError(f"algorithm {self.quantization_config.algorithm!r} needs calibration data: pass a forward_loop")
        target = _target(model)
        if self.quantization_config.enable_kv_cache and dist.get_rank() == 0:
            _log.warning("enable_kv_cache=True has no effect beside %s: the KV cache stays unquantised", self.quantization_config.algorithm)
        repair_amax_sharding()
        mtq.quantize(target, copy.deepcopy(self.quant_cfg), forward_loop)
        on_each(lambda: _check_calibrated(target))
        if dist.get_rank() == 0:
            mtq.print_quant_summary(target)
        return model

    def export(
        self,
        model: Any,
        model_dir: Path | str | None = None,
        trainer: Any = None,  # noqa: ARG002 NeMo's signature; the writing needs no trainer here
        *,
        topology: Topology | None = None,
        tokenizer_dir: Path | str | None = None,
        extra: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the quantized model as a sharded checkpoint; collective.

        Args:
            model: what `quantize` returned.
            model_dir: directory to write; None for the path of the export configuration.
            trainer: ignored; part of NeMo's signature.
            topology: the layout the model lives on; None for the one that is set up.
            tokenizer_dir: tokenizer to copy beside the weights.
            extra: JSON values to keep in the checkpoint's description.
            overwrite: replace an existing checkpoint.

        Returns:
            the directory written.

        Raises:
            ConfigError: for a format that is not written yet, naming the one that is.

        """
        if self.export_config is None:
            raise ConfigError("export needs an export configuration: pass export_config to Quantizer")
        if self.export_config.export_format != "nemo":
            raise ConfigError(
                f"export_format {self.export_config.export_format!r} is not supported yet; use export_format='nemo' (a sharded checkpoint)"
            )
        topology = topology or current_topology()
        if topology is None:
            raise ConfigError("no layout is set up: pass topology")
        path = Path(model_dir or self.export_config.path)
        recorded = {"quantization": self.quantization_config.algorithm, **(extra or {})}
        save_checkpoint(path, [unwrap(model)], topology=topology, tokenizer_dir=tokenizer_dir, extra=recorded, overwrite=overwrite)
        return path

    @staticmethod
    def modify_model_config(model_cfg: Any) -> Any:
        """Prepare NeMo's model configuration (OmegaConf) in place, as its Quantizer does: no sequence parallelism, no fused RoPE."""
        from omegaconf import open_dict

        with open_dict(model_cfg):
            model_cfg.sequence_parallel = False
            model_cfg.name = "modelopt"
            model_cfg.apply_rope_fusion = False
        return model_cfg


def _target(model: Any) -> Any:
    """The module ModelOpt quantizes: the unwrapped GPTModel; anything that is no torch module (a test double) as it is."""
    if isinstance(model, list) and len(model) > 1:
        raise ConfigError(f"the model is cut into {len(model)} chunks (interleaved pipeline), which ModelOpt cannot save: use vp=1")
    if not isinstance(model, torch.nn.Module | list):
        return model
    gpt_model = unwrap(model)
    if gpt_model.config.num_moe_experts is not None:
        raise ConfigError(f"quantizing mixture-of-experts models ({gpt_model.config.num_moe_experts} experts) is not supported yet")
    if is_quantized(gpt_model):
        raise ConfigError("the model is already quantized: start from an unquantized checkpoint")
    return gpt_model


def _check_calibrated(model: Any) -> None:
    """Refuse a result that would quantize to NaN: ModelOpt only warns of an amax that is missing, infinite or NaN."""
    bad = [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and not _is_calibrated(module)]
    if bad:
        raise DataError(
            f"calibration gave {len(bad)} quantizers no finite amax, first {bad[0]}: look for NaN in the weights or activations"
        )


def _is_calibrated(quantizer: TensorQuantizer) -> bool:
    if not quantizer.is_enabled:
        return True
    amax = getattr(quantizer, "_amax", None)
    return amax is not None and bool(amax.isfinite().all())
