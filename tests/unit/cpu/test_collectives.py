"""gloo's gaps on two ranks, and that groups do not pile up threads."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_opt import device
from nemo_opt.cpu import collectives

device.activate(announce=False)
pytestmark = pytest.mark.ranks


def _gather_scalars():
    gathered = torch.empty(2)
    dist.all_gather_into_tensor(gathered, torch.tensor(float(dist.get_rank() + 1)))
    listed = [torch.empty(()), torch.empty(())]
    dist.all_gather(listed, torch.tensor(float(dist.get_rank() + 1)))
    return gathered.tolist(), [item.item() for item in listed]


def test_scalars_are_gathered(ranks):
    assert ranks(2).run(_gather_scalars) == [([1.0, 2.0], [1.0, 2.0])] * 2


def _move_8_bit_floats():
    rank = dist.get_rank()
    mine = torch.tensor([rank + 0.5, 448.0]).to(torch.float8_e4m3fn)
    gathered = torch.empty(4, dtype=torch.float8_e4m3fn)
    dist.all_gather_into_tensor(gathered, mine)
    sent = mine.clone()
    dist.broadcast(sent, 1)
    exchanged = torch.empty_like(mine)
    operations = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, exchanged, 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [x.float().tolist() for x in (gathered, sent, exchanged)]


def test_8_bit_floats_are_moved_as_bytes(ranks):
    for rank, result in enumerate(ranks(2).run(_move_8_bit_floats)):
        assert result == [[0.5, 448.0, 1.5, 448.0], [1.5, 448.0], [1.5 - rank, 448.0]]


def _exchange(as_tensor):
    rank = dist.get_rank()
    counts = [[1, 2], [0, 3]][rank]  # what this rank sends to each
    arriving = [[1, 0], [2, 3]][rank]
    splits = [torch.tensor(x) if as_tensor else x for x in (arriving, counts)]
    output = torch.empty(sum(arriving))
    dist.all_to_all_single(output, torch.arange(3.0) + 10 * rank, *splits)
    return output.tolist()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_all_to_all_takes_sizes_in_any_form(ranks, as_tensor):
    assert ranks(2).run(_exchange, as_tensor) == [[0.0], [1.0, 2.0, 10.0, 11.0, 12.0]]


def _uneven(async_op):
    """Rank 0 has one row, rank 1 three: gathered, and the other way summed and scattered."""
    rank, rows = dist.get_rank(), (1, 3)
    gathered = [torch.empty(n, 2) for n in rows]
    works = [dist.all_gather(gathered, torch.full((rows[rank], 2), float(rank)), async_op=async_op)]
    scattered = torch.empty(rows[rank], 2)
    parts = [torch.full((n, 2), 10.0 * n + rank) for n in rows]
    works.append(dist.reduce_scatter(scattered, parts, async_op=async_op))
    for work in works:
        assert (work is not None) == async_op
        if async_op:
            work.wait()
    assert [part[0, 0].item() for part in parts] == [10.0 + rank, 30.0 + rank], "the input is left alone"
    return [x.tolist() for x in gathered], scattered.tolist()


@pytest.mark.parametrize("async_op", [False, True])
def test_lists_of_differently_sized_tensors(ranks, async_op):
    for rank, (gathered, scattered) in enumerate(ranks(2).run(_uneven, async_op)):
        assert gathered == [[[0.0] * 2], [[1.0] * 2] * 3]
        assert scattered == [[[21.0] * 2], [[61.0] * 2] * 3][rank]


def _reduce():
    rank = dist.get_rank()
    mean = torch.full((2,), float(rank))
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)
    scattered = torch.empty(1)
    dist.reduce_scatter_tensor(scattered, torch.tensor([1.0, 2.0]) * (rank + 1), op=dist.ReduceOp.AVG)
    coalesced = torch.ones(2), torch.ones(3)
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for tensor in coalesced:
            dist.all_reduce(tensor)
    manager.wait()
    dist.barrier(device_ids=[0])
    return mean.tolist(), scattered.item(), [x.tolist() for x in coalesced]


def test_reductions_that_megatron_uses(ranks):
    for rank, (mean, scattered, coalesced) in enumerate(ranks(2).run(_reduce)):
        assert mean == [0.5, 0.5]
        assert scattered == 1.5 * (rank + 1)
        assert coalesced == [[2.0, 2.0], [2.0, 2.0, 2.0]]


def _data_parallel():
    layer = torch.nn.Linear(2, 1, bias=False).cuda()
    model = torch.nn.parallel.DistributedDataParallel(layer, device_ids=[dist.get_rank()], output_device=dist.get_rank())
    model(torch.full((1, 2), float(dist.get_rank()))).sum().backward()
    mesh = dist.init_device_mesh("cuda", (2,), mesh_dim_names=("dp",))
    return layer.weight.grad.tolist(), mesh.device_type, mesh.get_local_rank()


def test_data_parallelism_and_meshes_of_gpu_programs(ranks):
    for rank, (grad, device_type, local_rank) in enumerate(ranks(2).run(_data_parallel)):
        assert grad == [[0.5, 0.5]]
        assert (device_type, local_rank) == ("cpu", rank)


def _share_groups():
    before = collectives.shared_groups()
    first = dist.new_group([0, 1], backend="nccl")
    made = collectives.shared_groups() - before
    same = [dist.new_group([1, 0]) is first, dist.new_group(backend="nccl") is first]
    other = dist.new_group([0, 1], backend="gloo") is first
    alone = dist.new_group([0])
    total = torch.ones(1)
    dist.destroy_process_group(first)
    dist.destroy_process_group(first)
    dist.all_reduce(total, group=first)  # one user of three is left
    dist.destroy_process_group(first)
    fresh = dist.new_group([0, 1])
    again = fresh is first
    return made, same, other, (alone is dist.GroupMember.NON_GROUP_MEMBER), total.item(), again


def test_one_group_for_each_list_of_ranks(ranks):
    pool = ranks(2)
    for rank, (made, same, other, outside, total, again) in enumerate(pool.run(_share_groups)):
        assert made <= 1
        assert same == [True, True]
        assert not other
        assert outside == (rank == 1)
        assert total == 2.0
        assert not again


def _initialise_often(times):
    from megatron.core import parallel_state

    counts = []
    for step in range(times):
        tensor_parallel = 1 + step % 2
        parallel_state.initialize_model_parallel(tensor_parallel)
        total = torch.ones(1)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        assert total.item() == 2 / tensor_parallel
        parallel_state.destroy_model_parallel()
        counts.append(sum(1 for _ in Path("/proc/self/task").iterdir()))
    return counts


def test_threads_stay_bounded_over_many_initialisations(ranks):
    for counts in ranks(2).run(_initialise_often, 40):
        assert counts[-1] == counts[3]  # both layouts have been seen twice by then


def _timeouts():
    world = dist.distributed_c10d._get_default_group()
    longest = dist.new_group([0, 1], timeout=timedelta(hours=3), backend="nccl", use_local_synchronization=True)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in (world, longest)]


def test_no_group_waits_longer_than_the_default_one(ranks):
    for world, longest in ranks(2).run(_timeouts):
        assert longest <= world <= timedelta(minutes=30)
