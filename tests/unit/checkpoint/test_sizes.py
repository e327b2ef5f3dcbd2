import pytest

from nemo_opt.checkpoint.sizes import check_same_model
from nemo_opt.errors import CheckpointError, ConfigError
from nemo_opt.models.config import RopeScaling, preset

TINY = preset("tiny")


def compare(other, error=CheckpointError):
    check_same_model("the checkpoint", TINY, "the model", other, error=error)


@pytest.mark.parametrize(
    "changes", [{}, {"init_method_std": 1.0}, {"max_position_embeddings": 8}, {"kv_channels": TINY.head_dim}, {"vocab_size": 2047}]
)
def test_what_no_weight_depends_on_may_differ(changes):
    compare(TINY.with_(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 128 in the checkpoint, 64 in the model"),
        ({"num_layers": 2, "rotary_base": 5e5}, "num_layers 4 in the checkpoint, 2 in the model; rotary_base 10000.0 in"),
        ({"rope_scaling": RopeScaling()}, "rope_scaling None in"),
        ({"tie_embeddings": True}, "tie_embeddings False in"),
        ({"vocab_size": 2049}, "padded_vocab_size 2048 in the checkpoint, 2176 in the model"),
        ({"kv_channels": 32}, "head_dim 16 in the checkpoint, 32 in the model"),
    ],
)
def test_every_difference_is_named_with_both_sides(changes, message):
    with pytest.raises(ConfigError, match=message):
        compare(TINY.with_(**changes), ConfigError)
