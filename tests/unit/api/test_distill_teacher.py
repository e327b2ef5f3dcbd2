"""Where a teacher lies, and how its vocabulary is padded, makes no difference to what the student learns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nemo_opt.api as api
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.huggingface import export_hf
from nemo_opt.parallel import Topology, parallel
from nemo_opt.training.config import TrainingConfig

STUDENT = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=384, max_position_embeddings=64
)
TEACHER = STUDENT.with_(hidden_size=48, num_layers=3, init_method_std=0.1)
PAIRS = [("decoder.layers.1", "decoder.layers.2")]


def distil(root):
    """On each rank: one student, the same teacher in three places."""
    tokenizer = root / "tokenizer"
    with parallel(Topology(tp=2)) as topology:
        [teacher] = build_model(TEACHER, topology, seed=5)
        save_checkpoint(root / "student", build_model(STUDENT, topology, seed=1), topology=topology, tokenizer_dir=tokenizer)
        save_checkpoint(root / "checkpoint", [teacher], topology=topology, tokenizer_dir=tokenizer)
        export_hf([teacher], root / "hf", tokenizer_dir=tokenizer)
        if torch.distributed.get_rank() == 0:
            pad(root / "hf", root / "padded")
    values = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4}
    return [
        api.distill(
            student=str(root / "student"),
            teacher=str(root / teacher),
            output=str(root / f"from {teacher}"),
            distillation=DistillationConfig(intermediate_layer_pairs=PAIRS),
            data=api.data_config(**values, index_mapping_dir=str(root / "index")),
            training=TrainingConfig(max_steps=2, lr=1e-2, **values),
            topology=Topology(tp=2),
            eval_batches=1,
        )
        for teacher in ("checkpoint", "hf", "padded")
    ]


def pad(directory, padded):
    """A copy whose embedding and head have 136 rows more, as published models do."""
    shutil.copytree(directory, padded)
    weights = load_file(padded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((136, TEACHER.hidden_size), 9.0)])
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 520}))


@pytest.mark.ranks
@pytest.mark.wide
def test_the_place_of_the_teacher_makes_no_difference(ranks, tmp_path):
    train_tokenizer(Path(api.builtin_corpus()).read_text().splitlines()[:40], STUDENT.vocab_size, tmp_path / "tokenizer")
    for results in ranks(2).run(distil, tmp_path):
        checkpoint, *others = ({k: v for k, v in result.to_dict().items() if isinstance(v, float) and "_s" not in k} for result in results)
        assert {"teacher_loss", "loss_before", "loss_after", "kd_loss_first", "kd_loss_last"} <= checkpoint.keys()
        assert checkpoint["loss_after"] != checkpoint["loss_before"]
        assert others == [checkpoint] * 2
