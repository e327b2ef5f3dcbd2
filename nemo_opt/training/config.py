"""Settings of a training run. No torch in this module."""

import math
from dataclasses import dataclass

from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology

__all__ = ["TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, on how much data at a time, and with which learning rate."""

    max_steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    seq_length: int
    """Tokens of a sample."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data parallel rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step over all data parallel ranks."""
    lr: float = 1e-3
    """Largest learning rate, reached after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 0
    """Steps of linear growth from lr / warmup_steps to lr."""
    lr_decay_steps: int | None = None
    """Steps until the cosine reaches min_lr; None means max_steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip_grad: float = 1.0
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""
    val_check_interval: int = 0
    """Steps between validations; 0 validates after the last step only."""
    limit_val_batches: int = 8
    """Micro-batches of one validation on each data parallel rank; 0 turns validation off."""
    log_interval: int = 1
    """Steps between lines of the metrics log."""
    seed: int = 1234
    """Of data order and dropout."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "seq_length", "micro_batch_size", "global_batch_size", "log_interval"):
            _require_integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "val_check_interval", "limit_val_batches"):
            _require_integer(name, getattr(self, name), 0)
        for name in ("lr", "min_lr", "weight_decay", "clip_grad"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        if self.lr < self.min_lr:
            raise ConfigError(f"lr {self.lr} < min_lr {self.min_lr}: the cosine falls from lr to min_lr")
        if self.decay_steps <= self.warmup_steps:
            raise ConfigError(f"warmup_steps {self.warmup_steps} >= the {self.decay_steps} steps of the schedule: shorten the warm-up")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(f"global_batch_size {self.global_batch_size} % micro_batch_size {self.micro_batch_size} != 0")

    @property
    def decay_steps(self) -> int:
        """Steps of the learning rate schedule."""
        return self.max_steps if self.lr_decay_steps is None else self.lr_decay_steps

    def num_microbatches(self, dp: int) -> int:
        """Forward passes of one step on each of `dp` data parallel ranks; raises `ConfigError` where they do not come out even."""
        if self.global_batch_size % (self.micro_batch_size * dp):
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} % (micro_batch_size {self.micro_batch_size} * dp {dp}) != 0: "
                "choose a global batch that the data parallel ranks can share"
            )
        return self.global_batch_size // (self.micro_batch_size * dp)

    def validate(self, topology: Topology) -> None:
        """Raises `ConfigError` where the batch or the sequence cannot be shared by the ranks of a resolved `topology`."""
        topology.validate_sequence(self.seq_length)
        microbatches = self.num_microbatches(topology.dp or 1)
        if topology.vp > 1 and microbatches % topology.pp:
            raise ConfigError(
                f"num_microbatches {microbatches} % pp {topology.pp} != 0, but vp {topology.vp} needs it: change the batch size"
            )


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}")
