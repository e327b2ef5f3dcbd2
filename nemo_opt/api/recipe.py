"""search_recipe(): which format each linear of a checkpoint should get under a budget of bits, as a recipe file that ptq() takes."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import nemo_opt._stack

from nemo_opt.api import checks
from nemo_opt.api._session import open_feed, session, world_size
from nemo_opt.api.results import RecipeResult
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.collective import on_first
from nemo_opt.data.config import DataConfig
from nemo_opt.models.build import Spec
from nemo_opt.parallel import Topology
from nemo_opt.quantize.auto import search_mixed_precision
from nemo_opt.quantize.config import QuantizationConfig
from nemo_opt.quantize.recipes import save_quant_cfg

__all__ = ["search_recipe"]


def search_recipe(
    *,
    checkpoint: str,
    output: str,
    effective_bits: float,
    candidates: list[QuantizationConfig],
    topology: Topology,
    data: DataConfig,
    tokenizer: str | None = None,
    samples: int = 128,
    spec: Spec | None = None,
    overwrite: bool = False,
) -> RecipeResult:
    """Searches mixed precision and writes the recipe; the checkpoint is only read. Collective.

    Args:
        checkpoint: The model, unquantised.
        output: File to write, .json, .yaml or .yml.
        effective_bits: Most bits a weight of the layers' linears, on average.
        candidates: Formats to choose from, with their block sizes.
        topology: The layout to search at, without pipeline stages; the recipe quantises at any.
        data: The text to calibrate and score on.
        tokenizer: Its directory; the checkpoint's own by default.
        samples: Samples to calibrate and score on, over all data parallel ranks.
        spec: Layer spec, "te" or "local"; the device's default when None.
        overwrite: Replace an existing file.

    Raises:
        NemoOptError: Bad settings, a damaged checkpoint, unsuitable data, or a budget that nothing meets.

    """
    settings: dict[str, Any] = {"data": data, "tokenizer": tokenizer, "samples": samples, "overwrite": overwrite}
    checks.check_search_recipe(
        checkpoint=checkpoint, output=output, candidates=candidates, topology=topology, world_size=world_size(), **settings
    )
    info = read_info(checkpoint)
    with session(topology, info.model) as job:
        chunks, _ = restore_model(checkpoint, job.topology, spec=spec)
        facts = job.facts(chunks)  # now: what a search leaves is no model any more
        feed = open_feed(data, checks.tokenizer_directory(info, tokenizer), train_samples=samples, eval_batches=0)
        batches = feed.some_train_batches(samples, data.micro_batch_size)
        found = search_mixed_precision(chunks, batches, effective_bits=effective_bits, candidates=candidates)
        on_first(lambda: save_quant_cfg(found.recipe, Path(output)))
        return RecipeResult(
            **facts | {"time_s": time.perf_counter() - job.started},
            path=output,
            effective_bits=found.effective_bits,
            budget_bits=effective_bits,
            formats=dict(Counter(found.formats.values())),
            format_of=found.formats,
        )
