"""ptq(): from a checkpoint to a quantised one: losses before and after on the same batches, what each quantizer loses, and a report.

`quantize_and_export` does the work on a model that is loaded; `nemo_opt.api.sweep` calls it once for each algorithm. Activations are
measured while the loss after is, on held-out batches without padding: no pass over the data is added.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nemo_opt._stack

import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.api import checks
from nemo_opt.api._session import Feed, Session, directory_bytes, open_feed, session, world_size
from nemo_opt.api.results import PtqResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig
from nemo_opt.models.build import Spec, unwrap
from nemo_opt.parallel import Topology
from nemo_opt.quantize.bits import bits_per_weight
from nemo_opt.quantize.calibration import calibration_loop
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.quantize.quantizer import Quantizer
from nemo_opt.quantize.report import write_report
from nemo_opt.quantize.sqnr import ActivationMeter, Rounding, measure_activations, weight_rounding
from nemo_opt.training.sample import generate

__all__ = ["Source", "ptq", "quantize_and_export"]

_PROMPTS = ("Born in north-east France, Soyer trained as a", "I was born in")  # NeMo's


def ptq(
    *,
    checkpoint: str,
    quantization: QuantizationConfig,
    export: ExportConfig,
    topology: Topology,
    data: DataConfig,
    tokenizer: str | None = None,
    report: str | None = None,
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
        report: HTML file to write: losses, sizes, calibration, and SQNR and amax of every quantizer.
        eval_batches: Validation micro-batches for the losses and the SQNR of activations; 0 measures neither.
        spec: Layer spec, "te" or "local"; the device's default when None.
        overwrite: Replace an existing output.

    Raises:
        NemoOptError: Bad settings, a damaged checkpoint or unsuitable data.

    """
    settings: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "eval_batches": eval_batches, "overwrite": overwrite}
    settings |= {"quantization": quantization, "export": export, "topology": topology, "report": report, "spec": spec}
    checks.check_ptq(checkpoint=checkpoint, world_size=world_size(), **settings)
    info = read_info(checkpoint)
    tokenizer_dir = checks.tokenizer_directory(info, tokenizer)
    with session(topology, info.model) as job:
        feed = open_feed(data, tokenizer_dir, train_samples=quantization.calibration_dataset_size, eval_batches=eval_batches)
        source = Source(job=job, checkpoint=checkpoint, tokenizer_dir=tokenizer_dir, feed=feed, spec=spec, overwrite=overwrite)
        chunks = source.restore()
        result = quantize_and_export(source, chunks, Quantizer(quantization, export), feed.loss(chunks))
        if report is not None:
            on_first(lambda: write_report(Path(report), result.to_dict()))
        return result


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is quantised, and how it is measured: everything but the algorithm."""

    job: Session
    """The session."""
    checkpoint: str
    """The model's directory."""
    tokenizer_dir: Path
    """To copy beside an export."""
    feed: Feed
    """Training samples to calibrate on, validation samples to measure on."""
    spec: Spec | None
    """Layer spec."""
    overwrite: bool
    """Replace an existing output."""

    def restore(self) -> list[Any]:
        """The part of this rank, unquantised."""
        return restore_model(self.checkpoint, self.job.topology, spec=self.spec)[0]


def quantize_and_export(source: Source, chunks: list[Any], quantizer: Quantizer, loss_before: float | None) -> PtqResult:
    """Quantises a model that is loaded, measures it, and writes it where the quantizer has an export configuration. Collective.

    Args:
        source: Where the model came from, and its data.
        chunks: This rank's part of the model; quantised in place.
        quantizer: Not used before.
        loss_before: Validation loss of the model.

    """
    config = quantizer.quantization_config
    samples, micro_batch_size = config.calibration_dataset_size, config.calibration_batch_size
    loop = calibration_loop(source.feed.calibration_batches(samples, micro_batch_size, config.calibration_packing))
    quantizer.quantize(chunks, loop)
    watch: AbstractContextManager[ActivationMeter | None] = measure_activations(chunks) if source.feed.eval_batches else nullcontext()
    with watch as meter:
        loss_after = source.feed.loss(chunks)
    weights, activations = weight_rounding(chunks), meter.results() if meter is not None else {}
    bits = bits_per_weight(chunks)
    path, continuations = None, dict[str, str]()
    if quantizer.export_config is not None:
        places: dict[str, Any] = {"topology": source.job.topology, "tokenizer_dir": source.tokenizer_dir, "overwrite": source.overwrite}
        if quantizer.export_config.generate_sample:
            continuations = dict(zip(_PROMPTS, generate(chunks, source.feed.tokenizer, _PROMPTS), strict=True))
        path = str(quantizer.export(chunks, proof_batches=source.feed.proof_batches(), **places))
    return PtqResult(
        **source.job.facts(chunks),
        path=path or source.checkpoint,
        algorithm=config.algorithm,
        export_format=quantizer.export_config.export_format if quantizer.export_config is not None else "none",
        loss_before=loss_before,
        loss_after=loss_after,
        quantizers=_count_quantizers(chunks),
        bytes_before=directory_bytes(source.checkpoint),
        bytes_after=None if path is None else directory_bytes(path),
        block=bits.block,
        bits_per_weight=bits.quantized,
        bits_per_parameter=bits.model,
        calibration=_calibration_facts(loop.report) if loop.report.passes else None,
        sqnr={kind: _summary(found) for kind, found in (("weights", weights), ("activations", activations)) if found},
        quantizer_facts={name: _facts(rounding, bits.by_name.get(name)) for name, rounding in (weights | activations).items()},
        proof=_proof_facts(getattr(quantizer, "proof", None)),
        samples=continuations,
    )


def _calibration_facts(report: Any) -> dict[str, Any]:
    return {**asdict(report), "tokens_per_s": report.tokens_per_s}


def _proof_facts(proof: Any) -> dict[str, Any] | None:
    return asdict(proof) if is_dataclass(proof) and not isinstance(proof, type) else proof


def _facts(rounding: Rounding, bits: float | None) -> dict[str, float | None]:
    return {**asdict(rounding), **({"bits": bits} if bits is not None else {})}


def _summary(found: dict[str, Rounding]) -> dict[str, Any]:
    """Median and worst; quantizers that lose nothing count as infinitely good."""
    values = {name: float("inf") if rounding.sqnr_db is None else rounding.sqnr_db for name, rounding in found.items()}
    worst = min(values, key=values.__getitem__)
    return {"median": _finite(median(values.values())), "worst": _finite(values[worst]), "worst_name": worst}


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _count_quantizers(chunks: list[Any]) -> int:
    """Enabled quantizers over all stages. Tensor and data parallel ranks hold the same ones; each stage's are counted once."""
    from megatron.core import parallel_state

    mine = sum(isinstance(module, TensorQuantizer) and module.is_enabled for chunk in chunks for module in unwrap(chunk).modules())
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, (parallel_state.get_pipeline_model_parallel_rank(), mine))
    return sum(dict(counts).values())
