"""Whether importance is worth measuring: on a trained model, pruning by importance against pruning by chance to the same sizes.

For each axis and each seed, importance is measured on other training samples, and the random choice is another one; both go through the
same selection and slicing, and both losses are measured on the same validation samples. Axes are cut one at a time, so that none hides
another. `python -m nemo_opt.testing.prune_study --json FILE` prints the table and writes the numbers; docs/pruning.md records them.

Random depth keeps the first layer half of the time or more, since there are few layers: so the study also says how much of the gap that is.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

from nemo_opt.launch import run_ranks
from nemo_opt.testing import fixtures

__all__ = ["TARGETS", "AxisStudy", "main", "study"]

TARGETS: dict[str, dict[str, int]] = {
    "hidden": {"hidden_size": 96},
    "ffn": {"ffn_hidden_size": 128},
    "heads": {"num_attention_heads": 4},
    "groups": {"num_query_groups": 2},
    "layers": {"num_layers": 3},
}
"""Each axis of the tiny Llama (4 layers, hidden 128, ffn 256, 8 heads in 4 groups), cut to a half or three quarters."""

_SAMPLES, _BATCHES, _MICRO_BATCH = 64, 8, 8


@dataclass(frozen=True, kw_only=True)
class AxisStudy:
    """Losses of one axis, in nats a token, one for each seed."""

    axis: str
    """What was cut."""
    unpruned: float
    """Loss of the whole model."""
    important: list[float]
    """After pruning by importance."""
    random: list[float]
    """After pruning by chance."""

    @property
    def gaps(self) -> list[float]:
        """By how much importance is better, seed by seed."""
        return [by_chance - by_importance for by_importance, by_chance in zip(self.important, self.random, strict=True)]


def study(*, root: str, seeds: int, axes: list[str], draws: int = 1) -> list[AxisStudy]:
    """Prunes the teacher in `root` by importance and by chance, on every rank of a data parallel job.

    Args:
        root: Directory of fixtures.
        seeds: How many samples of calibration data and random choices.
        axes: Names in `TARGETS`.
        draws: Random choices for each seed, whose mean loss counts.

    """
    from nemo_opt.api._session import session
    from nemo_opt.checkpoint.load import restore_model
    from nemo_opt.parallel import Topology

    made = fixtures.Fixtures(Path(root))
    with session(Topology()) as job:
        chunks, _ = restore_model(str(made.teacher), job.topology)
        judge = _Judge(chunks, made)
        whole = judge.loss()
        measured = [judge.importance(seed) for seed in range(seeds)]
        results = []
        for axis in axes:
            important = [judge.loss(scores, TARGETS[axis]) for scores in measured]
            by_chance = [
                mean(judge.loss(_shuffled(measured[0], 1000 * seed + draw), TARGETS[axis]) for draw in range(draws))
                for seed in range(seeds)
            ]
            results.append(AxisStudy(axis=axis, unpruned=whole, important=important, random=by_chance))
        return results


class _Judge:
    """The model, its calibration data and its validation data."""

    def __init__(self, chunks: list[Any], made: fixtures.Fixtures) -> None:
        from nemo_opt.api._session import open_feed
        from nemo_opt.data.config import DataConfig

        self._chunks = chunks
        data = DataConfig(
            paths=[str(made.dataset)],
            split=fixtures.RECIPE.split,
            seq_length=fixtures.RECIPE.seq_length,
            micro_batch_size=_MICRO_BATCH,
            global_batch_size=_MICRO_BATCH,
        )
        self._data, self._tokenizer, self._open = data, made.tokenizer, open_feed
        self._valid = open_feed(data, made.tokenizer, eval_batches=_BATCHES)

    def importance(self, seed: int) -> Any:
        """Scores of the whole model on training samples that depend on the seed."""
        from nemo_opt.prune.importance import measure_importance
        from nemo_opt.training.forward import forward_loop

        feed = self._open(replace(self._data, seed=seed), self._tokenizer, train_samples=_SAMPLES, eval_batches=1)
        batches = list(islice(feed.train_batches(), _SAMPLES // _MICRO_BATCH))
        return measure_importance(self._chunks, forward_loop(batches, description="measuring importance"))

    def loss(self, scores: Any = None, targets: dict[str, int] | None = None) -> float:
        """Validation loss of the whole model, or pruned to `targets` by `scores`."""
        from nemo_opt.models.build import unwrap
        from nemo_opt.prune.search import pruned

        if targets is None:
            value = self._valid.loss(self._chunks)
        else:
            with pruned(unwrap(self._chunks), scores, targets):
                value = self._valid.loss(self._chunks)
        assert value is not None
        return value


def _shuffled(scores: Any, seed: int) -> Any:
    """Scores without meaning: uniform random numbers in place of each tensor."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def chance(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)

    parts = {name: {number: chance(t) for number, t in getattr(scores, name).items()} for name in ("ffn", "heads", "groups")}
    return replace(scores, hidden=chance(scores.hidden), layers=chance(scores.layers), **parts)


def _show(results: list[AxisStudy]) -> None:
    print(f"unpruned: {results[0].unpruned:.4f} nats a token; losses over {len(results[0].random)} seeds: mean (smallest to largest)")
    print(f"{'axis':<8}{'by importance':>28}{'by chance':>28}{'gap: median (smallest)':>26}{'better':>9}")
    for r in results:
        ranges = [f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" for values in (r.important, r.random)]
        won = sum(gap > 0 for gap in r.gaps)
        print(f"{r.axis:<8}{ranges[0]:>28}{ranges[1]:>28}{f'{median(r.gaps):.4f} ({min(r.gaps):+.4f})':>26}{f'{won}/{len(r.gaps)}':>9}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the study on one rank and prints it; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.prune_study", description="Pruning by importance against pruning by chance")
    parser.add_argument("--seeds", type=int, default=5, help="Samples of calibration data, and random choices")
    parser.add_argument("--draws", type=int, default=1, help="Random choices for each seed, whose mean loss counts")
    parser.add_argument("--axes", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="Also write the numbers to this file")
    options = parser.parse_args(arguments)
    settings = {"root": str(fixtures.build().root), "seeds": options.seeds, "axes": options.axes, "draws": options.draws}
    results = run_ranks("nemo_opt.testing.prune_study:study", settings, devices=1)
    _show(results)
    if options.json:
        options.json.write_text(json.dumps({r.axis: {**asdict(r), "gaps": r.gaps} for r in results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
