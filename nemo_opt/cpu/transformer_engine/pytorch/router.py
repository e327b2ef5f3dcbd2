"""The arithmetic of a mixture-of-experts router, with the signatures of Transformer Engine's fused kernels; in float32 as they do it."""

import torch

from nemo_opt.errors import ConfigError

__all__ = ["fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function"]

_EPSILON = 1e-20  # keeps the normalisation of sigmoid scores finite; Megatron-Core's value


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_function(name: str) -> None:
    if name not in ("softmax", "sigmoid"):
        raise ConfigError(f'score_function={name!r}: the CPU reference announces a version that has only "softmax" and "sigmoid".')


def _normalised(scores: torch.Tensor) -> torch.Tensor:
    return scores / (scores.sum(-1, keepdim=True) + _EPSILON)


def _top_experts(scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None) -> torch.Tensor:
    """[T, topk] the experts with the highest scores, within the best groups if there are groups."""
    if not group_topk:
        return scores.topk(topk, dim=-1).indices
    if not num_groups or scores.shape[-1] % num_groups or topk % group_topk:
        raise ConfigError(f"{scores.shape[-1]} experts, num_groups={num_groups}, group_topk={group_topk} and topk={topk} do not divide.")
    grouped = scores.reshape(scores.shape[0], num_groups, -1)
    group_scores = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, group_scores.topk(group_topk, dim=-1).indices, True)
    return grouped.masked_fill(~chosen[..., None], float("-inf")).flatten(1).topk(topk, dim=-1).indices


def fused_topk_with_score_function(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts for each token.

    Args:
        logits: [T, E].
        topk: experts for each token.
        use_pre_softmax: softmax over all experts instead of the chosen ones.
        num_groups: groups of experts.
        group_topk: groups that a token may choose from; None for all.
        scaling_factor: factor of the probabilities.
        score_function: "softmax" or "sigmoid".
        expert_bias: [E] added to sigmoid scores for the choice alone.

    Returns:
        ([T, E] probabilities, zero where not chosen, in the logits' type; [T, E] bool, chosen).

    Raises:
        ConfigError: an unknown score function, a bias with softmax, or sizes that do not divide.
    """
    _check_function(score_function)
    if score_function == "softmax":
        if expert_bias is not None:
            raise ConfigError('expert_bias only goes with score_function="sigmoid".')
        scores = _wide(logits).softmax(-1) if use_pre_softmax else _wide(logits)
        experts = _top_experts(scores.detach(), topk, num_groups, group_topk)
        chosen = scores.gather(-1, experts)
        probs = chosen if use_pre_softmax else chosen.softmax(-1)
    else:
        scores = _wide(logits).sigmoid()
        ranked = scores.detach() if expert_bias is None else scores.detach() + expert_bias
        experts = _top_experts(ranked, topk, num_groups, group_topk)
        chosen = scores.gather(-1, experts)
        probs = _normalised(chosen) if topk > 1 else chosen
    if scaling_factor:
        probs = probs * scaling_factor
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, experts, True)
    return torch.zeros_like(logits).scatter(-1, experts, probs.to(logits.dtype)), routing_map


def fused_compute_score_for_moe_aux_loss(logits: torch.Tensor, topk: int, score_function: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores for the load-balancing loss.

    Args:
        logits: [T, E].
        topk: experts for each token.
        score_function: "softmax" or "sigmoid".

    Returns:
        ([T, E] bool, chosen; [T, E] scores that sum to 1, float32).
    """
    _check_function(score_function)
    scores = _wide(logits).softmax(-1) if score_function == "softmax" else _normalised(_wide(logits).sigmoid())
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, scores.detach().topk(topk, dim=-1).indices, True)
    return chosen, scores


def fused_moe_aux_loss(
    probs: torch.Tensor, tokens_per_expert: torch.Tensor, total_num_tokens: int, num_experts: int, topk: int, coeff: float
) -> torch.Tensor:
    """The load-balancing loss: coeff * E * sum over experts of (mean score * share of tokens).

    Args:
        probs: [T, E] scores.
        tokens_per_expert: [E].
        total_num_tokens: tokens the counts were taken over.
        num_experts: E.
        topk: experts for each token.
        coeff: weight of the loss.

    Returns:
        The loss, in the type of `probs`.
    """
    per_expert = _wide(probs).sum(0)
    loss = (per_expert * tokens_per_expert).sum() * (num_experts * coeff / (topk * total_num_tokens * total_num_tokens))
    return loss.to(probs.dtype)
