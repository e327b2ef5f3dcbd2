"""What can be known to be wrong before the stack is loaded: layouts, missing or foreign checkpoints, tokenizers, outputs that exist.

One `check_<command>` for each function of `nemo_opt.api`, with the same settings. Commands call it in the launching process, where it costs
milliseconds; the functions call it again on each rank, since notebooks call them directly. Loads no torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_opt.api.resumable import check_resumable, check_save_interval
from nemo_opt.distill.teacher import check_same_tokens, shared_vocabulary, teacher_sizes
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.huggingface_config import is_huggingface
from nemo_opt.parallel import Topology

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemo_opt.checkpoint.info import CheckpointInfo
    from nemo_opt.data.config import DataConfig
    from nemo_opt.distill.config import DistillationConfig
    from nemo_opt.models.config import ModelConfig
    from nemo_opt.prune.config import PruningConfig
    from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
    from nemo_opt.training.config import TrainingConfig

__all__ = [
    "check_distill",
    "check_evaluate",
    "check_export_ckpt",
    "check_import_ckpt",
    "check_output",
    "check_prune",
    "check_ptq",
    "check_ptq_sweep",
    "check_search_recipe",
    "check_train",
    "checkpoint_info",
    "is_huggingface",
    "sweep_name",
    "teacher_sizes",
    "tokenizer_directory",
]


def checkpoint_info(path: str | Path, role: str = "checkpoint") -> "CheckpointInfo":
    """What the checkpoint says of itself; raises `CheckpointError` where it is none."""
    from nemo_opt.checkpoint.info import read_info

    if not Path(path).exists():
        raise CheckpointError(f"{role} {path} does not exist")
    if is_huggingface(path):
        raise CheckpointError(f"{role} {path} is a Hugging Face directory: turn it into a checkpoint with `nemo-opt import {path} OUT_DIR`")
    return read_info(path)


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses an output that would replace something; NeMo's PTQ script exits 0 here without having done anything."""
    target = Path(path)
    if target.is_file():
        raise ConfigError(f"output {target} is a file: choose a directory")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"output {target} exists and is not empty: choose another path, remove it, or ask to overwrite it")


def tokenizer_directory(info: "CheckpointInfo", tokenizer: str | None) -> Path:
    """The directory of the tokenizer: the one given, or the checkpoint's own; checked against the model's vocabulary."""
    directory = Path(tokenizer) if tokenizer else info.tokenizer_dir
    if directory is None:
        raise ConfigError(f"checkpoint {info.path} has no tokenizer: name one")
    _check_vocabulary(directory, info.model, f"model of {info.path}")
    return directory


def _check_vocabulary(directory: Path, model: "ModelConfig", owner: str) -> None:
    from nemo_opt.data.tokenizer import load_tokenizer

    size = load_tokenizer(directory).vocab_size
    if size > model.vocab_size:
        raise ConfigError(
            f"tokenizer {directory} has {size} tokens, the {owner} a vocabulary of {model.vocab_size}: use the model's own tokenizer"
        )


def _check_layout(topology: Topology, world_size: int, model: "ModelConfig", seq_length: int | None = None) -> Topology:
    resolved = topology.validate(world_size, model)
    if seq_length is not None:
        topology.validate_sequence(seq_length)
        if seq_length > model.max_position_embeddings:
            raise ConfigError(
                f"seq_length {seq_length} > max_position_embeddings {model.max_position_embeddings} of the model: shorten the sequences"
            )
    return resolved


def _check_data(data: "DataConfig | None", eval_batches: int) -> None:
    if eval_batches < 0:
        raise ConfigError(f"eval_batches {eval_batches} < 0: give 0 to measure no loss")
    if data is None:
        if eval_batches:
            raise ConfigError(f"{eval_batches} evaluation batches asked for, but no data given")
        return
    data.check()


