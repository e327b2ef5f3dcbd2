"""NeMo's scripts/llm/gpt_train.py: trains a checkpoint, or distils it from a teacher when `--teacher_path` is given.

The result is written to LOG_DIR/NAME/checkpoint, metrics to LOG_DIR/NAME/metrics.jsonl. As in NeMo, every validation leaves a checkpoint
(LOG_DIR/NAME/checkpoint-resume), and an interrupted run goes on from it when the same command is given again. Training runs in float32
without a GPU whatever `--precision` says, with a printed line; chat data is refused by name.
"""

import argparse
import sys
from pathlib import Path

from nemo_opt.api.corpus import data_config
from nemo_opt.api.resumable import resume_dir
from nemo_opt.cli.run import exit_code_of
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.scripts import _common
from nemo_opt.training.config import TrainingConfig

__all__ = ["main", "parser"]

_PRECISIONS = ("bf16-mixed", "bf16", "32", "32-true")


def parser() -> argparse.ArgumentParser:
    """NeMo's flags, then nemo_opt's own."""
    p = argparse.ArgumentParser("nemo_opt.scripts.gpt_train", description="Training, and distillation with --teacher_path, of GPT models")
    p.add_argument("--name", required=True, help="Name of the experiment")
    p.add_argument("--model_path", required=True, help="Checkpoint to train; the student when --teacher_path is given")
    p.add_argument("--teacher_path", help="Checkpoint of the teacher; turns training into distillation")
    p.add_argument("--kd_config", help="YAML with the distillation's layer pairs and scales")
    p.add_argument("--tp_size", type=int, default=1, help="Tensor parallel size; above 1 sequence parallelism is on, as in NeMo")
    p.add_argument("--cp_size", type=int, default=1, help="Context parallel size")
    p.add_argument("--pp_size", type=int, default=1, help="Pipeline parallel size")
    p.add_argument("--ep_size", type=int, default=1, help="Expert parallel size")
    p.add_argument("--precision", default="bf16-mixed", help="Type for models and optimizer")
    p.add_argument("--devices", type=int, default=1, help="Devices a node")
    p.add_argument("--num_nodes", type=int, default=1, help="Nodes")
    p.add_argument("--log_dir", required=True, help="Folder for logs and checkpoints")
    p.add_argument("--max_steps", type=int, required=True, help="Optimizer steps")
    p.add_argument("--gbs", type=int, required=True, help="Global batch size")
    p.add_argument("--mbs", type=int, required=True, help="Micro-batch size")
    p.add_argument("--data_paths", nargs="+", help="PATH ..., or WEIGHT PATH WEIGHT PATH ...")
    p.add_argument("--split", default="99,1,0", help="Shares for training, validation and test")
    p.add_argument("--index_mapping_dir", help="Folder of index files")
    p.add_argument("--use-chat-data", action="store_true", help="Not supported yet")
    p.add_argument("--chat-template-path", help="Not supported yet")
    p.add_argument("--use_mock_data", action="store_true", help="Random tokens instead of --data_paths")
    p.add_argument("--seq_length", type=int, required=True, help="Tokens of a sample")
    p.add_argument("--tokenizer", help="Tokenizer directory; the checkpoint's own by default")
    p.add_argument("--lr", type=float, default=1e-4, help="Highest learning rate of the cosine schedule")
    p.add_argument("--min_lr", type=float, default=1e-5, help="Lowest learning rate")
    p.add_argument("--warmup_steps", type=int, default=50, help="Steps of warm-up")
    p.add_argument("--val_check_interval", type=int, default=100, help="Validate, and save to go on from, every so many steps")
    p.add_argument("--limit_val_batches", type=int, default=32, help="Batches of one validation")
    p.add_argument("--log_interval", type=int, default=10, help="Log every so many steps")
    p.add_argument(
        "--legacy_ckpt", action="store_true", help="Accepted; checkpoints of nemo_opt do not depend on the version of Transformer Engine"
    )
    _common.add_own_flags(p)
    group = p.add_argument_group("nemo_opt's own, of training")
    group.add_argument(
        "--save_interval", type=int, help="Steps between checkpoints to go on from; --val_check_interval by default, 0: none"
    )
    group.add_argument("--report", help="Write a page of a distillation's losses (HTML)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    _check(options)
    topology = Topology(tp=options.tp_size, pp=options.pp_size, cp=options.cp_size, ep=options.ep_size, sp=options.tp_size > 1)
    devices = _common.start_count(topology, options.devices, options.num_nodes, nodes_given=options.num_nodes > 1)
    home = Path(options.log_dir) / options.name
    output = str(home / "checkpoint")
    resumed = resume_dir(output)
    settings = {
        "output": output,
        "log_dir": str(home),
        "resume": resumed.exists(),
        "save_interval": options.val_check_interval if options.save_interval is None else options.save_interval,
        "training": _training(options),
        "data": data_config(
            options.data_paths,
            mock=options.use_mock_data,
            split=options.split,
            seq_length=options.seq_length,
            micro_batch_size=options.mbs,
            global_batch_size=options.gbs,
            index_mapping_dir=options.index_mapping_dir,
        ),
        "tokenizer": options.tokenizer,
    }
    source = options.model_path
    if settings["resume"]:
        _common.note(f"going on from {resumed}, where an interrupted run left it; remove it to start from {source}")
        source = str(resumed)
    if options.teacher_path:
        distillation = {"student": source, "teacher": options.teacher_path, "distillation": options.kd_config}
        shown = {"eval_batches": options.eval_batches, "report": options.report}
        _common.run("distill", options, devices=devices, topology=topology, **settings, **distillation, **shown)
    else:
        _common.run("train", options, devices=devices, topology=topology, checkpoint=source, **settings)


def _check(options: argparse.Namespace) -> None:
    """NeMo's refusals, and what is not supported here."""
    _common.refuse("--use-chat-data", options.use_chat_data, "chat data is not read yet; give text or Megatron prefixes in --data_paths")
    _common.refuse("--chat-template-path", bool(options.chat_template_path), "chat data is not read yet")
    if not options.data_paths and not options.use_mock_data:
        raise ConfigError("Must provide either custom dataset(s) in --data_paths or set --use_mock_data.")
    if options.kd_config and not options.teacher_path:
        raise ConfigError(f"--kd_config {options.kd_config} without --teacher_path: name the teacher, or leave the settings out")
    if options.report and not options.teacher_path:
        raise ConfigError(f"--report {options.report} without --teacher_path: it shows a distillation's losses")
    if options.precision not in _PRECISIONS:
        raise ConfigError(f"--precision {options.precision!r} is not supported: give one of {', '.join(_PRECISIONS)}")
    if options.legacy_ckpt:
        _common.note("--legacy_ckpt has no effect: checkpoints do not depend on the version of Transformer Engine")
    _common.note(f"--precision {options.precision}: the type of the chosen device is used (float32 without a GPU)")


def _training(options: argparse.Namespace) -> TrainingConfig:
    # NeMo's default of 50 warm-up steps is longer than a test's whole run.
    warmup_steps = min(options.warmup_steps, max(options.max_steps - 1, 0))
    if warmup_steps != options.warmup_steps:
        _common.note(f"warmup_steps {options.warmup_steps} -> {warmup_steps}: it must be below max_steps {options.max_steps}")
    return TrainingConfig(
        max_steps=options.max_steps,
        global_batch_size=options.gbs,
        micro_batch_size=options.mbs,
        seq_length=options.seq_length,
        lr=options.lr,
        min_lr=options.min_lr,
        warmup_steps=warmup_steps,
        val_check_interval=options.val_check_interval,
        limit_val_batches=options.limit_val_batches,
        log_interval=options.log_interval,
    )


if __name__ == "__main__":
    sys.exit(main())
