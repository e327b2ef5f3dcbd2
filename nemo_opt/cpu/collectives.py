"""torch.distributed on gloo, for programs that ask for NCCL.

Three decisions:

* One process group per list of ranks. gloo starts threads for every group and Megatron-Core makes about forty at each initialisation,
  most of them over the same few lists. A group that is asked for again is handed out again and really destroyed when it was
  given back as often. Groups asked for by the name "gloo" are not shared with the others: programs make them to use them from a
  second thread. Ranks outside a group cannot know when its members gave it back and made it anew, so a group is named after the
  number of calls so far, which all ranks share, not after the groups that a rank itself made, as torch does.
* No group waits longer than the default group does, so that a dead rank shows after the timeout that was chosen, not after gloo's (and
  Megatron-Core's) 30 minutes.
* What gloo cannot send is sent as something equal: 0-dim tensors as one element, 8-bit floats as bytes, split sizes as a list, lists of
  differently sized tensors (tokens of experts on tensor-parallel ranks) piece by piece, as NCCL's backend does.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nemo_opt.cpu.devices import CPU, names_cuda
from nemo_opt.cpu.patches import set_attribute

__all__ = ["DEFAULT_TIMEOUT", "install", "shared_groups"]

DEFAULT_TIMEOUT = timedelta(minutes=5)  # of a default group made without one; gloo's own is 30 minutes

_GroupKey = tuple[tuple[int, ...], bool, bool]


@dataclass
class _SharedGroup:
    group: Any
    uses: int = 0


_shared: dict[_GroupKey, _SharedGroup] = {}
_timeout = DEFAULT_TIMEOUT
_calls = 0


def shared_groups() -> int:
    """The number of process groups that exist beside the default one."""
    return len(_shared)


def install() -> None:
    """Wraps the group functions and the collectives with gaps, in both namespaces of torch.distributed."""
    for name, wrapper in _WRAPPERS.items():
        wrapped = wrapper(getattr(c10d, name))
        set_attribute(c10d, name, wrapped)
        set_attribute(dist, name, wrapped)
    mesh = _device_first(dist.device_mesh.init_device_mesh)
    set_attribute(dist, "init_device_mesh", mesh)
    set_attribute(dist.device_mesh, "init_device_mesh", mesh)
    set_attribute(dist.device_mesh.DeviceMesh, "__init__", _device_first(dist.device_mesh.DeviceMesh.__init__, position=1))
    parallel = torch.nn.parallel.DistributedDataParallel
    set_attribute(parallel, "__init__", _without_device_ids(parallel.__init__))


def _device_first(original: Callable[..., Any], position: int = 0) -> Callable[..., Any]:
    """Wraps a function with a device type at `position`, or by name."""

    @functools.wraps(original)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position and names_cuda(args[position]):
            args = (*args[:position], "cpu", *args[position + 1 :])
        elif names_cuda(kwargs.get("device_type")):
            kwargs["device_type"] = "cpu"
        return original(*args, **kwargs)

    return redirected


def _without_device_ids(original: Callable[..., None]) -> Callable[..., None]:
    """PyTorch's data parallelism refuses device ids for a module in main memory; there is one copy of it in either case."""

    @functools.wraps(original)
    def __init__(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, module, None, None, *args, **kwargs)

    return __init__


def _on_gloo(backend: Any) -> Any:
    """The backend to use for the one that was named; None leaves the choice."""
    return "gloo" if backend is not None and "nccl" in str(backend).lower() else backend


