"""ModelOpt's Triton kernels under Triton's interpreter: `python triton_kernels.py INPUTS.pt OUTPUTS.pt`, run by test_block_quant.py.

The interpreter runs any kernel on CPU tensors, but converts float32 to 8-bit floats and bfloat16 in its own way: to nearest with halves up
and, where the fraction rounds up to a power of two, with the carry lost (127 becomes 64), or by cutting off. A GPU rounds to nearest even.
So each kernel runs twice: as it comes ("raw"), and with PyTorch's conversion in place of the interpreter's.

ModelOpt's packages above the kernels are left out (empty modules): they take 10 s to import.
"""

import contextlib
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import importlib.util

import numpy as np
import torch
from triton.runtime import interpreter

PACKAGES = ("", ".torch", ".torch.quantization", ".torch.quantization.utils", ".torch.kernels", ".torch.kernels.quantization")
ROOT = Path(importlib.util.find_spec("modelopt").submodule_search_locations[0])
_interpreted = interpreter._convert_float


def _converted(values, source, target, mode):
    dtype = {"fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(str(target))
    if dtype is None or str(source) != "fp32":
        return _interpreted(values, source, target, mode)
    converted = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return converted.view(torch.uint8).numpy() if dtype.itemsize == 1 else converted.view(torch.uint16).numpy()


def _kernels():
    torch.cuda.device = lambda device: contextlib.nullcontext()  # the kernels' launchers make the tensor's device current
    for name in (*PACKAGES, ".torch.kernels.quantization.gemm", ".torch.kernels.quantization.common"):
        package = sys.modules["modelopt" + name] = types.ModuleType("modelopt" + name)
        package.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
    from modelopt.torch.kernels.quantization.common import nvfp4_quant
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel, fp4_kernel_hopper, fp8_kernel

    nvfp4_quant.libdevice = types.SimpleNamespace(isnan=lambda values: values != values)  # CUDA's own function
    return fp4_kernel, fp4_kernel_hopper, fp8_kernel


def main(source, target):
    fp4_kernel, fp4_kernel_hopper, fp8_kernel = _kernels()
    dynamic, static = fp4_kernel_hopper.fp4_fake_quant_block, fp4_kernel.static_blockwise_fp4_fake_quant
    inputs, outputs = torch.load(source), {}
    for name, (x, amax) in inputs["dynamic"].items():
        interpreter._convert_float = _interpreted
        outputs[f"raw {name}"] = dynamic(x, amax)
        interpreter._convert_float = _converted
        outputs[f"dynamic {name}"] = dynamic(x, amax)
    for name, (x, scales) in inputs["static"].items():
        outputs[f"static {name}"] = static(x, scales * 6, quantize_block_scales=False)
    outputs["cast"] = fp4_kernel.static_blockwise_fp4_cast(inputs["cast"])
    outputs["weight"] = fp8_kernel.weight_dequant(*inputs["weight"], dtype=torch.float32)
    torch.save(outputs, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
