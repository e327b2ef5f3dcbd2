"""What calibration measures is real tokens, each document by itself: on every layout, for dense models and experts, and not upstream."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nemo_opt.parallel import Topology
from nemo_opt.quantize import calibration
from nemo_opt.quantize.calibration import CalibrationReport, calibration_loop

SEQ, LENGTHS = 16, (3, 16, 9, 6)
LOUD = 119
"""A token that no document holds, with an embedding on one channel only: after a norm, larger than any other's."""
TOL = 2e-6
"""Relative, of one document's maxima in another shape of matrices, which are then summed in another order (5.9e-7 seen)."""
TOKENIZER = SimpleNamespace(eod=0)


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, LOUD, (size - 1,), generator=generator).tolist() for size in LENGTHS]


def _model(topology, spec, moe=False):
    import modelopt.torch.quantization as mtq

    from nemo_opt.models.build import build_model
    from nemo_opt.testing.parity import TINY, TINY_MOE

    chunks = build_model(TINY_MOE if moe else TINY.with_(num_layers=2), topology, spec=spec, seed=5)
    if (embedding := getattr(chunks[0], "embedding", None)) is not None:
        table = embedding.word_embeddings
        if table.vocab_start_index <= LOUD < table.vocab_end_index:
            table.weight.data[LOUD - table.vocab_start_index] = 20 * torch.nn.functional.one_hot(torch.tensor(3), 32)
    quant_cfg = {"quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]], "algorithm": None}
    mtq.quantize(chunks[0], quant_cfg)
    return chunks


def _calibrated(chunks, loop):
    import modelopt.torch.quantization as mtq

    from nemo_opt.quantize.tensors import amax_by_name

    mtq.calibrate(chunks[0], algorithm="max", forward_loop=loop)
    return {name: amax for name, amax in amax_by_name(chunks).items() if "weight" not in name}


def _padded(name, spec, moe=False, masked=True):
    """Amax of padded rows."""
    from megatron.core import parallel_state

    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology.from_name(name))
    shard = {"dp_rank": parallel_state.get_data_parallel_rank(), "dp_size": topology.dp or 1}
    batches = calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9, micro_batch_size=2, packing="pad", **shard)
    batches = [batch | {"tokens": _loud(batch)} for batch in batches]
    if not masked:
        batches = [batch | {"attention_mask": None} for batch in batches]
    loop = calibration_loop(batches)
    amax = _calibrated(_model(topology, spec, moe), loop)
    return amax, (loop.report.samples, loop.report.tokens, loop.report.padding)


def _loud(batch):
    """Padding by the loud token: a document's own could hide among the real maxima."""
    mask = batch["attention_mask"]
    return batch["tokens"] if mask is None else batch["tokens"].where(mask.bool(), LOUD)


def _alone(spec, moe=False):
    """Amax of the documents, each in a row of its own length."""
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology())
    rows = [torch.tensor([[*document, TOKENIZER.eod][:SEQ]]) for document in documents()]
    loop = calibration_loop([{"tokens": row, "position_ids": torch.arange(row.shape[1])[None]} for row in rows])
    return _calibrated(_model(topology, spec, moe), loop)


@pytest.fixture(scope="module")
def alone(ranks):
    made = {}

    def get(*case):
        if case not in made:
            made[case] = ranks(1).run(_alone, *case)[0]
        return made[case]

    return get


CASES = [("TP1PP1", "local", False), ("TP1PP1", "te", True), ("TP2PP1SP", "te", False), ("CP2", "te", False)]
WIDE = [
    ("TP1PP2", "te", False),
    ("TP2PP1", "local", False),
    ("DP2", "te", False),
    ("DP3", "local", False),
    ("TP1PP1", "local", True),
    ("EP2", "local", True),
    ("TP2PP1SP", "local", True),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "spec", "moe"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.wide, id="-".join(map(str, case))) for case in WIDE)],
)
def test_padding_leaves_no_trace_in_any_amax(ranks, alone, name, spec, moe):
    expected = alone(spec, moe)
    assert any("bmm" in key for key in expected) == (spec == "te")
    assert any("experts" in key for key in expected) == moe
    for amax, counts in ranks(Topology.from_name(name).world_size).run(_padded, name, spec, moe):
        assert amax.keys() == expected.keys()
        for key, value in amax.items():
            torch.testing.assert_close(value, expected[key], rtol=TOL, atol=0, msg=lambda text, key=key: f"{key}: {text}")
        assert counts[:2] == (len(LENGTHS), sum(LENGTHS))
        assert counts[2] >= len(LENGTHS) * SEQ - sum(LENGTHS)


