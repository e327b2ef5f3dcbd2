"""Training settings that contradict each other are refused with both sides in the message."""

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology
from nemo_opt.training.config import TrainingConfig

GOOD = {"max_steps": 10, "seq_length": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer >= 1, got 0"),
        ({"seq_length": 2.5}, "seq_length must be an integer"),
        ({"log_interval": True}, "log_interval must be an integer"),
        ({"limit_val_batches": -1}, "limit_val_batches must be an integer >= 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"clip_grad": -1.0}, "clip_grad must be"),
        ({"lr": 1e-4, "min_lr": 1e-3}, r"lr 0.0001 < min_lr 0.001"),
        ({"warmup_steps": 10}, "warmup_steps 10 >= the 10 steps"),
        ({"warmup_steps": 5, "lr_decay_steps": 4}, "warmup_steps 5 >= the 4 steps"),
        ({"micro_batch_size": 3}, "global_batch_size 8 % micro_batch_size 3"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**(GOOD | changes))


def test_micro_batches_are_shared_by_data_parallel_ranks():
    config = TrainingConfig(**GOOD, micro_batch_size=2)
    assert [config.num_microbatches(dp) for dp in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"global_batch_size 8 % \(micro_batch_size 2 \* dp 3\)"):
        config.num_microbatches(3)


def test_layouts_that_cannot_run_the_batch_are_refused():
    config = TrainingConfig(**GOOD, global_batch_size=3)
    config.validate(Topology(pp=2, dp=1))
    with pytest.raises(ConfigError, match=r"num_microbatches 3 % pp 2 != 0, but vp 2 needs it"):
        config.validate(Topology(pp=2, vp=2, dp=1))
    with pytest.raises(ConfigError, match="seq_length 16"):
        config.validate(Topology(cp=3, dp=1))
