"""Cuts a model to what stays, in place, on any layout.

Decisions:
- The smaller model is built by Megatron-Core itself from the changed configuration and then takes the old object's place: so every size
  that a module keeps beside its weights is right by construction, and the marks on parameters too; those added later are carried over.
- Weights travel one by one between the ranks that share a layer (tensor parallel, for experts expert parallel too): every rank cuts its
  piece and shows it to the others, each takes what its new piece needs. Layers stay on their pipeline stage. No rank sees a whole layer;
  the peak is the old and the new pieces of one rank together.
- Where a piece of a global weight lies is read from Megatron-Core's own sharding (`models.shards`), whose keys are the same for both specs.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nemo_opt._stack

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_opt.collective import on_each
from nemo_opt.device import local_device
from nemo_opt.errors import ConfigError
from nemo_opt.models.build import model_config_of, rebuilt
from nemo_opt.models.config import ModelConfig
from nemo_opt.models.shards import Shard, parameter_shards
from nemo_opt.prune.selection import Kept, KeptLayer, keep_layers
from nemo_opt.prune.stages import record_sizes

__all__ = ["check_weights", "slice_model"]

_LAYER_KEY = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_EXPERT_KEY = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def check_weights(gpt_model: Any) -> None:
    """Raise `ConfigError`, on every rank, if a weight of any rank is unknown to pruning or has an unexpected shape; collective."""
    on_each(lambda: _check_known(model_config_of(gpt_model), parameter_shards([gpt_model])))


@torch.no_grad()
def slice_model(gpt_model: Any, kept: Kept) -> None:
    """Cut an unwrapped GPTModel, this rank's only chunk, which `check_weights` accepts, to `kept`; collective.

    Its submodules and parameters are new objects afterwards. After an error it is what it was.
    """
    model = model_config_of(gpt_model)
    old_shards = parameter_shards([gpt_model])
    cuts = _Cuts(model, kept)
    stay = [index for index, layer in enumerate(gpt_model.decoder.layers) if layer.layer_number in kept.layers]
    with _restored_on_error(gpt_model.config):
        record_sizes(gpt_model.config, kept, model, layers_here=len(stay))
        new = rebuilt(gpt_model, stay)
        _carry_parameter_marks(gpt_model, new, stay)
        new_shards = parameter_shards([new])
        for of_experts, group in enumerate(
            (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_and_model_parallel_group())
        ):
            old, made = ([s for s in shards if bool(_EXPERT_KEY.match(s.key)) == bool(of_experts)] for shards in (old_shards, new_shards))
            _exchange(old, made, cuts, group)
    _take_over(gpt_model, new)


@contextmanager
def _restored_on_error(config: Any) -> Iterator[None]:
    settings = dict(vars(config))
    try:
        yield
    except BaseException:
        vars(config).update(settings)
        raise


class _Cuts:
    """For each key of the new model: the old key, and which indices of each of its dimensions stay."""

    def __init__(self, model: ModelConfig, kept: Kept) -> None:
        self._model, self._hidden = model, kept.hidden
        self._numbers = list(kept.layers)
        self._layers = list(kept.layers.values())

    def of(self, key: str, dims: int) -> tuple[str, list[Sequence[int]]]:
        """(old key, indices by dimension) of a new key."""
        if not (match := _LAYER_KEY.match(key)):
            return key, self._indices(key, None, dims)
        index = int(match[2])
        layer = self._layers[index]
        old_key = f"{match[1]}{self._numbers[index] - 1}{match[3]}"
        if expert := _EXPERT_KEY.match(old_key):
            assert layer.experts is not None
            old_key = f"{expert[1]}{layer.experts[int(expert[2])]}{expert[3]}"
        return old_key, self._indices(old_key, layer, dims)

    def _indices(self, old_key: str, layer: KeptLayer | None, dims: int) -> list[Sequence[int]]:
        """Of rows and columns; a bias or a norm has rows only."""
        rows, columns = self._outside_layers(old_key) if layer is None else self._in_layer(old_key, layer)
        return [rows, columns][:dims]

    def _outside_layers(self, key: str) -> tuple[Sequence[int], Sequence[int]]:
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return range(self._model.padded_vocab_size), self._hidden
        if key.startswith("decoder.final_layernorm."):
            return self._hidden, ()
        raise self._unknown(key)

    def _in_layer(self, key: str, layer: KeptLayer) -> tuple[Sequence[int], Sequence[int]]:
        expert = _EXPERT_KEY.match(key)
        ffn = layer.ffn[int(expert[2]) if expert else 0]
        *modules, name = key.split(".")[3:]
        path = ".".join(part for part in modules if not part.isdigit())
        if name.startswith("layer_norm_") or path in ("input_layernorm", "pre_mlp_layernorm"):
            return self._hidden, ()
        match path:
            case "self_attention.linear_qkv":
                return self._qkv_rows(layer), self._hidden
            case "self_attention.linear_proj":
                return self._hidden, _spread(layer.heads, self._model.head_dim)
            case "self_attention.q_layernorm" | "self_attention.k_layernorm":
                return range(self._model.head_dim), ()
            case "mlp.linear_fc1" | "mlp.experts.experts.linear_fc1":
                return ffn, self._hidden
            case "mlp.linear_fc2" | "mlp.experts.experts.linear_fc2":
                return self._hidden, ffn
            case "mlp.router":
                return layer.experts or (), self._hidden
        raise self._unknown(key)

    def _unknown(self, key: str) -> ConfigError:
        return ConfigError(
            f"{key} is no weight that pruning knows (attention, MLP, experts, norms, embeddings): this model cannot be pruned"
        )

    def _qkv_rows(self, layer: KeptLayer) -> list[int]:
        """Group by group: its query heads, its key, its value."""
        per_group = self._model.num_attention_heads // self._model.num_query_groups
        slots = [head // per_group * (per_group + 2) + head % per_group for head in layer.heads]
        slots += [group * (per_group + 2) + per_group + part for group in layer.groups for part in (0, 1)]
        return _spread(sorted(slots), self._model.head_dim)


def _check_known(model: ModelConfig, shards: list[Shard]) -> None:
    """Raise `ConfigError` if the rules of `_Cuts` do not describe one of the model's weights."""
    whole = _Cuts(model, keep_layers(model, ()))
    for shard in shards:
        expected = tuple(len(indices) for indices in whole.of(shard.key, len(shard.global_shape))[1])
        if expected != shard.global_shape:
            raise ConfigError(f"{shard.key} has the shape {shard.global_shape}, pruning expects {expected}: this model cannot be pruned")


