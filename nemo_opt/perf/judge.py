"""Judges all series of a run: against the history of its platform, or against its base in interleaved pairs.

Decisions:
- Every kind of figure has one rule: counts and memory `exact`, all others `detector` or, in pairs, `pairs`.
- A series is expected where one of the last runs of the same set, or a smaller one, has it. One run that lacks it does not make its lack
  normal; an entry of `accepted.toml` does.
- Of many series some move by chance: regressions and improvements that this explains are INCONCLUSIVE (Benjamini and Hochberg). Eight pairs
  that all agree have p = 0.004, which among more than twelve series is chance: sixteen are asked for (`unconfirmed`).
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from nemo_opt.errors import DataError
from nemo_opt.perf.accepted import Accepted, segment
from nemo_opt.perf.detector import FRESH_RUNS, control_discoveries, judge_latest
from nemo_opt.perf.exact import judge_exact, judge_memory
from nemo_opt.perf.history import Point, by_series, environment_changes, in_order, step
from nemo_opt.perf.pairs import MORE_PAIRS, judge_pairs
from nemo_opt.perf.record import Figure, Record
from nemo_opt.perf.verdict import Finding, Judgement, Verdict

__all__ = ["compare", "judge"]

_EXPECTING_RUNS = 5
"""Last runs whose series must be there."""


def judge(history: Sequence[Record], latest: Record, accepted: Sequence[Accepted] = (), *, fresh: Sequence[Record] = ()) -> list[Judgement]:
    """Judges a run, from the most severe to the least.

    Args:
        history: Records of the platform; those that are not older than the run, and itself, are left out.
        latest: The run.
        accepted: Entries of `accepted.toml`.
        fresh: The two runs that confirm jumps, where a first judgement was `unconfirmed`.

    Raises:
        DataError: Records of several platforms, fresh runs of another commit, or a series whose unit, kind or direction changed.

    """
    _refuse_strangers(history, latest, fresh)
    judged = {record.run_id for record in (latest, *fresh)}
    past = in_order([record for record in history if record.name < latest.name and record.run_id not in judged])
    points = by_series(past)
    found = []
    for series, figure in latest.by_series().items():
        counted = segment(series, points.get(series, ()), accepted, (*past, latest))
        found.append(_judge_series(figure, counted, latest, fresh))
    found += [_missing(series, latest) for series in _expected(past, latest, accepted) - latest.by_series().keys()]
    return _sorted(_controlled(found, latest))


def _refuse_strangers(history: Sequence[Record], latest: Record, fresh: Sequence[Record]) -> None:
    strange = sorted({record.platform for record in (*history, *fresh)} - {latest.platform})
    if strange:
        raise DataError(f"a run of {latest.platform} cannot be judged by runs of {', '.join(strange)}; give its own history")
    if len(fresh) not in (0, FRESH_RUNS):
        raise DataError(f"{len(fresh)} fresh runs; give none or {FRESH_RUNS}: more would be running until it is green")
    other = [record.commit for record in fresh if record.commit != latest.commit]
    if other:
        raise DataError(f"fresh runs of {', '.join(other)} cannot confirm one of {latest.commit}: measure the same commit")


def _judge_series(figure: Figure, points: Sequence[Point], latest: Record, fresh: Sequence[Record]) -> Judgement:
    for point in points:
        _refuse_another_form(point.figure, figure, point.record)
    records = [*(point.record for point in points), latest]
    values, changed = [point.value for point in points], environment_changes(records)
    again = [record.by_series()[figure.series].value for record in fresh if figure.series in record.by_series()]
    try:
        if figure.kind == "exact":
            finding = judge_exact(values, figure.value, environment_changed=changed)
        elif figure.kind == "memory":
            finding = judge_memory(values, figure.value, direction=figure.direction, environment_changed=changed)
        else:
            latest_values = [figure.value, *(again if len(again) == FRESH_RUNS else [])]
            finding = judge_latest(values, latest_values, direction=figure.direction, environment_changed=changed)
    except DataError as error:
        raise DataError(f"{figure.series}: {error}") from error
    at = step(records[finding.index - 1], records[finding.index]) if finding.index else None
    return Judgement(series=figure.series, at=at, **asdict(finding))


def _refuse_another_form(old: Figure, new: Figure, record: Record) -> None:
    was, now = ((figure.unit, figure.kind, figure.direction) for figure in (old, new))
    if was != now:
        raise DataError(f"{new.series}: {now} != {was} in {record.name}: give it another name, or accept a new level in accepted.toml")


def _expected(past: Sequence[Record], latest: Record, accepted: Sequence[Accepted]) -> set[str]:
    """The series that the last comparable runs have, and that no entry has put an end to."""
    comparable = [record for record in past if record.short or not latest.short][-_EXPECTING_RUNS:]
    if not latest.short:
        # The last runs may all be short ones, which say nothing of the full set.
        comparable += [record for record in past if not record.short][-_EXPECTING_RUNS:]
    found = by_series(comparable)
    return {series for series, points in found.items() if segment(series, points, accepted, (*past, latest))}


def _missing(series: str, latest: Record) -> Judgement:
    why = f"; failed benchmarks: {', '.join(latest.failed)}" if latest.failed else "; accept it in accepted.toml if it was taken away"
    return Judgement(series=series, verdict=Verdict.MISSING, reason=f"measured in one of the last runs, not in this one{why}")


def _controlled(found: Sequence[Judgement], latest: Record, *, more: bool = False) -> list[Judgement]:
    """Those that chance explains, among so many series, are INCONCLUSIVE; `more` says whether more measuring would help."""
    noisy = {figure.series for figure in latest.figures if figure.kind in ("ratio", "time")}
    tested = [judgement for judgement in found if judgement.p is not None and judgement.series in noisy]
    stands = control_discoveries([judgement.p for judgement in tested if judgement.p is not None])
    chance = {judgement.series for judgement, is_real in zip(tested, stands, strict=True) if not is_real}
    return [_doubted(judgement, len(tested), more) if judgement.series in chance else judgement for judgement in found]


def _doubted(judgement: Judgement, series: int, more: bool) -> Judgement:
    if judgement.verdict not in (Verdict.REGRESSION, Verdict.IMPROVEMENT):
        return judgement
    told = f"{judgement.reason}; among {series} series chance does this"
    return replace(judgement, verdict=Verdict.INCONCLUSIVE, reason=told, unconfirmed=more)


def _sorted(found: Sequence[Judgement]) -> list[Judgement]:
    return sorted(found, key=lambda judgement: (judgement.verdict.severity, -abs(judgement.change or 0.0), judgement.series))


def compare(base: Sequence[Record], head: Sequence[Record], accepted: Sequence[Accepted] = ()) -> list[Judgement]:
    """Judges a change against its base, from the most severe to the least.

    Args:
        base: Runs of the base, in order.
        head: Runs of the change, `head[i]` beside `base[i]`.
        accepted: Entries that the change adds to `accepted.toml`: their series may be worse, and do not fail.

    Raises:
        DataError: No pairs, records of several platforms, or a series whose unit, kind or direction changed.

    """
    if not base or len(base) != len(head):
        raise DataError(f"{len(base)} runs of the base, {len(head)} of the change: pairs are needed")
    _refuse_strangers([*base, *head], head[0], ())
    before, after = by_series(base), by_series(head)
    found = [_compare_series(series, before.get(series, ()), points, len(base)) for series, points in after.items()]
    found += [_missing(series, head[0]) for series in before.keys() - after.keys()]
    found = _controlled(found, head[0], more=len(base) < MORE_PAIRS)
    return _sorted([_accepted(judgement, accepted) for judgement in found])


def _compare_series(series: str, base: Sequence[Point], head: Sequence[Point], pairs: int) -> Judgement:
    figure = head[0].figure
    if not base:
        return Judgement(series=series, verdict=Verdict.NO_BASELINE, reason="the base does not measure it", value=figure.value)
    _refuse_another_form(base[0].figure, figure, base[0].record)
    finding: Finding
    if len(head) < pairs or len(base) < pairs:
        missing = f"measured in {len(base)} runs of the base and {len(head)} of the change, not in all {pairs}"
        finding = Finding(verdict=Verdict.MISSING, reason=missing)
    elif figure.kind == "exact":
        finding = judge_exact([base[0].value], figure.value)
    elif figure.kind == "memory":
        finding = judge_memory([point.value for point in base], figure.value, direction=figure.direction)
    else:
        finding = judge_pairs([point.value for point in base], [point.value for point in head], direction=figure.direction)
    return Judgement(series=series, **asdict(replace(finding, index=None)))


def _accepted(judgement: Judgement, accepted: Sequence[Accepted]) -> Judgement:
    entry = next((entry for entry in accepted if entry.covers(judgement.series)), None)
    if entry is None or not judgement.verdict.fails:
        return judgement
    return replace(judgement, verdict=Verdict.OK, reason=f"{judgement.reason}; accepted by {entry.author}: {entry.reason}")
