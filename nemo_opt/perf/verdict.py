"""What is said of a series: a verdict, the numbers behind it, and where the change began.

Decisions:
- Only REGRESSION and MISSING fail. NO_BASELINE, INCONCLUSIVE and ENV_CHANGED are printed and never stand for a pass.
- A finding speaks of numbers only (`detector`, `pairs` and `exact` know no records); a judgement adds the series and the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from nemo_opt.perf.record import Record

__all__ = ["Finding", "Judgement", "Step", "Verdict"]


class Verdict(StrEnum):
    """Of a series; from the one that needs most attention to the one that needs least."""

    REGRESSION = "REGRESSION"
    """Worse by more than noise and by more than the threshold; or a count that is not the same."""
    MISSING = "MISSING"
    """Was measured before and is not now."""
    ENV_CHANGED = "ENV_CHANGED"
    """Moved in the very step in which versions or settings changed: not the commit's doing, as far as can be seen."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """Noise hides whether it changed, or a jump waits for its two fresh runs."""
    IMPROVEMENT = "IMPROVEMENT"
    """Better by more than noise and by more than the threshold; asks to accept a new level."""
    NO_BASELINE = "NO_BASELINE"
    """Nothing, or too little, to compare with."""
    OK = "OK"
    """No change that noise does not explain, or none that matters."""

    @property
    def fails(self) -> bool:
        """Whether a gate is red."""
        return self in (Verdict.REGRESSION, Verdict.MISSING)

    @property
    def words(self) -> str:
        """For a reader."""
        return "environment changed" if self is Verdict.ENV_CHANGED else self.value.lower().replace("_", " ")

    @property
    def severity(self) -> int:
        """For sorting: 0 is the worst."""
        return list(Verdict).index(self)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule found in numbers."""

    verdict: Verdict
    """Of the rule."""
    reason: str
    """A sentence with the numbers."""
    change: float | None = None
    """Of the value against the baseline, relative: 0.1 is ten per cent more; None without a baseline, or with one of 0."""
    p: float | None = None
    """How often chance alone would do this; None where chance has no part."""
    z: float | None = None
    """Distance from the baseline in units of the noise."""
    baseline: float | None = None
    """What was compared with."""
    value: float | None = None
    """What was judged; the median where there are fresh runs."""
    n: int = 0
    """Points or pairs behind the baseline."""
    index: int | None = None
    """Where the change began: a position in history followed by the judged run."""
    unconfirmed: bool = False
    """Whether more measuring is called for: two fresh runs, or as many pairs again."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Two neighbouring runs, between which something changed."""

    before: Record
    """The last run of the old level."""
    after: Record
    """The first run of the new one."""
    environment: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """What else changed in this step: name to what it was and what it is; empty for what is not there."""

    def __str__(self) -> str:
        commits = f"{self.before.commit[:7] or 'nocommit'}..{self.after.commit[:7] or 'nocommit'}"
        changes = ", ".join(f"{name} {was or 'absent'} -> {now or 'absent'}" for name, (was, now) in sorted(self.environment.items()))
        return f"{commits} ({self.before.started} to {self.after.started}){f'; in the same step {changes}' if changes else ''}"


@dataclass(frozen=True, kw_only=True)
class Judgement(Finding):
    """What was found of a series."""

    series: str
    """Its name."""
    at: Step | None = None
    """Where the change began; None where there is none."""

    def __str__(self) -> str:
        return f"{self.verdict} {self.series}: {self.reason}{f'; at {self.at}' if self.at else ''}"