@pytest.mark.ranks
def test_padding_without_a_mask_does_leave_traces(ranks, alone):
    ((amax, _),) = ranks(1).run(_padded, "TP1PP1", "local", masked=False)
    assert max(float((value / alone("local", False)[key] - 1).abs()) for key, value in amax.items()) > 0.01


def _exact():
    """Amax found under the mask, and the maxima of the very rows of real tokens that the quantizers were called with."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    chunks = _model(initialize(Topology()), "te")
    batches = calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9, packing="pad")
    batches = [batch | {"tokens": _loud(batch)} for batch in batches]
    maxima = {}

    def watch(name):
        def hook(_, inputs):
            real = LENGTHS[len(maxima[name])]
            maxima[name].append(inputs[0][:real].abs().max())

        return hook

    for name, module in chunks[0].named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled and "weight" not in name:
            maxima[name] = []
            module.register_forward_pre_hook(watch(name))
    amax = _calibrated(chunks, calibration_loop(batches))
    return amax, {name: torch.stack(found).max() for name, found in maxima.items()}


@pytest.mark.ranks
def test_amax_is_exactly_the_largest_of_the_real_rows(ranks):
    amax, maxima = ranks(1).run(_exact)[0]
    assert amax == maxima
    assert len(amax) == 2 * (4 + 2)


def _upstream(pack):
    """Amax by upstream's own loop, as `hf_ptq` and Megatron-LM run it, with our documents in place of its data sets."""
    from unittest.mock import patch

    import modelopt.torch.utils.plugins.megatron_calibration as upstream

    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import initialize

    topology = initialize(Topology())
    packing = "pack" if pack else "pad"
    batches = calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9, packing=packing)
    loader = [{"input_ids": _loud(batch), "attention_mask": batch["attention_mask"]} for batch in batches]
    chunks = _model(topology, "local")
    with patch.object(upstream, "get_megatron_calibration_dataloader", return_value=loader):
        loop = upstream.get_megatron_calibration_forward_loop(TOKENIZER, pack=pack)
    return _calibrated(chunks, loop)


def _packed(spec, isolate=True):
    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    topology = initialize(Topology())
    batches = calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9, packing="pack")
    if not isolate:
        batches = [batch | {"cu_seqlens": None} for batch in batches]
    return _calibrated(_model(topology, spec), calibration_loop(batches))


@pytest.mark.ranks
def test_upstreams_loop_counts_padding(ranks):
    """Turns red when upstream's loop passes the attention mask on; then `masking` may go."""
    (padded, _), upstream = ranks(1).run(_padded, "TP1PP1", "local", masked=False)[0], ranks(1).run(_upstream, False)[0]
    assert upstream == padded


@pytest.mark.ranks
def test_upstreams_packing_lets_documents_attend_to_each_other(ranks):
    """Turns red when upstream keeps packed documents apart."""
    together, apart = (ranks(1).run(_packed, "local", isolate)[0] for isolate in (False, True))
    upstream = ranks(1).run(_upstream, True)[0]
    assert upstream == together
    assert max(float((upstream[key] / apart[key] - 1).abs()) for key in apart) > 0.01


def _head(quantized):
    """How often the output layer ran, and the counts of a second pass."""
    import modelopt.torch.quantization as mtq

    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop

    chunks = _model(initialize(Topology()), "local")
    if quantized:
        mtq.set_quantizer_by_cfg(chunks[0], [{"quantizer_name": "*output_layer.input_quantizer", "enable": True}])
    calls = []
    chunks[0].output_layer.register_forward_hook(lambda *_: calls.append(1))
    loop = calibration_loop(calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9))
    for _ in range(2):
        loop(chunks[0])
    return len(calls), loop.report


@pytest.mark.ranks
@pytest.mark.parametrize("quantized", [False, True])
def test_the_output_layer_runs_only_for_its_quantizer(ranks, quantized):
    calls, report = ranks(1).run(_head, quantized)[0]
    assert calls == (2 * 2 if quantized else 0)
    assert (report.samples, report.tokens, report.padding, report.passes) == (2, 32, 0, 2)
    assert report.tokens_per_s == pytest.approx(64 / report.time_s)


def test_the_report_is_one_line():
    report = CalibrationReport(samples=3, tokens=40, padding=8, passes=2, time_s=0.5)
    assert str(report) == "3 samples, 40 tokens, 8 of padding, 2 passes in 0.5 s: 160 tokens/s"
    assert CalibrationReport(samples=3, tokens=40, padding=8, passes=0, time_s=0.0).tokens_per_s == 0
    with pytest.raises(AttributeError):
        report.tokens = 41


