"""Commands that make, change or measure a model. Each makes validated settings and starts one function of `nemo_opt.api`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nemo_opt.api.corpus import data_config
from nemo_opt.cli.layout import Layout, with_layout
from nemo_opt.cli.report import show
from nemo_opt.cli.run import start, write_json
from nemo_opt.errors import ConfigError
from nemo_opt.quantize.config import ALGORITHMS, EXPORT_FORMATS

__all__ = ["register"]

_DATA = "Data"
_SIZES = "Sizes to prune to"
_SEARCH = "Search under limits"
_SWEEP = "Sweep over algorithms"
_IMPORTANCE = "Importance"

Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint directory.", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="A .jsonl, a .txt or a Megatron prefix; repeat for several. Default: the text that ships with Python.",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[str | None, typer.Option("--split", help="Shares for training, validation, test.", rich_help_panel=_DATA)]
Mock = Annotated[bool, typer.Option("--mock", help="Random tokens instead of text.", rich_help_panel=_DATA)]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer directory. Default: the checkpoint's own.", rich_help_panel=_DATA)
]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens of one sample.", rich_help_panel=_DATA)]
Mbs = Annotated[int, typer.Option("--mbs", help="Micro-batch size.", rich_help_panel=_DATA)]
Gbs = Annotated[int, typer.Option("--gbs", help="Global batch size.", rich_help_panel=_DATA)]
EvalBatches = Annotated[
    int, typer.Option("--eval-batches", help="Validation micro-batches for the loss before and after; 0 measures none.")
]
Spec = Annotated[str | None, typer.Option("--spec", help="Layer spec, te or local. Default: te where it exists.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps.", rich_help_panel="Training")]
Lr = Annotated[float, typer.Option("--lr", help="Highest learning rate.", rich_help_panel="Training")]
MinLr = Annotated[
    float | None, typer.Option("--min-lr", help="Lowest learning rate; a tenth of --lr by default.", rich_help_panel="Training")
]
Warmup = Annotated[int | None, typer.Option("--warmup-steps", help="A tenth of --steps by default.", rich_help_panel="Training")]
SaveInterval = Annotated[
    int, typer.Option("--save-interval", help="Steps between checkpoints to resume from, at OUTPUT-resume.", rich_help_panel="Training")
]
LogDir = Annotated[Path | None, typer.Option("--log-dir", help="Directory of metrics.jsonl.", rich_help_panel="Training")]


def check_spec(spec: str | None) -> str | None:
    """The layer spec of a flag; raises `ConfigError` where there is none of that name."""
    if spec not in (None, "te", "local"):
        raise ConfigError(f"layer spec {spec!r} is unknown: give te or local")
    return spec


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _run(command: str, layout: Layout, json: Path | None, **settings: Any) -> Any:
    result = start(command, devices=layout.devices, topology=layout.topology, **settings)
    show(result)
    if json is not None:
        write_json(result, json)
    return result


def _training(
    steps: int,
    gbs: int,
    mbs: int,
    seq_length: int,
    lr: float,
    min_lr: float | None,
    warmup: int | None,
    eval_batches: int,
    val_check_interval: int | None = None,
) -> Any:
    from nemo_opt.training.config import TrainingConfig

    return TrainingConfig(
        max_steps=steps,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        seq_length=seq_length,
        lr=lr,
        min_lr=lr / 10 if min_lr is None else min_lr,
        warmup_steps=steps // 10 if warmup is None else warmup,
        val_check_interval=steps if val_check_interval is None or not eval_batches else val_check_interval,
        limit_val_batches=max(eval_batches, 1),
    )


@with_layout
def train(
    output: Output,
    preset: Annotated[str | None, typer.Option("--preset", help="Sizes of a new model: tiny, 68m, llama3.2-1b, llama3.1-8b.")] = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Start from the weights of this checkpoint.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint with its optimizer, schedule and position.")] = False,
    tokenizer: Tokenizer = None,
    steps: Steps = 100,
    gbs: Gbs = 8,
    mbs: Mbs = 4,
    seq_length: SeqLength = 128,
    lr: Lr = 1e-3,
    min_lr: MinLr = None,
    warmup_steps: Warmup = None,
    data: Data = None,
    split: Split = None,
    mock: Mock = False,
    eval_batches: EvalBatches = 8,
    spec: Spec = None,
    log_dir: LogDir = None,
    save_interval: SaveInterval = 0,
    overwrite: Overwrite = False,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Train a model from its sizes, or go on from a checkpoint.

    Example: `nemo-opt train OUT --preset tiny --tokenizer TOKENIZER_DIR --steps 200 --tp 2`

    or, interrupted with --save-interval, `nemo-opt train OUT --checkpoint OUT-resume --resume --steps 200 --tp 2`
    """
    from nemo_opt.models.config import preset as preset_named

    settings = data_config(data, mock=mock, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=gbs)
    training = _training(steps, gbs, mbs, seq_length, lr, min_lr, warmup_steps, eval_batches)
    _run(
        "train",
        layout,
        json,
        output=str(output),
        model=preset_named(preset) if preset else None,
        checkpoint=checkpoint,
        resume=resume,
        tokenizer=tokenizer,
        data=settings,
        training=training,
        spec=check_spec(spec),
        log_dir=_text(log_dir),
        save_interval=save_interval,
        overwrite=overwrite,
    )


