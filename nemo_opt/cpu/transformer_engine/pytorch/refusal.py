"""Refusing options by name: ignoring one would change what is computed or measured."""

from collections.abc import Mapping
from typing import Any

from nemo_opt.errors import ConfigError

__all__ = ["refuse_options"]


def refuse_options(module: str, options: Mapping[str, Any], neutral: Mapping[str, Any] | None = None) -> None:
    """Refuse each option that is not at a value at which it has no effect.

    Args:
        module: name of the class, for the message.
        options: the options that are not implemented, as given.
        neutral: values without effect besides None and False.

    Raises:
        ConfigError: names the first option that is set, its value, and what to do.
    """
    for name, value in options.items():
        if value is None or value is False or (neutral is not None and name in neutral and value == neutral[name]):
            continue
        raise ConfigError(
            f"{module}({name}={value!r}) is not available in the CPU reference of Transformer Engine: ignoring it would change what is "
            f"computed or measured. Leave {name} unset, or run on a GPU."
        )
