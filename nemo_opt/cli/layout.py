"""The layout flags that every command shares, declared once.

`with_layout` replaces a command's `layout: Layout` parameter by the flags, for typer, which reads the signature.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology

__all__ = ["Layout", "with_layout"]

_PANEL = "Layout"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A topology, and how many ranks to start on this machine."""

    topology: Topology
    """Sizes of the axes."""
    devices: int
    """Ranks on this machine."""


def _flag(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=text, rich_help_panel=_PANEL, show_default=default is not None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_FLAGS = [
    _flag("tp", int, 1, "Tensor parallel ranks."),
    _flag("pp", int, 1, "Pipeline stages."),
    _flag("vp", int, 1, "Model chunks of a stage (interleaved schedule)."),
    _flag("cp", int, 1, "Context parallel ranks."),
    _flag("ep", int, 1, "Expert parallel ranks."),
    _flag("sp", bool, False, "Sequence parallel (needs tp > 1)."),
    _flag(
        "devices",
        int | None,
        None,
        "Ranks to start on this machine; what remains beside the axes is data parallel. Default: as many as the axes need.",
    ),
]


def layout_of(*, tp: int, pp: int, vp: int, cp: int, ep: int, sp: bool, devices: int | None) -> Layout:
    """The layout that the flags describe; raises `ConfigError` where it does not fit."""
    topology = Topology(tp=tp, pp=pp, vp=vp, cp=cp, ep=ep, sp=sp)
    if devices is not None and devices < 1:
        raise ConfigError(f"devices {devices} is not a number of ranks: give at least 1")
    return Layout(topology=topology, devices=devices or topology.world_size)


def with_layout(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` the layout flags; it receives them as `layout`."""
    signature = inspect.signature(command)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "layout"]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        flags = {flag.name: values.pop(flag.name) for flag in _FLAGS}
        command(**values, layout=layout_of(**flags))

    wrapped.__signature__ = signature.replace(parameters=[*own, *_FLAGS])  # type: ignore[attr-defined]
    return wrapped
