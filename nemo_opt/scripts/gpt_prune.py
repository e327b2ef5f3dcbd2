"""NeMo's scripts/llm/gpt_prune.py: `python -m nemo_opt.scripts.gpt_prune --restore_path CKPT --save_path DIR --target_... N`.

One difference, announced: without `--data_paths` NeMo prunes by random data; here the built-in corpus is used, and random data must be
asked for with `--use_mock_data`.
"""

import argparse
import sys

from nemo_opt.api.corpus import data_config
from nemo_opt.cli.run import exit_code_of
from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.scripts import _common

__all__ = ["main", "parser"]

_TARGETS = {
    "target_ffn_hidden_size": "MLP width",
    "target_hidden_size": "Width of the residual stream",
    "target_num_attention_heads": "Query heads",
    "target_num_query_groups": "Key/value heads",
    "target_num_layers": "Decoder layers",
    "target_mamba_num_heads": "Mamba heads",
    "target_mamba_head_dim": "Channels of a Mamba head",
}


def parser() -> argparse.ArgumentParser:
    """NeMo's flags, then nemo_opt's own."""
    p = argparse.ArgumentParser("nemo_opt.scripts.gpt_prune", description="Pruning of GPT models")
    p.add_argument("--devices", type=int, default=1, help="Devices a node")
    p.add_argument("--num_nodes", type=int, default=1)
    p.add_argument("--tp_size", type=int, default=1, help="Tensor parallel size")
    p.add_argument("--pp_size", type=int, default=1, help="Pipeline parallel size")
    p.add_argument("--num_layers_in_first_pipeline_stage", type=int, help="Layers of the first pipeline stage; an even split by default")
    p.add_argument("--num_layers_in_last_pipeline_stage", type=int, help="Layers of the last pipeline stage; an even split by default")
    p.add_argument("--seq_length", type=int, help="Tokens of a sample; not needed with --drop_layers or --scores")
    p.add_argument("--restore_path", required=True, help="Checkpoint to prune")
    p.add_argument(
        "--legacy_ckpt", action="store_true", help="Accepted; checkpoints of nemo_opt do not depend on the version of Transformer Engine"
    )
    p.add_argument("--save_path", required=True, help="Directory to write")
    p.add_argument("--tokenizer", help="Tokenizer directory; the checkpoint's own by default")
    p.add_argument("--data_paths", metavar="N", nargs="*", help="PATH ..., or WEIGHT PATH WEIGHT PATH ...; the built-in corpus by default")
    p.add_argument("--split", default="99,1,0", help="Shares for training, validation and test")
    p.add_argument("--index_mapping_dir", help="Directory of index files")
    p.add_argument("--mbs", type=int, default=1, help="Micro-batch size")
    p.add_argument("--num_train_samples", type=int, default=1024, help="Samples to estimate importance on")
    for name, text in _TARGETS.items():
        p.add_argument(f"--{name}", type=int, help=f"{text} after pruning")
    p.add_argument("--drop_layers", type=int, metavar="N", nargs="*", help="Layers to drop, counted from 1; excludes every target")
    _common.add_own_flags(p)
    group = p.add_argument_group("nemo_opt's own, of pruning")
    group.add_argument("--scores", help="Importance that was saved before: nothing is measured")
    group.add_argument("--save_scores", help="Save importance to this file")
    group.add_argument("--report", help="Write a page of importance and what was kept (HTML)")
    p.add_argument("--use_mock_data", action="store_true", help="Prune by random data, as NeMo does without --data_paths")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.legacy_ckpt:
        _common.note("--legacy_ckpt has no effect: checkpoints do not depend on the version of Transformer Engine")
    topology = Topology(
        tp=options.tp_size,
        pp=options.pp_size,
        first_stage_layers=options.num_layers_in_first_pipeline_stage,
        last_stage_layers=options.num_layers_in_last_pipeline_stage,
    )
    devices = _common.start_count(topology, options.devices, options.num_nodes, nodes_given=options.num_nodes > 1)
    pruning = PruningConfig(drop_layers=options.drop_layers, **{name: getattr(options, name) for name in _TARGETS})
    _common.run(
        "prune",
        options,
        devices=devices,
        topology=topology,
        checkpoint=options.restore_path,
        output=options.save_path,
        pruning=pruning,
        data=_data(options),
        tokenizer=options.tokenizer,
        num_train_samples=options.num_train_samples,
        scores=options.scores,
        save_scores=options.save_scores,
        report=options.report,
        eval_batches=options.eval_batches,
    )


def _data(options: argparse.Namespace) -> DataConfig | None:
    """Data to estimate importance on; saved scores and dropping layers by number need none."""
    if (options.drop_layers or options.scores) and not options.seq_length:
        return None
    if not options.seq_length:
        raise ConfigError("--seq_length must be given: importance is estimated on sequences of that length")
    if options.num_train_samples % options.mbs:
        raise ConfigError(
            f"num_train_samples {options.num_train_samples} % mbs {options.mbs} != 0: num_train_samples must be divisible by mbs"
        )
    builtin = not options.data_paths and not options.use_mock_data
    if builtin:
        _common.note("no --data_paths: importance is estimated on the built-in corpus (NeMo would take random data)")
    return data_config(
        options.data_paths,
        mock=options.use_mock_data,
        split=None if builtin else options.split,
        seq_length=options.seq_length,
        micro_batch_size=options.mbs,
        global_batch_size=options.mbs,
        index_mapping_dir=options.index_mapping_dir,
    )


if __name__ == "__main__":
    sys.exit(main())
