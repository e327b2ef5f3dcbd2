"""prune(): from a checkpoint to a smaller one, with the validation loss before and after on the same batches, and a report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks
from nemo_opt.api._session import Feed, count_parameters, open_feed, session, world_size
from nemo_opt.api.results import PruneResult
from nemo_opt.checkpoint.info import CheckpointInfo, read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig
from nemo_opt.models.build import Spec, model_config_of
from nemo_opt.parallel import Topology
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores, measure_importance
from nemo_opt.prune.pruner import prune_language_model, save_pruned_model
from nemo_opt.prune.report import write_report
from nemo_opt.prune.search import SearchResult, search_architecture
from nemo_opt.prune.selection import Kept, keep_layers, select
from nemo_opt.training.forward import forward_loop

__all__ = ["prune"]


def prune(
    *,
    checkpoint: str,
    output: str,
    pruning: PruningConfig,
    topology: Topology,
    data: DataConfig | None = None,
    tokenizer: str | None = None,
    num_train_samples: int = 1024,
    scores: str | None = None,
    save_scores: str | None = None,
    report: str | None = None,
    eval_batches: int = 8,
    spec: Spec | None = None,
    overwrite: bool = False,
) -> PruneResult:
    """Prunes a checkpoint by importance, to target sizes or under limits of size, or drops layers by number. Collective.

    Args:
        checkpoint: The model.
        output: Directory to write.
        pruning: Target sizes, limits of a search, or layers to drop.
        topology: The layout.
        data: The text to measure importance and losses on; may be None with `scores`, or where layers are dropped by number.
        tokenizer: Its directory; the checkpoint's own by default.
        num_train_samples: Samples to measure importance on.
        scores: File of importance that was measured before, at any layout: nothing is measured then.
        save_scores: File to save importance to.
        report: HTML file to write: importance, what was kept, sizes and losses.
        eval_batches: Validation micro-batches for the losses; 0 measures none. A search scores its candidates on them.
        spec: Layer spec, "te" or "local"; the device's default when None.
        overwrite: Replace an existing output.

    Raises:
        NemoOptError: Bad settings, a damaged checkpoint or unsuitable data.

    """
    settings: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "eval_batches": eval_batches, "overwrite": overwrite}
    settings |= {"scores": scores, "save_scores": save_scores, "report": report, "num_train_samples": num_train_samples}
    checks.check_prune(checkpoint=checkpoint, output=output, pruning=pruning, topology=topology, world_size=world_size(), **settings)
    info = read_info(checkpoint)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(checkpoint, job.topology, spec=spec)
        parameters_before = count_parameters(chunks)
        feed = None if data is None else _open(data, info, tokenizer, num_train_samples, eval_batches)
        loss_before = feed.loss(chunks) if feed is not None else None
        importance = None if pruning.drop_layers is not None else _importance(chunks, scores, feed, num_train_samples)
        found, kept = _prune(chunks, pruning, importance, feed, save_scores)
        loss_after = feed.loss(chunks) if feed is not None else None
        save_pruned_model(chunks, output, topology=job.topology, tokenizer_dir=tokenizer or info.tokenizer_dir, overwrite=overwrite)
        result = PruneResult(
            **job.facts(chunks),
            path=output,
            loss_before=loss_before,
            loss_after=loss_after,
            parameters_before=parameters_before,
            model_before=info.model.to_dict(),
            model_after=model_config_of(chunks).to_dict(),
            kept_layers=list(kept.layers),
            importance_tokens=importance.tokens if importance is not None else None,
            search=_search_facts(pruning, found) if found is not None else None,
        )
        if report is not None:
            on_first(lambda: write_report(Path(report), result.to_dict(), kept, importance))
        return result


def _open(data: DataConfig, info: CheckpointInfo, tokenizer: str | None, samples: int, eval_batches: int) -> Feed:
    return open_feed(data, checks.tokenizer_directory(info, tokenizer), train_samples=samples, eval_batches=eval_batches)


def _importance(chunks: list[Any], scores: str | None, feed: Feed | None, samples: int) -> ImportanceScores:
    """Saved importance, or else measured on training samples."""
    if scores is not None:
        return ImportanceScores.load(scores, model=model_config_of(chunks))
    assert feed is not None, "checked: data or scores"
    batches = feed.some_train_batches(samples, feed.config.micro_batch_size)
    return measure_importance(chunks, forward_loop(batches, description="measuring importance"))


def _prune(
    chunks: list[Any], pruning: PruningConfig, importance: ImportanceScores | None, feed: Feed | None, save_scores: str | None
) -> tuple[SearchResult | None, Kept]:
    """Prunes in place; returns what a search has found, and what stayed."""
    if pruning.drop_layers is not None:
        kept = keep_layers(model_config_of(chunks), pruning.drop_layers)
        prune_language_model(chunks, pruning)
        return None, kept
    assert importance is not None
    found = None
    if pruning.limits:
        assert feed is not None, "checked: a search has validation batches"
        found = search_architecture(chunks, pruning, importance, lambda model: -_loss(feed, model))
        targets: dict[str, Any] = {f"target_{name}": size for name, size in found.best.sizes.items()}
        pruning = PruningConfig(**targets)
    prune_language_model(chunks, pruning, scores=importance, save_scores=save_scores)
    return found, select(importance, pruning.targets)


def _loss(feed: Feed, model: list[Any]) -> float:
    loss = feed.loss(model)
    assert loss is not None
    return loss


def _search_facts(pruning: PruningConfig, found: SearchResult) -> dict[str, Any]:
    return {"limits": pruning.limits, **asdict(found)}
