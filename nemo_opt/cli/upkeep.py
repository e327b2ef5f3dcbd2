"""Commands that prove the installation: fixtures, the functional suite and the quickstart."""

from json import dumps
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


Tier = Annotated[str | None, typer.Option("--tier", help="Only scripts of this tier, such as L2.")]
Layout = Annotated[str | None, typer.Option("--layout", help="Only scripts of this layout, such as TP2PP1.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only scripts whose name contains this; repeat for several.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda: only scripts for it; on cuda, a GPU must be there.")]
Quarantined = Annotated[bool, typer.Option("--quarantined", help="Also those in quarantine, whose verdict does not count.")]
Folder = Annotated[Path, typer.Option("--folder", help="Where the scripts lie.")]


@suite.command("run")
def run(
    tier: Tier = None,
    layout: Layout = None,
    only: Only = None,
    device: Device = None,
    quarantined: Quarantined = False,
    folder: Folder = Path("tests/functional"),
    jobs: Annotated[int | None, typer.Option("--jobs", help="Scripts at once; by default as many as the cores or GPUs hold ranks.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start every rank from nothing: slower, and without the fork server.")] = False,
    timeout_scale: Annotated[float, typer.Option("--timeout-scale", help="Factor of every time limit, for a slow machine.")] = 1.0,
    logs: Annotated[Path, typer.Option("--logs", help="Where to write one log for each script.")] = Path("results/suite"),
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write the results as JUnit XML.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the results as one page.")] = None,
    history: Annotated[Path | None, typer.Option("--history", help="File of older runs; in the user's cache by default.")] = None,
) -> None:
    """Run functional scripts, each with its time limit and one log.

    Exits with 0 if all that ran passed and something did; 1 if a script failed or timed out, or none could run; 2 if none is selected,
    or one is not what a script must be; 75 if only infrastructure failed (no fixtures, a full disk).

    Example: `nemo-opt suite run --tier L2 --only Prune --html suite.html`
    """
    from nemo_opt.testing import suite as module

    options = module.Options(
        logs=logs,
        device=device,
        jobs=jobs,
        fresh=fresh,
        timeout_scale=timeout_scale,
        history=history,
        junit=junit,
        json=json,
        html=html,
    )
    code = module.main(folder=folder, options=options, tier=tier, layout=layout, only=only or [], quarantined=quarantined)
    raise typer.Exit(code)


@suite.command("list")
def list_scripts(
    tier: Tier = None,
    layout: Layout = None,
    only: Only = None,
    device: Device = None,
    quarantined: Quarantined = False,
    folder: Folder = Path("tests/functional"),
    as_json: Annotated[bool, typer.Option("--json", help="As one line of JSON, for a job matrix.")] = False,
) -> None:
    """List functional scripts with what their headers say, the only source of a job matrix.

    Example: `nemo-opt suite list --tier L2 --json`
    """
    from nemo_opt.testing import suite as module

    scripts = module.select(module.discover(folder), tier=tier, layout=layout, only=only or [], device=device, quarantined=quarantined)
    if as_json:
        print(dumps([script.row() for script in scripts]))
    else:
        module.show_matrix(scripts)


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
