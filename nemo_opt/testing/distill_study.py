"""Whether distillation is worth its teacher: a pruned model trained for the same steps by its teacher, by labels alone, and by both.

Each seed prunes the teacher by importance measured on other samples, and trains the result in each way: the same weights, the same samples
in the same order, the same schedule. Each way has the learning rate that was best for it, out of one grid, on a seed that no result is
taken from. All losses are measured on the same validation samples, at several steps.

`python -m nemo_opt.testing.distill_study --json FILE` prints the table and writes the numbers, `--svg FILE` draws the curves, `--grid`
chooses the learning rates anew; docs/distillation.md records them.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from nemo_opt import pages
from nemo_opt.launch import run_ranks
from nemo_opt.pages import COLOURS
from nemo_opt.testing import fixtures

__all__ = ["SETTINGS", "WAYS", "Setting", "Study", "Way", "draw", "main", "study"]

WAYS: dict[str, dict[str, Any] | None] = {
    "labels": None,
    "logits": {},
    "logits_hidden": {"intermediate_layer_pairs": [["decoder.final_layernorm", "decoder.final_layernorm"]]},
    "logits_labels": {"skip_lm_loss": False},
}
"""What the student learns from: settings of the distillation; None is no teacher at all."""
SIZES: dict[str, Any] = {"target_hidden_size": 96, "target_ffn_hidden_size": 192, "target_num_layers": 2}
"""Of the student; the teacher has 128, 256 and 4."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A teacher and a length of training."""

    teacher_steps: int
    """Optimizer steps of the teacher."""
    steps: int
    """Optimizer steps of the student."""
    lr: dict[str, float]
    """Learning rate of each way: the best of `GRID` on seed `TUNING_SEED`."""


GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEED = 100
SETTINGS = {
    "finished": Setting(teacher_steps=1000, steps=100, lr=dict.fromkeys(WAYS, 2e-3)),
    "half_trained": Setting(
        teacher_steps=fixtures.RECIPE.teacher_steps,
        steps=40,
        lr={"labels": 1e-3, "logits": 2e-3, "logits_hidden": 2e-3, "logits_labels": 2e-3},
    ),
    "overtaken": Setting(
        teacher_steps=fixtures.RECIPE.teacher_steps,
        steps=100,
        lr={"labels": 4e-3, "logits": 1e-3, "logits_hidden": 1e-3, "logits_labels": 1e-3},
    ),
}
"""A teacher whose own loss no longer falls; the fixtures' teacher, which has a quarter of that training; the same one, for so long that a
student can learn more from the text than its teacher knows."""

_SAMPLES, _BATCHES, _MICRO_BATCH = 64, 8, 8
_POINTS = 5


