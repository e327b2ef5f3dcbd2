"""A forward pass of a quantised model beside the plain one (the limit) and beside the model that ModelOpt alone has quantised.

All run in one rank, interleaved, over the same batches in the same schedule, without logits (the head is not quantised) and without a
quantised KV cache; processor time is compared, so that other load decides less. ModelOpt's differs from ours in two things: nothing of ours
has touched its state, and on CPUs its own kernels run, which the CPU backend exchanges; on GPUs the kernels are the same. Asserted is
that both compute the same, bit by bit, and something other than the plain model.

Size: a pass of 4096 tokens takes 0.5 s on one core, in products of matrices of 512 rows and more. Ours rounds weights once for its eight
micro-batches of 512 tokens, as `evaluate` does (`training/rounding.py`); ModelOpt rounds them in each.
"""

import ast
import functools
import statistics
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_opt.perf.interleave import interleave, ratios

GOALS = {"int8": 1.10, "fp8": 1.15}
CONFIGURATIONS = {"int8": "INT8_DEFAULT_CFG", "fp8": "FP8_DEFAULT_CFG"}
SHAPES = {
    "short": {"hidden": 512, "layers": 2, "vocabulary": 2048, "seq": 256, "micro_batch": 2, "rounds": 9},
    "full": {"hidden": 1024, "layers": 4, "vocabulary": 2048, "seq": 256, "micro_batch": 4, "rounds": 5},
}
MICRO_BATCHES = 8


def compare(hidden, layers, vocabulary, seq, micro_batch, rounds):
    """Seconds of each contender, after ours and ModelOpt's were seen to compute the same."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch

    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import ModelConfig
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize import Quantizer, calibration_loop
    from nemo_opt.training.forward import forward_loop
    from nemo_opt.training.rounding import rounded_once

    config = ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=3 * hidden, num_attention_heads=hidden // 32, num_query_groups=hidden // 64,
        vocab_size=vocabulary, max_position_embeddings=seq,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(seq).expand(micro_batch, -1).contiguous()
    batches = [
        {"tokens": torch.randint(vocabulary, (micro_batch, seq), generator=generator).to("cuda"), "position_ids": positions.to("cuda")}
        for _ in range(MICRO_BATCHES)
    ]
    with parallel(Topology()) as topology:
        loop, calibrate = forward_loop(batches, description="", skip_head=True), calibration_loop(batches)
        models = {"plain": build_model(config, topology, seed=1)[0].eval()}
        for algorithm in GOALS:
            models[f"ours {algorithm}"], models[f"ModelOpt {algorithm}"] = (
                build_model(config, topology, seed=1)[0].eval() for _ in range(2)
            )
            Quantizer({"algorithm": algorithm, "enable_kv_cache": False}).quantize(models[f"ours {algorithm}"], calibrate)
            with _kernels_of_modelopt():
                mtq.quantize(models[f"ModelOpt {algorithm}"], copy.deepcopy(getattr(mtq, CONFIGURATIONS[algorithm])), calibrate)

        def run(name):
            model = models[name]

            def in_its_context():
                with _kernels_of_modelopt() if name.startswith("ModelOpt") else rounded_once([model]):
                    loop(model)

            return in_its_context

        contenders = {name: run(name) for name in models}
        outputs = {name: _output(models[name], contenders[name]) for name in models}
        for algorithm in GOALS:
            torch.testing.assert_close(outputs[f"ours {algorithm}"], outputs[f"ModelOpt {algorithm}"], rtol=0.0, atol=0.0)
            error = (outputs[f"ours {algorithm}"] - outputs["plain"]).norm() / outputs["plain"].norm()
            assert 1e-4 < error < 0.1, f"{algorithm} changed the output by {error:.1e} of it"
        return interleave(contenders, rounds, together=torch.cuda.synchronize, clock=time.process_time)


def _output(model, run):
    """Of the last layer, for the last micro-batch."""
    seen = []
    handle = model.decoder.register_forward_hook(lambda _, __, output: seen.append(output.detach().float().cpu().clone()))
    run()
    handle.remove()
    return seen[-1]


@contextmanager
def _kernels_of_modelopt():
    """ModelOpt's FP8 and integers as its file has them; the CPU backend has exchanged the code of one function and put another in place."""
    from modelopt.torch.quantization import tensor_quant

    function, integers = tensor_quant._fp8_eager, tensor_quant._tensor_quant
    exchanged = function.__code__
    function.__code__ = _original(tensor_quant.__file__, "_fp8_eager").__code__
    original = _original(tensor_quant.__file__, "_tensor_quant")
    tensor_quant._tensor_quant = types.FunctionType(original.__code__, vars(tensor_quant), original.__name__, original.__defaults__)
    try:
        yield
    finally:
        function.__code__, tensor_quant._tensor_quant = exchanged, integers


@functools.cache
def _original(file, name):
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    found = {}
    exec(compile(tree, file, "exec"), found)  # of the installed package
    return found[name]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", ["short", pytest.param("full", marks=pytest.mark.wide)])
def test_quantised_forward(benchmark, ranks, figure, shape):
    times_s = benchmark.pedantic(ranks(1).run, args=(compare,), kwargs={**SHAPES[shape], "timeout_s": 500.0}, rounds=1)[0]
    for algorithm, goal in GOALS.items():
        figure(
            bench="quantised forward",
            case=algorithm if shape == "short" else f"{algorithm}, full size",
            metric="time of the plain forward pass's",
            samples=ratios(times_s[f"ours {algorithm}"], times_s["plain"]),
            peer="ModelOpt alone",
            peer_value=statistics.median(ratios(times_s[f"ModelOpt {algorithm}"], times_s["plain"])),
            limit=1.0,
            goal=goal,
        )
    benchmark.extra_info.update({name: statistics.median(times) for name, times in times_s.items()})
