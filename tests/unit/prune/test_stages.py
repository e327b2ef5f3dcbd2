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


CASES = {  # layers to drop -> (layout, what its ranks then hold)
    (2,): ("TP2PP1", [[1, 3, 4], [1, 3, 4]]),
    (1, 4): ("TP1PP2", [[2], [3]]),
    (3,): ("TP1PP2", [[1, 2], [4]]),
    (3, 4): ("TP1PP2", [[1, 2], []]),
}
SPECS = {(2,): ["te"], (1, 4): ["local", "te"], (3,): ["te"], (3, 4): ["local"]}


def _drop(name, cases, folder=None):
    """Each of `cases` at one layout, in one start of the ranks."""
    from nemo_opt.models.build import build_model, model_config_of
    from nemo_opt.parallel import initialize
    from nemo_opt.prune.pruner import prune_language_model, save_pruned_model

    topology = initialize(Topology.from_name(name))
    results = {}
    for layers in cases:
        for spec in SPECS[layers]:
            chunks = build_model(SMALL, topology, spec=spec, seed=5)
            for layer in chunks[0].decoder.layers:  # attributes of parameters are carried over
                layer.self_attention.linear_proj.weight.number_before = layer.layer_number
            assert prune_language_model(chunks, {"drop_layers": list(layers)}) is chunks
            if folder:
                save_pruned_model(chunks, f"{folder}/{spec}_{layers}")
            results[layers, spec] = {
                "kept": [layer.self_attention.linear_proj.weight.number_before for layer in chunks[0].decoder.layers],
                "numbers": [layer.layer_number for layer in chunks[0].decoder.layers],
                "config": model_config_of(chunks[0]),
                "loss": _loss(chunks),
                "gradients": _gradients(chunks),
            }
    return results


def _gradients(chunks):
    _loss(chunks, backward=True)
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in chunks[0].parameters())


def _reload(name, cases, folder):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    results = {}
    for layers in cases:
        for spec in SPECS[layers]:
            chunks, info = restore_model(f"{folder}/{spec}_{layers}", topology, spec=spec)
            results[layers, spec] = {"loss": _loss(chunks), "config": info.model, "layers": len(chunks[0].decoder.layers)}
    return results


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("chosen", "loaded_at"),  # the rest is left to the functional suite: see tests/unit/conftest.py
    [([(1, 4)], ["TP2PP1"]), pytest.param(list(CASES), ["TP1PP1", "TP2PP1", "TP1PP2"], id="all", marks=pytest.mark.wide)],
)
def test_the_named_layers_go_and_the_checkpoint_loads_evenly(ranks, tmp_path, chosen, loaded_at):
    expected = ranks(1).run(_drop, "TP1PP1", chosen)[0]
    for layout in dict.fromkeys(CASES[layers][0] for layers in chosen):
        cases = [layers for layers in chosen if CASES[layers][0] == layout]
        for rank, results in enumerate(ranks(2).run(_drop, layout, cases, str(tmp_path))):
            for (layers, spec), result in results.items():
                one = expected[layers, spec]
                assert result["kept"] == CASES[layers][1][rank]
                assert one["numbers"] == list(range(1, 5 - len(layers)))
                assert result["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
                assert result["config"] == one["config"] == SMALL.with_(num_layers=4 - len(layers))
                assert result["gradients"]
    for layout in loaded_at:
        topology = Topology.from_name(layout)
        cases = [layers for layers in chosen if topology.pp == 1 or len(layers) == 2]  # which leaves as many layers to each stage
        for key, loaded in ranks(topology.world_size).run(_reload, layout, cases, str(tmp_path))[0].items():
            assert loaded["loss"] == pytest.approx(expected[key]["loss"], rel=TOLERANCE), (layout, key)
            assert loaded["config"] == expected[key]["config"]
            assert loaded["layers"] == expected[key]["config"].num_layers // topology.pp
