"""Where a scale before a linear goes, and that the model stays the same."""

import pytest
import torch

from nemo_opt.models.config import preset
from nemo_opt.quantize.export.folding import PRE_QUANT_SCALE, fold
from nemo_opt.quantize.export.formats import Kind, LinearFormat

MODEL = preset("tiny", num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=32)
LAYER = "decoder.layers.0"
QKV, PROJ, FC1, FC2 = (
    f"{LAYER}.{n}" for n in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
)
ROWS = LinearFormat(kind=Kind.INT4, block=(1, 4), quantizes_inputs=False)
WHOLE = LinearFormat(kind=Kind.W4A8, block=(1, 4), quantizes_inputs=True)
BY_ROW = dict.fromkeys((QKV, PROJ, FC1, FC2), ROWS)
SHARED = torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8])  # heads 0, 1 read the first value head, 2, 3 the second


def _fold(scales, formats=BY_ROW, cache=False):
    return fold({name + PRE_QUANT_SCALE: scale for name, scale in scales.items()}, formats, MODEL, quantizes_cache=cache)


def test_norms_take_the_scales_of_what_they_feed():
    folding = _fold({QKV: torch.arange(16.0), FC1: torch.ones(16)})
    assert folding.norms.keys() == {f"{QKV}.layer_norm_weight", f"{FC1}.layer_norm_weight"}
    assert torch.equal(folding.norms[f"{QKV}.layer_norm_weight"], torch.arange(16.0))
    assert not folding.rows
    assert not folding.written


def test_up_rows_and_value_rows_take_theirs():
    folding = _fold({FC2: torch.arange(24.0), PROJ: SHARED})
    assert torch.equal(folding.rows[f"{FC1}.weight_v"], torch.arange(24.0))
    ones = [1.0] * 12  # two query heads and the key head of a group
    assert folding.rows[f"{QKV}.weight"].tolist() == [*ones, 1, 2, 3, 4, *ones, 5, 6, 7, 8]
    assert not folding.reasons


def test_attention_with_scaled_value_rows_is_the_attention_with_scaled_outputs():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(4, 5, 5, generator=generator)
    values = torch.randn(2, 5, 4, generator=generator)
    rows = _fold({PROJ: SHARED}).rows[f"{QKV}.weight"].view(2, 4, 4)[:, 3]
    scaled = values * rows[:, None]
    outputs, expected = (probabilities @ v.repeat_interleave(2, dim=0) for v in (scaled, values))
    torch.testing.assert_close(outputs, expected * SHARED.view(4, 1, 4))


@pytest.mark.parametrize(
    ("formats", "scale", "cache", "reason"),
    [
        (BY_ROW, SHARED.flip(0) + torch.arange(16.0), False, "query heads of a group have different scales"),
        (BY_ROW, SHARED, True, "the KV cache is quantised"),
        (dict.fromkeys(BY_ROW, WHOLE), SHARED, False, "share a scale"),
    ],
)
def test_a_scale_that_cannot_be_moved_is_written_with_all_its_kind(formats, scale, cache, reason):
    folding = _fold({QKV: torch.ones(16), PROJ: scale, FC2: torch.ones(24)}, formats, cache)
    assert reason in folding.reasons[PROJ]
    assert folding.written.keys() == {PROJ, FC2}  # engines expect one with the other
    assert not folding.rows
    assert folding.norms.keys() == {f"{QKV}.layer_norm_weight"}


def test_rows_of_a_linear_that_is_not_quantised_take_any_scale():
    assert _fold({FC2: torch.ones(24)}, {FC2: ROWS}).rows.keys() == {f"{FC1}.weight_v"}


@pytest.mark.parametrize(
    ("formats", "reasons"),
    [
        ({QKV: ROWS, FC1: WHOLE}, {FC2: f"the rows of {FC1} share a scale ({WHOLE.kind})"}),
        ({QKV: WHOLE, FC1: ROWS}, {PROJ: f"the rows of {QKV} share a scale ({WHOLE.kind})"}),
    ],
)
def test_the_reason_names_what_could_not_take_the_scale(formats, reasons):
    folding = _fold({PROJ: SHARED.bfloat16(), FC2: torch.ones(24)}, formats)
    assert folding.reasons == reasons
    assert {name: (scale.tolist(), scale.dtype) for name, scale in folding.written.items()} == {
        PROJ: (SHARED.tolist(), torch.float32),
        FC2: ([1.0] * 24, torch.float32),
    }


def test_scales_are_found_by_their_name_among_others_and_made_float32():
    tensors = {
        f"{QKV}.input_quantizer._pre_quant_scale": torch.ones(16).bfloat16(),
        f"{FC2}.input_quantizer._pre_quant_scale": torch.ones(24).bfloat16(),
        f"{QKV}.input_quantizer._amax": torch.tensor(1.0),
        f"{PROJ}.weight_quantizer._amax": torch.ones(16, 1),
    }
    folding = fold(tensors, BY_ROW, MODEL, quantizes_cache=False)
    assert folding.norms.keys() == {f"{QKV}.layer_norm_weight"}
    assert folding.rows.keys() == {f"{FC1}.weight_v"}
    assert not folding.reasons
    assert all(scale.dtype == torch.float32 for scale in (*folding.norms.values(), *folding.rows.values()))
