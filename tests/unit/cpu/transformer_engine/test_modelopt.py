"""ModelOpt's fake quantization reaches the weights and the inputs of the reference's modules, forward and backward."""

import copy

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch.nn import functional
from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.module import grouped_linear, layernorm_linear, linear

SPLITS = [3, 5]


class _Model(torch.nn.Module):
    """One module of the reference; ModelOpt converts what lies inside a model."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        init = {"init_method": torch.nn.init.normal_, "bias": False}
        if kind == "Linear":
            self.inner = Linear(16, 8, **init)
        elif kind == "LayerNormLinear":
            self.inner = LayerNormLinear(16, 8, normalization="RMSNorm", **init)
        else:
            self.inner = GroupedLinear(2, 16, 8, **init)

    def forward(self, x):
        return self.inner(x, SPLITS) if self.kind == "GroupedLinear" else self.inner(x)

    def weights(self):
        return [parameter for name, parameter in self.inner.named_parameters() if name.startswith("weight")]


KINDS = ["Linear", "LayerNormLinear", "GroupedLinear"]
CONFIGS = {"INT8": mtq.INT8_DEFAULT_CFG, "FP8": mtq.FP8_DEFAULT_CFG}


def _x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _int8(tensor, amax):
    step = amax / 127
    return (tensor / step).round().clamp(-128, 127) * step


def _fp8(tensor, amax):
    scale = 448 / amax
    return (tensor * scale).to(torch.float8_e4m3fn).float() / scale


def _fake(tensor, name, *, per_row):
    """The tensor as the configuration quantizes it, written out."""
    if name == "FP8":
        return _fp8(tensor, tensor.abs().max())
    return _int8(tensor, tensor.abs().amax(-1, keepdim=True) if per_row else tensor.abs().max())


def _quantized(kind, name):
    model = _Model(kind)
    plain = copy.deepcopy(model)
    quantized = mtq.quantize(model, CONFIGS[name], lambda m: m(_x().detach()))
    return plain, quantized


def _product_input(plain, x):
    """What enters the matrix product."""
    if plain.kind != "LayerNormLinear":
        return x
    return functional.rms_norm(x, (16,), plain.inner.layer_norm_weight, plain.inner.eps)


def _products(kind, x, weights):
    groups = x.split(SPLITS) if kind == "GroupedLinear" else [x]
    return torch.cat([functional.linear(group, weight) for group, weight in zip(groups, weights, strict=True)])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_weight_and_input_are_quantized(kind, name, with_gradients):
    plain, quantized = _quantized(kind, name)
    with torch.set_grad_enabled(with_gradients):
        out = quantized(_x())
    inputs = _fake(_product_input(plain, _x()), name, per_row=False)
    expected = _products(kind, inputs, [_fake(weight, name, per_row=True) for weight in plain.weights()])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    # Either alone would be further off than the tolerance.
    for x, weights in ((inputs, plain.weights()), (_product_input(plain, _x()), [_fake(w, name, per_row=True) for w in plain.weights()])):
        assert (_products(kind, x, weights) - out).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_straight_through(kind, name):
    plain, quantized = _quantized(kind, name)
    direction = torch.sin(torch.arange(64.0)).reshape(8, 8)
    x = _x()
    grads = torch.autograd.grad((quantized(x) * direction).sum(), [x, *quantized.inner.parameters()])

    x = _x()
    product_input = _product_input(plain, x)
    fake_input = product_input + (_fake(product_input, name, per_row=False) - product_input).detach()
    fake_weights = [weight + (_fake(weight, name, per_row=True) - weight).detach() for weight in plain.weights()]
    expected = torch.autograd.grad((_products(kind, fake_input, fake_weights) * direction).sum(), [x, *plain.inner.parameters()])
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_saw_what_enters_the_product(kind):
    plain, quantized = _quantized(kind, "INT8")
    quantizer = quantized.inner.input_quantizer
    assert isinstance(quantizer, TensorQuantizer)
    torch.testing.assert_close(quantizer.amax, _product_input(plain, _x()).abs().max().detach())
    weight_quantizers = quantized.inner.weight_quantizer if kind == "GroupedLinear" else [quantized.inner.weight_quantizer]
    for weight_quantizer, weight in zip(weight_quantizers, plain.weights(), strict=True):
        torch.testing.assert_close(weight_quantizer.amax.flatten(), weight.detach().abs().amax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_patched(kind):
    originals = (linear._Linear.forward, linear._Linear.apply, layernorm_linear._LayerNormLinear, grouped_linear._GroupedLinear.forward)
    _, quantized = _quantized(kind, "INT8")
    quantized(_x()).sum().backward()
    with torch.no_grad():
        quantized(_x())
    now = (linear._Linear.forward, linear._Linear.apply, layernorm_linear._LayerNormLinear, grouped_linear._GroupedLinear.forward)
    assert [f.__qualname__ for f in now] == [f.__qualname__ for f in originals]


@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear"])
def test_quantized_and_plain_modules_of_one_kind_live_side_by_side(kind):
    plain, quantized = _quantized(kind, "INT8")
    x = _x()
    before = plain(x)
    mixed = quantized(x).sum() + plain(x).sum()
    mixed.backward()
    torch.testing.assert_close(plain(_x()), before, rtol=0, atol=0)
