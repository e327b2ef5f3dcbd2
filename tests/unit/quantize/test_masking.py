"""Which rows of a tensor are padding, by its shape; and that nobody sees them, or that it is an error."""

from unittest.mock import patch

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.quantize import masking

REAL = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
"""[S, B] of a row of three tokens and one of two."""


@pytest.fixture(autouse=True)
def tp():
    """Sizes of the tensor-parallel axis and this rank's place on it: `tp(2, 1)`."""

    def set_to(size, rank):
        state.get_tensor_model_parallel_world_size.return_value = size
        state.get_tensor_model_parallel_rank.return_value = rank

    with patch.object(masking, "parallel_state") as state:
        set_to(1, 0)
        yield set_to


def test_rows_of_padding_are_zero_and_the_others_untouched():
    x = torch.randn(4, 2, 5)
    zeroed = masking.zero_padding(x, REAL)
    assert torch.equal(zeroed[REAL], x[REAL])
    assert not zeroed[~REAL].any()


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (4, 2)])
def test_any_dims_may_follow(shape):
    assert torch.equal(masking.zero_padding(torch.ones(shape), REAL) != 0, REAL.view(4, 2, *[1] * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize("shape", [(4, 1, 5), (4, 5), (4, 3, 5), (4, 1)])
def test_one_sequence_needs_no_batch_dim(shape):
    """Packed sequences reach attention as [tokens, heads, size]."""
    zeroed = masking.zero_padding(torch.ones(shape), REAL[:, 1:])
    assert zeroed.shape == shape
    assert [bool(row.all()) for row in zeroed] == [True, True, False, False]
    assert not zeroed[2:].any()


@pytest.mark.parametrize("rank", [0, 1])
def test_sequence_parallel_ranks_hold_a_part(tp, rank):
    tp(2, rank)
    assert torch.equal(masking.zero_padding(torch.ones(2, 2, 5), REAL)[..., 0] != 0, REAL[2 * rank : 2 * rank + 2])
    assert torch.equal(masking.zero_padding(torch.ones(4, 2, 5), REAL)[..., 0] != 0, REAL)


def test_nan_in_padding_is_not_seen_either():
    x = torch.full((4, 2, 5), float("nan"))
    assert not masking.zero_padding(x, REAL)[~REAL].any()


@pytest.mark.parametrize("shape", [(8, 5), (4,), (2, 4, 5), (3, 2, 5), (4, 3, 5), (4, 1, 5)])
def test_other_shapes_say_nothing(shape):
    assert masking.zero_padding(torch.ones(shape), REAL) is None


class _Model(torch.nn.Module):
    """A dense linear's quantizers, and those of a routed and a shared expert."""

    def __init__(self):
        from modelopt.torch.quantization.nn import TensorQuantizer

        super().__init__()
        names = ("fc1.input_quantizer", "fc1.weight_quantizer", "mlp.experts.0.input_quantizer", "mlp.shared_experts.fc1.input_quantizer")
        for name in names:
            parent = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            quantizer = TensorQuantizer()
            quantizer.disable()
            parent.add_module(last, quantizer)

    def seen(self, shape=(4, 2, 5)):
        """name -> what comes through each quantizer."""
        from modelopt.torch.quantization.nn import TensorQuantizer

        return {name: bool(module(torch.ones(shape)).all()) for name, module in self.named_modules() if isinstance(module, TensorQuantizer)}


def _batch(mask):
    return {"tokens": torch.zeros(2, 4), "attention_mask": mask}


def test_activations_are_masked_while_it_is_entered_and_not_after():
    model = _Model()
    as_decoder = patch.object(masking, "tokens_in_order", side_effect=lambda _chunk, _batch, values: values.t())
    with as_decoder, masking.padding_masked(model, _batch(REAL.t().long())):
        assert model.seen() == {
            "fc1.input_quantizer": False,
            "fc1.weight_quantizer": True,
            "mlp.experts.0.input_quantizer": True,  # its tokens are masked before the router
            "mlp.shared_experts.fc1.input_quantizer": False,
        }
        with pytest.raises(ConfigError, match=r"fc1.input_quantizer sees a tensor of shape \(7, 5\).*\(4, 2\) tokens.*packing='pack'"):
            model.seen((7, 5))
    assert all(model.seen().values())


@pytest.mark.parametrize("mask", [None, torch.ones(2, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)])
def test_without_padding_nothing_is_hooked(mask):
    model = _Model()
    with masking.padding_masked(model, _batch(mask)):
        assert all(model.seen((7, 5)).values())


def test_hooks_that_were_there_before_see_no_padding():
    """AWQ's statistics are such a hook."""
    model, seen = _Model(), []
    model.fc1.input_quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    as_decoder = patch.object(masking, "tokens_in_order", side_effect=lambda _chunk, _batch, values: values.t())
    with as_decoder, masking.padding_masked(model, _batch(REAL.t().long())):
        model.fc1.input_quantizer(torch.ones(4, 2, 5))
    assert torch.equal(seen[0][..., 0] != 0, REAL)
