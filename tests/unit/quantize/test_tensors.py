"""amax at several layouts and both specs against the single rank, and against the weights themselves."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import QuantizationConfig

SMALL = preset(
    "tiny",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)
TP_TOLERANCE = 5e-7
"""Relative. Tensor parallel ranks sum partial products in another order, so activations, hence their maxima, differ in the last bit:
1.2e-7 seen at TP2, with and without SP. Pipeline, data and context parallel layouts compute the same sums: 0 seen, 0 allowed."""
LOSS_TOLERANCE = 1e-5
"""Relative; 0 seen. An activation that differs in the last bit may lie next to a rounding edge and be quantised to the other side."""
BOTH_SPECS = ("TP1PP1", "TP2PP1", "TP1PP2")  # and these are saved; Megatron-Core's local modules refuse SP and CP, and seconds count
CASES = [("local", "fp8"), ("local", "int8"), ("te", "fp8"), ("te", "int8")]
NARROW = [("local", "int8"), ("te", "fp8")]  # the others at each layout are left to the functional suite: see tests/unit/conftest.py


def wide(*values):
    return pytest.param(*values, CASES, marks=pytest.mark.wide, id="-".join(values))


def _batches(dp_rank=0, dp_size=1):
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 128, (2, 16), generator=generator) for _ in range(4)]
    positions = torch.arange(16).expand(2, 16)
    return [{"tokens": part, "position_ids": positions, "attention_mask": None} for part in tokens[dp_rank::dp_size]]


def _quantize(name, cases, folder=None):
    """The cases at one layout, in one start of the ranks."""
    from megatron.core import parallel_state

    from nemo_opt.data.batches import cp_slice
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.config import ExportConfig
    from nemo_opt.quantize.quantizer import Quantizer
    from nemo_opt.quantize.tensors import amax_by_name

    topology = initialize(Topology.from_name(name))
    loop = calibration_loop([cp_slice(batch) for batch in _batches(parallel_state.get_data_parallel_rank(), topology.dp)])
    results = {}
    for spec, algorithm in cases:
        if spec == "local" and name not in BOTH_SPECS:
            continue
        chunks = build_model(SMALL, topology, spec=spec, seed=5)
        quantizer = Quantizer(QuantizationConfig(algorithm=algorithm), ExportConfig(path="unused", export_format="nemo"))
        assert quantizer.quantize(chunks, loop) is chunks
        if folder:
            quantizer.export(chunks, f"{folder}/{spec}_{algorithm}")
        loss = _loss(chunks) if topology.cp == 1 else None  # CP would need the loss's own reduction
        results[spec, algorithm] = {"amax": amax_by_name(chunks), "loss": loss, "maxima": _row_maxima(chunks)}
    return results


def _loss(chunks):
    """Mean loss of one batch on every rank of any layout."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (batch, *_) = _batches()

    def step(iterator, model):
        next(iterator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["tokens"].roll(-1, dims=1))
        return losses, lambda output: (output.mean(), {"loss": float(output.mean())})

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([0]),
            model=chunks,
            num_microbatches=1,
            seq_length=16,
            micro_batch_size=2,
            forward_only=True,
        )
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [result["loss"] for result in results])
    found = [loss for losses in everyone for loss in losses]
    return sum(found) / len(found)


