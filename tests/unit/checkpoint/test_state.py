import nemo_opt._stack

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_opt.checkpoint.state import check_fit, drop_absent, is_extra_state, local_bytes
from nemo_opt.errors import CheckpointError


def tensor(key, *shape, replica=0):
    return ShardedTensor.from_rank_offsets(key, torch.zeros(shape), replica_id=replica)


def extra(key):
    return ShardedObject(key, None, (1,), (0,))


def halves(key, data, replica_id, flattened_range):
    return [ShardedTensor.from_rank_offsets(f"{key}_{half}", part) for half, part in zip("wv", data.chunk(2), strict=True)]


def factory(key, *shape):
    return ShardedTensorFactory(key, torch.zeros(shape), halves, lambda parts: torch.cat(parts))


def table(**shapes):
    """A table of contents with tensors of these shapes; None is an object."""

    def entry(shape):
        if shape is None:
            return BytesStorageMetadata()
        size = torch.Size(shape)
        return TensorStorageMetadata(TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)])

    return Metadata({key: entry(shape) for key, shape in shapes.items()})


STORED = table(
    a=(2, 3),
    b_w=(1, 4),
    b_v=(1, 4),
    **{"m._extra_state/shard_0_1": None, "optimizer.state.x": (1,), "common_state/shard_0_1": None, "_loss_modules.0.projection": (3, 2)},
)
STATE = {"model": {"a": tensor("a", 2, 3), "b": factory("b", 2, 4), "extra": extra("m._extra_state")}}


def test_what_fits_passes_and_counts_its_bytes():
    check_fit(STATE, STORED)
    assert local_bytes(STATE) == 4 * (6 + 8)
    assert local_bytes([tensor("a", 2, 3, replica=1)]) == 0


def test_parameters_of_losses_go_with_an_optimizer():
    check_fit(STATE, STORED)
    with pytest.raises(CheckpointError, match=r"missing nothing, unexpected _loss_modules\.0\.projection"):
        check_fit(STATE, STORED, with_losses=True)
    check_fit([*STATE.values(), tensor("_loss_modules.0.projection", 3, 2)], STORED)
    with pytest.raises(CheckpointError, match=r"missing _loss_modules\.1\.projection, unexpected nothing"):
        check_fit([*STATE.values(), tensor("_loss_modules.1.projection", 3, 2)], STORED)
    with pytest.raises(
        CheckpointError, match=r"_loss_modules\.0\.projection has shape \(3, 2\) in the checkpoint and \(4, 2\) in the model"
    ):
        check_fit([*STATE.values(), tensor("_loss_modules.0.projection", 4, 2)], STORED)


def test_missing_and_unexpected_entries_are_named():
    with pytest.raises(CheckpointError, match="missing c, d, unexpected a"):
        check_fit([tensor("c", 1), tensor("d", 1), factory("b", 2, 4)], STORED)
    check_fit([factory("b", 2, 4)], STORED, strict=False)
    with pytest.raises(CheckpointError, match=r"missing k0, .*k7 and 2 more, unexpected"):
        check_fit([tensor(f"k{number}", 1) for number in range(10)], STORED)


@pytest.mark.parametrize(("key", "hint"), [("a", r"\(2, 4\) in the model$"), ("a_quantizer._amax", "use the one it was quantised at")])
def test_shapes_that_differ_are_named(key, hint):
    with pytest.raises(CheckpointError, match=rf"{key} has shape \(2, 3\) in the checkpoint and .*{hint}"):
        check_fit([tensor(key, 2, 4)], table(**{key: (2, 3)}))


def test_only_extra_states_may_be_absent():
    state = {"model": {"a": tensor("a", 1), "extra": extra("n._extra_state"), "kept": extra("m._extra_state")}, "plain": 3}
    assert drop_absent(state, STORED)["model"].keys() == {"a", "kept"}
    assert [is_extra_state(key) for key in ("m._extra_state/shard_0_1", "m.weight")] == [True, False]
