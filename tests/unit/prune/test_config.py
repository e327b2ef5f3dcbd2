import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.footprint import memory_mb, parameters
from nemo_opt.prune.space import SearchSpace

TINY = preset("tiny")  # 4 layers, hidden 128, ffn 256, 8 heads in 4 groups


def test_everything_is_unset_by_default():
    assert PruningConfig().targets == {}
    assert PruningConfig().drop_layers is None


@pytest.mark.parametrize(
    "target", ["ffn_hidden_size", "hidden_size", "num_attention_heads", "num_query_groups", "num_layers", "mamba_num_heads"]
)
def test_drop_layers_excludes_every_target(target):
    with pytest.raises(ValueError, match="drop_layers cannot be used with other pruning parameters"):
        PruningConfig(drop_layers=[1], **{f"target_{target}": 2})


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "given but empty"),
        ([0], "counted from 1"),
        ([-1], "counted from 1"),
        ([True], "counted from 1"),
        ([1.0], "counted from 1"),
        ([2, 2], "twice"),
        ("12", "list of layer numbers"),
        (3, "list of layer numbers"),
    ],
)
def test_bad_layer_lists_are_refused(layers, match):
    with pytest.raises(ConfigError, match=match):
        PruningConfig(drop_layers=layers)


@pytest.mark.parametrize("value", [0, -4, 1.0, "64", True])
def test_targets_are_positive_integers(value):
    with pytest.raises(ConfigError, match="target_hidden_size must be a positive integer"):
        PruningConfig(target_hidden_size=value)


@pytest.mark.parametrize("name", ["target_mamba_num_heads", "target_mamba_head_dim"])
def test_mamba_targets_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} is for Mamba"):
        PruningConfig(**{name: 2})


def test_layers_are_kept_sorted():
    assert PruningConfig(drop_layers=[3, 1]).drop_layers == (1, 3)


def test_mapping_and_omegaconf_are_read():
    config = PruningConfig(drop_layers=[1, 3])
    assert PruningConfig.from_any({"drop_layers": [3, 1]}) == config
    assert PruningConfig.from_any(OmegaConf.create({"drop_layers": [3, 1]})) == config
    assert PruningConfig.from_any(config) is config
    with pytest.raises(ConfigError, match=r"unknown pruning settings \['target_layers'\]"):
        PruningConfig.from_any({"target_layers": 2})
    with pytest.raises(ConfigError, match="got list"):
        PruningConfig.from_any([1])


@pytest.mark.parametrize("layers", [[5], [1, 9]])
def test_layers_out_of_range_are_refused(layers):
    with pytest.raises(ConfigError, match=rf"\[{layers[-1]}\] out of range: the model has layers 1..4"):
        PruningConfig(drop_layers=layers).check_against(TINY)


def test_dropping_all_layers_is_refused():
    PruningConfig(drop_layers=[1, 2, 3]).check_against(TINY)
    with pytest.raises(ConfigError, match="all 4 layers"):
        PruningConfig(drop_layers=[1, 2, 3, 4]).check_against(TINY)


def test_no_target_is_refused():
    with pytest.raises(ConfigError, match="nothing to prune"):
        PruningConfig().check_against(TINY)


def _sizes(model=TINY, **targets):
    return PruningConfig(**{f"target_{name}": size for name, size in targets.items()}).pruned(model)


def test_pruned_sizes_are_the_targets_and_the_rest():
    assert _sizes(hidden_size=64) == TINY.with_(hidden_size=64, kv_channels=16)
    assert _sizes(num_layers=2, ffn_hidden_size=7) == TINY.with_(num_layers=2, ffn_hidden_size=7)
    assert _sizes(hidden_size=64, num_attention_heads=4).kv_channels is None  # 64 / 4 is the head dimension of before
    assert PruningConfig(drop_layers=[1, 4]).pruned(TINY) == TINY.with_(num_layers=2)


