"""Whether importance is worth measuring: on a trained model, pruning by importance against pruning by chance to the same sizes.

For each axis and each seed, importance is measured on other training samples, and the random choices are others; all go through the
same selection and slicing, and all losses are measured on the same validation samples. Axes are cut one at a time, so that none hides
another. `python -m nemo_opt.testing.prune_study --json FILE` prints the table and writes the numbers; docs/pruning.md records them.

Where there are few choices (three of four layers) chance is no sample: each seed sees all of them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from math import comb
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
    "hidden_112": {"hidden_size": 112},
    "hidden_64": {"hidden_size": 64},
}
"""Cuts of the tiny Llama (4 layers, hidden 128, ffn 256, 8 heads in 4 groups), each to a half or three quarters; hidden to others too."""

_AXES = ["hidden", "ffn", "heads", "groups", "layers"]
_SAMPLES, _BATCHES, _MICRO_BATCH = 64, 8, 8
_FEW = 20  # choices that are all tried


@dataclass(frozen=True, kw_only=True)
class AxisStudy:
    """Losses of one axis, in nats a token."""

    axis: str
    """What was cut."""
    unpruned: float
    """Loss of the whole model."""
    important: list[float]
    """After pruning by importance, seed by seed."""
    random: list[list[float]]
    """After pruning by chance, for each seed several times."""

    @property
    def gaps(self) -> list[float]:
        """By how much importance is better than the mean of its seed's choices by chance."""
        return [mean(by_chance) - by_importance for by_importance, by_chance in zip(self.important, self.random, strict=True)]

    def summary(self) -> dict[str, float | int]:
        """What the table shows."""
        choices = [loss for by_chance in self.random for loss in by_chance]
        return {
            "important_mean": mean(self.important),
            "random_mean": mean(choices),
            "random_median": median(choices),
            "gap": mean(self.gaps),
            "seeds_won": sum(gap > 0 for gap in self.gaps),
            "choices_beaten": sum(mean(self.important) < loss for loss in choices) / len(choices),
        }


def study(*, root: str, seeds: int, axes: list[str], draws: int) -> list[AxisStudy]:
    """Prunes the teacher in `root` by importance and by chance, on every rank of a data parallel job.

    Args:
        root: Directory of fixtures.
        seeds: How many samples of calibration data and random choices.
        axes: Names in `TARGETS`.
        draws: Random choices for each seed.

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
            by_chance = _by_chance(judge, measured[0], TARGETS[axis], seeds, draws)
            results.append(AxisStudy(axis=axis, unpruned=whole, important=important, random=by_chance))
        return results


def _by_chance(judge: "_Judge", scores: Any, targets: dict[str, int], seeds: int, draws: int) -> list[list[float]]:
    """Losses of random choices, `draws` for each seed; of all choices where only depth is cut and there are not more."""
    total, count = scores.model.num_layers, targets.get("num_layers")
    if count is not None and comb(total, count) <= max(draws, _FEW):
        return [[judge.loss(_only_layers(scores, kept), targets) for kept in combinations(range(total), count)]] * seeds
    return [[judge.loss(_shuffled(scores, 1000 * seed + draw), targets) for draw in range(draws)] for seed in range(seeds)]


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


def _only_layers(scores: Any, kept: Sequence[int]) -> Any:
    """Scores by which the layers `kept`, counted from 0, stay."""
    layers = scores.layers.new_zeros(len(scores.layers))
    layers[list(kept)] = 1.0
    return replace(scores, layers=layers)


def _show(results: list[AxisStudy]) -> None:
    first = results[0]
    print(f"unpruned: {first.unpruned:.4f} nats a token; {len(first.important)} seeds")
    print(f"{'cut':<12}{'by importance':>14}{'by chance':>11}{'median':>9}{'gap':>9}{'seeds won':>11}{'choices beaten':>16}")
    for r in results:
        s = r.summary()
        losses = f"{s['important_mean']:>14.4f}{s['random_mean']:>11.4f}{s['random_median']:>9.4f}{s['gap']:>+9.4f}"
        beaten = f"{100 * s['choices_beaten']:.0f} % of {sum(map(len, r.random))}"
        print(f"{r.axis:<12}{losses}{f'{s["seeds_won"]}/{len(r.gaps)}':>11}{beaten:>16}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the study on one rank and prints it; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.prune_study", description="Pruning by importance against pruning by chance")
    parser.add_argument("--seeds", type=int, default=5, help="Samples of calibration data, each with its random choices")
    parser.add_argument("--draws", type=int, default=6, help="Random choices for each seed")
    parser.add_argument("--axes", nargs="+", choices=list(TARGETS), default=_AXES)
    parser.add_argument("--json", type=Path, help="Also write the numbers to this file")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.draws) < 1:
        parser.error(f"--seeds {options.seeds} and --draws {options.draws} must be at least 1")
    settings = {"root": str(fixtures.build().root), "seeds": options.seeds, "axes": options.axes, "draws": options.draws}
    results = run_ranks("nemo_opt.testing.prune_study:study", settings, devices=1)
    _show(results)
    if options.json:
        options.json.write_text(json.dumps({r.axis: {**asdict(r), "gaps": r.gaps, **r.summary()} for r in results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
