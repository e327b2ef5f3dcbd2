"""Quantizer: PTQ through ModelOpt with NeMo's interface, on any layout and with both layer specs.

Decisions: ModelOpt inserts the quantizers and calibrates by maxima; the searches of SmoothQuant and AWQ are ours (`smooth`, `awq`), over
ModelOpt's state. `mtq`, `dist`, `export_tensorrt_llm_checkpoint` and `save_artifacts` are module-level names because NeMo's tests patch
them here.
"""

import copy
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.utils import is_quantized

from nemo_opt.checkpoint.amax_sharding import needs_no_amax, repair_amax_sharding
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.collective import on_each
from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.build import spec_of, unwrap
from nemo_opt.models.sizes import model_config_of
from nemo_opt.parallel import Topology, current_topology
from nemo_opt.quantize.awq import calibrate_awq
from nemo_opt.quantize.blocks import check_recipe_blocks
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.quantize.export.artifacts import save_artifacts
from nemo_opt.quantize.export.trtllm import check_trtllm, export_trtllm
from nemo_opt.quantize.export.unified import ExportPlan, export_quantized_hf
from nemo_opt.quantize.proof import ProofReport, prove_checkpoint, prove_export
from nemo_opt.quantize.recipes import get_quant_cfg_choices, kv_format, localized, needs_data, quant_cfg_of
from nemo_opt.quantize.smooth import smoothquant
from nemo_opt.training.forward import ForwardLoop

__all__ = ["QUANT_CFG_CHOICES", "Quantizer", "get_quant_cfg_choices"]

_log = logging.getLogger(__name__)


QUANT_CFG_CHOICES = get_quant_cfg_choices()
"""ModelOpt's configuration by algorithm name; read only, the Quantizer works on copies."""

