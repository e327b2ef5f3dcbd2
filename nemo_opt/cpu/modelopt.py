"""ModelOpt 0.47: the places that take an announced GPU for one that can run CUDA and Triton kernels.

They matter only under `python -m nemo_opt.cpu`, where `torch.cuda.is_available()` is True. Importing this module registers the patches;
`nemo_opt.cpu.patches.install` applies them as ModelOpt's modules are loaded.
"""

import warnings
from types import ModuleType
from typing import Any

from nemo_opt.cpu.patches import replace, set_attribute, when_loaded

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
