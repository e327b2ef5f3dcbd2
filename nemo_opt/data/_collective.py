"""Work that one rank does for all, with its errors reaching all: a rank left waiting for a dead one looks like a hang."""

from collections.abc import Callable

import torch

from nemo_opt.errors import DataError

__all__ = ["on_rank_zero"]


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """What `work` returns on global rank 0, on every rank; a collective call.

    Raises:
        DataError: on every rank when it was raised on rank 0; other errors of rank 0 stay themselves there and are a DataError elsewhere.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as raised:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            error = raised
            outcome = [(None, f"{raised}" if isinstance(raised, DataError) else f"rank 0 failed: {raised!r}")]
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if error is not None:
        raise error
    if message is not None:
        raise DataError(message)
    return result  # type: ignore[return-value]
