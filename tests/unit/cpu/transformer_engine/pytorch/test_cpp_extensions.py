"""`general_gemm` in its three layouts."""

import pytest
import torch

from nemo_opt.cpu.transformer_engine.pytorch.cpp_extensions import general_gemm
from nemo_opt.errors import ConfigError

A, B = torch.randn(3, 4), torch.randn(2, 5, 4)


def test_layouts():
    torch.testing.assert_close(general_gemm(A, B)[0], B @ A.t())
    torch.testing.assert_close(general_gemm(A, torch.ones(2, 5, 3), layout="NN")[0], torch.ones(2, 5, 3) @ A)
    torch.testing.assert_close(general_gemm(B, torch.ones(2, 5, 3), layout="NT")[0], torch.ones(10, 3).t() @ B.reshape(10, 4))
    with pytest.raises(ConfigError, match="TT"):
        general_gemm(A, B, layout="TT")


def test_epilogues():
    bias = torch.arange(3.0)
    torch.testing.assert_close(general_gemm(A, B, bias=bias, alpha=2.0)[0], 2 * (B @ A.t()) + bias)
    assert general_gemm(A, B, out_dtype=torch.float64)[0].dtype == torch.float64
    product, bias_grad, *_ = general_gemm(B, torch.ones(2, 5, 3), layout="NT", bias=bias, grad=True)
    torch.testing.assert_close(bias_grad, torch.full((3,), 10.0))
    out = torch.ones(3, 4)
    assert general_gemm(B, torch.ones(2, 5, 3), layout="NT", out=out, accumulate=True)[0] is out
    torch.testing.assert_close(out, product + 1)
    general_gemm(B, torch.ones(2, 5, 3), layout="NT", out=out, accumulate=True, beta=0.0)
    torch.testing.assert_close(out, product)
    general_gemm(B, torch.zeros(2, 5, 3), layout="NT", out=out)
    assert out.eq(0).all()


@pytest.mark.parametrize("name", ["quantization_params", "gelu", "gelu_in", "ub", "ub_type", "extra_output", "bulk_overlap"])
def test_what_needs_a_gpu_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}="):
        general_gemm(A, B, **{name: True})