def test_query_groups_that_go_take_their_heads_along():
    assert _sizes(num_query_groups=3).num_attention_heads == 6
    assert _sizes(num_query_groups=1, num_attention_heads=2).num_query_groups == 1
    with pytest.raises(ConfigError, match=r"heads 8 cannot be reached.*2 query groups that stay, which have 4 heads.*nearest: 4$"):
        _sizes(num_query_groups=2, num_attention_heads=8)
    with pytest.raises(ConfigError, match=r"target_num_query_groups 5 cannot be reached from num_query_groups 4.*nearest: 4$"):
        _sizes(num_query_groups=5)


def test_experts():
    moe = TINY.with_(num_moe_experts=8)
    PruningConfig(drop_layers=[1]).check_against(moe)
    assert _sizes(moe, num_moe_experts=2, ffn_hidden_size=64) == moe.with_(num_moe_experts=2, ffn_hidden_size=64)
    with pytest.raises(ConfigError, match=r"at least moe_router_topk 2; nearest: 2$"):
        _sizes(moe, num_moe_experts=1)
    with pytest.raises(ConfigError, match=r"target_num_moe_experts 4 is for mixtures of experts"):
        _sizes(num_moe_experts=4)
    with pytest.raises(ConfigError, match=r"a multiple of ep 4; nearest: 4 or 8$"):
        PruningConfig(target_num_moe_experts=6).check_against(moe, ep=4)


@pytest.mark.parametrize(
    ("targets", "tp", "named"),
    [
        ({"ffn_hidden_size": 66}, 4, "is a multiple of tp 4; nearest: 64 or 68$"),
        ({"num_attention_heads": 4, "num_query_groups": 2}, 8, r"a multiple of tp 8 \(.*nearest: none$"),
        ({"num_query_groups": 3}, 2, "is a multiple or a divisor of tp 2; nearest: 2 or 4$"),
        ({"num_query_groups": 1}, 4, "leaves 2 heads, 2 % tp 4 != 0"),
    ],
)
def test_ranks_share_pruned_widths_evenly(targets, tp, named):
    config = PruningConfig(**{f"target_{name}": size for name, size in targets.items()})
    config.check_against(TINY)
    with pytest.raises(ConfigError, match=named):
        config.check_against(TINY, tp=tp)


@pytest.mark.parametrize(
    ("name", "target", "nearest"),
    [
        ("hidden_size", 129, "128"),
        ("ffn_hidden_size", 10_000, "256"),
        ("num_layers", 5, "4"),
        ("num_attention_heads", 16, "8"),
        ("num_attention_heads", 6, "4 or 8"),
        ("num_attention_heads", 3, "4"),
    ],
)
def test_unreachable_target_names_the_nearest(name, target, nearest):
    with pytest.raises(ConfigError, match=rf"target_{name} {target} cannot be reached.*nearest: {nearest}$"):
        PruningConfig(**{f"target_{name}": target}).check_against(TINY)


def test_nemos_own_test_values_fit():
    PruningConfig(
        target_hidden_size=64, target_ffn_hidden_size=128, target_num_attention_heads=4, target_num_query_groups=4, target_num_layers=2
    ).check_against(TINY)


@given(heads=st.integers(1, 64), groups=st.sampled_from([1, 2, 4, 8]), per_group=st.integers(1, 8))
def test_accepted_heads_and_named_ones_are_valid(heads, groups, per_group):
    model = preset("tiny", num_attention_heads=groups * per_group, num_query_groups=groups, kv_channels=16)
    config = PruningConfig(target_num_attention_heads=heads)
    valid = {n * groups for n in range(1, per_group + 1)}
    if heads in valid:
        config.check_against(model)
        return
    with pytest.raises(ConfigError, match="nearest") as caught:
        config.check_against(model)
    named = {int(n) for n in str(caught.value).rpartition("nearest: ")[2].split(" or ")}
    assert named <= valid
    assert min(abs(heads - n) for n in named) == min(abs(heads - n) for n in valid)


