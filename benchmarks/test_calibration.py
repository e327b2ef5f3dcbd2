"""Calibration by maxima beside a plain forward pass (the limit) and ModelOpt's own loop, and on short texts beside NeMo's padding.

All run on the same ranks, interleaved. A time is that between two barriers, so it is the slowest rank's; one rank alone is timed by its
processor time, so that other load decides less. Each contender has a model of its own with the same weights. Asserted is that calibration
finds the amax that ModelOpt's loop finds, and on short texts those of documents that stand alone. Goals and the peers' numbers are those of
issue 7.

- The plain pass is the same layers over the same batches in the same schedule, of a model without quantizers. It makes no logits, since our
  loop makes none either: what remains is the price of the statistics. ModelOpt's loop (`megatron_prefill`) makes logits, and with pipeline
  stages broadcasts them after each batch, before the next one starts.
- Timed are the loops, as calibration runs them: what comes once, whatever the number of tokens, is a figure of its own.
- NeMo's way is one document a row, padded to the row's length, without a mask, logits included. Useful tokens are those of documents.
  ModelOpt's pack=True fills rows from a stream of documents, which attend to each other.

Sizes: a pass takes 0.3 to 0.5 s on one core, in products of matrices of 512 rows and more: computing is nearly all of it. Statistics cost
a share that falls as the model gets wider; 512 is the widest that leaves the short set short. The head has a fourth of the parameters, as
in Llama 3.2 1B; on short texts, where NeMo's pass has logits and ours has not, a seventh. Two cores that share their memory's bandwidth
run two stages at most 1.45 times as fast as one, and other load hides what overlapping gains.
"""

import math
import statistics
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

from nemo_opt.perf.interleave import interleave, ratios

LAYOUTS = {"TP1PP1": {}, "TP2PP1": {"tp": 2}, "TP1PP2": {"pp": 2}}
ALGORITHMS = {"fp8": "FP8_DEFAULT_CFG", "int8": "INT8_DEFAULT_CFG"}
GOAL = 1.05
"""Of the plain pass."""
GOAL_OF_MODELOPTS = {"TP1PP2": 0.67}
"""Of ModelOpt's own loop, which overlaps no stages."""
SHAPES = {
    "short": {"hidden": 512, "layers": 2, "vocabulary": 4096, "seq": 256, "micro_batch": 2, "rounds": 9},
    "full": {"hidden": 1024, "layers": 4, "vocabulary": 8192, "seq": 256, "micro_batch": 2, "rounds": 5},
}
MICRO_BATCHES = 4
SHORT_TEXTS = {256: {"rows": 8, "goal": 2.8, "rounds": 7}, 512: {"rows": 8, "goal": 5.5, "rounds": 5}}
"""By length of a row. The goals are 0.93 of what the useful share of padded rows allows (33 % and 17 %), of NeMo's speed."""
MEDIAN_LENGTH, SIGMA = 71, 0.64
"""Of a log-normal distribution: real paragraphs have that median, and it reproduces the useful shares of their padded rows."""
ROWS_AT_ONCE = 8
AMAX_TOLERANCE = 1e-5
"""Relative, of maxima of what was computed in matrices of another shape or under an explicit mask, which add in another order."""


def _sizes(hidden, layers, vocabulary, seq):
    from nemo_opt.models.config import ModelConfig

    return ModelConfig(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=3 * hidden, num_attention_heads=hidden // 32, num_query_groups=hidden // 64,
        vocab_size=vocabulary, max_position_embeddings=seq,
    )  # fmt: skip


def _together():
    import torch
    import torch.distributed as dist

    torch.cuda.synchronize()
    dist.barrier()


def _model(config, topology, algorithm=None):
    """A model with quantizers that are not calibrated, or without any."""
    import copy

    import modelopt.torch.quantization as mtq

    from nemo_opt.models.build import build_model

    (model,) = build_model(config, topology, seed=1)
    model.eval()
    if algorithm is not None:
        mtq.quantize(model, copy.deepcopy(getattr(mtq, ALGORITHMS[algorithm])) | {"algorithm": None})
    return model


def _collecting(model, loop):
    """The loop over a model whose quantizers collect statistics, as within `mtq.calibrate`."""
    from modelopt.torch.quantization.model_calib import enable_stats_collection, weight_only_quantize

    enable_stats_collection(model)
    weight_only_quantize(model)
    return lambda: loop(model)


