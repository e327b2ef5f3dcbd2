"""Each patch of Megatron-Core and ModelOpt: that it applies, and what its site does with it."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_opt import device
from nemo_opt.cpu import patches

device.activate(announce=False)


def test_every_patch_finds_its_target():
    patches.apply_all()
    assert len(patches.registered()) >= 10
    assert all(patch.reason and ":" in patch.target for patch in patches.registered())


def test_fusions_are_eager():
    from megatron.core import jit

    assert jit.jit_fuser is jit.noop_decorator


def test_gradients_in_main_memory_are_clipped():
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
    # upstream divides by total_norm + 1e-6
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)
    double = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    double.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError):
        clip_grad_by_total_norm_fp32([double], max_norm=1.0, total_norm=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_precision_optimizer_sorts_parameters_by_dtype(dtype):
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    parameter = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    inner = torch.optim.SGD([parameter], lr=0.1)
    config = OptimizerConfig(bf16=True, params_dtype=torch.bfloat16)
    optimizer = Float16OptimizerWithFloat16Params(inner, config, None, lambda *_: None)
    (group,) = optimizer.float16_groups if dtype != torch.float32 else optimizer.fp32_from_fp32_groups
    assert group[0] is parameter
    assert inner.param_groups[0]["params"][0].dtype == torch.float32


def test_split_sizes_become_numpy():
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    sizes = maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True, record_stream=True)
    assert isinstance(sizes, np.ndarray)
    assert sizes.tolist() == [1, 2]
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_stages_exchange_what_lies_in_main_memory():
    from megatron.core.inference.communication_utils import _is_cuda_contiguous

    _is_cuda_contiguous(torch.ones(2, 2))
    with pytest.raises(AssertionError):
        _is_cuda_contiguous(torch.ones(2, 3).t())
    with pytest.raises(AssertionError):
        _is_cuda_contiguous(torch.ones(2, device="meta"))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_norms_say_that_sequence_parallel_ranks_share_them(sequence_parallel, normalization):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = SimpleNamespace(
        sequence_parallel=sequence_parallel, normalization=normalization, layernorm_zero_centered_gamma=False,
        persist_layer_norm=False, memory_efficient_layer_norm=False,
    )  # fmt: skip
    norm = WrappedTorchNorm(config=config, hidden_size=4, eps=1e-6)
    assert type(norm).__name__ == normalization
    assert norm.eps == 1e-6
    assert [getattr(weight, "sequence_parallel", False) for weight in norm.parameters()] == [sequence_parallel] * len(
        list(norm.parameters())
    )
    assert config.sequence_parallel is sequence_parallel


def test_modelopt_compiles_no_extension(monkeypatch):
    from modelopt.torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="Skipping extension some_kernel"):
        assert cpp_extension.load_cpp_extension("some_kernel", ["a.cu"], ">=11") is None
    with pytest.raises(RuntimeError, match="CUDA is not available"):
        cpp_extension.load_cpp_extension("some_kernel", ["a.cu"], ">=11", raise_if_failed=True)


def test_no_kernels_of_triton_and_no_compiler_of_cuda():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.kernels.common import attention
        from modelopt.torch.kernels.quantization import gemm
        from torch.utils import cpp_extension
    assert not attention.IS_AVAILABLE
    assert not gemm.IS_AVAILABLE
    assert cpp_extension.CUDA_HOME is None