@pytest.fixture
def place():
    """This rank's place: `place(tp=1, first=False, cp=1)`; and what other ranks count."""

    def set_to(tp=0, cp=0, *, first=True, others=()):
        state.get_tensor_model_parallel_rank.return_value = tp
        state.get_context_parallel_rank.return_value = cp
        state.is_pipeline_first_stage.return_value = first
        dist.get_world_size.return_value = 1 + len(others)
        dist.all_gather_object.side_effect = lambda everyone, own: everyone.__setitem__(slice(None), [own, *others])

    with (
        patch.object(calibration, "parallel_state") as state,
        patch.object(calibration, "dist") as dist,
        patch.object(calibration, "forward_loop", lambda *_, **__: lambda model: None),
    ):
        set_to()
        yield set_to


def _rows():
    """Rows of 4, 1 and no real tokens, and two of a batch without a mask."""
    masked = {"tokens": torch.ones(3, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])}
    return [masked, {"tokens": torch.ones(2, 4), "attention_mask": None}]


def _counts(batches):
    report = calibration_loop(batches).report
    return report.samples, report.tokens, report.padding


def test_rows_tokens_and_padding_are_counted(place):
    assert _counts(_rows()) == (4, 13, 7)
    assert _counts(iter(_rows())) == (4, 13, 7), "batches may be an iterator"
    full_attention = {"tokens": torch.ones(2, 4), "attention_mask": torch.zeros(2, 1, 4, 4)}
    assert _counts([full_attention, {"tokens": torch.ones(1, 4)}]) == (3, 12, 0), "only a mask of [B, S] says what padding is"


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ({"others": [(1, 2, 3), (10, 20, 30)]}, (15, 35, 40)),
        ({"tp": 1, "others": [(1, 2, 3)]}, (1, 2, 3)),  # its copy is counted by the first tensor-parallel rank
        ({"first": False, "others": [(1, 2, 3)]}, (1, 2, 3)),
        ({"tp": 1, "first": False}, (0, 0, 0)),
        ({"cp": 1, "others": [(4, 2, 3)]}, (4, 15, 10)),  # tokens are its own, rows the first context-parallel rank's
    ],
)
def test_every_sequence_is_counted_once(place, at, expected):
    place(**at)
    assert _counts(_rows()) == expected


def _with_head(**quantizers):
    """A model of a stage that has an output layer, with quantizers that are enabled or not."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    head = torch.nn.Module()
    for name, is_enabled in quantizers.items():
        quantizer = TensorQuantizer()
        if not is_enabled:
            quantizer.disable()
        head.add_module(name, quantizer)
    return SimpleNamespace(output_layer=head)


@pytest.mark.parametrize(
    ("model", "unseen"),
    [
        (SimpleNamespace(), False),  # not the last stage
        (SimpleNamespace(output_layer=None), False),
        (_with_head(), True),
        (_with_head(input_quantizer=False, weight_quantizer=False), True),
        (_with_head(input_quantizer=True, weight_quantizer=False), False),
    ],
)
def test_the_head_is_skipped_where_no_quantizer_looks(place, model, unseen):
    ran = []
    with (
        patch.object(calibration, "unwrap", lambda model: model),
        patch.object(calibration, "quick_maxima", nullcontext),
        patch.object(calibration, "forward_loop", lambda batches, **how: lambda model: ran.append((batches, how, model))),
    ):
        loop = calibration_loop(_rows())
        loop(model)
        loop(model)
    batches, how, shown = ran[-1]
    assert len(ran) == 2
    assert shown is model
    assert (how["skip_head"], how["surround"]) == (unseen, calibration.padding_masked)
    assert [batch["tokens"].shape for batch in batches] == [(3, 4), (2, 4)]


def test_time_is_the_sum_of_all_passes(place):
    clock = iter([10.0, 10.5, 20.0, 22.0])
    with (
        patch.object(calibration, "_head_is_unseen", lambda model: False),
        patch.object(calibration, "quick_maxima", nullcontext),
        patch.object(calibration.time, "perf_counter", lambda: next(clock)),
    ):
        loop = calibration_loop(_rows())
        assert (loop.report.passes, loop.report.time_s, loop.report.tokens_per_s) == (0, 0, 0)
        loop(None)
        loop(None)
    assert (loop.report.passes, loop.report.time_s, loop.report.tokens_per_s) == (2, 2.5, 13 * 2 / 2.5)
