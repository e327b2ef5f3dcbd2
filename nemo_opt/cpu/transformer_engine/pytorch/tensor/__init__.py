"""Tensor classes that Megatron-Core tests for. No tensor is ever an instance of one here."""

import torch

__all__ = ["QuantizedTensor"]


class QuantizedTensor(torch.Tensor):
    """Base of Transformer Engine's FP8 tensors; cannot be made without a GPU."""

    @staticmethod
    def __new__(cls: type["QuantizedTensor"], *args: object, **kwargs: object) -> "QuantizedTensor":
        """Refuse.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Quantized tensors of Transformer Engine hold GPU data; the CPU reference has none.")