def _amax(config, topology, algorithm, loop):
    """Of a model calibrated by it."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.quantize.tensors import amax_by_name

    model = _model(config, topology, algorithm)
    mtq.calibrate(model, algorithm="max", forward_loop=loop)
    return amax_by_name([model])


def _modelopts_loop(batches):
    """ModelOpt's own, with our rows in place of its data sets."""
    from unittest.mock import patch

    import modelopt.torch.utils.plugins.megatron_calibration as upstream

    loader = [{"input_ids": batch["tokens"], "attention_mask": None} for batch in batches]
    with patch.object(upstream, "get_megatron_calibration_dataloader", return_value=loader):
        return upstream.get_megatron_calibration_forward_loop(None)


def _assert_same_amax(found, expected, tolerance):
    import torch

    assert found.keys() == expected.keys()
    assert any("input_quantizer" in name for name in found)
    for name, amax in found.items():
        assert float(amax.max()) > 0, name
        torch.testing.assert_close(amax, expected[name], rtol=tolerance, atol=0.0, msg=lambda text, name=name: f"{name}: {text}")


def compare_loops(layout, algorithm, hidden, layers, vocabulary, seq, micro_batch, rounds):
    """Seconds of each contender, after ours and ModelOpt's were seen to find the same."""
    import modelopt.torch.quantization as mtq
    import torch

    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.training.forward import forward_loop

    config = _sizes(hidden, layers, vocabulary, seq)
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(seq).expand(micro_batch, -1).contiguous()
    batches = [
        {"tokens": torch.randint(vocabulary, (micro_batch, seq), generator=generator).to("cuda"), "position_ids": positions.to("cuda")}
        for _ in range(MICRO_BATCHES)
    ]
    with parallel(Topology(**layout)) as topology:
        loops = {"ours": calibration_loop(batches), "ModelOpt": _modelopts_loop(batches)}
        ours, modelopts = (_amax(config, topology, algorithm, loop) for loop in loops.values())
        _assert_same_amax(ours, modelopts, AMAX_TOLERANCE)  # ModelOpt's loop brings a mask, under which attention adds in another order
        plain, plain_loop = _model(config, topology), forward_loop(batches, description="", skip_head=True)
        other = _model(config, topology, algorithm)
        contenders = {"plain": lambda: plain_loop(plain)}
        contenders |= {name: _collecting(_model(config, topology, algorithm), loop) for name, loop in loops.items()}
        contenders["beside the loop"] = lambda: mtq.calibrate(other, algorithm="max", forward_loop=lambda _: None)
        clock = time.perf_counter if layout else time.process_time
        return interleave(contenders, rounds, together=_together, clock=clock)


CASES = [("short", "fp8", layout) for layout in LAYOUTS] + [("short", "int8", "TP1PP1")]
WIDE = [("short", "int8", "TP2PP1"), ("short", "int8", "TP1PP2"), *(("full", "fp8", layout) for layout in LAYOUTS)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("shape", "algorithm", "layout"), [*CASES, *(pytest.param(*case, marks=pytest.mark.wide) for case in WIDE)])
def test_calibration_by_maxima(benchmark, ranks, figure, shape, algorithm, layout):
    axes = LAYOUTS[layout]
    pool = ranks(max(axes.values(), default=1))
    arguments = {"layout": axes, "algorithm": algorithm, **SHAPES[shape], "timeout_s": 500.0}
    times_s = benchmark.pedantic(pool.run, args=(compare_loops,), kwargs=arguments, rounds=1)[0]
    names = {"bench": "calibration", "case": f"{algorithm}, {layout}{'' if shape == 'short' else ', full size'}"}
    figure(
        **names,
        metric="time of a plain forward pass's",
        samples=ratios(times_s["ours"], times_s["plain"]),
        peer="ModelOpt's own loop, with logits",
        peer_value=statistics.median(ratios(times_s["ModelOpt"], times_s["plain"])),
        limit=1.0,
        goal=GOAL,
    )
    figure(
        **names,
        metric="time of ModelOpt's own loop's",
        samples=ratios(times_s["ours"], times_s["ModelOpt"]),
        peer="ModelOpt's own loop",
        peer_value=1.0,
        limit=statistics.median(ratios(times_s["plain"], times_s["ModelOpt"])),
        goal=GOAL_OF_MODELOPTS.get(layout, 1.0),
    )
    figure(**names, metric="time beside the loop", samples=times_s["beside the loop"], unit="s", kind="time")
    benchmark.extra_info.update({name: statistics.median(times) for name, times in times_s.items()})