_TORCH_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}
_OUR_SEARCHES = ("smoothquant", "awq_lite")
_GPT_MIN_FRACTION, _GPT_MAX_BOUND = 0.01, {"fp8": 448, "int8_sq": 127}  # NeMo's least amax of inputs, for decoders of type gpt


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
        self.quant_cfg: dict[str, Any] | None = quant_cfg_of(self.quantization_config)
        self.proof: ProofReport | None = None

    def quantize(self, model: Any, forward_loop: ForwardLoop | None = None) -> Any:
        """Quantize `model` in place and calibrate it; collective.

        Args:
            model: a GPTModel, wrapped or not, or a list that holds one; returned untouched when the algorithm is None.
            forward_loop: shows calibration data to the model it is called with (`calibration_loop`).

        Returns:
            the model that was passed.

        Raises:
            ConfigError: if there is no forward loop where one is needed, blocks do not fit, or the model is quantized already or cut into
                several chunks.
            DataError: if calibration left a quantizer without a finite amax.

        """
        if self.quant_cfg is None:
            return model
        target = _target(model)
        quant_cfg = copy.deepcopy(self.quant_cfg)
        self._check_data(quant_cfg, forward_loop)
        if isinstance(target, GPTModel):
            check_recipe_blocks(quant_cfg, model_config_of([target]), tp=parallel_state.get_tensor_model_parallel_world_size())
            self._check_kv_cache(target, quant_cfg)
            quant_cfg = localized(quant_cfg, [layer.layer_number - 1 for layer in target.decoder.layers])
        repair_amax_sharding()
        self._calibrate(target, quant_cfg, forward_loop)
        on_each(lambda: _check_calibrated(target))
        if dist.get_rank() == 0:
            _log.info("%s", _summary(target))
        return model

    def _check_data(self, quant_cfg: dict[str, Any], forward_loop: ForwardLoop | None) -> None:
        if forward_loop is None and needs_data(quant_cfg):
            raise ConfigError(f"algorithm {self.quantization_config.algorithm!r} needs calibration data: pass a forward_loop")

    def _check_kv_cache(self, target: torch.nn.Module, quant_cfg: dict[str, Any]) -> None:
        """Attention that ModelOpt cannot quantise: refused if the cache was asked for, told if it was only NeMo's rule."""
        config = self.quantization_config
        if config.enable_kv_cache and kv_format(config) is None and dist.get_rank() == 0:
            _log.warning("the KV cache stays unquantised beside %s: set kv_cache_qformat to have it quantised", config.algorithm)
        if kv_format(config) is None or spec_of(target) == "te":
            return
        if config.enable_kv_cache:
            raise ConfigError("enable_kv_cache=True needs the layer spec te: ModelOpt does not quantise the attention of the local one")
        quant_cfg["quant_cfg"] = [entry for entry in quant_cfg["quant_cfg"] if "bmm_quantizer" not in entry["quantizer_name"]]
        if dist.get_rank() == 0:
            _log.warning("the KV cache stays unquantised: ModelOpt does not quantise the attention of the layer spec local, use te")

    def _calibrate(self, target: Any, quant_cfg: dict[str, Any], forward_loop: ForwardLoop | None) -> None:
        config, method = self.quantization_config, _method(quant_cfg)
        if method in _OUR_SEARCHES and isinstance(target, GPTModel):
            assert forward_loop is not None
            mtq.quantize(target, quant_cfg | {"algorithm": None})
            if method == "smoothquant":
                smoothquant(target, forward_loop, alpha=_option(quant_cfg, "alpha", 1.0))
            else:
                calibrate_awq(target, forward_loop, alpha_step=_option(quant_cfg, "alpha_step", 0.1))
        else:
            mtq.quantize(target, quant_cfg, forward_loop)
        _forget_unused(target)
        if config.decoder_type == "gpt" and config.algorithm in _GPT_MAX_BOUND:
            bound = _GPT_MIN_FRACTION * _GPT_MAX_BOUND[config.algorithm]
            mtq.postprocess_amax(target, "*input_quantizer", lambda amax: torch.clamp(amax, min=bound))

    def export(
        self,
        model: Any,
        model_dir: Path | str | None = None,
        trainer: Any = None,  # noqa: ARG002 NeMo's signature; the writing needs no trainer here
        *,
        topology: Topology | None = None,
        tokenizer_dir: Path | str | None = None,
        extra: dict[str, Any] | None = None,
        proof_batches: Sequence[Any] = (),
        overwrite: bool = False,
    ) -> Path:
        """Write the quantized model in the form of the export configuration; collective.

        Args:
            model: what `quantize` returned.
            model_dir: directory to write; None for the path of the export configuration.
            trainer: ignored; part of NeMo's signature.
            topology: the layout the model lives on; None for the one that is set up.
            tokenizer_dir: tokenizer to copy beside the weights.
            extra: JSON values to keep in the description of a "nemo" checkpoint.
            proof_batches: validation batches, the same on every rank, on which what was written must compute what the model in memory does
                (`nemo_opt.quantize.proof`); what was found is in `proof` afterwards. Without any nothing is proven.
            overwrite: replace an existing export of the same form.

        Returns:
            the directory written.

        Raises:
            ConfigError: there is no export configuration or layout, or the form cannot hold the model; names the alternative.
            CheckpointError: the directory exists, cannot be written, or was proven wrong; then nothing is left behind.

        """
        if self.export_config is None:
            raise ConfigError("export needs an export configuration: pass export_config to Quantizer")
        config, path = self.export_config, Path(model_dir or self.export_config.path)
        self.proof = None
        if not isinstance(model, torch.nn.Module | list):
            return self._export_double(model, path, tokenizer_dir)
        topology = topology or current_topology()
        if topology is None:
            raise ConfigError("no layout is set up: pass topology")
        chunks = [unwrap(model)]
        places: dict[str, Any] = {"tokenizer_dir": tokenizer_dir, "overwrite": overwrite}
        if config.export_format == "hf":
            prove = partial(self._prove, chunks, proof_batches) if proof_batches else None
            return export_quantized_hf(chunks, path, dtype=_TORCH_DTYPES[str(config.dtype)], prove=prove, **places)
        if config.export_format == "trtllm":
            engine = self._engine()
            sizes = {"inference_tp": engine.pop("inference_tp"), "inference_pp": engine.pop("inference_pp")}
            check_trtllm(spec=spec_of(chunks[0]), world_size=topology.world_size, **sizes)
            return export_trtllm(chunks, path, write=export_tensorrt_llm_checkpoint, **engine, **places)
        recorded = {"quantization": self.quantization_config.algorithm, **(extra or {})}
        prove_saved = partial(self._prove_checkpoint, chunks, topology, proof_batches) if proof_batches else None
        save_checkpoint(path, chunks, topology=topology, extra=recorded, prove=prove_saved, **places)
        return path

    def _prove(self, chunks: list[Any], batches: Sequence[Any], directory: Path, plan: ExportPlan | None) -> None:
        self.proof = prove_export(directory, chunks, plan, batches)

    def _prove_checkpoint(self, chunks: list[Any], topology: Topology, batches: Sequence[Any], directory: Path) -> None:
        self.proof = prove_checkpoint(directory, chunks, topology, batches)

    def _engine(self) -> dict[str, Any]:
        """What TensorRT-LLM needs to know; models are Llamas here, so NeMo's failure to infer the decoder type has no counterpart."""
        assert self.export_config is not None
        config = self.export_config
        return {
            "decoder_type": config.decoder_type or self.quantization_config.decoder_type or "llama",
            "dtype": _TORCH_DTYPES[str(config.dtype)],
            "inference_tp": config.inference_tp,
            "inference_pp": config.inference_pp,
        }

    def _export_double(self, model: Any, path: Path, tokenizer_dir: Path | str | None) -> Path:
        """NeMo's test double, in the only format that its first generation knew."""
        engine = self._engine()
        sizes = {"inference_tensor_parallel": engine.pop("inference_tp"), "inference_pipeline_parallel": engine.pop("inference_pp")}
        export_tensorrt_llm_checkpoint(model=model, export_dir=path, **engine, **sizes)
        save_artifacts(path, tokenizer_dir=tokenizer_dir)
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
    if is_quantized(gpt_model):
        raise ConfigError("the model is already quantized: start from an unquantized checkpoint")
    return gpt_model


