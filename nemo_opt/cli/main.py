"""The typer application: `nemo-opt COMMAND`."""

import sys
from typing import Annotated

import typer

from nemo_opt import __version__
from nemo_opt.cli import bench, models, recipes, upkeep
from nemo_opt.cli.run import exit_code_of

__all__ = ["app", "main"]

app = typer.Typer(
    name="nemo-opt",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="PTQ, pruning and distillation of Megatron-Core models, on GPUs or on none.\n\nStart with `nemo-opt quickstart`.",
)
models.register(app)
recipes.register(app)
upkeep.register(app)
bench.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nemo-opt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    code = 0

    def command() -> None:
        nonlocal code
        code = app(arguments, standalone_mode=True) or 0

    try:
        failure = exit_code_of(command)
    except SystemExit as end:  # click's own: help, usage errors, typer.Exit(code)
        failure = end.code if isinstance(end.code, int) else int(bool(end.code))
    sys.exit(failure or code)
