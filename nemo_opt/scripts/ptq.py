"""NeMo's scripts/llm/ptq.py: `python -m nemo_opt.scripts.ptq -nc CKPT -algo fp8 -out DIR --export_format nemo`.

Differences, all announced: an output that exists is an error (NeMo exits 0 without quantising); a calibration set that would have to be
downloaded is replaced by the built-in corpus when it is only the default, and refused when it was asked for.
"""

import argparse
import sys
from pathlib import Path

from nemo_opt.api.corpus import data_config
from nemo_opt.cli.run import exit_code_of
from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.scripts import _common

__all__ = ["main", "parser"]

_ALGORITHMS = ["no_quant", "int8", "int8_sq", "fp8", "block_fp8", "int4_awq", "w4a8_awq", "int4", "nvfp4", "mxfp8"]
_EVAL_BATCH_SIZE = 8  # of the losses before and after: NeMo's 64 is for calibration, where no logits are kept
_DEFAULT_DATASET = "cnn_dailymail"
_DOWNLOADS = ("cnn_dailymail", "wikitext")


def parser() -> argparse.ArgumentParser:
    """NeMo's flags, then nemo_opt's own."""
    p = argparse.ArgumentParser(
        "nemo_opt.scripts.ptq", formatter_class=argparse.ArgumentDefaultsHelpFormatter, description="Post-training quantisation"
    )
    p.add_argument("-nc", "--nemo_checkpoint", required=True, help="Source checkpoint")
    p.add_argument("--tokenizer", help="Tokenizer directory; the checkpoint's own by default")
    p.add_argument("--decoder_type", help="Decoder type for TensorRT-LLM")
    p.add_argument("-ctp", "--calibration_tp", "--calib_tp", type=int, default=1)
    p.add_argument("-cpp", "--calibration_pp", "--calib_pp", type=int, default=1)
    p.add_argument("--num_layers_in_first_pipeline_stage", type=int, help="Layers of the first pipeline stage; an even split by default")
    p.add_argument("--num_layers_in_last_pipeline_stage", type=int, help="Layers of the last pipeline stage; an even split by default")
    p.add_argument("-itp", "--inference_tp", "--tensor_parallelism_size", type=int, default=1, help="TP size of the TensorRT-LLM engine")
    p.add_argument("-ipp", "--inference_pp", "--pipeline_parallelism_size", type=int, default=1, help="PP size of the TensorRT-LLM engine")
    p.add_argument("--devices", type=int, help="Devices a node; calibration_tp by default")
    p.add_argument("-nodes", "--num_nodes", type=int, help="Nodes; calibration_pp by default, all on this machine without torchrun")
    p.add_argument("-out", "--export_path", "--output_path", help="Directory to write")
    p.add_argument(
        "--export_format", default="trtllm", choices=["trtllm", "nemo", "hf"], help="Form of the result; TensorRT-LLM reads hf too"
    )
    p.add_argument(
        "-algo", "--algorithm", default="fp8", help=f"One of {', '.join(_ALGORITHMS)}, ModelOpt's ..._CFG, or a JSON or YAML file"
    )
    p.add_argument("-awq_bs", "--awq_block_size", type=int, default=128, help="Block size of int4 and AWQ algorithms")
    p.add_argument("--fp8_block_shape", type=int, nargs=2, default=(128, 128), help="Rows and columns of block_fp8's blocks")
    p.add_argument("--weight_only", action="store_true", help="Leave activations as they are")
    p.add_argument("--sq_alpha", type=float, default=0.5, help="SmoothQuant's alpha")
    p.add_argument("--enable_kv_cache", action="store_true", help="Quantise the KV cache")
    p.add_argument("--disable_kv_cache", dest="enable_kv_cache", action="store_false")
    p.set_defaults(enable_kv_cache=None)
    p.add_argument("--kv_cache_qformat", default="fp8", choices=["fp8", "nvfp4"], help="Format of a quantised KV cache")
    p.add_argument(
        "-dt", "--dtype", default="bf16", choices=["16", "bf16"], help="Type of layers that are not quantised, in exports that convert"
    )
    p.add_argument("-bs", "--batch_size", default=64, type=int, help="Calibration batch size")
    p.add_argument("-sl", "--seq_len", default=128, type=int, help="Tokens of a calibration sample")
    p.add_argument("-calib_size", "--calibration_dataset_size", default=512, type=int, help="Calibration samples")
    p.add_argument(
        "-calib_ds",
        "--calibration_dataset",
        default=None,
        help="builtin, a .jsonl, a .txt or a Megatron prefix (NeMo's default would be downloaded)",
    )
    p.add_argument(
        "--calibration_packing",
        default="pack",
        choices=["pack", "pad"],
        help="Rows full of documents that do not attend to each other, or one document a row, its padding counted nowhere",
    )
    p.add_argument("--generate_sample", action="store_true", help="Generate a sample after quantising")
    p.add_argument("--trust_remote_code", action="store_true", help="Refused: no code of a checkpoint is ever run")
    p.add_argument(
        "--legacy_ckpt", action="store_true", help="Accepted; checkpoints of nemo_opt do not depend on the version of Transformer Engine"
    )
    _common.add_own_flags(p)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    _common.refuse("--trust_remote_code", options.trust_remote_code, "no code of a checkpoint is ever run")
    if options.legacy_ckpt:
        _common.note("--legacy_ckpt has no effect: checkpoints do not depend on the version of Transformer Engine")
    topology = Topology(
        tp=options.calibration_tp,
        pp=options.calibration_pp,
        first_stage_layers=options.num_layers_in_first_pipeline_stage,
        last_stage_layers=options.num_layers_in_last_pipeline_stage,
    )
    devices = _common.start_count(
        topology,
        topology.tp if options.devices is None else options.devices,
        _nodes(options, topology),
        nodes_given=options.num_nodes is not None,
    )
    data = _calibration_data(options)
    _common.run(
        "ptq",
        options,
        devices=devices,
        topology=topology,
        checkpoint=options.nemo_checkpoint,
        quantization=_quantization(options),
        export=_export(options),
        data=data,
        tokenizer=options.tokenizer,
        eval_batches=options.eval_batches,
    )


