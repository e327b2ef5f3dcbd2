"""Padding never reaches a quantizer."""

from unittest.mock import patch

import pytest
import torch

from nemo_opt.errors import DataError
from nemo_opt.quantize import calibration


def _batch(mask=None):
    return {"tokens": torch.zeros(2, 4, dtype=torch.long), "position_ids": torch.arange(4).expand(2, 4), "attention_mask": mask}


@pytest.fixture
def world(request):
    """A world of two ranks, this process being rank 0; the other one found `request.param` padded batches."""

    def gather(counts, own):
        counts[:] = [own, getattr(request, "param", 0)]

    with patch.object(calibration, "dist") as dist, patch.object(calibration, "forward_loop") as forward_loop:
        dist.get_world_size.return_value = 2
        dist.all_gather_object.side_effect = gather
        yield forward_loop


@pytest.mark.parametrize("mask", [None, torch.ones(2, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)])
def test_batches_without_padding_are_passed_on(world, mask):
    batches = [_batch(mask), _batch()]
    assert calibration.calibration_loop(iter(batches)) is world.return_value
    world.assert_called_once_with(batches, description="calibrating")


def test_padding_is_refused(world):
    mask = torch.ones(2, 4)
    mask[1, 3] = 0
    with pytest.raises(DataError, match=r"per rank: \[1, 0\]"):
        calibration.calibration_loop([_batch(), _batch(mask)])
    world.assert_not_called()


@pytest.mark.parametrize("world", [3], indirect=True)
def test_another_ranks_padding_is_refused_here_too(world):
    with pytest.raises(DataError, match=r"per rank: \[0, 3\]"):
        calibration.calibration_loop([_batch()])
