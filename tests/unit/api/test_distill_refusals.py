"""A broken teacher ends a distillation on every rank, named: by its own loss, or by the first step."""

import pytest

import nemo_opt.api as api
from nemo_opt.errors import DataError, NemoOptError
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig

pytestmark = pytest.mark.ranks

MODEL = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2, vocab_size=384, max_position_embeddings=32
)


def write(path, broken):
    """A model, one weight of its first layer not a number where it is `broken`."""
    import torch

    from nemo_opt.checkpoint.save import save_checkpoint
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import parallel

    with parallel(Topology()) as topology, torch.no_grad():
        chunks = build_model(MODEL, topology, spec="local", seed=1)
        if broken:
            chunks[0].decoder.layers[0].mlp.linear_fc2.weight[3, 5] = torch.nan
        save_checkpoint(path, chunks, topology=topology)


def distil(root, eval_batches):
    sizes = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4}
    with pytest.raises(NemoOptError) as caught:
        api.distill(
            student=str(root / "student"),
            teacher=str(root / "teacher"),
            output=str(root / "out"),
            data=api.data_config(**sizes, mock=True),
            training=TrainingConfig(**sizes, max_steps=2, lr=1e-3),
            topology=Topology(pp=2),
            tokenizer=str(root / "tokenizer"),
            eval_batches=eval_batches,
            spec="local",
        )
    return type(caught.value), str(caught.value)


@pytest.fixture(scope="module")
def root(ranks, tmp_path_factory):
    from nemo_opt.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("broken")
    train_tokenizer(api.builtin_corpus().read_text().splitlines()[:40], MODEL.vocab_size, path / "tokenizer")
    ranks(1).run(write, path / "student", False)
    ranks(1).run(write, path / "teacher", True)
    return path


def test_by_its_own_loss(ranks, root):
    for kind, message in ranks(2).run(distil, root, 1):
        assert kind is DataError
        assert message.startswith("the loss of the teacher over 1 validation batches is nan")
    assert not (root / "out").exists()


def test_by_the_first_step(ranks, root):
    from nemo_opt.training.loop import DivergedError

    for kind, message in ranks(2).run(distil, root, 0):
        assert kind is DivergedError
        assert message == "the loss of step 1 is not finite on rank [1]: the logits of the teacher are not finite on rank [1]"
    assert not (root / "out").exists()