def _init_process_group(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_process_group(
        backend: Any = None, init_method: Any = None, timeout: timedelta | None = None, *args: Any, **kwargs: Any
    ) -> None:
        global _timeout, _calls
        _timeout, _calls = timeout or DEFAULT_TIMEOUT, 0
        kwargs.pop("pg_options", None)
        if names_cuda(kwargs.get("device_id")):
            kwargs.pop("device_id")
        original(_on_gloo(backend) or "gloo", init_method, _timeout, *args, **kwargs)

    return init_process_group


def _new_group(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def new_group(
        ranks: list[int] | None = None, timeout: timedelta | None = None, backend: Any = None, pg_options: Any = None,
        use_local_synchronization: bool = False, group_desc: str | None = None, device_id: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        global _calls
        if not use_local_synchronization:  # only members call then, and torch names the group after its ranks
            _calls += 1
        listed = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
        if kwargs.get("sort_ranks", True):
            listed = tuple(sorted(listed))
        key = (listed, str(backend).lower() == "gloo", use_local_synchronization)
        if key not in _shared:
            timeout = min(timeout or _timeout, _timeout)
            c10d._world.group_count = _calls
            group = original(list(listed), timeout, _on_gloo(backend), None, use_local_synchronization, group_desc, **kwargs)
            _shared[key] = _SharedGroup(group)
        _shared[key].uses += 1
        return _shared[key].group

    return new_group


def _destroy_process_group(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def destroy_process_group(group: Any = None) -> None:
        if group is None or group == dist.GroupMember.WORLD:
            _shared.clear()
            original(group)
            return
        key = next((key for key, shared in _shared.items() if shared.group is group), None)
        if key is None:
            original(group)
            return
        _shared[key].uses -= 1
        if _shared[key].uses == 0:
            del _shared[key]
            original(group)

    return destroy_process_group


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a form that gloo can move (not reduce)."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _moving(names: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a collective that moves data: its first `len(names)` arguments are tensors or lists of tensors."""

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _sendable(value)
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            args = (*map(convert, args[: len(names)]), *args[len(names) :])
            return original(*args, **{key: convert(value) if key in names else value for key, value in kwargs.items()})

        return collective

    return wrap


def _all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    moving = _moving(("tensor_list", "tensor"))(original)

    @functools.wraps(original)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({piece.shape for piece in tensor_list}) == 1:
            return moving(tensor_list, tensor, group, async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        works = [c10d.broadcast(piece, group=group, async_op=True, group_src=rank) for rank, piece in enumerate(tensor_list)]
        return _last(works, async_op)

    return all_gather


def _reduce_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor, input_list: list[torch.Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({piece.shape for piece in input_list}) == 1:
            return original(output, input_list, op, group, async_op)
        pieces = [piece.clone() for piece in input_list]
        works = [c10d.reduce(piece, op=op, group=group, async_op=True, group_dst=rank) for rank, piece in enumerate(pieces)]
        _last(works, False)
        output.copy_(pieces[dist.get_rank(group)])
        return works[-1] if async_op else None

    return reduce_scatter


def _last(works: list[Any], async_op: bool) -> Any:
    """Waits for all but the last work, which is handed out or waited for as well."""
    for work in works[:-1] if async_op else works:
        work.wait()
    return works[-1] if async_op else None


def _all_to_all_single(original: Callable[..., Any]) -> Callable[..., Any]:
    def sizes(splits: Any) -> list[int] | None:
        return None if splits is None else [int(size) for size in splits]

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 (callers pass it by this name)
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(_sendable(output), _sendable(input), sizes(output_split_sizes), sizes(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return original(group, async_op)

    return barrier


def _broadcast_object_list(original: Callable[..., Any]) -> Callable[..., Any]:
    """Also for the other object collectives that take a device."""

    @functools.wraps(original)
    def object_collective(*args: Any, **kwargs: Any) -> Any:
        if names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return object_collective


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "init_process_group": _init_process_group,
    "new_group": _new_group,
    "destroy_process_group": _destroy_process_group,
    "all_gather_into_tensor": _moving(("output_tensor", "input_tensor")),
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _moving(("tensor",)),
    "send": _moving(("tensor",)),
    "recv": _moving(("tensor",)),
    "isend": _moving(("tensor",)),
    "irecv": _moving(("tensor",)),
    "all_to_all_single": _all_to_all_single,
    "barrier": _barrier,
    "broadcast_object_list": _broadcast_object_list,
}
