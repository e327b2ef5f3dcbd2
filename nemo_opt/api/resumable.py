"""What an interrupted run leaves: `<output>-resume`, a checkpoint that is replaced at every interval and gone when the output is in place.

It is marked with the command that wrote it: a training does not go on as a distillation, whose optimizer has other parameters and whose
data would stand elsewhere. Loads no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_opt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from nemo_opt.checkpoint.info import CheckpointInfo
    from nemo_opt.training.loop import TrainingRun

__all__ = ["Command", "check_resumable", "check_save_interval", "clear", "marks", "resume_dir", "save"]

type Command = Literal["train", "distill"]

_MARK = "resumable"
_WORK = {"train": "training", "distill": "distillation"}


def resume_dir(output: str | Path) -> Path:
    """Where a run that will write `output` leaves its checkpoints on the way."""
    target = Path(output)
    return target.with_name(f"{target.name}-resume")


def marks(command: Command) -> dict[str, Any]:
    """What tells a resumable checkpoint of `command` from others: `extra` of `save_checkpoint`."""
    return {_MARK: command}


def check_resumable(info: "CheckpointInfo", command: Command, *, max_steps: int | None = None) -> None:
    """Raises `ConfigError` where `info` is not a checkpoint from which `command` can go on to `max_steps`."""
    found = info.extra.get(_MARK, "train")
    if not info.has_optimizer:
        raise ConfigError(f"checkpoint {info.path} holds no optimizer state: start from its weights, without resuming")
    if found != command:
        raise ConfigError(
            f"checkpoint {info.path} is of a {_WORK.get(found, found)}, a {_WORK[command]} cannot go on from it: "
            "start from its weights, without resuming"
        )
    if max_steps is not None and info.iteration >= max_steps:
        raise ConfigError(f"checkpoint {info.path} is at step {info.iteration} of max_steps {max_steps}: ask for more steps")


def check_save_interval(
    save_interval: int, output: str | Path, command: Command, *, source: str | Path | None = None, overwrite: bool = False
) -> None:
    """Refuses to put checkpoints on the way where something else lies, or another interrupted run.

    Args:
        save_interval: Steps between them; 0 for none.
        output: What the run will write.
        command: What it does.
        source: The checkpoint that it goes on from; None for a run from the beginning.
        overwrite: Give an interrupted run up.

    Raises:
        ConfigError: naming what lies there and what to do.

    """
    path = resume_dir(output)
    if save_interval < 0:
        raise ConfigError(f"save_interval {save_interval} < 0: give the steps between two checkpoints, or 0 to save at the end alone")
    if save_interval and path.exists() and not _is(source, path):
        step = _interrupted_at(path, command)
        if not overwrite:
            raise ConfigError(
                f"{path} is what an interrupted {_WORK[command]} left at step {step}: resume from it, remove it, or ask to overwrite it"
            )


def _interrupted_at(path: Path, command: Command) -> int:
    """The step of the checkpoint that an interrupted `command` has left."""
    from nemo_opt.checkpoint.info import read_info

    try:
        info = read_info(path)
        check_resumable(info, command)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"checkpoints on the way would replace {path}, which no interrupted {_WORK[command]} left: {error}") from None
    return info.iteration


def save(run: "TrainingRun", output: str | Path, command: Command, tokenizer_dir: str | Path) -> None:
    """Replaces the checkpoint on the way by one of `run` as it is now. Collective."""
    run.save(resume_dir(output), tokenizer_dir=tokenizer_dir, extra=marks(command), overwrite=True)


def clear(output: str | Path, *, wrote: bool, source: str | Path | None) -> None:
    """Removes the checkpoint on the way when the output is in place, if this run `wrote` it or went on from it. Collective."""
    from nemo_opt.checkpoint.atomic import discard, remove_stale
    from nemo_opt.collective import on_first

    path = resume_dir(output)

    def remove() -> None:
        discard(path)
        remove_stale(path)

    if wrote or _is(source, path):
        on_first(remove)


def _is(source: str | Path | None, path: Path) -> bool:
    return source is not None and Path(source).resolve() == path.resolve()
