"""Dropping layers at several layouts: the layers that stay, the model's account of itself, its checkpoint, and training on."""

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology

SMALL = preset(
    "tiny",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)
TOLERANCE = 1e-6  # of the loss; float32 sums in another order (TP2) differ by up to 1e-7
LOCAL_TE = pytest.mark.parametrize("spec", ["local", "te"])


def _loss(chunks, backward=False):
    """Mean loss over two micro-batches, on every rank."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(16).expand(2, 16)
    tokens = [torch.randint(0, 128, (2, 17), generator=generator) for _ in range(2)]

    def step(iterator, model):
        batch = next(iterator)
        losses = model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
        return losses, lambda output: (output.mean(), {"loss": float(output.mean())})

    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(tokens),
        model=chunks,
        num_microbatches=2,
        seq_length=16,
        micro_batch_size=2,
        forward_only=not backward,
    )
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [result["loss"] for result in results])
    found = [loss for losses in everyone for loss in losses]
    return sum(found) / len(found)


def _drop(topology, spec, layers, folder=None):
    from nemo_opt.models.build import build_model, model_config_of
    from nemo_opt.parallel import initialize
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

    initialize(topology)
    chunks = build_model(SMALL, topology, spec=spec, seed=5)
    before = {id(layer): layer.layer_number for layer in chunks[0].decoder.layers}
    assert prune_language_model(chunks, {"drop_layers": layers}) is chunks
    if folder:
        save_pruned_model(chunks, folder)
    return {
        "kept": [before[id(layer)] for layer in chunks[0].decoder.layers],
        "numbers": [layer.layer_number for layer in chunks[0].decoder.layers],
        "config": model_config_of(chunks[0]),
        "loss": _loss(chunks),
        "gradients": _gradients(chunks),
    }


def _gradients(chunks):
    _loss(chunks, backward=True)
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in chunks[0].parameters())


def _reload(topology, spec, folder):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.parallel import initialize

    initialize(topology)
    chunks, info = restore_model(folder, topology, spec=spec)
    return {"loss": _loss(chunks), "config": info.model, "layers": len(chunks[0].decoder.layers)}


@pytest.mark.ranks
@LOCAL_TE
@pytest.mark.parametrize(
    ("name", "layers", "kept"),
    [
        ("TP2PP1", [2], [[1, 3, 4], [1, 3, 4]]),
        ("TP1PP2", [1, 4], [[2], [3]]),
        ("TP1PP2", [3], [[1, 2], [4]]),
        ("TP1PP2", [3, 4], [[1, 2], []]),
    ],
)
def test_the_named_layers_go_and_the_checkpoint_loads_evenly(ranks, tmp_path, name, layers, kept, spec):
    one = ranks(1).run(_drop, Topology(), spec, layers)[0]
    several = ranks(2).run(_drop, Topology.from_name(name), spec, layers, str(tmp_path / "dropped"))
    assert [rank["kept"] for rank in several] == kept
    assert one["numbers"] == list(range(1, 5 - len(layers)))
    for rank in several:
        assert rank["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
        assert rank["config"] == one["config"] == SMALL.with_(num_layers=4 - len(layers))
        assert rank["gradients"]
    even = [Topology(), Topology(tp=2)] + ([Topology(pp=2)] if len(layers) == 2 else [])
    for topology in even:
        loaded = ranks(topology.world_size).run(_reload, topology, spec, str(tmp_path / "dropped"))[0]
        assert loaded["loss"] == pytest.approx(one["loss"], rel=TOLERANCE), topology.name
        assert loaded["config"] == one["config"]
        assert loaded["layers"] == one["config"].num_layers // topology.pp