@pytest.mark.parametrize("limit", ["params", "active_params", "memory_mb"])
def test_limits_exclude_sizes_and_layers(limit):
    config = PruningConfig(**{f"target_{limit}": 1.5e3})
    assert (config.limits, config.targets, config.drop_layers) == ({limit: 1.5e3}, {}, None)
    with pytest.raises(ConfigError, match="target_num_layers"):
        PruningConfig(**{f"target_{limit}": 1e6}, target_num_layers=2)
    with pytest.raises(ConfigError, match="drop_layers cannot be used with other pruning parameters"):
        PruningConfig(**{f"target_{limit}": 1e6}, drop_layers=[1])


def test_limits_combine():
    config = PruningConfig(target_memory_mb=2, target_params=7)
    assert config.limits == {"params": 7, "memory_mb": 2}
    assert PruningConfig().limits == {}


@pytest.mark.parametrize("value", [0, -1.0, "6e9", True, float("nan")])
def test_limits_are_positive_numbers(value):
    with pytest.raises(ConfigError, match="target_params must be a positive number"):
        PruningConfig(target_params=value)


def test_a_model_within_the_limits_is_refused():
    whole = parameters(TINY)
    PruningConfig(target_params=whole - 1).check_against(TINY)
    PruningConfig(target_params=whole, target_memory_mb=0.1).check_against(TINY)
    with pytest.raises(ConfigError, match=rf"within the limits already \(params {whole:,} <= {whole:,}\)"):
        PruningConfig(target_params=whole).check_against(TINY)


def test_the_cache_that_was_asked_for_counts_for_the_limit():
    space = {"seq_length": 100, "batch_size": 7}
    whole = memory_mb(TINY, sequence_length=100, batch_size=7)
    PruningConfig(target_memory_mb=0.999 * whole, search=space).check_against(TINY)
    with pytest.raises(ConfigError, match="within the limits already"):
        PruningConfig(target_memory_mb=1.001 * whole, search=space).check_against(TINY)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_width_pruning": 0}, "max_width_pruning must be a share"),
        ({"max_depth_pruning": 1.1}, "max_depth_pruning must be a share"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"seq_length": 1.5}, "seq_length must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"hidden_size_divisor": 0}, "hidden_size_divisor must be"),
        ({"ffn_hidden_size_divisor": 0}, "ffn_hidden_size_divisor must be"),
        ({"num_layers_divisor": 0}, "num_layers_divisor must be"),
        ({"hparams_to_skip": "hidden_size"}, "must be a list of sizes"),
        ({"hparams_to_skip": 3}, "must be a list of sizes"),
        ({"hparams_to_skip": ["vocab_size"]}, r"\['vocab_size'\] are not searched; those are \['hidden_size'"),
        ({"divisor": 1}, r"unknown search settings \['divisor'\]; known are \['max_width_pruning'"),
        (3, "a SearchSpace or a mapping, got int"),
    ],
)
def test_bad_search_spaces_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        PruningConfig(search=settings)


def test_search_spaces_are_read_from_mappings():
    settings = {"target_params": 5, "search": {"top_k": 3, "hparams_to_skip": ["num_layers"], "max_width_pruning": 1}}
    config = PruningConfig.from_any(OmegaConf.create(settings))
    assert config.search == SearchSpace(top_k=3, hparams_to_skip=("num_layers",), max_width_pruning=1)
    assert PruningConfig().search == SearchSpace()


def test_defaults_of_the_search_are_modelopts():
    import nemo_opt._stack

    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronSearcher

    theirs = MCoreMinitronSearcher().default_search_config
    ours = SearchSpace()
    for name in ("max_width_pruning", "max_depth_pruning", "top_k", "seq_length", "batch_size"):
        assert getattr(ours, name) == theirs[name]