@with_layout
def import_hf(hf_dir: Path, out_dir: Path, spec: Spec = None, overwrite: Overwrite = False, json: Json = None, *, layout: Layout) -> None:
    """Turn a Hugging Face directory into a checkpoint.

    Example: `nemo-opt import ./Llama-3.2-1B ./llama-1b --tp 2`
    """
    _run("import_ckpt", layout, json, source=str(hf_dir), output=str(out_dir), spec=check_spec(spec), overwrite=overwrite)


@with_layout
def export_hf(ckpt: Checkpoint, hf_dir: Output, overwrite: Overwrite = False, json: Json = None, *, layout: Layout) -> None:
    """Turn a checkpoint into a Hugging Face directory, which transformers opens.

    Example: `nemo-opt export ./llama-1b ./llama-1b-hf --pp 2`
    """
    _run("export_ckpt", layout, json, checkpoint=str(ckpt), output=str(hf_dir), overwrite=overwrite)


@with_layout
def ptq(
    ckpt: Checkpoint,
    output: Output,
    algorithm: Annotated[
        str,
        typer.Option("--algorithm", "-a", help=f"One of {', '.join(ALGORITHMS)}; a ModelOpt configuration (..._CFG); or a recipe's file."),
    ] = "fp8",
    export_format: Annotated[
        str | None,
        typer.Option(
            "--export-format", help=f"Form of the result: {', '.join(EXPORT_FORMATS)}. Default: nemo; hf of a sweep.", show_default=False
        ),
    ] = None,
    awq_block_size: Annotated[int, typer.Option("--awq-block-size", help="Weights that share a scale in int4 formats.")] = 128,
    fp8_block_shape: Annotated[
        tuple[int, int], typer.Option("--fp8-block-shape", help="Rows and columns that share a scale in block_fp8.")
    ] = (128, 128),
    sq_alpha: Annotated[float, typer.Option("--sq-alpha", help="SmoothQuant's migration strength, 0..1.")] = 0.5,
    weight_only: Annotated[bool, typer.Option("--weight-only", help="Leave activations as they are.")] = False,
    kv_cache: Annotated[
        bool | None, typer.Option("--kv-cache/--no-kv-cache", help="Quantise the KV cache. Default: NeMo's rule, not beside int8.")
    ] = None,
    kv_cache_format: Annotated[
        str | None, typer.Option("--kv-cache-format", help="fp8 or nvfp4. Default: fp8.", show_default=False)
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Compare algorithms; OUTPUT holds each result.", rich_help_panel=_SWEEP)] = False,
    algorithms: Annotated[
        str | None, typer.Option("--algorithms", help="Which, with commas between. Default: all.", rich_help_panel=_SWEEP)
    ] = None,
    export: Annotated[
        bool, typer.Option("--export/--no-export", help="Write each result, or only measure.", rich_help_panel=_SWEEP)
    ] = True,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page of losses, sizes, SQNR and amax (HTML).")] = None,
    calibration_samples: Annotated[
        int, typer.Option("--calibration-samples", help="Samples to calibrate on.", rich_help_panel=_DATA)
    ] = 128,
    packing: Annotated[
        str,
        typer.Option("--packing", help="Rows to calibrate on: full (pack), or one document each (pad).", rich_help_panel=_DATA),
    ] = "pack",
    sample: Annotated[bool, typer.Option("--generate-sample", help="Continue two prompts with the quantised model.")] = False,
    tokenizer: Tokenizer = None,
    mbs: Mbs = 8,
    seq_length: SeqLength = 128,
    data: Data = None,
    split: Split = None,
    mock: Mock = False,
    eval_batches: EvalBatches = 8,
    spec: Spec = None,
    overwrite: Overwrite = False,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Quantise a checkpoint after training; or compare algorithms on it (a sweep).

    Example: `nemo-opt ptq ./teacher ./teacher-fp8 --algorithm fp8 --tp 2 --report fp8.html`

    or `nemo-opt ptq ./teacher ./sweep --sweep --algorithms fp8,int4_awq,nvfp4 --pp 2 --report sweep.html`

    or, all algorithms, only measured, `nemo-opt ptq ./teacher ./sweep --sweep --no-export`
    """
    from nemo_opt.quantize.config import ExportConfig, QuantizationConfig

    if not sweep and (algorithms is not None or not export):
        raise ConfigError("--algorithms and --no-export belong to a sweep over algorithms: add --sweep")
    common: dict[str, Any] = {
        "checkpoint": str(ckpt),
        "quantization": QuantizationConfig(
            algorithm=algorithm,
            awq_block_size=awq_block_size,
            fp8_block_shape=fp8_block_shape,
            sq_alpha=sq_alpha,
            weight_only=weight_only,
            enable_kv_cache=kv_cache,
            kv_cache_qformat=kv_cache_format,
            calibration_packing=_packing(packing),
            calibration_dataset="builtin" if not data else data[-1],
            calibration_dataset_size=calibration_samples,
            calibration_batch_size=mbs,
            calibration_seq_len=seq_length,
        ),
        "data": data_config(data, mock=mock, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=mbs),
        "tokenizer": tokenizer,
        "report": _text(report),
        "eval_batches": eval_batches,
        "spec": check_spec(spec),
        "overwrite": overwrite,
    }
    if not sweep:
        written = ExportConfig(path=str(output), export_format=export_format or "nemo", generate_sample=sample)
        _run("ptq", layout, json, export=written, **common)
        return
    names = [name.strip() for name in algorithms.split(",")] if algorithms is not None else list(ALGORITHMS)
    chosen = {"algorithms": names, "export_format": (export_format or "hf") if export else None}
    if _run("ptq_sweep", layout, json, output=str(output), **chosen, **common).failed:
        raise typer.Exit(1)


def _packing(name: str) -> Literal["pack", "pad"]:
    if name not in ("pack", "pad"):
        raise ConfigError(f"--packing {name} is unknown: give pack or pad")
    return "pack" if name == "pack" else "pad"


@with_layout
def prune(
    ckpt: Checkpoint,
    output: Output,
    hidden_size: Annotated[int | None, typer.Option("--hidden-size", help="Width of the residual stream.", rich_help_panel=_SIZES)] = None,
    ffn_hidden_size: Annotated[int | None, typer.Option("--ffn-hidden-size", help="Width of the MLP.", rich_help_panel=_SIZES)] = None,
    attention_heads: Annotated[int | None, typer.Option("--attention-heads", help="Query heads.", rich_help_panel=_SIZES)] = None,
    query_groups: Annotated[int | None, typer.Option("--query-groups", help="Key/value heads.", rich_help_panel=_SIZES)] = None,
    experts: Annotated[int | None, typer.Option("--experts", help="Experts of every layer.", rich_help_panel=_SIZES)] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="Decoder layers.", rich_help_panel=_SIZES)] = None,
    drop_layers: Annotated[
        list[int] | None, typer.Option("--drop-layer", help="Drop this layer (from 1); repeat. Excludes targets.", rich_help_panel=_SIZES)
    ] = None,
    target_params: Annotated[
        float | None, typer.Option("--target-params", help="At most so many parameters (6e9 is allowed).", rich_help_panel=_SEARCH)
    ] = None,
    target_active_params: Annotated[
        float | None, typer.Option("--target-active-params", help="At most so many for one token.", rich_help_panel=_SEARCH)
    ] = None,
    target_memory_mb: Annotated[
        float | None, typer.Option("--target-memory-mb", help="At most so many MiB of weights and cache.", rich_help_panel=_SEARCH)
    ] = None,
    max_width_pruning: Annotated[
        float, typer.Option("--max-width-pruning", help="Share of each width that may go.", rich_help_panel=_SEARCH)
    ] = 0.40,
    max_depth_pruning: Annotated[
        float, typer.Option("--max-depth-pruning", help="Share of the layers that may go.", rich_help_panel=_SEARCH)
    ] = 0.20,
    top_k: Annotated[int, typer.Option("--top-k", help="Largest candidates that are scored.", rich_help_panel=_SEARCH)] = 10,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Importance that was saved before: nothing is measured.", rich_help_panel=_IMPORTANCE)
    ] = None,
    save_scores: Annotated[
        Path | None, typer.Option("--save-scores", help="Save importance to this file.", rich_help_panel=_IMPORTANCE)
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page of importance and what was kept (HTML).")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Samples to measure importance on.", rich_help_panel=_IMPORTANCE)] = 128,
    tokenizer: Tokenizer = None,
    mbs: Mbs = 4,
    seq_length: SeqLength = 128,
    data: Data = None,
    split: Split = None,
    mock: Mock = False,
    eval_batches: EvalBatches = 8,
    spec: Spec = None,
    overwrite: Overwrite = False,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Prune a checkpoint by importance (Minitron): to sizes, or to the best sizes under a limit; or drop layers by number.

    Example: `nemo-opt prune ./teacher ./pruned --hidden-size 96 --ffn-hidden-size 192 --tp 2 --report pruned.html`
    """
    from nemo_opt.prune.config import PruningConfig
    from nemo_opt.prune.space import SearchSpace

    pruning = PruningConfig(
        target_hidden_size=hidden_size,
        target_ffn_hidden_size=ffn_hidden_size,
        target_num_attention_heads=attention_heads,
        target_num_query_groups=query_groups,
        target_num_moe_experts=experts,
        target_num_layers=num_layers,
        drop_layers=tuple(drop_layers) if drop_layers else None,
        target_params=target_params,
        target_active_params=target_active_params,
        target_memory_mb=target_memory_mb,
        search=SearchSpace(max_width_pruning=max_width_pruning, max_depth_pruning=max_depth_pruning, top_k=top_k),
    )
    settings = data_config(data, mock=mock, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=mbs)
    _run(
        "prune",
        layout,
        json,
        checkpoint=str(ckpt),
        output=str(output),
        pruning=pruning,
        data=settings,
        tokenizer=tokenizer,
        num_train_samples=samples,
        scores=_text(scores),
        save_scores=_text(save_scores),
        report=_text(report),
        eval_batches=eval_batches,
        spec=check_spec(spec),
        overwrite=overwrite,
    )


@with_layout
def distill(
    student: Annotated[Path, typer.Argument(help="Checkpoint to train; it may be quantised.", show_default=False)],
    teacher: Annotated[Path, typer.Argument(help="Checkpoint or Hugging Face directory to learn from.", show_default=False)],
    output: Output,
    kd_config: Annotated[str | None, typer.Option("--kd-config", help="YAML with the layer pairs and scales, as NeMo's.")] = None,
    tokenizer: Tokenizer = None,
    steps: Steps = 100,
    gbs: Gbs = 8,
    mbs: Mbs = 4,
    seq_length: SeqLength = 128,
    lr: Lr = 1e-3,
    min_lr: MinLr = None,
    warmup_steps: Warmup = None,
    data: Data = None,
    split: Split = None,
    mock: Mock = False,
    eval_batches: EvalBatches = 8,
    val_check_interval: Annotated[
        int | None,
        typer.Option(
            "--val-check-interval",
            help="Steps between validations on the way; 0 for none. Default: a tenth of --steps with --report, else none.",
            show_default=False,
            rich_help_panel="Training",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page of the losses (HTML).")] = None,
    spec: Spec = None,
    log_dir: LogDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from STUDENT, which an interrupted distillation left.", rich_help_panel="Training")
    ] = False,
    save_interval: SaveInterval = 0,
    save_optimizer: Annotated[
        bool,
        typer.Option("--save-optimizer", help="Write OUTPUT so that it can be resumed for more steps.", rich_help_panel="Training"),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Train a student to give the teacher's answers.

    Example: `nemo-opt distill ./pruned ./teacher ./distilled --steps 100 --pp 2 --report distilled.html`

    or, a long run, `nemo-opt distill ./pruned ./teacher ./distilled --steps 10000 --save-interval 500 --log-dir ./log`

    and, after it was interrupted, `nemo-opt distill ./distilled-resume ./teacher ./distilled --steps 10000 --resume --log-dir ./log`
    """
    if val_check_interval is None and report is not None:
        val_check_interval = max(steps // 10, 1)
    settings = data_config(data, mock=mock, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=gbs)
    _run(
        "distill",
        layout,
        json,
        student=str(student),
        teacher=str(teacher),
        output=str(output),
        distillation=kd_config,
        data=settings,
        training=_training(steps, gbs, mbs, seq_length, lr, min_lr, warmup_steps, eval_batches, val_check_interval),
        tokenizer=tokenizer,
        eval_batches=eval_batches,
        spec=check_spec(spec),
        log_dir=_text(log_dir),
        resume=resume,
        save_interval=save_interval,
        save_optimizer=save_optimizer,
        report=_text(report),
        overwrite=overwrite,
    )


@with_layout
def evaluate(
    path: Annotated[Path, typer.Argument(help="Checkpoint or Hugging Face directory.", metavar="DIR", show_default=False)],
    tokenizer: Tokenizer = None,
    mbs: Mbs = 8,
    seq_length: SeqLength = 128,
    data: Data = None,
    split: Split = None,
    mock: Mock = False,
    eval_batches: EvalBatches = 32,
    spec: Spec = None,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Measure the validation loss of a checkpoint, or of a Hugging Face directory, quantised or not, as an engine would run it.

    Example: `nemo-opt eval ./teacher-fp8 --pp 2`
    """
    settings = data_config(data, mock=mock, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=mbs)
    _run("evaluate", layout, json, path=str(path), data=settings, tokenizer=tokenizer, eval_batches=eval_batches, spec=check_spec(spec))


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    panel = "Models"
    app.command("train", rich_help_panel=panel)(train)
    app.command("import", rich_help_panel=panel)(import_hf)
    app.command("export", rich_help_panel=panel)(export_hf)
    app.command("ptq", rich_help_panel=panel)(ptq)
    app.command("prune", rich_help_panel=panel)(prune)
    app.command("distill", rich_help_panel=panel)(distill)
    app.command("eval", rich_help_panel=panel)(evaluate)