def _summary(model: Any) -> str:
    """ModelOpt's line for every quantizer, which it can only print."""
    with redirect_stdout(StringIO()) as lines:
        mtq.print_quant_summary(model)
    return lines.getvalue()


def _method(quant_cfg: dict[str, Any]) -> str | None:
    algorithm = quant_cfg["algorithm"]
    return algorithm["method"] if isinstance(algorithm, dict) else algorithm


def _option(quant_cfg: dict[str, Any], name: str, default: float) -> float:
    algorithm = quant_cfg["algorithm"]
    return float(algorithm.get(name, default)) if isinstance(algorithm, dict) else default


def _check_calibrated(model: Any) -> None:
    """Refuse a result that would quantize to NaN: ModelOpt only warns of an amax that is missing, infinite or NaN."""
    bad = [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and not _is_calibrated(module)]
    if bad:
        raise DataError(
            f"calibration gave {len(bad)} quantizers no finite amax, first {bad[0]}: look for NaN in the weights or activations"
        )


def _is_calibrated(quantizer: TensorQuantizer) -> bool:
    if not quantizer.is_enabled or needs_no_amax(quantizer):
        return True
    amax = getattr(quantizer, "_amax", None)
    return amax is not None and bool(amax.isfinite().all())


def _forget_unused(model: Any) -> None:
    """Removes amax that no one reads and that tensor parallel ranks do not agree on: calibrating the KV cache gives MX formats one."""
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        if isinstance(module, TensorQuantizer) and needs_no_amax(module) and module.is_enabled:
            module.reset_amax()