def _documents(tokens, vocabulary):
    """Token ids of short texts, the end-of-document token not yet among them; with it just over `tokens`."""
    import torch

    generator = torch.Generator().manual_seed(2)
    lengths, normal = [], statistics.NormalDist()
    while sum(lengths) < tokens:  # quantiles of the distribution: a few documents drawn from it have another useful share each time
        count = len(lengths) + 1
        lengths = [round(MEDIAN_LENGTH * math.exp(SIGMA * normal.inv_cdf((i + 0.5) / count))) for i in range(count)]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return [torch.randint(1, vocabulary, (lengths[i] - 1,), generator=generator).tolist() for i in order]


def _padded(documents, seq):
    """NeMo's rows: cut or filled up with the end-of-document token, which nothing masks; and their useful tokens."""
    import torch

    rows = [([*document, 0] + [0] * seq)[:seq] for document in documents]
    positions = torch.arange(seq)
    batches = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        tokens = torch.tensor(rows[start : start + ROWS_AT_ONCE])
        batches.append({"tokens": tokens.to("cuda"), "position_ids": positions.expand(len(tokens), -1).contiguous().to("cuda")})
    return batches, sum(min(len(document) + 1, seq) for document in documents)


def _alone(batches):
    """Each piece of packed rows in a row of its own."""
    for batch in batches:
        bounds, tokens = batch["cu_seqlens"].tolist(), batch["tokens"].reshape(-1)
        for start, end in pairwise(bounds):
            yield {"tokens": tokens[None, start:end], "position_ids": batch["position_ids"].reshape(-1)[None, start:end]}


def compare_packing(seq, rows, rounds, hidden=512, layers=2, vocabulary=2048):
    """Seconds and useful tokens of each contender, after ours was seen to measure each document by itself."""
    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.training.forward import forward_loop

    config = _sizes(hidden, layers, vocabulary, seq)
    documents = _documents(rows * seq, vocabulary)
    with parallel(Topology()) as topology:
        packed = calibration_batches(documents, SimpleNamespace(eod=0), seq_length=seq, num_samples=rows, micro_batch_size=ROWS_AT_ONCE)
        padded, useful = _padded(documents, seq)
        ours = calibration_loop(packed)
        assert (ours.report.tokens, ours.report.padding) == (rows * seq, 0)
        found, expected = (_amax(config, topology, "fp8", loop) for loop in (ours, calibration_loop(_alone(packed))))
        _assert_same_amax(found, expected, AMAX_TOLERANCE)
        loops = {"ours": ours, "NeMo": forward_loop(padded, description=""), "ModelOpt": _modelopts_loop(packed)}
        contenders = {name: _collecting(_model(config, topology, "fp8"), loop) for name, loop in loops.items()}
        plain, plain_loop = _model(config, topology), forward_loop(packed, description="", skip_head=True)
        times_s = interleave(contenders | {"plain": lambda: plain_loop(plain)}, rounds, together=_together, clock=time.process_time)
    return times_s, {name: useful if name == "NeMo" else rows * seq for name in times_s}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seq", [256, pytest.param(512, marks=pytest.mark.wide)])
def test_useful_tokens_of_short_texts(benchmark, ranks, figure, seq):
    settings = SHORT_TEXTS[seq]
    arguments = {"seq": seq, "rows": settings["rows"], "rounds": settings["rounds"], "timeout_s": 500.0}
    times_s, tokens = benchmark.pedantic(ranks(1).run, args=(compare_packing,), kwargs=arguments, rounds=1)[0]
    speeds = {name: [tokens[name] / time_s for time_s in times] for name, times in times_s.items()}
    figure(
        bench="calibration on short texts",
        case=f"rows of {seq} tokens",
        metric="useful tokens a second of NeMo's",
        samples=ratios(speeds["ours"], speeds["NeMo"]),
        direction="higher",
        peer="ModelOpt pack=True, whose documents attend to each other",
        peer_value=statistics.median(ratios(speeds["ModelOpt"], speeds["NeMo"])),
        limit=statistics.median(ratios(speeds["plain"], speeds["NeMo"])),
        goal=settings["goal"],
    )
    figure(
        bench="calibration on short texts",
        case=f"rows of {seq} tokens",
        metric="useful tokens a second of a processor",
        samples=speeds["ours"],
        unit="tokens/s",
        kind="time",
        direction="higher",
        peer="ModelOpt pack=True, whose documents attend to each other",
        peer_value=statistics.median(speeds["ModelOpt"]),
        limit=statistics.median(speeds["plain"]),
    )