def _spread(blocks: Sequence[int], size: int) -> list[int]:
    """The elements of blocks of `size`."""
    return [block * size + element for block in blocks for element in range(size)]


@dataclass(frozen=True)
class _Piece:
    """What one rank holds of an old weight."""

    owner: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def _exchange(old: list[Shard], new: list[Shard], cuts: _Cuts, group: Any) -> None:
    """Fill the new shards from the old ones of all ranks of `group`, key by key."""
    everyone: list[Any] = [None] * group.size()
    mine = ([(s.key, s.offset, tuple(s.tensor.shape), s.tensor.dtype) for s in old], [(s.key, len(s.global_shape)) for s in new])
    dist.all_gather_object(everyone, mine, group=group)
    pieces: dict[str, dict[tuple[int, ...], _Piece]] = {}
    for owner, (held, _) in enumerate(everyone):
        for key, offset, shape, dtype in held:
            pieces.setdefault(key, {}).setdefault(offset, _Piece(owner, offset, shape, dtype))
    held_here = {(shard.key, shard.offset): shard.tensor for shard in old}
    wanted_here: dict[str, list[Shard]] = {}
    for shard in new:
        wanted_here.setdefault(shard.key, []).append(shard)
    for key, dims in sorted({entry for _, wanted in everyone for entry in wanted}):
        old_key, indices = cuts.of(key, dims)
        for piece in pieces[old_key].values():
            _pass_on(piece, held_here.get((old_key, piece.offset)), indices, wanted_here.get(key, []), group)


def _pass_on(piece: _Piece, tensor: torch.Tensor | None, indices: list[Sequence[int]], wanted: list[Shard], group: Any) -> None:
    """Cut one old piece where it lies, show the result to the group, and copy from it what this rank's new shards need."""
    spans = [
        slice(bisect_left(kept, start), bisect_left(kept, start + size))
        for kept, start, size in zip(indices, piece.offset, piece.shape, strict=True)
    ]
    shape = [span.stop - span.start for span in spans]
    if 0 in shape:
        return
    if piece.owner == group.rank():
        assert tensor is not None
        cut = tensor
        for dim, (kept, span, start) in enumerate(zip(indices, spans, piece.offset, strict=True)):
            if len(kept[span]) < cut.shape[dim]:
                cut = cut.index_select(dim, torch.tensor([index - start for index in kept[span]], device=tensor.device))
        cut = cut.contiguous()
    else:
        cut = torch.empty(shape, dtype=piece.dtype, device=_device(wanted, tensor))
    if group.size() > 1:
        dist.broadcast(cut, group=group, group_src=piece.owner)
    for shard in wanted:
        _copy_overlap(cut, [span.start for span in spans], shard)


def _device(wanted: list[Shard], tensor: torch.Tensor | None) -> torch.device:
    return wanted[0].tensor.device if wanted else local_device() if tensor is None else tensor.device


def _copy_overlap(cut: torch.Tensor, offset: list[int], shard: Shard) -> None:
    ranges = [
        (max(start, own), min(start + size, own + own_size))
        for start, size, own, own_size in zip(offset, cut.shape, shard.offset, shard.tensor.shape, strict=True)
    ]
    if any(start >= stop for start, stop in ranges):
        return
    into = tuple(slice(start - own, stop - own) for (start, stop), own in zip(ranges, shard.offset, strict=True))
    out_of = tuple(slice(start - first, stop - first) for (start, stop), first in zip(ranges, offset, strict=True))
    shard.tensor[into] = cut[out_of]


def _carry_parameter_marks(old: Any, new: Any, stay: list[int]) -> None:
    """dtype, requires_grad and plain attributes of the old parameters; Megatron-Core's own marks the new ones have from their modules."""
    sources = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        match = _LAYER_KEY.match(name)
        source = sources[f"{match[1]}{stay[int(match[2])]}{match[3]}" if match else name]
        parameter.data = parameter.data.to(source.dtype)
        parameter.requires_grad_(source.requires_grad)
        vars(parameter).update({key: value for key, value in vars(source).items() if isinstance(value, bool | int | float | str)})


def _take_over(gpt_model: Any, new: Any) -> None:
    """Give the old object the new one's modules and attributes; hooks that were registered on it stay."""
    new.train(gpt_model.training)
    vars(gpt_model).update({name: value for name, value in vars(new).items() if "hooks" not in name})
