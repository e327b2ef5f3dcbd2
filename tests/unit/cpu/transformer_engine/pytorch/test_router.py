"""The router's functions against Megatron-Core's unfused ones."""

import nemo_opt._stack

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)

from nemo_opt.errors import ConfigError

BIAS = torch.linspace(0.5, -0.5, 8)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "group_topk": 2}])
@pytest.mark.parametrize("scaling", [None, 2.5])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"score_function": "softmax"},
        {"score_function": "softmax", "use_pre_softmax": True},
        {"score_function": "sigmoid"},
        {"score_function": "sigmoid", "expert_bias": BIAS},
        {"score_function": "sigmoid", "topk": 1},
    ],
    ids=lambda k: "-".join(k),
)
def test_choice_of_experts(kwargs, scaling, groups):
    kwargs = {"topk": 2, "scaling_factor": scaling, **groups, **kwargs}
    if groups and kwargs["topk"] == 1:
        kwargs["group_topk"] = 1
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = [topk_routing_with_score_function(logits, fused=fused, **kwargs) for fused in (False, True)]
    (probs, chosen), (fused_probs, fused_chosen) = results
    assert torch.equal(chosen, fused_chosen)
    torch.testing.assert_close(fused_probs, probs)
    direction = torch.sin(torch.arange(160.0)).reshape(20, 8)
    torch.testing.assert_close(*[torch.autograd.grad((p * direction).sum(), logits)[0] for p in (fused_probs, probs)])


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_load_balancing(score_function):
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = []
    for fused in (False, True):
        chosen, scores = compute_routing_scores_for_aux_loss(logits, 2, score_function, fused=fused)
        kwargs = {"probs": scores, "tokens_per_expert": chosen.sum(0), "total_num_tokens": 20, "topk": 2, "num_experts": 8}
        losses.append(switch_load_balancing_loss_func(**kwargs, moe_aux_loss_coeff=0.1, fused=fused))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, logits)[0] for loss in losses])


def test_refusals():
    logits = torch.zeros(2, 8)
    kwargs = {"topk": 2, "use_pre_softmax": False, "num_groups": None, "group_topk": None, "scaling_factor": None}
    from nemo_opt.cpu.transformer_engine.pytorch.router import fused_topk_with_score_function as choose

    with pytest.raises(ConfigError, match="sqrtsoftplus"):
        choose(logits, score_function="sqrtsoftplus", expert_bias=None, **kwargs)
    with pytest.raises(ConfigError, match="expert_bias"):
        choose(logits, score_function="softmax", expert_bias=BIAS, **kwargs)
    with pytest.raises(ConfigError, match="do not divide"):
        choose(logits, score_function="softmax", expert_bias=None, **{**kwargs, "num_groups": 3, "group_topk": 1})
