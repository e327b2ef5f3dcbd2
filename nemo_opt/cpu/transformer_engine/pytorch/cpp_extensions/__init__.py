"""Matrix products in the calling convention of Transformer Engine's `general_gemm`.

The convention is cuBLAS's: operands are named in column-major order, so for row-major tensors `layout` reads, with A first and B second,

- "TN": B @ A^T  (forward: A = weight [out, in], B = input [N, in])
- "NN": B @ A    (gradient of the input: A = weight, B = gradient [N, out])
- "NT": B^T @ A  (gradient of the weight: A = input, B = gradient)
"""

from typing import Any

import torch

from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError

__all__ = ["general_gemm"]


def general_gemm(
    A: torch.Tensor,
    B: torch.Tensor,
    workspace: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool | None = False,
    gelu_in: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: torch.Tensor | None = None,
    bulk_overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """One matrix product; leading dims of A and B are flattened for "NT" and kept otherwise.

    Args:
        A: first operand, see the module's docstring.
        B: second operand.
        workspace: GPU scratch space; unused.
        out_dtype: type of the result if it differs from the operands'.
        quantization_params: must be None.
        gelu: must be off.
        gelu_in: must be None.
        alpha: factor of the product.
        beta: factor of `out` when accumulating; 1 if not given.
        accumulate: add to `out` instead of overwriting it.
        layout: "TN", "NN" or "NT".
        out: where to put the result.
        bias: [out] added to the result; with `grad=True` it only asks for the bias gradient.
        use_split_accumulator: precision of FP8 accumulation; unused.
        grad: whether this is a product of the backward pass.
        ub: must be None.
        ub_type: must be None.
        extra_output: must be None.
        bulk_overlap: must be off.

    Returns:
        (result, bias gradient or None, None, None).

    Raises:
        ConfigError: an option that only a GPU can honour is set.
    """
    if quantization_params is not None or gelu or gelu_in is not None or ub or ub_type or extra_output is not None or bulk_overlap:
        refused = {"quantization_params": quantization_params, "gelu": gelu, "gelu_in": gelu_in, "ub": ub, "ub_type": ub_type}
        refuse_options("general_gemm", refused | {"extra_output": extra_output, "bulk_overlap": bulk_overlap})
    result = _product(A, B, layout)
    if alpha != 1.0:
        result = result * alpha
    if bias is not None and not grad:
        result = result + bias
    if out_dtype is not None:
        result = result.to(out_dtype)
    if out is not None:
        result = _store(result, out, accumulate, 1.0 if beta is None else beta)
    bias_grad = B.reshape(-1, B.shape[-1]).sum(0) if bias is not None and grad else None
    return result, bias_grad, None, None


def _product(A: torch.Tensor, B: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "TN":
        return torch.nn.functional.linear(B, A)
    if layout == "NN":
        return B @ A
    if layout == "NT":
        return B.reshape(-1, B.shape[-1]).t() @ A.reshape(-1, A.shape[-1])
    raise ConfigError(f"general_gemm(layout={layout!r}): only TN, NN and NT exist.")


def _store(result: torch.Tensor, out: torch.Tensor, accumulate: bool, beta: float) -> torch.Tensor:
    if accumulate:
        return out.mul_(beta).add_(result) if beta != 1.0 else out.add_(result)
    return out.copy_(result)
