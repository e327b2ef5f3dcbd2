"""ModelOpt 0.47: block-scaled formats, which it computes on GPUs only, and the places that take an announced GPU for a real one.

The latter matter only under `python -m nemo_opt.cpu`, where `torch.cuda.is_available()` is True. Importing this module registers the
patches; `nemo_opt.cpu.patches.install` applies them as ModelOpt's modules are loaded.
"""

import warnings
from types import ModuleType
from typing import Any

from nemo_opt.cpu.patches import replace, rewrite, set_attribute, when_loaded

__all__: list[str] = []


@replace(
    "modelopt.torch.utils.cpp_extension:load_cpp_extension",
    reason="compiles CUDA sources for minutes wherever a GPU is announced and nvcc is found, for kernels that no tensor here could enter",
    parameters=("name", "sources", "cuda_version_specifiers", "fail_msg", "raise_if_failed"),
)
def _compile_nothing(original: Any) -> Any:
    def load_cpp_extension(name: str, *args: Any, raise_if_failed: bool = False, **kwargs: Any) -> None:
        message = f"Skipping extension {name} because CUDA is not available (nemo_opt CPU backend)."
        if raise_if_failed:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)

    return load_cpp_extension


def _no_triton(module: ModuleType) -> None:
    set_attribute(module, "IS_AVAILABLE", False)


for _module in ("common.attention", "quantization.gemm"):
    when_loaded(
        f"modelopt.torch.kernels.{_module}:IS_AVAILABLE",
        reason="believes that Triton's kernels run wherever a GPU is announced; the eager forms compute the same here",
    )(_no_triton)


@when_loaded(
    "torch.utils.cpp_extension:CUDA_HOME",
    reason="whoever finds nvcc builds CUDA extensions where a GPU is announced; without it they say at once that they cannot",
)
def _hide_nvcc(module: ModuleType) -> None:
    set_attribute(module, "CUDA_HOME", None)


@rewrite(
    "modelopt.torch.quantization.tensor_quant:_dynamic_block_quantize_impl",
    reason="asks for a CUDA tensor, Triton or a CUDA extension for NVFP4 and MX; registered as an operator when ModelOpt is imported",
)
def _dynamic_block_quantize(  # runs with ModelOpt's globals
    inputs: Any, block_size: int, amax: Any, num_bits: int, exponent_bits: int, scale_num_bits: int, scale_exponent_bits: int
) -> Any:
    from nemo_opt.cpu.block_quant import dynamic_block_quantize

    return dynamic_block_quantize(inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)


@rewrite(
    "modelopt.torch.quantization.tensor_quant:_fp8_eager",
    reason="goes over memory a dozen times, twice through an unvectorised conversion; a third of the time gives the same numbers",
)
def _fp8_eager(x: Any, amax: Any = None) -> Any:  # runs with ModelOpt's globals
    from nemo_opt.cpu.block_quant import fp8

    return fp8(x, amax)


@replace(
    "modelopt.torch.quantization.tensor_quant:_tensor_quant",
    reason="goes over memory eight times, once through a clamp between tensors; a third of the time gives the same numbers",
    parameters=("inputs", "amax", "num_bits", "unsigned", "narrow_range"),
)
def _integers(original: Any) -> Any:
    def _tensor_quant(inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True) -> Any:
        if unsigned or not inputs.numel() or amax.dim() > inputs.dim() > 0:
            return original(inputs, amax, num_bits, unsigned, narrow_range)
        from nemo_opt.cpu.integer_quant import fake_integers

        return fake_integers(inputs, amax, num_bits, narrow_range)

    return _tensor_quant


@replace(
    "modelopt.torch.quantization.tensor_quant:StaticBlockwiseFP4FakeQuantFunction.forward",
    reason="refuses to work without Triton; NVFP4 with searched block scales (4/6, MSE, local Hessian) goes through it",
    parameters=("ctx", "x", "amax", "global_amax", "quantize_block_scales", "fp8_max_for_normalization", "out_dtype", "pass_through_bwd"),
)
def _static_nvfp4(original: Any) -> Any:
    def forward(
        ctx: Any,
        x: Any,
        amax: Any,
        global_amax: Any = None,
        quantize_block_scales: bool = True,
        fp8_max_for_normalization: float = 448.0,
        out_dtype: Any = None,
        pass_through_bwd: bool = False,
    ) -> Any:
        from nemo_opt.cpu.block_quant import nvfp4_static

        original.__func__.__globals__["_save_for_backward_if_needed"](ctx, pass_through_bwd, x, amax)
        return nvfp4_static(x, amax, global_amax, quantize_block_scales, fp8_max_for_normalization, out_dtype)

    return staticmethod(forward)


@replace(
    "modelopt.torch.quantization.tensor_quant:FP4CastSTEFunction.forward",
    reason="refuses to work without Triton; training of NVFP4's block scales (LSQ) goes through it",
    parameters=("ctx", "x", "out_dtype"),
)
def _cast_nvfp4(original: Any) -> Any:
    def forward(ctx: Any, x: Any, out_dtype: Any = None) -> Any:
        from nemo_opt.cpu.block_quant import cast_e2m1

        ctx.save_for_backward(x)
        return cast_e2m1(x, out_dtype)

    return staticmethod(forward)
