"""Work that one rank does for all, with its errors reaching all: a rank left waiting for a dead one looks like a hang.

The work may take hours (tokenising a large text) and the others must not time out meanwhile, nor wait without a limit: rank 0 tells them
every few seconds that it is still at work, so each single wait is short.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from nemo_opt.errors import DataError

__all__ = ["on_rank_zero"]

_HEARTBEAT_S = 5.0


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """What `work` returns on global rank 0, on every rank; a collective call. It runs in a thread of its own there.

    Raises:
        DataError: on every rank when it was raised on rank 0; other errors of rank 0 stay themselves there and are a DataError elsewhere.

    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return work()
    if torch.distributed.get_rank() != 0:
        return _listen()
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(work)
        while not wait([future], timeout=_HEARTBEAT_S).done:
            _send(None)
        _send(_outcome(future))
        return future.result()


def _outcome(future: Future[Any]) -> tuple[Any, str | None]:
    """Result, and the message where it failed."""
    error = future.exception()
    if error is None:
        return future.result(), None
    return None, str(error) if isinstance(error, DataError) else f"rank 0 failed: {error!r}"


def _send(outcome: tuple[Any, str | None] | None) -> None:
    torch.distributed.broadcast_object_list([outcome], src=0)


def _listen() -> Any:
    box: list[Any] = [None]
    while box[0] is None:
        torch.distributed.broadcast_object_list(box, src=0)
    result, message = box[0]
    if message is not None:
        raise DataError(message)
    return result
