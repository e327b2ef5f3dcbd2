"""`Fp8Padding` and `Fp8Unpadding`: rows of each expert padded with zeros to a multiple that FP8 products need, and the way back."""

import torch

__all__ = ["Fp8Padding", "Fp8Unpadding"]

_DEFAULT_ALIGNMENT = 16  # rows; what Transformer Engine pads to when no recipe says otherwise


class _PerGroup(torch.nn.Module):
    """Rows in groups, one group per product.

    Args:
        num_gemms: number of groups.
        align_size: multiple to pad each group to.
    """

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size or _DEFAULT_ALIGNMENT

    def _padded(self, m_splits: list[int]) -> list[int]:
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"{len(m_splits)} group sizes were given for {self.num_gemms} groups.")
        return [-(-rows // self.align_size) * self.align_size for rows in m_splits]


class Fp8Padding(_PerGroup):
    """Appends rows of zeros to each group."""

    def forward(self, inp: torch.Tensor, m_splits: list[int], padded_m_splits: list[int] | None = None) -> tuple[torch.Tensor, list[int]]:
        """Pad.

        Args:
            inp: [N, H], the groups one after the other.
            m_splits: rows of each group.
            padded_m_splits: rows after padding, if not the next multiples.

        Returns:
            (padded input, rows of each padded group).
        """
        padded = padded_m_splits if padded_m_splits is not None else self._padded(m_splits)
        if padded == list(m_splits):
            return inp, padded
        groups = inp.split(list(m_splits))
        pieces = [torch.nn.functional.pad(group, (0, 0, 0, rows - group.shape[0])) for group, rows in zip(groups, padded, strict=True)]
        return torch.cat(pieces), padded


class Fp8Unpadding(_PerGroup):
    """Drops the rows that `Fp8Padding` appended."""

    def forward(self, inp: torch.Tensor, m_splits: list[int], padded_m_splits: list[int] | None = None) -> torch.Tensor:
        """Drop the padding from [padded N, H]; `m_splits` are the rows of each group before padding."""
        padded = padded_m_splits if padded_m_splits is not None else self._padded(m_splits)
        if padded == list(m_splits):
            return inp
        return torch.cat([group[:rows] for group, rows in zip(inp.split(padded), m_splits, strict=True)])
