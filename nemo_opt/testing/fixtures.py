"""The tiny trained models of functional tests and the quickstart, made once and kept in the user's cache.

What is made: a tokenizer and a dataset of the built-in corpus; a teacher (the `tiny` preset) trained on it until its validation loss is
`MARGIN_NATS` under the uniform loss; a smaller student, trained briefly; the teacher as a Hugging Face directory; `fixtures.json` with the
recipe and the losses.

Decisions:
- The directory's name is a hash of the recipe, the versions of what computes, and the corpus (which differs between Python releases).
- Two processes may build at once: a file lock lets one do it, and the directory appears by one rename, whole or not at all.
- Checksums are compared at every use (15 MB: some 20 ms). A damaged directory is named, set aside and built anew.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_opt.api.results import Result, TrainResult
from nemo_opt.checkpoint.manifest import check_contents, check_entries, hash_files, list_files, read_manifest, write_manifest
from nemo_opt.data.corpus import builtin_documents, corpus_fingerprint
from nemo_opt.errors import CheckpointError, ConfigError, NemoOptError
from nemo_opt.launch import run_ranks
from nemo_opt.models.config import ModelConfig, preset

__all__ = ["MARGIN_NATS", "RECIPE", "Fixtures", "Recipe", "build", "find", "make", "show"]

DIRECTORY_VARIABLE = "NEMO_OPT_FIXTURES"
"""Names the directory that holds fixtures by hash, in place of the user's cache."""

MARGIN_NATS = 2.0
"""How far the teacher must be under ln(vocabulary)."""

_FACTS = "fixtures.json"
_INDICES = "indices"  # of the samples; made for training, not kept
_DAMAGED = (CheckpointError, OSError)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is made."""

    revision: int = 1
    """Counts changes of the code here that change the result."""
    teacher: ModelConfig
    """Sizes of the teacher."""
    student: ModelConfig
    """Sizes of the student."""
    teacher_steps: int = 240
    """200 steps reach 5.43 on held-out text; 2 nats under ln(2048) is 5.62."""
    student_steps: int = 40
    """Enough to be a language model at all, far from what it can learn."""
    lr: float = 3e-3
    """Highest learning rate."""
    global_batch_size: int = 8
    """Samples of a step."""
    seq_length: int = 128
    """Tokens of a sample."""
    seed: int = 1234
    """Of weights and order of the data."""
    split: str = "90,10,0"
    """Shares of the documents."""


RECIPE = Recipe(
    teacher=preset("tiny"),
    student=ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=4,
        vocab_size=2048,
        max_position_embeddings=512,
    ),
)  # fmt: skip
"""What `build` makes."""


@dataclass(frozen=True)
class Fixtures:
    """A directory of fixtures."""

    root: Path
    """The directory."""

    @property
    def teacher(self) -> Path:
        """Checkpoint of the trained teacher."""
        return self.root / "teacher"

    @property
    def student(self) -> Path:
        """Checkpoint of the student."""
        return self.root / "student"

    @property
    def teacher_hf(self) -> Path:
        """The teacher as transformers opens it."""
        return self.root / "teacher-hf"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer of both."""
        return self.root / "tokenizer"

    @property
    def corpus(self) -> Path:
        """The text, one document a line."""
        return self.root / "data" / "corpus.jsonl"

    @property
    def dataset(self) -> Path:
        """Prefix of the text as Megatron's .bin and .idx."""
        return self.root / "data" / "text"

    @property
    def facts(self) -> dict[str, Any]:
        """Recipe, versions and measured numbers."""
        return dict(json.loads((self.root / _FACTS).read_text()))

    def verify(self) -> None:
        """Compares every file with the manifest; raises `CheckpointError` naming the first that is damaged."""
        entries = read_manifest(self.root)
        check_entries(self.root, entries)
        check_contents(self.root, entries)


def build(recipe: Recipe = RECIPE, *, devices: int | None = None, quiet: bool = False) -> Fixtures:
    """The fixtures of `recipe`: those in the cache if they are whole, else new ones.

    Args:
        recipe: What to make.
        devices: Data parallel ranks to train with; the machine's cores, at most 2, by default.
        quiet: Print nothing.

    Raises:
        NemoOptError: They cannot be made.

    """
    fixtures = Fixtures(_home() / _key(recipe))
    if _is_whole(fixtures, quiet=True):
        return fixtures
    with _lock(fixtures.root, quiet=quiet):
        if not _is_whole(fixtures, quiet=quiet):
            _make_beside(fixtures.root, recipe, devices or min(os.cpu_count() or 1, 2), quiet=quiet)
    return fixtures


def find(recipe: Recipe = RECIPE) -> Fixtures:
    """The fixtures in the cache; raises `ConfigError` where they are missing or damaged."""
    fixtures = Fixtures(_home() / _key(recipe))
    try:
        fixtures.verify()
    except _DAMAGED as error:
        raise ConfigError(f"fixtures {fixtures.root} are not there or damaged ({error}): run `nemo-opt fixtures build`") from None
    return fixtures


def show(fixtures: Fixtures) -> None:
    """Prints what the fixtures are, and where."""
    from rich.console import Console
    from rich.table import Table

    from nemo_opt.cli.report import format_bytes, format_count, format_loss

    facts = fixtures.facts
    table = Table(title="Fixtures", title_justify="left", title_style="bold")
    for title in ("what", "parameters", "validation loss", "bytes"):
        table.add_column(title)
    for name in ("teacher", "student", "teacher-hf"):
        size = sum(file.stat().st_size for file in (fixtures.root / name).rglob("*") if file.is_file())
        numbers = facts.get(name.removesuffix("-hf"), {})
        table.add_row(name, format_count(numbers["parameters"]), format_loss(numbers["loss_after"]), format_bytes(size))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"made in {facts['time_s']:.0f} s; knowing nothing costs {facts['loss_uniform']:.4f} nats a token")
    console.print(f"they lie in [bold]{fixtures.root}[/bold]", style="green", highlight=False)