def check_train(
    *,
    output: str,
    data: "DataConfig",
    training: "TrainingConfig",
    world_size: int,
    topology: Topology,
    model: "ModelConfig | None" = None,
    checkpoint: str | None = None,
    resume: bool = False,
    tokenizer: str | None = None,
    save_interval: int = 0,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.train`."""
    check_output(output, overwrite=overwrite)
    if (model is None) == (checkpoint is None):
        raise ConfigError("training starts either from a model's sizes (a preset) or from a checkpoint: give exactly one")
    if checkpoint is not None:
        info = checkpoint_info(checkpoint)
        model = info.model
        tokenizer_directory(info, tokenizer)
        if resume:
            check_resumable(info, "train", max_steps=training.max_steps)
    elif tokenizer is None:
        raise ConfigError("a model that starts from its sizes has no tokenizer yet: name one")
    else:
        assert model is not None
        _check_vocabulary(Path(tokenizer), model, "model")
    assert model is not None
    resolved = _check_layout(topology, world_size, model, data.seq_length)
    _check_data(data, 0)
    _check_training(data, training, resolved)
    check_save_interval(save_interval, output, "train", source=checkpoint if resume else None, overwrite=overwrite)


def _check_training(data: "DataConfig", training: "TrainingConfig", topology: Topology) -> None:
    training.validate(topology)
    for name in ("seq_length", "micro_batch_size", "global_batch_size"):
        if getattr(data, name) != getattr(training, name):
            raise ConfigError(f"{name} {getattr(data, name)} of the data != {getattr(training, name)} of the training: use one value")


def _check_samples(name: str, samples: int, micro_batch_size: int, topology: Topology) -> None:
    step = micro_batch_size * (topology.dp or 1)
    if samples < step:
        raise ConfigError(f"{name} {samples} < micro-batch size {micro_batch_size} * dp {topology.dp}: not one micro-batch for every rank")


def _check_not_interleaved(topology: Topology, work: str) -> None:
    if topology.vp > 1:
        raise ConfigError(f"vp {topology.vp}: {work} does not run on the interleaved pipeline schedule; set vp 1")


def check_ptq(
    *,
    checkpoint: str,
    quantization: "QuantizationConfig",
    export: "ExportConfig",
    topology: Topology,
    world_size: int,
    data: "DataConfig",
    tokenizer: str | None = None,
    report: str | None = None,
    eval_batches: int = 8,
    spec: str | None = None,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.ptq`."""
    from nemo_opt.quantize.blocks import check_blocks

    _check_export_format(export, world_size, spec)
    check_output(export.path, overwrite=overwrite)
    model, resolved = _check_quantisation(checkpoint, quantization, topology, world_size, data, tokenizer, eval_batches)
    check_blocks(quantization, model, tp=resolved.tp)
    _check_report(report)


def check_ptq_sweep(
    *,
    checkpoint: str,
    output: str,
    algorithms: "Sequence[str]",
    quantization: "QuantizationConfig",
    topology: Topology,
    world_size: int,
    data: "DataConfig",
    export_format: str | None = "hf",
    tokenizer: str | None = None,
    report: str | None = None,
    eval_batches: int = 8,
    spec: str | None = None,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.ptq_sweep`; whether a single algorithm suits the model is said in the table."""
    from nemo_opt.quantize.config import ExportConfig

    if export_format is not None:
        _check_export_format(ExportConfig(path=output, export_format=export_format), world_size, spec)
    names = [sweep_name(algorithm) for algorithm in algorithms]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"algorithms {list(algorithms)}: give at least one, and none twice (each is a directory of its own)")
    for algorithm in algorithms:
        replace(quantization, algorithm=algorithm)
    check_output(output, overwrite=overwrite)
    _check_quantisation(checkpoint, quantization, topology, world_size, data, tokenizer, eval_batches)
    _check_report(report)


def sweep_name(algorithm: str) -> str:
    """What a sweep calls an algorithm, in its table and as a directory: its name, or the stem of a recipe's file."""
    from nemo_opt.quantize.config import is_recipe_file

    return Path(algorithm).stem if is_recipe_file(algorithm) else algorithm


def _check_quantisation(
    checkpoint: str,
    quantization: "QuantizationConfig",
    topology: Topology,
    world_size: int,
    data: "DataConfig",
    tokenizer: str | None,
    eval_batches: int,
) -> "tuple[ModelConfig, Topology]":
    """The checkpoint, the layout and the data; returns the model's sizes and the resolved layout."""
    info = checkpoint_info(checkpoint)
    if info.has_modelopt_state:
        raise ConfigError(f"checkpoint {checkpoint} is already quantised or converted by ModelOpt: give the original")
    tokenizer_directory(info, tokenizer)
    _check_not_interleaved(topology, "quantisation")
    resolved = _check_layout(topology, world_size, info.model, data.seq_length)
    if data.seq_length != quantization.calibration_seq_len:
        raise ConfigError(
            f"seq_length {data.seq_length} of the data != calibration_seq_len {quantization.calibration_seq_len}: use one value"
        )
    _check_data(data, eval_batches)
    return info.model, resolved