def _row_maxima(chunks):
    """max |w| of every output row of this rank's quantized linears (over all of the row) beside its amax."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from modelopt.torch.quantization.nn import QuantModule

    pairs = []
    for module in chunks[0].modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(module, QuantModule) and quantizer is not None and quantizer.is_enabled:
            rows = module.weight.detach().abs().amax(dim=1)
            if module._is_row_parallel:
                dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
            pairs.append((rows, quantizer.amax.detach().flatten().clone()))
    return pairs


@pytest.fixture(scope="module")
def single(ranks):
    return ranks(1).run(_quantize, "TP1PP1", CASES)[0]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """layout and cases -> (results of its ranks, directory of its checkpoints), made when first asked for."""
    made = {}

    def get(layout, cases):
        key = layout, len(cases)
        if key not in made:
            folder = str(tmp_path_factory.mktemp(layout)) if layout in BOTH_SPECS else None
            made[key] = ranks(Topology.from_name(layout).world_size).run(_quantize, layout, cases, folder), folder
        return made[key]

    return get


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_weight_amax_is_the_largest_weight(single, case):
    result = single[case]
    kv_cache = SMALL.num_layers * 2 if case == ("te", "fp8") else 0  # NeMo's rule; ModelOpt knows the attention of one spec only
    assert len(result["amax"]) == SMALL.num_layers * 4 * 2 + kv_cache  # qkv, proj, fc1, fc2: weight and input
    assert len(result["maxima"]) == SMALL.num_layers * 4
    for rows, amax in result["maxima"]:
        assert torch.equal(amax, rows if case[1] == "int8" else rows.max().reshape(1))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "cases"),
    [("TP2PP1", NARROW), ("TP1PP2", NARROW), *map(wide, ("TP2PP1", "TP1PP2", "TP2PP2", "TP2PP1SP", "DP2", "CP2"))],
)
def test_amax_of_every_layout_is_the_single_ranks(saved, single, layout, cases):
    for results in saved(layout, cases)[0]:
        assert len(results) == (len(cases) if layout in BOTH_SPECS else 2)
        for case, result in results.items():
            expected = single[case]["amax"]
            assert result["amax"].keys() == expected.keys()
            for name, amax in result["amax"].items():
                rtol = 0 if "weight_quantizer" in name or "TP2" not in layout else TP_TOLERANCE
                torch.testing.assert_close(
                    amax, expected[name], rtol=rtol, atol=0, msg=lambda text, name=name, case=case: f"{case} {name}: {text}"
                )


def _restore(name, cases, folder):
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.parallel import initialize
    from nemo_opt.quantize.tensors import amax_by_name

    topology = initialize(Topology.from_name(name))
    results = {}
    for spec, algorithm in cases:
        chunks, info = restore_model(f"{folder}/{spec}_{algorithm}", topology, spec=spec)
        chunks[0].eval()
        assert info.has_modelopt_state
        assert info.extra["quantization"] == algorithm
        results[spec, algorithm] = {"amax": amax_by_name(chunks), "loss": _loss(chunks), "maxima": _row_maxima(chunks)}
    return results


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "loaded", "cases"),
    [("TP2PP1", "TP1PP2", NARROW), wide("TP2PP1", "TP1PP1"), wide("TP2PP1", "TP1PP2"), wide("TP1PP2", "TP2PP1")],
)
def test_every_amax_finds_its_place_at_another_layout(ranks, saved, layout, loaded, cases):
    (before, *_), folder = saved(layout, cases)
    for results in ranks(Topology.from_name(loaded).world_size).run(_restore, loaded, cases, folder):
        for case, after in results.items():
            assert after["amax"].keys() == before[case]["amax"].keys()
            assert all(torch.equal(after["amax"][name], amax) for name, amax in before[case]["amax"].items())
            for rows, amax in after["maxima"]:  # beside the weights: an amax in the wrong row hardly moves the loss
                assert torch.equal(amax, rows) or amax.numel() == 1
            assert after["loss"] == pytest.approx(before[case]["loss"], rel=LOSS_TOLERANCE)


def _stage():
    """Third and fourth layer of a model whose fourth has experts 4 and 5 of all on this rank."""
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for number, layer in enumerate(model.decoder.layers, start=3):
        layer.layer_number = number
        layer.mlp = torch.nn.Module()
        layer.mlp.linear_fc1 = torch.nn.Linear(2, 2)
    model.decoder.layers[1].mlp.local_expert_indices = [4, 5]
    model.decoder.layers[0].mlp.local_expert_indices = []
    return model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.0.mlp.linear_fc1.input_quantizer", "decoder.layers.2.mlp.linear_fc1.input_quantizer"),
        ("decoder.layers.1.self_attention.linear_qkv", "decoder.layers.3.self_attention.linear_qkv"),
        ("output_layer.weight_quantizer", "output_layer.weight_quantizer"),
        ("decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.w", "decoder.layers.3.mlp.experts.experts.5.linear_fc2.w"),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight_quantizer.0",
            "decoder.layers.3.mlp.experts.experts.4.linear_fc1.weight_quantizer",
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight_quantizer.1",
            "decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight_quantizer",
        ),
        ("decoder.layers.1.mlp.experts.linear_fc2.input_quantizer", "decoder.layers.3.mlp.experts.experts.linear_fc2.input_quantizer"),
        ("decoder.layers.1.mlp.shared_experts.linear_fc1", "decoder.layers.3.mlp.shared_experts.linear_fc1"),
        ("decoder.layers.1.mlp_of_another.experts.linear_fc1", "decoder.layers.3.mlp_of_another.experts.linear_fc1"),
    ],
)
def test_names_count_over_stages_and_ranks(name, expected):
    from nemo_opt.quantize.tensors import global_names

    assert global_names(_stage())(name) == expected


def test_halves_of_a_gated_mlp_are_one_amax_gate_first():
    """Keys are those of `quantizer_shards`: sorted, so the up rows (_v) come before the gate rows (_w)."""
    from nemo_opt.quantize import tensors

    found = [
        ("b.input_quantizer._amax", torch.tensor([3.0])),
        ("b.input_quantizer._pre_quant_scale", torch.ones(4)),
        ("b.weight_quantizer._amax_v", torch.tensor([[3.0], [4.0]])),
        ("b.weight_quantizer._amax_w", torch.tensor([[1.0], [2.0]])),
        ("a.weight_quantizer.0._amax", torch.arange(6.0).view(2, 3).bfloat16()),
        ("c.weight_quantizer._amax", torch.tensor(7)),
    ]
    with (
        patch.object(tensors, "full_tensors", lambda shards: iter(found)),
        patch.object(tensors, "quantizer_shards"),
        patch.object(tensors.dist, "broadcast_object_list") as sent,
    ):
        amax = tensors.amax_by_name([])
    assert {name: value.tolist() for name, value in amax.items()} == {
        "a.weight_quantizer.0": [[0, 1, 2], [3, 4, 5]],
        "b.input_quantizer": 3,
        "b.weight_quantizer": [1, 2, 3, 4],
        "c.weight_quantizer": 7,
    }
    assert list(amax) == sorted(amax)
    assert all(value.dtype == torch.float32 for value in amax.values())
    assert sent.call_args.kwargs == {"src": 0}


def test_amax_is_what_rank_0_has():
    from nemo_opt.quantize import tensors

    def broadcast(message, src):
        assert message == [{}]
        message[0] = {"b": 2, "a": 1}

    with (
        patch.object(tensors, "full_tensors", lambda shards: iter([("a._amax", None)])),
        patch.object(tensors, "quantizer_shards"),
        patch.object(tensors.dist, "broadcast_object_list", broadcast),
    ):
        assert list(tensors.amax_by_name([]).items()) == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (2, 3, 1), (3,)])
def test_blocks_keep_their_shape(shape):
    from nemo_opt.quantize.tensors import _shaped

    assert _shaped(torch.ones(shape)).shape == shape


def test_settings_are_of_enabled_quantizers_on_any_rank():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo_opt.quantize import tensors
    from nemo_opt.quantize.tensors import QuantizerSettings, quantizer_settings

    model, blocks = _stage(), {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    fc1 = model.decoder.layers[0].mlp.linear_fc1
    fc1.weight_quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(2, 1), block_sizes=blocks))
    fc1.input_quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=8, axis=0))
    fc1.output_quantizer = TensorQuantizer()
    fc1.output_quantizer.disable()
    other = QuantizerSettings(num_bits=4, axis=None, block_sizes={-1: 16, "type": "static"})

    def gather(everyone, own):
        everyone[:] = [own, {"a": other}]

    with (
        patch.object(tensors, "unwrap", lambda chunk: chunk.model),
        patch.object(tensors.dist, "get_world_size", lambda: 2),
        patch.object(tensors.dist, "all_gather_object", gather),
    ):
        settings = quantizer_settings([SimpleNamespace(model=model)])
    name = "decoder.layers.2.mlp.linear_fc1"
    assert list(settings.items()) == [
        ("a", other),
        (f"{name}.input_quantizer", QuantizerSettings(num_bits=8, axis=0, block_sizes=None)),
        (f"{name}.weight_quantizer", QuantizerSettings(num_bits=(2, 1), axis=None, block_sizes=blocks)),
    ]
    assert [setting.is_dynamic for setting in settings.values()] == [False, False, True]
    with pytest.raises(AttributeError):
        other.axis = 0
