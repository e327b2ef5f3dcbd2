"""Whether a checkpoint is what it says at every layout and in transformers: one job of two ranks, one JSON file of numbers.

`python -m nemo_opt.testing.reload CKPT --data PREFIX --json FILE` loads the checkpoint at each layout of `--layouts`, measures its loss on
the same validation samples, exports it to Hugging Face, opens that with transformers, and compares loss and logits there. The numbers are
for `nemo_opt.testing.check`; the program itself fails only where something cannot be done at all.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_opt.data.config import DataConfig
from nemo_opt.errors import ConfigError
from nemo_opt.launch import run_ranks
from nemo_opt.parallel import Topology

__all__ = ["main", "reload"]

_RANKS = 2
_MICRO_BATCH, _BATCHES = 2, 8


def reload(*, checkpoint: str, data: DataConfig, layouts: list[str], folder: str) -> dict[str, Any]:
    """Losses by layout, and what transformers makes of the export; called on both ranks.

    Args:
        checkpoint: What is loaded.
        data: Validation samples; the same ones at every layout.
        layouts: Names of topologies of two ranks; data parallel ones share the samples.
        folder: Directory to export to, the same one on both ranks.

    """
    from nemo_opt import api
    from nemo_opt.checkpoint.info import read_info

    losses, parameters = {}, set()
    for name in layouts:
        topology = Topology.from_name(name)
        result = api.evaluate(path=checkpoint, data=data, topology=topology, eval_batches=_eval_batches(topology))
        losses[result.layout] = result.loss
        parameters.add(result.parameters)
    split = Topology.from_name(layouts[-1])
    api.export_ckpt(checkpoint=checkpoint, output=folder, topology=split)
    opened = api.evaluate(path=folder, data=data, topology=Topology(), eval_batches=_eval_batches(Topology()))
    return {
        "losses": losses,
        "parameters": sorted(parameters),
        "model": read_info(checkpoint).model.to_dict(),
        "transformers_loss": opened.loss,
        "transformers_parameters": opened.parameters,
        "transformers_config": json.loads((Path(folder) / "config.json").read_text()),
        "logits_difference": _logits_difference(checkpoint, folder, data),
    }


def _eval_batches(topology: Topology) -> int:
    """Micro-batches of each data parallel rank, so that all layouts see the same samples."""
    return _BATCHES * topology.resolve(_RANKS).model_parallel_size // _RANKS


def _logits_difference(checkpoint: str, folder: str, data: DataConfig) -> float:
    """Largest difference between Megatron-Core's and transformers' logits on one micro-batch, relative to the largest logit."""
    import torch
    import transformers

    from nemo_opt.api._session import open_feed, session
    from nemo_opt.checkpoint.info import read_info
    from nemo_opt.checkpoint.load import restore_model

    info = read_info(checkpoint)
    with session(Topology(), info.model) as job, torch.no_grad():
        (model,), _ = restore_model(checkpoint, job.topology)
        batch = next(iter(open_feed(data, info.tokenizer_dir or checkpoint, eval_batches=1).valid_batches()))
        ours_BSV = model.eval()(batch["tokens"], batch["position_ids"], None)[..., : info.model.vocab_size].float()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=ours_BSV.dtype, local_files_only=True)
        theirs_BSV = theirs.to(ours_BSV.device).eval()(input_ids=batch["tokens"], position_ids=batch["position_ids"]).logits
    return float((ours_BSV - theirs_BSV[..., : ours_BSV.shape[-1]]).abs().max() / theirs_BSV.abs().max())


def main(arguments: list[str] | None = None) -> int:
    """Runs the check on two ranks; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.reload", description="Load a checkpoint at several layouts and in transformers")
    parser.add_argument("checkpoint")
    parser.add_argument("--data", nargs="+", required=True, help="As of nemo-opt's --data")
    parser.add_argument("--split", default="99,1,0")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--layouts", nargs="+", default=["TP1PP1", "TP2PP1"], help="Topologies of at most two model parallel ranks")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    batch = {"seq_length": options.seq_length, "micro_batch_size": _MICRO_BATCH, "global_batch_size": _MICRO_BATCH}
    data = DataConfig(paths=options.data, split=options.split, **batch)
    try:
        with tempfile.TemporaryDirectory(prefix="nemo_opt_reload_") as folder:
            settings = {"checkpoint": options.checkpoint, "data": data, "layouts": options.layouts, "folder": f"{folder}/hf"}
            result = run_ranks("nemo_opt.testing.reload:reload", settings, devices=_RANKS)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