@dataclass(frozen=True, kw_only=True)
class Way:
    """What one way of learning has come to."""

    lr: float
    """Highest learning rate."""
    curves: list[list[float]]
    """Validation losses in nats a token, seed by seed, at the study's `points`."""

    @property
    def finals(self) -> list[float]:
        """After the last step, seed by seed."""
        return [curve[-1] for curve in self.curves]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All ways of one setting."""

    teacher_steps: int
    """Optimizer steps of the teacher."""
    teacher_loss: float
    """Its validation loss."""
    points: list[int]
    """Steps after which losses were measured."""
    before: list[float]
    """Loss of the pruned model, seed by seed."""
    ways: dict[str, Way]
    """By name in `WAYS`."""

    def margins(self, way: str) -> list[float]:
        """By how much the way is better than labels alone, seed by seed."""
        return [labels - loss for labels, loss in zip(self.ways["labels"].finals, self.ways[way].finals, strict=True)]

    def summary(self, way: str) -> dict[str, float | int]:
        """What the table shows; `closed` is the share of the gap to the teacher."""
        finals, margins = self.ways[way].finals, self.margins(way)
        closed = [(before - loss) / (before - self.teacher_loss) for before, loss in zip(self.before, finals, strict=True)]
        return {
            "loss": mean(finals),
            "loss_sd": _spread(finals),
            "margin": mean(margins),
            "margin_sd": _spread(margins),
            "margin_least": min(margins),
            "seeds_won": sum(margin > 0 for margin in margins),
            "closed": mean(closed),
        }


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------- in the rank


def study(*, root: str, folder: str, teacher_steps: int, steps: int, seeds: int, lr: dict[str, float], grid: list[float]) -> Study:
    """Trains students of the teacher in `root` in each way; called on one rank.

    Args:
        root: Directory of fixtures.
        folder: For pruned models; removed by the caller.
        teacher_steps: Recorded.
        steps: Optimizer steps of a student.
        seeds: How many.
        lr: Learning rate of each way that is studied.
        grid: Learning rates to choose from, in place of `lr`; empty to take that.

    """
    bench = _Bench(fixtures.Fixtures(Path(root)), folder, steps)
    if grid:
        lr = {way: _best(bench, way, grid) for way in lr}
    pruned = {seed: bench.prune(seed) for seed in range(1, seeds + 1)}
    return Study(
        teacher_steps=teacher_steps,
        teacher_loss=bench.loss(str(bench.made.teacher)),
        points=bench.points,
        before=[bench.loss(path) for path in pruned.values()],
        ways={way: Way(lr=lr[way], curves=[bench.train(path, way, lr[way], seed) for seed, path in pruned.items()]) for way in lr},
    )


def _best(bench: "_Bench", way: str, grid: Sequence[float]) -> float:
    """The learning rate with the smallest last loss, on a seed of its own."""
    pruned = bench.prune(TUNING_SEED)
    finals = {lr: bench.train(pruned, way, lr, TUNING_SEED)[-1] for lr in grid}
    print(f"{way}: " + ", ".join(f"{lr:g} {loss:.4f}" for lr, loss in finals.items()), flush=True)
    return min(finals, key=finals.__getitem__)


class _Bench:
    """One teacher, one length of training, one set of validation samples."""

    def __init__(self, made: fixtures.Fixtures, folder: str, steps: int) -> None:
        self.made, self._folder, self._steps = made, folder, steps
        self._interval = max(steps // _POINTS, 1)
        self.points = sorted({*range(self._interval, steps + 1, self._interval), steps})
        self._valid = self._data(fixtures.RECIPE.seed)

    def prune(self, seed: int) -> str:
        """Path of a student that was pruned by importance on samples of the seed."""
        from nemo_opt import api
        from nemo_opt.parallel import Topology
        from nemo_opt.prune.config import PruningConfig

        path = f"{self._folder}/pruned{seed}"
        if not Path(path).is_dir():
            of_seed: dict[str, Any] = {"data": self._data(seed), "num_train_samples": _SAMPLES, "eval_batches": 0}
            api.prune(checkpoint=str(self.made.teacher), output=path, pruning=PruningConfig(**SIZES), topology=Topology(), **of_seed)
        return path

    def loss(self, path: str) -> float:
        """Validation loss of a checkpoint."""
        from nemo_opt import api
        from nemo_opt.parallel import Topology

        return api.evaluate(path=path, data=self._valid, topology=Topology(), eval_batches=_BATCHES).loss

    def train(self, path: str, way: str, lr: float, seed: int) -> list[float]:
        """Validation losses of the student in `path` at `points`."""
        from nemo_opt.api._session import open_feed, session
        from nemo_opt.checkpoint.load import restore_model
        from nemo_opt.distill import DistillationConfig, convert_to_distillation_model, distillation_loss_fn, teacher_provider
        from nemo_opt.parallel import Topology
        from nemo_opt.training.loop import train

        training = self._training(lr, seed)
        with session(Topology(), seed=seed) as job:
            chunks, _ = restore_model(path, job.topology)
            feed = open_feed(self._data(seed), self.made.tokenizer, train_samples=self._steps * _MICRO_BATCH, eval_batches=1)
            valid = open_feed(self._valid, self.made.tokenizer, eval_batches=_BATCHES)
            settings, loss_fn = WAYS[way], None
            if settings is not None:
                teacher, loss_fn = teacher_provider(None, self.made.teacher), distillation_loss_fn
                chunks = convert_to_distillation_model(chunks, teacher, DistillationConfig(**settings))
            batches: dict[str, Any] = {"train_batches": feed.train_batches, "valid_batches_fn": valid.valid_batches}
            result = train(chunks, config=training, topology=job.topology, loss_fn=loss_fn, **batches)
        return [result.validation_losses[step] for step in self.points]

    def _training(self, lr: float, seed: int) -> Any:
        from nemo_opt.training.config import TrainingConfig

        return TrainingConfig(
            max_steps=self._steps,
            lr=lr,
            min_lr=lr / 10,
            warmup_steps=self._steps // 10,
            seq_length=fixtures.RECIPE.seq_length,
            micro_batch_size=_MICRO_BATCH,
            global_batch_size=_MICRO_BATCH,
            val_check_interval=self._interval,
            limit_val_batches=_BATCHES,
            seed=seed,
        )

    def _data(self, seed: int) -> Any:
        from nemo_opt.data.config import DataConfig

        return DataConfig(
            paths=[str(self.made.dataset)],
            split=fixtures.RECIPE.split,
            seq_length=fixtures.RECIPE.seq_length,
            micro_batch_size=_MICRO_BATCH,
            global_batch_size=_MICRO_BATCH,
            index_mapping_dir=f"{self._folder}/indices",
            seed=seed,
        )


# ---------------------------------------------------------------------------------------------------------------- what is shown


def _show(name: str, found: Study) -> None:
    print(f"\n{name}: teacher {found.teacher_loss:.4f} after {found.teacher_steps} steps, pruned {mean(found.before):.4f}; ", end="")
    print(f"{found.points[-1]} steps, {len(found.before)} seeds")
    print(f"| way | lr | {' | '.join(f'step {step}' for step in found.points)} | better than labels by | least | seeds won | gap closed |")
    print("|---|" + "---|" * (len(found.points) + 5))
    for way, results in found.ways.items():
        s = found.summary(way)
        curve = " | ".join(f"{mean(losses):.4f}" for losses in zip(*results.curves, strict=True))
        against = f"{s['margin']:+.4f} ± {s['margin_sd']:.4f} | {s['margin_least']:+.4f} | {s['seeds_won']} of {len(found.before)}"
        cells = "| | " if way == "labels" else against
        print(f"| {way} | {results.lr:g} | {curve} ± {s['loss_sd']:.4f} | {cells} | {100 * s['closed']:.0f} % |")


_STYLES: dict[str, dict[str, Any]] = {
    "labels": {"color": COLOURS["soft"], "marker": "s", "linestyle": ":"},
    "logits": {"color": COLOURS["main"], "marker": "o", "linestyle": "-"},
    "logits_hidden": {"color": COLOURS["text"], "marker": "^", "linestyle": "--"},
    "logits_labels": {"color": COLOURS["good"], "marker": "D", "linestyle": "-"},
}


def draw(studies: dict[str, Study]) -> str:
    """The mean curves with their range over seeds, a panel each, as a file of its own for light and dark screens."""

    def panels(figure: Any) -> None:
        for place, (name, found) in enumerate(studies.items(), start=1):
            panel = figure.add_subplot(len(studies), 1, place)
            for way, results in found.ways.items():
                by_step = list(zip(*results.curves, strict=True))
                panel.fill_between(
                    found.points, *map(list, (map(min, by_step), map(max, by_step))), color=_STYLES[way]["color"], alpha=0.15, linewidth=0
                )
                panel.plot(found.points, [mean(losses) for losses in by_step], label=way.replace("_", " + "), markersize=4, **_STYLES[way])
            panel.axhline(found.teacher_loss, color=COLOURS["bad"], linewidth=1.0, label="teacher")
            panel.set_title(f"{name.replace('_', ' ')}: teacher of {found.teacher_steps} steps, student of {found.points[-1]}", fontsize=9)
            panel.set_ylabel("nats a token")
            panel.set_xticks(found.points)
            if place == 1:
                panel.legend(fontsize=8)
        panel.set_xlabel("step")

    return _alone(
        pages.plot(panels, title="Validation loss of students by what they learn from", width=6.4, height=0.3 + 2.6 * len(studies))
    )


def _alone(svg: str) -> str:
    """The element with the colours and the font of the pages, so that it stands without one."""
    page = (Path(pages.__file__).parent / "templates" / "page.html.j2").read_text()
    colours = re.search(r"^:root .*?^}", page, flags=re.DOTALL | re.MULTILINE)
    assert colours is not None
    style = f"<style>\n{colours[0]}\nsvg {{ font-family: system-ui, sans-serif; background: var(--back); }}\n</style>"
    return re.sub(r"(<svg [^>]*>)", lambda tag: f"{tag[1]}\n{style}", svg, count=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the study on one rank and prints it; returns the exit code."""
    parser = argparse.ArgumentParser("nemo_opt.testing.distill_study", description="Distillation against training on labels")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="labels are always among them")
    parser.add_argument("--seeds", type=int, default=5, help="Orders of the data, each with a student pruned on other samples")
    parser.add_argument("--steps", type=int, help="Steps of a student, in place of the settings' own")
    parser.add_argument("--teacher-seed", type=int, default=fixtures.RECIPE.seed, help="Another teacher")
    parser.add_argument("--grid", action="store_true", help=f"Choose each way's learning rate out of {GRID} first")
    parser.add_argument("--json", type=Path, help="Also write the numbers to this file")
    parser.add_argument("--svg", type=Path, help="Also draw the curves to this file")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or (options.steps is not None and options.steps < 2):
        parser.error(f"--seeds {options.seeds} must be at least 1, --steps {options.steps} at least 2")
    studies = {name: _run(SETTINGS[name], options) for name in options.settings}
    for name, found in studies.items():
        _show(name, found)
    if options.json:
        options.json.write_text(json.dumps({name: _plain(found) for name, found in studies.items()}, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(draw(studies))
    return 0


def _run(setting: Setting, options: argparse.Namespace) -> Study:
    recipe = replace(fixtures.RECIPE, teacher_steps=setting.teacher_steps, seed=options.teacher_seed)
    with tempfile.TemporaryDirectory(prefix="nemo_opt_distill_study_") as folder:
        settings = {
            "root": str(fixtures.build(recipe).root),
            "folder": folder,
            "teacher_steps": setting.teacher_steps,
            "steps": options.steps or setting.steps,
            "seeds": options.seeds,
            "lr": {way: lr for way, lr in setting.lr.items() if way in (*options.ways, "labels")},
            "grid": list(GRID) if options.grid else [],
        }
        found: Study = run_ranks("nemo_opt.testing.distill_study:study", settings, devices=1)
    return found


def _plain(found: Study) -> dict[str, Any]:
    ways = {way: asdict(results) | found.summary(way) | {"margins": found.margins(way)} for way, results in found.ways.items()}
    return asdict(found) | {"ways": ways}


if __name__ == "__main__":
    sys.exit(main())
