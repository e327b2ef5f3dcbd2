"""Pruning on one rank: measuring importance, slicing, and both together beside ModelOpt's own pruning (`mcore_minitron`).

- Measuring importance is compared with a plain forward pass over the same batches by the same loop, which is its limit.
- Slicing is compared with copying the weights that remain once.
- The whole, scores and slicing, is compared with ModelOpt's `mtp.prune` to the same sizes; each turn has fresh models, built where no clock
  runs. Asserted is that both keep the same weights.

A forward pass has 4 micro-batches of 8 x 128 tokens at hidden 256 and 8 layers or more: 0.4 s or more, of which 5 % remained with
one row of 2 tokens: launching operations. Times are processor time of the one rank: nothing is waited for.
"""

import contextlib
import io
import time

import pytest

from nemo_opt.perf.interleave import ratios

BENCH = "pruning"
SIZES = {
    "short": {"hidden_size": 256, "ffn_hidden_size": 768, "num_layers": 8, "vocab_size": 4096},
    "full": {"hidden_size": 512, "ffn_hidden_size": 1536, "num_layers": 12, "vocab_size": 8192},
}
TARGETS = {
    "short": {"hidden_size": 192, "ffn_hidden_size": 512, "num_layers": 6},
    "full": {"hidden_size": 384, "ffn_hidden_size": 1024, "num_layers": 9},
}
MICRO_BATCHES, MICRO_BATCH, SEQ, ROUNDS = 4, 8, 128, 4
GOAL = 1.0
"""Of ModelOpt's time."""


def measure(sizes, targets):
    """Processor seconds of each turn by what ran, after ours and ModelOpt's were seen to keep the same weights."""
    import torch

    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import ModelConfig
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.prune.importance import measure_importance
    from nemo_opt.prune.pruner import prune_language_model
    from nemo_opt.prune.selection import select
    from nemo_opt.prune.slicing import slice_model
    from nemo_opt.training.forward import forward_loop

    config = ModelConfig(**sizes, num_attention_heads=8, num_query_groups=4, max_position_embeddings=SEQ)
    times_s = {}

    def timed(name, function):
        torch.cuda.synchronize()
        start = time.process_time()
        result = function()
        torch.cuda.synchronize()
        times_s.setdefault(name, []).append(time.process_time() - start)
        return result

    with parallel(Topology()) as topology:
        loop = forward_loop(_batches(config.vocab_size), description="")

        def turn(order):
            theirs, ours, sliced = (build_model(config, topology, spec="te", seed=5)[0] for _ in range(3))
            steps = {
                "plain": lambda: loop(theirs),
                "scores": lambda: measure_importance(sliced, loop),
                "ModelOpt": lambda: _prune_with_modelopt(theirs, loop, targets),
                "ours": lambda: prune_language_model(ours, {f"target_{name}": size for name, size in targets.items()}, loop),
            }
            results = {name: timed(name, steps[name]) for name in order}
            kept = select(results["scores"], dict(targets))
            timed("slice", lambda: slice_model(sliced, kept))
            timed("copy", lambda: [parameter.detach().clone() for parameter in sliced.parameters()])
            return theirs, ours, sliced

        names = ("plain", "scores", "ours", "ModelOpt")
        for number in range(ROUNDS + 1):
            theirs, ours, sliced = turn(names if number % 2 else ("plain", "ModelOpt", "scores", "ours"))
            _assert_same(theirs, ours)
            _assert_same(sliced, ours)
    return {name: values[1:] for name, values in times_s.items()}


def _batches(vocabulary):
    import torch

    generator = torch.Generator().manual_seed(0)

    def batch():
        tokens = torch.randint(1, vocabulary, (MICRO_BATCH, SEQ), generator=generator)
        positions = torch.arange(SEQ).expand(MICRO_BATCH, -1).contiguous()
        return {"tokens": tokens.to("cuda"), "position_ids": positions.to("cuda")}

    return [batch() for _ in range(MICRO_BATCHES)]


def _prune_with_modelopt(model, loop, targets):
    import modelopt.torch.prune as mtp
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    mode = get_mcore_minitron_config(hidden_size_divisor=64, ffn_hidden_size_divisor=64, num_layers_divisor=1)
    settings = {"constraints": {"export_config": dict(targets)}, "dummy_input": None, "config": {"forward_loop": loop}}
    with contextlib.redirect_stdout(io.StringIO()):
        mtp.prune(model, mode=[("mcore_minitron", mode)], **settings)


def _assert_same(first, second):
    """ModelOpt orders what it keeps by importance: the same values stand in other places."""
    import torch

    tensors = dict(second.named_parameters())
    assert {name for name, _ in first.named_parameters()} == tensors.keys()
    for name, tensor in first.named_parameters():
        assert torch.equal(tensor.flatten().sort().values, tensors[name].flatten().sort().values), name


@pytest.mark.parametrize("shape", ["short", pytest.param("full", marks=pytest.mark.wide)])
def test_pruning(benchmark, figure, ranks, shape):
    arguments = (SIZES[shape], TARGETS[shape])
    (times_s,) = benchmark.pedantic(ranks(1).run, args=(measure, *arguments), kwargs={"timeout_s": 280.0}, rounds=1)
    case = f"TP1PP1, {shape}"
    whole = ratios(times_s["ours"], times_s["ModelOpt"])
    figure(bench=BENCH, case=case, metric="time of ModelOpt's", samples=whole, peer="ModelOpt's mcore_minitron", peer_value=1.0, goal=GOAL)
    scores = ratios(times_s["scores"], times_s["plain"])
    figure(bench=BENCH, case=case, metric="scores, time of a plain forward pass's", samples=scores, limit=1.0)
    slices = ratios(times_s["slice"], times_s["copy"])
    figure(bench=BENCH, case=case, metric="slicing, time of a copy's", samples=slices, limit=1.0)
    figure(bench=BENCH, case=case, metric="slicing, share of the whole", samples=ratios(times_s["slice"], times_s["ours"]), limit=0.0)