def _nodes(options: argparse.Namespace, topology: Topology) -> int:
    """NeMo's default is calibration_pp nodes of calibration_tp devices; devices that hold every stage leave one node."""
    if options.num_nodes is not None:
        return int(options.num_nodes)
    return topology.pp if options.devices is None or options.devices % topology.model_parallel_size else 1


def _quantization(options: argparse.Namespace) -> QuantizationConfig:
    return QuantizationConfig(
        algorithm=None if options.algorithm == "no_quant" else options.algorithm,
        awq_block_size=options.awq_block_size,
        fp8_block_shape=options.fp8_block_shape,
        weight_only=options.weight_only,
        sq_alpha=options.sq_alpha,
        enable_kv_cache=options.enable_kv_cache,
        kv_cache_qformat=options.kv_cache_qformat,
        calibration_dataset=options.calibration_dataset or "builtin",
        calibration_dataset_size=options.calibration_dataset_size,
        calibration_batch_size=options.batch_size,
        calibration_seq_len=options.seq_len,
        calibration_packing=options.calibration_packing,
        decoder_type=options.decoder_type,
    )


def _export(options: argparse.Namespace) -> ExportConfig:
    return ExportConfig(
        path=Path(options.export_path or f"./nemo_{options.algorithm}"),
        export_format=options.export_format,
        dtype=options.dtype,
        decoder_type=options.decoder_type,
        inference_tp=options.inference_tp,
        inference_pp=options.inference_pp,
        generate_sample=options.generate_sample,
    )


def _calibration_data(options: argparse.Namespace) -> DataConfig:
    name = options.calibration_dataset
    if name in _DOWNLOADS:
        raise ConfigError(f"--calibration_dataset {name} would have to be downloaded: give builtin, a .jsonl, a .txt or a Megatron prefix")
    if name is None:
        _common.note(f"calibrating on the built-in corpus; NeMo's default {_DEFAULT_DATASET} would have to be downloaded")
    paths = None if name in (None, "builtin") else [name]
    micro_batch_size = min(options.batch_size, _EVAL_BATCH_SIZE)
    return data_config(paths, seq_length=options.seq_len, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size)


if __name__ == "__main__":
    sys.exit(main())
