"""ptq(): from a checkpoint to a quantised one, with the validation loss before and after on the same batches."""

from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.api import checks
from nemo_opt.api._session import directory_bytes, open_feed, session, world_size
from nemo_opt.api.results import PtqResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.data.config import DataConfig
from nemo_opt.models.build import Spec, unwrap
from nemo_opt.parallel import Topology
from nemo_opt.quantize.calibration import calibration_loop
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.quantize.quantizer import Quantizer

__all__ = ["ptq"]


def ptq(
    *,
    checkpoint: str,
    quantization: QuantizationConfig,
    export: ExportConfig,
    topology: Topology,
    data: DataConfig,
    tokenizer: str | None = None,
    eval_batches: int = 8,
    spec: Spec | None = None,
    overwrite: bool = False,
) -> PtqResult:
    """Quantises a checkpoint: restore, calibrate on training samples, measure on validation samples, write. Collective.

    Args:
        checkpoint: The model, unquantised.
        quantization: Algorithm and calibration sizes.
        export: Where and in which form to write.
        topology: The layout to calibrate at; the result loads at any.
        data: The text; `micro_batch_size` is that of the evaluation.
        tokenizer: Its directory; the checkpoint's own by default.
        eval_batches: Validation micro-batches for the losses; 0 measures none.
        spec: Layer spec, "te" or "local"; the device's default when None.
        overwrite: Replace an existing output.

    Raises:
        NemoOptError: Bad settings, a damaged checkpoint or unsuitable data.

    """
    settings: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "eval_batches": eval_batches, "overwrite": overwrite}
    checks.check_ptq(
        checkpoint=checkpoint, quantization=quantization, export=export, topology=topology, world_size=world_size(), **settings
    )
    info = read_info(checkpoint)
    tokenizer_dir = checks.tokenizer_directory(info, tokenizer)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(checkpoint, job.topology, spec=spec)
        samples = quantization.calibration_dataset_size
        feed = open_feed(data, tokenizer_dir, train_samples=samples, eval_batches=eval_batches)
        loss_before = feed.loss(chunks)
        quantizer = Quantizer(quantization, export)
        batches = feed.some_train_batches(samples, quantization.calibration_batch_size)
        quantizer.quantize(chunks, calibration_loop(batches))
        loss_after = feed.loss(chunks)
        path = quantizer.export(chunks, topology=job.topology, tokenizer_dir=tokenizer_dir, overwrite=overwrite)
        return PtqResult(
            **job.facts(chunks),
            path=str(path),
            algorithm=quantization.algorithm,
            export_format=export.export_format,
            loss_before=loss_before,
            loss_after=loss_after,
            quantizers=_count_quantizers(chunks),
            bytes_before=directory_bytes(checkpoint),
            bytes_after=directory_bytes(path),
        )


def _count_quantizers(chunks: list[Any]) -> int:
    """Enabled quantizers over all stages. Tensor and data parallel ranks hold the same ones; each stage's are counted once."""
    from megatron.core import parallel_state

    mine = sum(isinstance(module, TensorQuantizer) and module.is_enabled for chunk in chunks for module in unwrap(chunk).modules())
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, (parallel_state.get_pipeline_model_parallel_rank(), mine))
    return sum(dict(counts).values())
