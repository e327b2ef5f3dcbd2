"""An action on one rank, or on each, whose failure every rank hears of.

Without this a rank that fails alone leaves the others waiting in their next collective until its timeout. Outside of a process group the
actions simply run. An action must not communicate itself. It may take hours (tokenising a large text) and the others must not time out
meanwhile, nor wait without a limit: rank 0 tells them every few seconds that it is still at work, so each single wait is short.
"""

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch.distributed as dist

from nemo_opt.errors import NemoOptError

__all__ = ["on_each", "on_first", "rank", "world_size"]

_HEARTBEAT_S = 5.0


def rank() -> int:
    """The global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first[T](action: Callable[[], T]) -> T:
    """Runs `action` on rank 0, in a thread of its own, and gives its (picklable) result to every rank.

    Raises:
        NemoOptError: On every rank, as rank 0 raised it.
        RuntimeError: On every rank, for any other error of rank 0, with its traceback.

    """
    if world_size() == 1:
        return action()
    if rank() != 0:
        return _result(_listen())
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(_attempt, action)
        while not wait([future], timeout=_HEARTBEAT_S).done:
            dist.broadcast_object_list([None], src=0)
        outcome = future.result()
        dist.broadcast_object_list([outcome], src=0)
    return _result(outcome)


def on_each[T](action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and gives all (picklable) results, by rank, to every rank; one failure is raised on every rank."""
    if world_size() == 1:
        return [action()]
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, _attempt(action))
    return [_result(outcome) for outcome in outcomes]


def _listen() -> Any:
    box: list[Any] = [None]
    while box[0] is None:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _attempt[T](action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except NemoOptError as error:
        return None, error
    except Exception:  # noqa: BLE001  raised again on every rank
        return None, RuntimeError(f"rank {rank()} failed:\n{traceback.format_exc()}")


def _result(outcome: tuple[Any, Exception | None]) -> Any:
    result, error = outcome
    if error is not None:
        raise error
    return result