def _check_export_format(export: "ExportConfig", world_size: int, spec: str | None) -> None:
    """ModelOpt knows nothing of Transformer Engine's modules when it writes TensorRT-LLM checkpoints, and takes all ranks for TP and PP."""
    if export.export_format != "trtllm":
        return
    instead = "use hf (--export_format hf), which TensorRT-LLM reads too"
    if world_size > 1 or spec != "local":
        raise ConfigError(
            f"export format 'trtllm' is written by ModelOpt from one rank and the layer spec local, got {world_size} ranks and spec "
            f"{spec or 'te (the default)'}: {instead}, or one rank and --spec local"
        )
    if (export.inference_tp, export.inference_pp) != (1, 1):
        raise ConfigError(
            f"inference_tp {export.inference_tp}, inference_pp {export.inference_pp}: 'trtllm' is written for 1, 1: {instead}"
        )


def check_search_recipe(
    *,
    checkpoint: str,
    output: str,
    candidates: "list[QuantizationConfig]",
    topology: Topology,
    world_size: int,
    data: "DataConfig",
    tokenizer: str | None = None,
    samples: int = 128,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.search_recipe`."""
    from nemo_opt.quantize.blocks import check_blocks
    from nemo_opt.quantize.config import SEARCHABLE, is_recipe_file

    _check_file(output, overwrite=overwrite)
    if not is_recipe_file(output):
        raise ConfigError(f"recipe {output} must end in .json, .yaml or .yml")
    if unknown := [config.algorithm for config in candidates if config.algorithm not in SEARCHABLE]:
        raise ConfigError(f"candidates {unknown} cannot be searched: choose among {list(SEARCHABLE)}")
    if topology.pp > 1:
        raise ConfigError(f"pp {topology.pp}: the search for mixed precision needs pp 1; its recipe then quantises at any layout")
    info = checkpoint_info(checkpoint)
    if info.has_modelopt_state:
        raise ConfigError(f"checkpoint {checkpoint} is already quantised or converted by ModelOpt: give the original")
    tokenizer_directory(info, tokenizer)
    resolved = _check_layout(topology, world_size, info.model, data.seq_length)
    for config in candidates:
        check_blocks(config, info.model, tp=resolved.tp)
    _check_samples("samples", samples, data.micro_batch_size, resolved)
    _check_data(data, 0)


def _check_file(path: str, *, overwrite: bool) -> None:
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} does not exist: make it, or choose another place for {target.name}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ConfigError(f"output {target} exists: choose another path, remove it, or ask to overwrite it")


def check_prune(
    *,
    checkpoint: str,
    output: str,
    pruning: "PruningConfig",
    topology: Topology,
    world_size: int,
    data: "DataConfig | None" = None,
    tokenizer: str | None = None,
    num_train_samples: int = 1024,
    scores: str | None = None,
    save_scores: str | None = None,
    report: str | None = None,
    eval_batches: int = 8,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.prune`."""
    check_output(output, overwrite=overwrite)
    info = checkpoint_info(checkpoint)
    if info.has_modelopt_state:
        raise ConfigError(f"checkpoint {checkpoint} is quantised or converted by ModelOpt: prune the original, and quantise that")
    pruning.check_against(info.model, tp=topology.tp, ep=topology.ep)
    _check_not_interleaved(topology, "pruning")
    resolved = _check_layout(topology, world_size, info.model, data.seq_length if data else None)
    _check_importance(pruning, data, scores, save_scores, report)
    if pruning.limits:
        _check_data(data, eval_batches)
        _check_search(pruning, info.model, topology, eval_batches)
    if data is not None:
        tokenizer_directory(info, tokenizer)
        if num_train_samples % data.micro_batch_size:
            raise ConfigError(f"num_train_samples {num_train_samples} % micro_batch_size {data.micro_batch_size} != 0")
        _check_samples("num_train_samples", num_train_samples, data.micro_batch_size, resolved)
    _check_data(data, eval_batches if data is not None else 0)


def _check_importance(
    pruning: "PruningConfig", data: "DataConfig | None", scores: str | None, save_scores: str | None, report: str | None
) -> None:
    """Where importance comes from, where it is saved to, and whether a report of it can be written."""
    if pruning.drop_layers is not None and (scores or save_scores):
        raise ConfigError("layers that are dropped by number need no importance: leave scores and save_scores out")
    if pruning.drop_layers is None and data is None and scores is None:
        raise ConfigError(
            "pruning to target sizes measures importance on data, but none is given: name data or saved scores, or drop layers by number"
        )
    if scores is not None and not Path(scores).is_file():
        raise CheckpointError(f"importance scores {scores} do not exist: name a file that save_scores has written")
    _check_new_file("save_scores", save_scores)
    _check_report(report)


def _check_new_file(name: str, path: str | None) -> None:
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"{name} {path} is a directory: name a file")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{name} {path}: the directory {Path(path).absolute().parent} does not exist: make it, or name another")


def _check_report(report: str | None) -> None:
    from nemo_opt.pages import can_plot

    _check_new_file("report", report)
    if report is not None and not can_plot():
        raise ConfigError("a report draws plots with matplotlib, which is not installed: install nemo_opt[plots]")


def _check_search(pruning: "PruningConfig", model: "ModelConfig", topology: Topology, eval_batches: int) -> None:
    from nemo_opt.prune.candidates import candidates

    if not eval_batches:
        raise ConfigError("a search scores its candidates by validation loss, but eval_batches is 0: give at least 1")
    candidates(model, pruning, tp=topology.tp, ep=topology.ep)


def check_distill(
    *,
    student: str,
    teacher: str,
    output: str,
    data: "DataConfig",
    training: "TrainingConfig",
    topology: Topology,
    world_size: int,
    tokenizer: str | None = None,
    distillation: "DistillationConfig | str | None" = None,
    eval_batches: int = 8,
    resume: bool = False,
    save_interval: int = 0,
    report: str | None = None,
    overwrite: bool = False,
    **_: Any,
) -> None:
    """Checks the settings of `nemo_opt.api.distill`."""
    check_output(output, overwrite=overwrite)
    info, teacher_model = checkpoint_info(student, "student"), teacher_sizes(teacher)
    _check_distillation(distillation, topology, info.model, teacher_model)
    _check_not_interleaved(topology, "distillation")
    _check_teacher_vocabulary(teacher, teacher_model, info.model, tokenizer_directory(info, tokenizer))
    for model in (info.model, teacher_model):
        resolved = _check_layout(topology, world_size, model, data.seq_length)
    _check_data(data, eval_batches)
    _check_training(data, training, resolved)
    if resume:
        check_resumable(info, "distill", max_steps=training.max_steps)
    check_save_interval(save_interval, output, "distill", source=student if resume else None, overwrite=overwrite)
    _check_report(report)


def _check_distillation(
    distillation: "DistillationConfig | str | None", topology: Topology, student: "ModelConfig", teacher: "ModelConfig"
) -> None:
    from nemo_opt.distill.config import DistillationConfig, load_distillation_config

    config = distillation
    if not isinstance(config, DistillationConfig):
        config = load_distillation_config(config, student, teacher)
    config.check_layers(student, teacher)
    config.check_topology(topology)


def _check_teacher_vocabulary(path: str, teacher: "ModelConfig", student: "ModelConfig", tokenizer: Path) -> None:
    from nemo_opt.data.tokenizer import load_tokenizer

    if teacher.vocab_size != student.vocab_size:
        shared_vocabulary(student.vocab_size, teacher.vocab_size, load_tokenizer(tokenizer).vocab_size)
    check_same_tokens(path, tokenizer)


def check_import_ckpt(*, source: str, output: str, topology: Topology, world_size: int, overwrite: bool = False, **_: Any) -> None:
    """Checks the settings of `nemo_opt.api.import_ckpt`."""
    check_output(output, overwrite=overwrite)
    if not Path(source).is_dir():
        raise CheckpointError(f"Hugging Face directory {source} does not exist")
    if not is_huggingface(source):
        raise CheckpointError(f"{source} is not a Hugging Face directory: it has no config.json")
    topology.resolve(world_size)


def check_export_ckpt(*, checkpoint: str, output: str, topology: Topology, world_size: int, overwrite: bool = False, **_: Any) -> None:
    """Checks the settings of `nemo_opt.api.export_ckpt`."""
    check_output(output, overwrite=overwrite)
    info = checkpoint_info(checkpoint)
    _check_layout(topology, world_size, info.model)


def check_evaluate(
    *, path: str, data: "DataConfig", topology: Topology, world_size: int, tokenizer: str | None = None, eval_batches: int = 32, **_: Any
) -> None:
    """Checks the settings of `nemo_opt.api.evaluate`."""
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} does not exist: give a checkpoint or a Hugging Face directory")
    if eval_batches < 1:
        raise ConfigError(f"eval_batches {eval_batches} < 1: nothing to evaluate")
    if is_huggingface(path):
        if topology.resolve(world_size).model_parallel_size > 1:
            raise ConfigError(
                f"{path} is a Hugging Face directory, which transformers evaluates without {topology.name}: import it first to split it"
            )
    else:
        info = checkpoint_info(path)
        tokenizer_directory(info, tokenizer)
        _check_layout(topology, world_size, info.model, data.seq_length)
    _check_data(data, 1)
