"""Commands that prove the installation: fixtures, the functional suite and the quickstart."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

fixtures = typer.Typer(no_args_is_help=True, help="The tiny trained models that functional tests and the quickstart use.")
suite = typer.Typer(no_args_is_help=True, help="The functional tests of tests/functional.")


@fixtures.command("build")
def build(
    path: Annotated[bool, typer.Option("--path", help="Print only the directory.")] = False,
) -> None:
    """Make the teacher, the student, the dataset and the Hugging Face directory, or find them in the cache.

    They lie under `$NEMO_OPT_FIXTURES`, or else in the user's cache directory, by a hash of recipe and versions.

    Example: `nemo-opt fixtures build`
    """
    from nemo_opt.testing import fixtures as module

    built = module.build()
    if path:
        print(built.root)
    else:
        module.show(built)


@suite.command("run")
def run(
    tier: Annotated[str | None, typer.Option("--tier", help="Only scripts of this tier, such as L2.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only scripts whose name contains this; repeat for several.")] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where the scripts lie.")] = Path("tests/functional"),
    logs: Annotated[Path, typer.Option("--logs", help="Where to write one log for each script.")] = Path("results/suite"),
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start every rank from nothing: slower, and without the fork server.")] = False,
) -> None:
    """Run functional scripts, each with its time limit and one log; exits with 1 if one fails or none is selected.

    Example: `nemo-opt suite run --tier L2 --only Prune`
    """
    from nemo_opt.testing import suite as module

    raise typer.Exit(module.main(folder=folder, logs=logs, tier=tier, only=only or [], json_path=json, fresh=fresh))


def quickstart(
    output: Annotated[Path, typer.Option("--output", help="Directory of the artefacts and the report.")] = Path("results/quickstart"),
) -> None:
    """Quantise, prune and distil a tiny Llama at TP2 and PP2, and print what each step did.

    Example: `nemo-opt quickstart --output /tmp/quickstart`
    """
    from nemo_opt.testing import quickstart as module

    raise typer.Exit(module.main(output))


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    app.add_typer(fixtures, name="fixtures", rich_help_panel="Proof")
    app.add_typer(suite, name="suite", rich_help_panel="Proof")
    app.command("quickstart", rich_help_panel="Proof")(quickstart)
