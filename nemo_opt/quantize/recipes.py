"""From a `QuantizationConfig` to the configuration that ModelOpt takes: by NeMo's name, by ModelOpt's name, or from a file.

Decisions:
- Every configuration handed out is a copy: ModelOpt's are module-level dicts, which NeMo changes in place, so that one Quantizer alters the
  next one's.
- NeMo's rule for the KV cache is kept: beside one of its named algorithms, `enable_kv_cache=None` quantises the cache unless the algorithm
  is an int8 one or the decoder type is "gpt". A recipe from a file, or under ModelOpt's name, says itself what it quantises.
- Entries that name a layer by number count over all pipeline stages (ModelOpt matches the names of each stage, which begin at 0).
- `awq_block_size` holds for plain int4 too, `sq_alpha` for int8_sq: NeMo reads the second nowhere.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_opt._stack

import modelopt.torch.quantization as mtq
import yaml
from modelopt.torch.quantization.config import QuantizeConfig, normalize_quant_cfg_list
from pydantic import ValidationError

from nemo_opt.errors import ConfigError
from nemo_opt.quantize.blocks import weight_cfgs
from nemo_opt.quantize.config import ALGORITHMS, QuantizationConfig, is_recipe_file

__all__ = ["get_quant_cfg_choices", "kv_format", "load_quant_cfg", "localized", "needs_data", "quant_cfg_of", "save_quant_cfg"]

_UPSTREAM_NAMES = {
    "block_fp8": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}
_KV_NAMES = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
_PAIRS = ("num_bits", "scale_bits")
_INT4_BLOCKS = ("int4", "int4_awq", "w4a8_awq")
_LAYER = re.compile(r"layers\.(\d+)\.")
_COARSE_SEARCH = ("gemma", "mpt")

assert set(_UPSTREAM_NAMES) == set(ALGORITHMS)


def get_quant_cfg_choices() -> dict[str, dict[str, Any]]:
    """ModelOpt's configuration of each of `ALGORITHMS`, as fresh copies."""
    return {name: copy.deepcopy(getattr(mtq, upstream)) for name, upstream in _UPSTREAM_NAMES.items()}


def load_quant_cfg(path: str | Path) -> dict[str, Any]:
    """A ModelOpt configuration from a JSON or YAML file; equal to the one it was written from.

    Args:
        path: written by `save_quant_cfg`, by `json.dump` of a ModelOpt configuration (as NeMo's are), or by hand.

    Raises:
        ConfigError: naming the file and what ModelOpt says of it.

    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no recipe: {error}") from None
    if not isinstance(values, dict) or "quant_cfg" not in values:
        raise ConfigError(f"{path} is no recipe: it must map quant_cfg to a list of quantizers, and algorithm to a calibration method")
    return _checked(str(path), _from_json(values))


def save_quant_cfg(quant_cfg: dict[str, Any], path: str | Path) -> None:
    """Writes a ModelOpt configuration, as YAML if the name ends so, else as JSON; `load_quant_cfg` reads it back equal."""
    path = Path(path)
    plain = json.loads(json.dumps(quant_cfg))
    path.write_text(json.dumps(plain, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(plain, sort_keys=False), "utf-8")


def quant_cfg_of(config: QuantizationConfig) -> dict[str, Any] | None:
    """What `mtq.quantize` takes, for all settings together; None if nothing is quantised.

    Raises:
        ConfigError: ModelOpt has no configuration of that name, or the file is none.

    """
    if config.algorithm is None:
        return None
    quant_cfg = _named(config)
    if config.weight_only:
        quant_cfg["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    if (kv := kv_format(config)) is not None:
        quant_cfg["quant_cfg"] += copy.deepcopy(getattr(mtq, _KV_NAMES[kv])["quant_cfg"])
        quant_cfg["algorithm"] = quant_cfg["algorithm"] or "max"  # MX formats need no calibration, the cache does
    return quant_cfg


def kv_format(config: QuantizationConfig) -> str | None:
    """Format of the KV cache by NeMo's rule, or None; see the module's decisions."""
    if config.enable_kv_cache is not None:
        beside_int8 = "int8" in str(config.algorithm) and config.kv_cache_qformat is None
        return (config.kv_cache_qformat or "fp8") if config.enable_kv_cache and not beside_int8 else None
    automatic = config.algorithm in ALGORITHMS and "int8" not in config.algorithm and config.decoder_type != "gpt"
    return (config.kv_cache_qformat or "fp8") if automatic else None


def needs_data(quant_cfg: dict[str, Any]) -> bool:
    """Whether any activation must be seen; ModelOpt's `need_calibration` overlooks entries that switch a quantizer off again."""
    if quant_cfg["algorithm"] not in (None, "max"):
        return True
    last: dict[str, dict[str, Any]] = {}
    for entry in quant_cfg["quant_cfg"]:
        if entry["quantizer_name"] == "*" and "parent_class" not in entry:
            last.clear()
        last[entry["quantizer_name"]] = entry
    return any(_sees_data(entry) for name, entry in last.items() if "weight_quantizer" not in name and entry.get("enable", True))


