"""Commands that track performance: `nemo-opt bench run | compare | history | report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

bench = typer.Typer(no_args_is_help=True, help="Performance: figures beside their peers, their history, and two commits side by side.")

Benchmarks = Annotated[Path, typer.Option("--benchmarks", help="Folder of the benchmarks.")]
History = Annotated[Path, typer.Option("--output", help="Folder of the history: one file a run, by platform.")]
Platform = Annotated[str | None, typer.Option("--platform", help="Another platform's history than this machine's.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Also write a summary for a pull request.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON.")]

FOLDER, HISTORY = Path("benchmarks"), Path("benchmarks/history")


@bench.command("run")
def run(
    short: Annotated[bool, typer.Option("--short/--full", help="The short set, or all shapes.")] = True,
    only: Annotated[str | None, typer.Option("--only", help="Only benchmarks that match, as pytest's -k.")] = None,
    confirm: Annotated[bool, typer.Option("--confirm/--no-confirm", help="Two fresh runs where a figure jumped.")] = True,
    benchmarks: Benchmarks = FOLDER,
    output: History = HISTORY,
    html: Html = None,
    markdown: Markdown = None,
    json: Json = None,
) -> None:
    """Run the benchmarks, record the run and judge it by its history.

    Exits with 0 if nothing regressed or is missing, 1 if something did or a benchmark failed, 2 if none is selected.

    Example: `nemo-opt bench run --short --html results/performance.html`
    """
    from nemo_opt.perf import tracker

    _finish(tracker.run(benchmarks, output, short=short, only=only, confirm=confirm), html, markdown, json)


@bench.command("report")
def report(
    commit: Annotated[str | None, typer.Option("--commit", help="The last run of this commit instead of the last of all.")] = None,
    output: History = HISTORY,
    platform: Platform = None,
    html: Html = None,
    markdown: Markdown = None,
    json: Json = None,
) -> None:
    """Judge and show a recorded run, without running anything.

    Example: `nemo-opt bench report --html results/performance.html --markdown results/performance.md`
    """
    from nemo_opt.perf import tracker

    _finish(tracker.judged(output, platform=platform, commit=commit), html, markdown, json)


@bench.command("history")
def history(
    only: Annotated[str, typer.Option("--only", help="Only series whose name contains this.")] = "",
    output: History = HISTORY,
    platform: Platform = None,
) -> None:
    """List the recorded series: how many runs, the first and the last value, and how far runs are apart.

    Example: `nemo-opt bench history --only distillation`
    """
    from nemo_opt.perf import terminal, tracker

    known = tracker.past(output, platform)
    if not terminal.show_history(known.records, only):
        where = output / platform if platform else output
        typer.echo(f"no series in {where} contains {only!r}: `nemo-opt bench run` records some", err=True)
        raise typer.Exit(2)


@bench.command("compare")
def compare(
    base: Annotated[str, typer.Argument(help="A commit, or a directory with nemo_opt/ in it.")],
    head: Annotated[str, typer.Argument(help="The change: likewise.")] = ".",
    only: Annotated[str, typer.Option("--only", help="Only measurements whose name contains this.")] = "",
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Counts (collectives, bytes, quantizers) too.")] = True,
    benchmarks: Benchmarks = FOLDER,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Append all pairs to this file, for nemo_opt.perf.power.")] = None,
    html: Html = None,
    markdown: Markdown = None,
    json: Json = None,
) -> None:
    """Measure a change against its base, turn by turn in interleaved pairs of processes on this machine.

    Exits with 0 if nothing regressed, 1 if something did, 2 if a tree cannot be measured.

    Example: `nemo-opt bench compare origin/main HEAD`
    """
    from contextlib import ExitStack

    from tqdm import tqdm

    from nemo_opt.perf import compare as module
    from nemo_opt.perf import terminal
    from nemo_opt.perf.accepted import read_accepted
    from nemo_opt.perf.pair_file import append_pairs
    from nemo_opt.perf.report import Report
    from nemo_opt.perf.tracker import ACCEPTED
    from nemo_opt.perf.trees import tree

    pulse = benchmarks / "pulse.py"
    chosen = module.measurements(pulse.resolve(), only)
    with ExitStack() as stack:
        trees = [stack.enter_context(tree(name, Path.cwd())) for name in (base, head)]
        before, after = (read_accepted(one.root / "benchmarks" / ACCEPTED) for one in trees)
        with tqdm(desc="measuring", unit="pair", disable=not sys.stderr.isatty()) as bar:
            found = module.compare(
                trees[0],
                trees[1],
                pulse.resolve(),
                chosen,
                exact=(benchmarks / "test_exact.py").resolve() if exact else None,
                accepted=[entry for entry in after if entry not in before],
                tick=bar.update,
            )
    if pairs is not None:
        append_pairs(pairs, found.base, found.head)
    terminal.show_comparison(found)
    _finish(Report(record=found.head[-1], older=(), judgements=found.judgements), html, markdown, json, table=False)


def _finish(report: object, html: Path | None, markdown: Path | None, json: Path | None, *, table: bool = True) -> None:
    """Shows and writes a report; exits with 1 where it is not good."""
    from nemo_opt.perf import page, summary, terminal
    from nemo_opt.perf.report import Report

    assert isinstance(report, Report)
    if table:
        terminal.show(report)
    for write, place in ((page.write_html, html), (summary.write_markdown, markdown), (summary.write_json, json)):
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write(report, place)
            print(f"written to {place}")
    if not report.good:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    app.add_typer(bench, name="bench", rich_help_panel="Proof")
