"""What the three scripts share: the group of nemo_opt's own flags, and NeMo's devices and nodes turned into ranks. Loads no torch."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from nemo_opt import launch
from nemo_opt.cli.report import show
from nemo_opt.cli.run import start, write_json
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology

__all__ = ["add_own_flags", "note", "refuse", "run", "start_count"]


def note(text: str) -> None:
    """Says on stderr how a flag was understood (once, not on every rank)."""
    if launch.rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def refuse(flag: str, given: bool, reason: str) -> None:
    """Raises `ConfigError` naming `flag` where it was given."""
    if given:
        raise ConfigError(f"{flag} is not supported: {reason}")


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that NeMo's scripts do not have."""
    group = parser.add_argument_group("nemo_opt's own")
    group.add_argument("--result_json", type=Path, help="Also write the numbers to this file")
    group.add_argument(
        "--eval_batches", type=int, default=8, help="Validation micro-batches for the loss before and after; 0 measures none"
    )
    group.add_argument("--spec", choices=["te", "local"], help="Layer spec; te where it exists by default")
    group.add_argument("--overwrite", action="store_true", help="Replace an existing output")


def start_count(topology: Topology, devices: int, num_nodes: int, *, nodes_given: bool) -> int:
    """Ranks to start on this machine. NeMo counts devices a node; several nodes need torchrun on each of them.

    Raises:
        ConfigError: The layout does not fit, or several nodes were asked for without torchrun.
    """
    if min(devices, num_nodes) < 1:
        raise ConfigError(f"devices {devices} and num_nodes {num_nodes} must be at least 1")
    if launch.joined():
        topology.resolve(int(os.environ["WORLD_SIZE"]))
        return launch.local_world_size()
    if nodes_given and num_nodes > 1:
        raise ConfigError(
            f"num_nodes {num_nodes}: start the script with torchrun on each node; without torchrun it runs on this machine only"
        )
    topology.resolve(devices * num_nodes)
    return devices * num_nodes


def run(command: str, arguments: argparse.Namespace, *, devices: int, topology: Topology, **settings: Any) -> None:
    """Starts `nemo_opt.api.<command>`, and shows the result."""
    result = start(command, devices=devices, topology=topology, spec=arguments.spec, overwrite=arguments.overwrite, **settings)
    show(result)
    if arguments.result_json:
        write_json(result, arguments.result_json)