def localized(quant_cfg: dict[str, Any], global_numbers: Sequence[int]) -> dict[str, Any]:
    """A configuration whose entries name layers over all pipeline stages, for a stage that counts its own from 0.

    Args:
        quant_cfg: a ModelOpt configuration; entries without a layer number stay as they are.
        global_numbers: of this stage's layers, from 0, in order.

    """
    entries = []
    for entry in quant_cfg["quant_cfg"]:
        match = _LAYER.search(entry["quantizer_name"])
        if match is None:
            entries.append(entry)
        elif int(match[1]) in global_numbers:
            local = f"layers.{list(global_numbers).index(int(match[1]))}."
            entries.append(entry | {"quantizer_name": _LAYER.sub(local, entry["quantizer_name"])})
    return quant_cfg | {"quant_cfg": entries}


def _sees_data(entry: dict[str, Any]) -> bool:
    cfgs = entry.get("cfg") or {}
    return any(not _is_mx(cfg) and cfg.get("type") != "dynamic" for cfg in (cfgs if isinstance(cfgs, list) else [cfgs]))


def _is_mx(cfg: dict[str, Any]) -> bool:
    """Formats whose block scales come from the data of each call alone."""
    sizes = cfg.get("block_sizes") or {}
    return sizes.get("type") == "dynamic" and sizes.get("scale_bits") == (8, 0)


def _named(config: QuantizationConfig) -> dict[str, Any]:
    name = str(config.algorithm)
    if is_recipe_file(name):
        return load_quant_cfg(name)
    if name not in _UPSTREAM_NAMES:
        return _upstream(name)
    quant_cfg = get_quant_cfg_choices()[name]
    for cfg in weight_cfgs(quant_cfg):
        if name == "block_fp8":
            cfg["block_sizes"] = {-1: config.fp8_block_shape[1], -2: config.fp8_block_shape[0]}
        elif name in _INT4_BLOCKS and "block_sizes" in cfg:
            cfg["block_sizes"][-1] = config.awq_block_size
    if name == "int8_sq":
        quant_cfg["algorithm"] = {"method": "smoothquant", "alpha": config.sq_alpha}
    if name == "w4a8_awq" and config.decoder_type in _COARSE_SEARCH:
        quant_cfg["algorithm"] = {"method": "awq_lite", "alpha_step": 1}  # NeMo's setting for these decoders
    return quant_cfg


def _upstream(name: str) -> dict[str, Any]:
    found = getattr(mtq, name, None) if name.endswith("_CFG") else None
    if not isinstance(found, dict) or "algorithm" not in found:
        known = sorted(n for n in dir(mtq) if n.endswith("_CFG") and "algorithm" in getattr(mtq, n))
        raise ConfigError(f"ModelOpt has no configuration {name!r}; it has {known}")
    return _checked(name, copy.deepcopy(found))


def _checked(origin: str, quant_cfg: dict[str, Any]) -> dict[str, Any]:
    try:
        quant_cfg["quant_cfg"] = [_plain(entry) for entry in normalize_quant_cfg_list(quant_cfg["quant_cfg"])]
        QuantizeConfig(**copy.deepcopy(quant_cfg))
    except (ValidationError, ValueError, TypeError) as error:
        raise ConfigError(f"{origin} is no recipe that ModelOpt accepts: {error}") from None
    return quant_cfg


def _plain(entry: Any) -> dict[str, Any]:
    return dict(entry) if isinstance(entry, dict) else dict(entry.model_dump(exclude_unset=True))


def _from_json(value: Any, key: str = "") -> Any:
    """JSON has no tuples and no integer keys: pairs of bits and dims of blocks get theirs back."""
    if isinstance(value, dict):
        return {_dim(k): _from_json(v, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        items = [_from_json(v) for v in value]
        return tuple(items) if key in _PAIRS else items
    return value


def _dim(key: Any) -> Any:
    text = str(key)
    return int(text) if text.lstrip("-").isdigit() else key
