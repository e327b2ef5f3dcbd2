"""From a checked command to its result: checks in this process, work in the ranks.

Exit codes: 0 done, 1 failed, 2 bad input, 75 (EX_TEMPFAIL) the fork server that ranks come from is gone, 130 interrupted.

Shared by `nemo-opt` and `nemo_opt.scripts`. Loads no torch.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_opt import launch
from nemo_opt.api import checks
from nemo_opt.api.results import Result
from nemo_opt.errors import ConfigError, NemoOptError
from nemo_opt.forked import ForkServerError

__all__ = ["exit_code_of", "start", "write_json"]


def start(command: str, *, devices: int, **settings: Any) -> Any:
    """Checks `settings` for `nemo_opt.api.<command>`, then runs it on `devices` ranks and returns rank 0's result.

    Raises:
        NemoOptError: Bad input; found before the stack is loaded wherever that is possible.
        RankFailedError: A rank failed otherwise.
    """
    world_size = int(os.environ["WORLD_SIZE"]) if launch.joined() else devices
    getattr(checks, f"check_{command}")(**settings, world_size=world_size)
    return launch.run_ranks(f"nemo_opt.api:{command}", settings, devices=devices)


def exit_code_of(command: Callable[[], None]) -> int:
    """Runs `command`; prints what went wrong on stderr, without a traceback where the user caused it."""
    who = f"rank {launch.rank()}: " if launch.joined() else ""
    try:
        command()
    except ForkServerError as error:
        print(f"{who}failed: {error}", file=sys.stderr)
        return 75
    except NemoOptError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except launch.RankFailedError as error:
        print(f"{who}failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def write_json(result: Result, path: str | Path) -> None:
    """Writes a result's numbers to `path` (rank 0 only, under torchrun)."""
    if launch.rank() == 0:
        target = Path(path)
        if not target.parent.is_dir():
            raise ConfigError(f"{target.parent} does not exist: make it, or choose another place for the JSON result")
        target.write_text(json.dumps({"kind": type(result).__name__, **result.to_dict()}, indent=2) + "\n")
