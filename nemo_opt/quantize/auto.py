"""Mixed precision to a bit budget: which format each linear gets, as a recipe that the Quantizer takes at any layout.

Method: `modelopt.torch.quantization.auto_quantize` with gradient scores: a format's score in a layer is the squared change of the layer's
output times the loss's gradient there, summed over samples (a diagonal Fisher estimate of the loss it costs); formats are then chosen by
integer programming under the budget.

Upstream's choice is not taken: it adds up the scores of tensor-parallel ranks, so that those of row-parallel linears, whose output every
rank holds, weigh tp times as much, and it accepts a choice near the best. The program is solved again, exactly, over scores put right.

Decisions: the search runs without pipeline stages (upstream's restriction) and only over formats calibrated by maxima, since one recipe has
one calibration method. The model that was searched is left quantised by upstream in a state of its own and should be thrown away: the
recipe is the result, and quantising with it is an ordinary PTQ run.
"""

import copy
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from modelopt.torch.quantization import algorithms
from modelopt.torch.quantization.algorithms import QuantRecipe, get_auto_quantize_config
from scipy.optimize import Bounds, LinearConstraint, milp

from nemo_opt.errors import ConfigError
from nemo_opt.models.build import unwrap
from nemo_opt.models.sizes import model_config_of
from nemo_opt.quantize.blocks import check_recipe_blocks
from nemo_opt.quantize.config import SEARCHABLE, QuantizationConfig
from nemo_opt.quantize.recipes import quant_cfg_of
from nemo_opt.training.forward import Batch

__all__ = ["MixedPrecision", "search_mixed_precision"]

_FULL_BITS = 16  # as upstream counts an unquantised weight
_UNQUANTISED = ["*output_layer*"]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What a search found."""

    recipe: dict[str, Any]
    """A ModelOpt configuration; `recipes.save_quant_cfg` writes it."""
    effective_bits: float
    """Bits of a weight of the layers' linears on average, as ModelOpt counts them (block scales are left out)."""
    formats: dict[str, str]
    """Name of each linear -> the algorithm it got, or "none"."""
    scores: dict[str, dict[str, float]]
    """Name of each linear -> algorithm -> what upstream estimates that it costs."""


