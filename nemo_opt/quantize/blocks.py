"""Whether the blocks of a recipe fit the model, decided before anything is loaded.

ModelOpt pads a row that does not divide into blocks, so a block that straddles tensor-parallel ranks gets one scale on one rank and two on
another: the result depends on the layout, and exports cannot express it. Such recipes are refused here, naming the size that fits.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig
from nemo_opt.quantize.config import QuantizationConfig

__all__ = ["check_blocks", "check_recipe_blocks", "fitting_blocks", "weight_cfgs"]

_INT4 = ("int4", "int4_awq", "w4a8_awq")
_FIXED = {"nvfp4": 16, "mxfp8": 32}


def check_blocks(config: QuantizationConfig, model: ModelConfig, *, tp: int) -> None:
    """Refuses a named algorithm whose blocks do not divide the weights of each tensor-parallel rank; loads no torch.

    Raises:
        ConfigError: naming the block, the linear, its size, and the setting that fits.

    """
    if config.algorithm == "block_fp8":
        rows, columns = config.fp8_block_shape
        _check(rows, _rows(model, tp), "output rows", tp, "set the rows of fp8_block_shape to {} or a divisor of it")
        _check(columns, _inputs(model, tp), "inputs", tp, "set the columns of fp8_block_shape to {} or a divisor of it")
    elif config.algorithm in _INT4:
        _check(config.awq_block_size, _inputs(model, tp), "inputs", tp, "set awq_block_size to {} or a divisor of it")
    elif config.algorithm in _FIXED:
        _check(_FIXED[config.algorithm], _inputs(model, tp), "inputs", tp, "{} would fit; use a smaller tp or another algorithm")


def check_recipe_blocks(quant_cfg: dict[str, Any], model: ModelConfig, *, tp: int) -> None:
    """The same for any ModelOpt configuration.

    Raises:
        ConfigError: as `check_blocks`.

    """
    for cfg in weight_cfgs(quant_cfg):
        sizes = cfg.get("block_sizes") or {}
        for dim, lengths, what in ((-1, _inputs(model, tp), "inputs"), (-2, _rows(model, tp), "output rows")):
            if isinstance(sizes.get(dim), int):
                _check(sizes[dim], lengths, what, tp, "{} would fit; change the recipe's block_sizes or use a smaller tp")


def fitting_blocks(config: QuantizationConfig, model: ModelConfig, *, tp: int) -> QuantizationConfig:
    """The configuration with its block sizes reduced to the largest that fit the model: what a sweep over algorithms uses."""
    inputs, rows = math.gcd(*_inputs(model, tp).values()), math.gcd(*_rows(model, tp).values())
    return replace(
        config,
        awq_block_size=math.gcd(config.awq_block_size, inputs),
        fp8_block_shape=(math.gcd(config.fp8_block_shape[0], rows), math.gcd(config.fp8_block_shape[1], inputs)),
    )


def weight_cfgs(quant_cfg: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The attributes that any enabled weight quantizer of a ModelOpt configuration may get."""
    for entry in quant_cfg["quant_cfg"]:
        if entry["quantizer_name"].endswith("weight_quantizer") and entry.get("enable", True):
            cfg = entry.get("cfg") or {}
            yield from cfg if isinstance(cfg, list) else [cfg]


def _check(block: int, lengths: dict[str, int], what: str, tp: int, remedy: str) -> None:
    for linear, length in lengths.items():
        if length % block:
            fits = math.gcd(block, *lengths.values())
            raise ConfigError(f"blocks of {block} do not divide the {length} {what} of {linear} at tp {tp}: {remedy.format(fits)}")


def _inputs(model: ModelConfig, tp: int) -> dict[str, int]:
    """Columns of each quantised linear on one rank."""
    return {
        "linear_qkv": model.hidden_size,
        "linear_proj": model.num_attention_heads * model.head_dim // tp,
        "linear_fc1": model.hidden_size,
        "linear_fc2": model.ffn_hidden_size // tp,
    }


def _rows(model: ModelConfig, tp: int) -> dict[str, int]:
    """Rows that one block may not leave: of a head, since heads of query, key and value alternate; of the gate or the up half."""
    return {
        "a head of linear_qkv": model.head_dim,
        "linear_proj": model.hidden_size,
        "half of linear_fc1": model.ffn_hidden_size // tp,
        "linear_fc2": model.hidden_size,
    }
