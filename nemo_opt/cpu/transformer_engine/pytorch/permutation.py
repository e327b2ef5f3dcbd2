"""Sorting tokens by the expert they go to, and back, with the signatures of Transformer Engine's fused kernels.

Only maps of type "mask", which Megatron-Core uses. The row map that `moe_permute` returns is opaque to callers: here it is [2, rows], the
token and the expert of each row.
"""

import torch

from nemo_opt.errors import ConfigError

__all__ = ["moe_permute", "moe_permute_with_probs", "moe_sort_chunks_by_index", "moe_sort_chunks_by_index_with_probs", "moe_unpermute"]


def _rows(routing_map: torch.Tensor, num_out_tokens: int | None) -> torch.Tensor:
    """[2, rows] (token, expert), by expert and then by token.

    Raises:
        ConfigError: the number of rows is not the announced one.
    """
    experts, tokens = routing_map.bool().t().nonzero(as_tuple=True)
    if num_out_tokens is not None and num_out_tokens > 0 and num_out_tokens != tokens.numel():
        raise ConfigError(f"The routing map has {tokens.numel()} entries but num_out_tokens={num_out_tokens}.")
    return torch.stack([tokens, experts])


def _require_mask(map_type: str) -> None:
    if map_type != "mask":
        raise ConfigError(f'map_type={map_type!r}: the CPU reference of Transformer Engine has only "mask".')


def moe_permute(
    inp: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int | None = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row for each (token, expert) pair, sorted by expert.

    Args:
        inp: [T, H].
        routing_map: [T, E], true where a token goes to an expert.
        num_out_tokens: number of rows, checked if positive.
        max_token_num: without effect.
        map_type: "mask".

    Returns:
        ([rows, H], the row map for `moe_unpermute`).
    """
    _require_mask(map_type)
    rows = _rows(routing_map, num_out_tokens)
    return inp.index_select(0, rows[0]), rows


def moe_permute_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int | None = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_permute`, and the probability of each row.

    Args:
        inp: [T, H].
        probs: [T, E].
        routing_map: [T, E].
        num_out_tokens: number of rows, checked if positive.

    Returns:
        ([rows, H], [rows] probabilities, the row map).
    """
    rows = _rows(routing_map, num_out_tokens)
    return inp.index_select(0, rows[0]), probs[rows[0], rows[1]], rows


def moe_unpermute(
    inp: torch.Tensor,
    row_id_map: torch.Tensor,
    merging_probs: torch.Tensor | None = None,
    restore_shape: torch.Size | tuple[int, int] | None = None,
    map_type: str = "mask",
    probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the rows of each token.

    Args:
        inp: [rows, H].
        row_id_map: what `moe_permute` returned.
        merging_probs: [T, E] factors of the rows.
        restore_shape: (T, H); that of `inp` if not given.
        map_type: "mask".
        probs: older name of `merging_probs`.

    Returns:
        [T, H] in the input's type; summed in float32 at least.
    """
    _require_mask(map_type)
    tokens, experts = row_id_map
    factors = merging_probs if merging_probs is not None else probs
    wide = inp.to(torch.promote_types(inp.dtype, torch.float32))
    if factors is not None:
        wide = wide * factors[tokens, experts].to(wide.dtype)[:, None]
    shape = inp.shape if restore_shape is None else tuple(restore_shape)
    return torch.zeros(shape, dtype=wide.dtype).index_add(0, tokens, wide).to(inp.dtype)


def _chunk_order(split_sizes: torch.Tensor, sorted_index: torch.Tensor) -> torch.Tensor:
    """[N] rows in the order of the sorted chunks."""
    sizes = split_sizes.tolist()
    chunks = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor) -> torch.Tensor:
    """The chunks of [N, H] (`split_sizes` rows each) in the order `sorted_index`."""
    return inp.index_select(0, _chunk_order(split_sizes, sorted_index))


def moe_sort_chunks_by_index_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`moe_sort_chunks_by_index` of [N, H] and of [N] probabilities."""
    order = _chunk_order(split_sizes, sorted_index)
    return inp.index_select(0, order), probs.index_select(0, order)
