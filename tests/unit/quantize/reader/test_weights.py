"""Every layout decodes what is written by hand, and says which tensors it needs."""

import pytest
import torch
from safetensors.torch import save_file

from nemo_opt.errors import CheckpointError
from nemo_opt.models.safetensors_dir import SafetensorsReader
from nemo_opt.quantize.reader.description import LinearForm
from nemo_opt.quantize.reader.weights import LAYOUTS, linear_tensors, read_weight

F8 = torch.float8_e4m3fn


def form(weight, group=(1, 0), inputs=None):
    return LinearForm(weight=weight, group=group, inputs=inputs, label="")


def _read(folder, tensors, linear, rows, columns):
    save_file({f"linear.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_weight(SafetensorsReader(folder), "linear", linear, rows, columns)


def _u8(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def _words(word, scale, shape):
    return {"weight_packed": torch.tensor([[word]], dtype=torch.int32), "weight_scale": scale, "weight_shape": torch.tensor(shape)}


CASES = [
    (form("fp8"), {"weight": torch.tensor([[1.0, -2.0]]).to(F8), "weight_scale": torch.tensor(0.5)}, [[0.5, -1.0]]),
    (form("fp8_channel"), {"weight": torch.ones(2, 1).to(F8), "weight_scale": torch.tensor([2.0, 3.0])}, [[2.0], [3.0]]),
    (
        form("fp8_block", (1, 2)),
        {"weight": torch.ones(2, 4).to(F8), "weight_scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 2, 1)},
        [[1, 1, 2, 2], [3, 3, 4, 4]],
    ),
    (form("int8"), {"weight": torch.tensor([[-128], [127]]).to(torch.int8), "weight_scale": torch.ones(2, 1)}, [[-128], [127]]),
    (
        form("int8_words"),
        _words(0x7F80, torch.ones(1, 1), [1, 2]),
        [[0, -1]],
    ),
    (
        form("int4_words", (1, 2)),
        _words(0xF08A, torch.tensor([[1.0, 10.0]]), [1, 4]),
        [[2, 0, -80, 70]],
    ),
    (form("int4_rows", (1, 2)), {"weight": _u8([[0x7F, 0x80]]), "weight_scale": torch.tensor([[1.0], [2.0]])}, [[-1, 0], [14, -16]]),
    (
        form("nvfp4", (1, 2)),
        {"weight": _u8([[0x7A, 0x10]]), "weight_scale": torch.tensor([[1.0, 4.0]]).to(F8), "weight_scale_2": torch.tensor([0.5])},
        [[-0.5, 3.0, 0.0, 1.0]],
    ),
    (form("mxfp8", (1, 2)), {"weight": torch.ones(1, 4).to(F8), "weight_scale": _u8([[127, 130]])}, [[1, 1, 8, 8]]),
]  # fmt: skip


@pytest.mark.parametrize(("linear", "tensors", "expected"), CASES, ids=lambda case: getattr(case, "weight", ""))
def test_layouts(tmp_path, linear, tensors, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(_read(tmp_path, tensors, linear, *expected.shape), expected)


def test_w4a8_rounds_twice(tmp_path):
    tensors = {"weight": _u8([[0x37]]), "weight_scale": torch.tensor([[1.0], [1.1]]), "weight_scale_2": torch.tensor(0.5)}
    weight = _read(tmp_path, tensors, form("w4a8", (1, 1)), 2, 1)
    assert weight[0].item() == 7.0
    assert weight[1].item() == torch.tensor(6.6).to(F8).float().item() * 0.5  # 3 * 1.1 / 0.5


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_name_their_tensors(name):
    group = {"fp8_block": (4, 32)}.get(name, (1, 0 if name in ("fp8", "fp8_channel", "int8", "int8_words") else 16))
    tensors = linear_tensors(form(name, group), 16, 64)
    assert "weight_scale" in tensors
    assert "input_scale" not in tensors
    assert "input_scale" in linear_tensors(form(name, group, "fp8"), 16, 64)
    assert "input_scale" not in linear_tensors(form(name, group, "mxfp8"), 16, 64)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(CheckpointError, match="groups of 1 x 24 do not divide a weight of 16 x 64"):
        linear_tensors(form("int4_words", (1, 24)), 16, 64)


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    tensors = {"weight": torch.ones(1, 1).to(F8), "weight_scale": torch.tensor(float("nan"))}
    with pytest.raises(CheckpointError, match=r"linear\.weight_scale holds values that are not finite"):
        _read(tmp_path, tensors, form("fp8"), 1, 1)


def test_a_shape_that_contradicts_the_model_is_refused(tmp_path):
    tensors = {
        "weight_packed": torch.zeros(1, 1, dtype=torch.int32),
        "weight_scale": torch.ones(1, 1),
        "weight_shape": torch.tensor([2, 2]),
    }
    with pytest.raises(CheckpointError, match=r"weight_shape is \[2, 2\], the model needs \[1, 4\]"):
        _read(tmp_path, tensors, form("int8_words"), 1, 4)


FLOATS, SCALAR = ("F32", "BF16", "F16"), ((), (1,))
E4M3 = (("F8_E4M3",), ((16, 80),))
WORDS = ("weight_shape", (("I64", "I32"), ((2,),)))
STORED = [
    (form("fp8"), {"weight": E4M3, "weight_scale": (FLOATS, SCALAR)}),
    (form("fp8_channel"), {"weight": E4M3, "weight_scale": (FLOATS, ((16,), (16, 1)))}),
    (form("fp8_block", (4, 20)), {"weight": E4M3, "weight_scale": (FLOATS, ((4, 4), (4, 1, 4, 1)))}),
    (form("int8"), {"weight": (("I8",), ((16, 80),)), "weight_scale": (FLOATS, ((16,), (16, 1)))}),
    (form("int8_words"), {"weight_packed": (("I32",), ((16, 20),)), "weight_scale": (FLOATS, ((16, 1),)), WORDS[0]: WORDS[1]}),
    (form("int4_words", (1, 20)), {"weight_packed": (("I32",), ((16, 10),)), "weight_scale": (FLOATS, ((16, 4),)), WORDS[0]: WORDS[1]}),
    (form("int4_rows", (1, 20)), {"weight": (("U8",), ((8, 80),)), "weight_scale": (FLOATS, ((16, 4),))}),
    (
        form("w4a8", (1, 20)),
        {"weight": (("U8",), ((8, 80),)), "weight_scale": (FLOATS, ((16, 4),)), "weight_scale_2": (FLOATS, SCALAR)},
    ),
    (
        form("nvfp4", (1, 16)),
        {"weight": (("U8",), ((16, 40),)), "weight_scale": (("F8_E4M3",), ((16, 5),)), "weight_scale_2": (FLOATS, SCALAR)},
    ),
    (form("mxfp8", (1, 16)), {"weight": E4M3, "weight_scale": (("U8",), ((16, 5),))}),
]


@pytest.mark.parametrize(("linear", "tensors"), STORED, ids=lambda case: getattr(case, "weight", ""))
def test_types_and_shapes_of_every_layout(linear, tensors):
    """As vLLM, SGLang and compressed-tensors declare them."""
    assert linear_tensors(linear, 16, 80) == tensors
    assert len(STORED) == len(LAYOUTS)
    with pytest.raises(AttributeError):
        LAYOUTS[linear.weight].decode = None


def test_words_that_are_not_full(tmp_path):
    assert linear_tensors(form("int4_words", (1, 1)), 1, 9)["weight_packed"][1] == ((1, 2),)
    words = torch.tensor([[0x7FFFFFFF, 0xF]]).int()
    tensors = {"weight_packed": words, "weight_scale": torch.ones(1, 9).bfloat16(), "weight_shape": torch.tensor([1, 9])}
    assert _read(tmp_path, tensors, form("int4_words", (1, 1)), 1, 9).tolist() == [[7, 7, 7, 7, 7, 7, 7, -1, 7]]


def test_every_code_of_e2m1(tmp_path):
    tensors = {
        "weight": _u8([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]),
        "weight_scale": torch.ones(1, 1).to(F8),
        "weight_scale_2": torch.tensor(1.0),
    }
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert _read(tmp_path, tensors, form("nvfp4", (1, 16)), 1, 16).tolist() == [[*positive, *(-value for value in positive)]]


def test_an_even_row_lies_below_the_odd_one_after_it(tmp_path):
    tensors = {"weight": _u8([[0x21, 0x43], [0x65, 0x77]]), "weight_scale": torch.ones(4, 1)}
    assert _read(tmp_path, tensors, form("int4_rows", (1, 2)), 4, 2).tolist() == [[1, 3], [2, 4], [5, 7], [6, 7]]


def test_an_even_column_lies_below_the_odd_one_after_it(tmp_path):
    tensors = {"weight": _u8([[0x21], [0x43]]), "weight_scale": torch.ones(2, 1).to(F8), "weight_scale_2": torch.tensor(1.0)}
    assert _read(tmp_path, tensors, form("nvfp4", (1, 2)), 2, 2).tolist() == [[0.5, 1.0], [1.5, 2.0]]


def test_one_scale_of_many_that_is_not_finite_is_refused(tmp_path):
    tensors = {"weight": torch.ones(2, 1).to(torch.int8), "weight_scale": torch.tensor([1.0, float("inf")])}
    with pytest.raises(CheckpointError, match="not finite"):
        _read(tmp_path, tensors, form("int8"), 2, 1)


def test_blocks_have_rows_too(tmp_path):
    tensors = {"weight": torch.ones(4, 2).to(F8), "weight_scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert _read(tmp_path, tensors, form("fp8_block", (2, 1)), 4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_w4a8_saturates_between_its_roundings(tmp_path):
    tensors = {"weight": _u8([[0x87]]), "weight_scale": torch.tensor([[1.0], [1.0]]), "weight_scale_2": torch.tensor(2.0**-8)}
    assert _read(tmp_path, tensors, form("w4a8", (1, 1)), 2, 1).tolist() == [[448 / 256], [-448 / 256]]