def search_mixed_precision(
    chunks: Sequence[Any], batches: Iterable[Batch], *, effective_bits: float, candidates: Sequence[QuantizationConfig]
) -> MixedPrecision:
    """Searches the best format of each linear under a budget. Collective; the model is not fit for use afterwards.

    Args:
        chunks: this rank's GPTModel, unquantised, in a list; any layout without pipeline stages.
        batches: this data parallel rank's samples with labels, for calibration and for scores.
        effective_bits: most bits a weight on average, over the linears of the layers.
        candidates: the formats to choose from; leaving a linear as it is is always a choice.

    Raises:
        ConfigError: pipeline stages, a candidate that is calibrated otherwise than by maxima, or a budget that none meets.

    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise ConfigError("the search for mixed precision needs pp 1; its recipe then quantises at any layout")
    _check_candidates(candidates)
    formats = {str(config.algorithm): _format(config) for config in candidates}
    model = unwrap(chunks[0])
    for quant_cfg in formats.values():
        check_recipe_blocks(quant_cfg, model_config_of(chunks), tp=parallel_state.get_tensor_model_parallel_world_size())
    _check_budget(effective_bits, formats)
    kept = list(batches)
    with _progress_on_terminals_only():
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": effective_bits, "cost": {"excluded_module_name_patterns": _UNQUANTISED}},
            quantization_formats=list(formats.values()),
            data_loader=kept,
            forward_step=_losses,
            loss_func=_mean_loss,
            disabled_layers=_UNQUANTISED,
            num_calib_steps=len(kept),
            num_score_steps=len(kept),
        )
    choices = {name: _scored(model, stats) for name, stats in state["candidate_stats"].items()}
    chosen = {name: choices[name][index] for name, index in _solve(choices, effective_bits).items()}
    state["best"]["recipe"] = {name: choice.recipe for name, choice in chosen.items()}
    recipe = get_auto_quantize_config(state)
    recipe["algorithm"] = "max"
    modules = {module: name for name in sorted(choices) for module in state["candidate_stats"][name]["module_names"]}
    return MixedPrecision(
        recipe=_plain(recipe),
        effective_bits=_bits(chosen.values(), choices.values()),
        formats={module: _label(chosen[name].recipe, formats) for module, name in modules.items() if not _is_head(module)},
        scores={
            module: {_label(choice.recipe, formats): choice.score for choice in choices[name]}
            for module, name in modules.items()
            if not _is_head(module)
        },
    )


@dataclass(frozen=True)
class _Choice:
    recipe: QuantRecipe
    score: float
    cost: float


def _scored(model: torch.nn.Module, stats: dict[str, Any]) -> list[_Choice]:
    """Upstream's candidates with the score of one model: it adds up the ranks', of which row-parallel ones each hold the whole output."""
    modules = [model.get_submodule(module) for module in stats["module_names"]]
    copies = parallel_state.get_tensor_model_parallel_world_size() if getattr(modules[0], "_is_row_parallel", False) else 1
    return [
        _Choice(*values) for values in zip(stats["formats"], (score / copies for score in stats["scores"]), stats["costs"], strict=True)
    ]


def _solve(choices: dict[str, list[_Choice]], effective_bits: float) -> dict[str, int]:
    """Index of one choice for each linear, so that the sum of scores is least and the budget is kept; the same on every rank."""
    flat = [(name, index, choice) for name, options in sorted(choices.items()) for index, choice in enumerate(options)]
    names = sorted(choices)
    pick_one = np.array([[float(owner == name) for owner, *_ in flat] for name in names])
    costs = np.array([choice.cost for *_, choice in flat])
    scores = np.array([choice.score for *_, choice in flat])
    budget = _whole(choices.values()) * effective_bits / _FULL_BITS
    result = milp(
        scores / (scores.max() or 1.0),  # gradients are tiny: the solver's tolerances are absolute
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(pick_one, 1, 1), LinearConstraint(costs[None], 0, budget * (1 + 1e-9))],
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise ConfigError(f"no choice of formats meets {effective_bits} bits a weight: raise the budget or add a smaller format")
    picked = [{name: index for (name, index, _), value in zip(flat, result.x, strict=True) if value > 0.5}]
    dist.broadcast_object_list(picked, src=0)
    return picked[0]


def _bits(chosen: Iterable[_Choice], choices: Iterable[list[_Choice]]) -> float:
    return sum(choice.cost for choice in chosen) / _whole(choices) * _FULL_BITS


def _whole(choices: Iterable[list[_Choice]]) -> float:
    """Cost of the model as it is."""
    return sum(max(choice.cost for choice in options) for options in choices)


def _is_head(module: str) -> bool:
    return module.endswith("output_layer")


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Upstream shows its bars on every rank and in every log."""
    original = algorithms.tqdm
    algorithms.tqdm = partial(original, disable=dist.get_rank() != 0 or not sys.stderr.isatty())
    try:
        yield
    finally:
        algorithms.tqdm = original


def _check_candidates(candidates: Sequence[QuantizationConfig]) -> None:
    if not candidates:
        raise ConfigError(f"a search needs candidates: name some of {list(SEARCHABLE)}")
    for config in candidates:
        if config.algorithm not in SEARCHABLE:
            raise ConfigError(f"candidate {config.algorithm!r} is not calibrated by maxima alone: choose among {list(SEARCHABLE)}")


def _check_budget(effective_bits: float, formats: dict[str, dict[str, Any]]) -> None:
    bits = {name: QuantRecipe(copy.deepcopy(quant_cfg), name=name).compression * 16 for name, quant_cfg in formats.items()}
    if not min(bits.values()) <= effective_bits <= 16:
        raise ConfigError(
            f"effective_bits {effective_bits} must lie between the smallest candidate ({min(bits.values())} of {bits}) and 16: "
            "change the budget or the candidates"
        )


def _format(config: QuantizationConfig) -> dict[str, Any]:
    quant_cfg = quant_cfg_of(config)
    assert quant_cfg is not None
    entries = [entry for entry in quant_cfg["quant_cfg"] if "bmm_quantizer" not in entry["quantizer_name"]]
    return {"quant_cfg": entries, "algorithm": "max"}


def _losses(model: Any, batch: Batch) -> torch.Tensor:
    return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])  # type: ignore[no-any-return]


def _mean_loss(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = batch.get("loss_mask")
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum().clamp(min=1)


def _label(choice: QuantRecipe, formats: dict[str, dict[str, Any]]) -> str:
    """The algorithm that upstream's choice stands for: it names formats itself."""
    return next((name for name, quant_cfg in formats.items() if choice == QuantRecipe(copy.deepcopy(quant_cfg), name=name)), "none")


def _plain(value: Any) -> Any:
    """Without upstream's own types, so that the recipe can be written and compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return copy.deepcopy(value)
