"""The errors a user can cause, so that callers can tell them from bugs.

A message prints both sides and the remedy; commands print it without a traceback and exit with 2.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "NemoOptError", "UpstreamMovedError"]


class NemoOptError(Exception):
    """Base of every error that nemo_opt raises on purpose."""


class ConfigError(NemoOptError, ValueError, AssertionError):
    """A setting is wrong. Also an `AssertionError`, which NeMo raises in the same places."""


class DataError(NemoOptError, ValueError):
    """Data is missing, empty or not of the announced form."""


class CheckpointError(NemoOptError, RuntimeError):
    """A checkpoint is missing, truncated, unsafe, or does not fit the model."""


class UpstreamMovedError(NemoOptError, RuntimeError):
    """A patch of upstream code found its target gone or changed; names the target."""