# ---------------------------------------------------------------------------------------------------------------- the cache


def _home() -> Path:
    if named := os.environ.get(DIRECTORY_VARIABLE):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_opt" / "fixtures"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "megatron-core", "nvidia-modelopt", "transformers", "tokenizers")}


def _key(recipe: Recipe) -> str:
    content = {"recipe": asdict(recipe), "versions": _versions(), "corpus": corpus_fingerprint()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _is_whole(fixtures: Fixtures, *, quiet: bool) -> bool:
    if not fixtures.root.is_dir():
        return False
    try:
        fixtures.verify()
    except _DAMAGED as error:
        if not quiet:
            print(f"fixtures are damaged and are made anew: {error}", file=sys.stderr)
        return False
    return True


@contextmanager
def _lock(root: Path, *, quiet: bool) -> Iterator[None]:
    """Held by the one process that builds `root`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f".{root.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                print("another process is making the fixtures: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_beside(root: Path, recipe: Recipe, devices: int, *, quiet: bool) -> None:
    """Makes the fixtures in a directory beside, and renames it; a damaged one is removed at the last moment."""
    if not quiet:
        print(f"making fixtures on {devices} rank(s): some 2 minutes, once", file=sys.stderr)
    for stale in root.parent.glob(f".{root.name}.part-*"):
        shutil.rmtree(stale)
    part = Path(tempfile.mkdtemp(prefix=f".{root.name}.part-", dir=root.parent))
    try:
        start = time.perf_counter()
        _write_text(Fixtures(part), recipe)
        results = run_ranks("nemo_opt.testing.fixtures:make", {"root": str(part), "recipe": recipe}, devices=devices)
        shutil.rmtree(part / _INDICES)
        _write_facts(Fixtures(part), recipe, results, time.perf_counter() - start)
        write_manifest(part, hash_files(part, list_files(part)))
        if root.exists():
            shutil.rmtree(root)
        part.rename(root)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_text(fixtures: Fixtures, recipe: Recipe) -> None:
    from nemo_opt.data.tokenizer import train_tokenizer

    documents = builtin_documents()
    fixtures.corpus.parent.mkdir()
    fixtures.corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    train_tokenizer(documents, recipe.teacher.vocab_size, fixtures.tokenizer)


def _write_facts(fixtures: Fixtures, recipe: Recipe, results: dict[str, Result], time_s: float) -> None:
    uniform = math.log(recipe.teacher.vocab_size)
    teacher = results["teacher"]
    assert isinstance(teacher, TrainResult)
    if teacher.loss_after is None or not teacher.loss_after <= uniform - MARGIN_NATS:
        raise NemoOptError(
            f"the teacher's validation loss {teacher.loss_after} is not {MARGIN_NATS} nats under {uniform:.4f}: train it longer"
        )
    facts = {
        "recipe": asdict(recipe),
        "versions": _versions(),
        "corpus": corpus_fingerprint(),
        "loss_uniform": uniform,
        "time_s": time_s,
        **{name: {k: v for k, v in result.to_dict().items() if k != "path"} for name, result in results.items()},
    }
    (fixtures.root / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------- in the ranks


def make(root: str, recipe: Recipe) -> dict[str, Result]:
    """Dataset, teacher, student and the Hugging Face directory, into `root`; called on every rank, all data parallel."""
    from nemo_opt.api import export_ckpt
    from nemo_opt.collective import on_first
    from nemo_opt.data.corpus import read_documents
    from nemo_opt.data.indexed import build_indexed
    from nemo_opt.data.tokenizer import load_tokenizer
    from nemo_opt.parallel import Topology, start_world

    fixtures = Fixtures(Path(root))
    dp = start_world()
    on_first(lambda: build_indexed(read_documents(fixtures.corpus), load_tokenizer(fixtures.tokenizer), fixtures.dataset))
    teacher = _train(fixtures, recipe, recipe.teacher, recipe.teacher_steps, fixtures.teacher, dp)
    student = _train(fixtures, recipe, recipe.student, recipe.student_steps, fixtures.student, dp)
    export_ckpt(checkpoint=str(fixtures.teacher), output=str(fixtures.teacher_hf), topology=Topology())
    return {"teacher": teacher, "student": student}


def _train(fixtures: Fixtures, recipe: Recipe, model: ModelConfig, steps: int, output: Path, dp: int) -> TrainResult:
    from nemo_opt.api import train
    from nemo_opt.data.config import DataConfig
    from nemo_opt.parallel import Topology
    from nemo_opt.training.config import TrainingConfig

    batch: dict[str, Any] = {
        "seq_length": recipe.seq_length,
        "micro_batch_size": max(recipe.global_batch_size // dp, 1),
        "global_batch_size": recipe.global_batch_size,
    }
    schedule: dict[str, Any] = {"max_steps": steps, "lr": recipe.lr, "min_lr": recipe.lr / 10, "warmup_steps": steps // 10}
    return train(
        output=str(output),
        model=model,
        tokenizer=str(fixtures.tokenizer),
        data=DataConfig(
            paths=[str(fixtures.dataset)], split=recipe.split, index_mapping_dir=str(fixtures.root / _INDICES), seed=recipe.seed, **batch
        ),
        training=TrainingConfig(limit_val_batches=8, seed=recipe.seed, **schedule, **batch),
        topology=Topology(),
        save_optimizer=False,
    )
