import nemo_opt._stack

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opt.distill.pairs import Place, place_pairs
from nemo_opt.errors import ConfigError

FINAL_NORM = "decoder.final_layernorm"


def sizes(layers=4, hidden=8, pp=2, **changes):
    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        **changes,
    )


def placed(student_layer, teacher_layer, *kind, student=None, teacher=None):
    [pair] = place_pairs([(student_layer, teacher_layer, *kind)], student or sizes(), teacher or sizes(layers=8))
    return pair


@pytest.mark.parametrize(
    ("name", "stage", "local"),
    [
        (FINAL_NORM, 1, FINAL_NORM),
        ("decoder.layers.0", 0, "decoder.layers.0"),
        ("decoder.layers.1.mlp", 0, "decoder.layers.1.mlp"),
        ("decoder.layers.2", 1, "decoder.layers.0"),
        ("decoder.layers.3.input_layernorm", 1, "decoder.layers.1.input_layernorm"),
    ],
)
def test_a_layer_is_found_under_the_number_that_its_stage_gives_it(name, stage, local):
    pair = placed(name, FINAL_NORM)
    assert pair.student == pair.place("student") == Place(stage=stage, name=local)
    assert pair.teacher == pair.place("teacher") == Place(stage=1, name=FINAL_NORM)


def test_uneven_stages():
    student = sizes(num_layers_in_first_pipeline_stage=1)
    assert placed("decoder.layers.1", FINAL_NORM, student=student).student == Place(stage=1, name="decoder.layers.0")
    assert placed("decoder.layers.3", FINAL_NORM, student=student).student == Place(stage=1, name="decoder.layers.2")


def test_numbers_of_two_digits():
    teacher = sizes(layers=24, pp=2)
    assert placed(FINAL_NORM, "decoder.layers.11", teacher=teacher).teacher == Place(stage=0, name="decoder.layers.11")
    assert placed(FINAL_NORM, "decoder.layers.22.mlp", teacher=teacher).teacher == Place(stage=1, name="decoder.layers.10.mlp")


@pytest.mark.parametrize(("layers", "home"), [((0, 0), 0), ((0, 5), 2), ((3, 0), 3), ((2, 5), 2)])
def test_equal_widths_meet_where_both_have_come(layers, home):
    pair = placed(f"decoder.layers.{layers[0]}", f"decoder.layers.{layers[1]}", student=sizes(pp=4), teacher=sizes(layers=8, pp=4))
    assert pair.home == home


def test_other_widths_meet_at_the_projection_on_the_last_stage():
    assert placed("decoder.layers.0", "decoder.layers.0", teacher=sizes(hidden=12)).home == 1


def test_kinds_and_order():
    pairs = place_pairs(
        [(FINAL_NORM, FINAL_NORM), (FINAL_NORM, "decoder.layers.1", "mse"), (FINAL_NORM, FINAL_NORM, "cosine")], sizes(), sizes()
    )
    assert [pair.kind for pair in pairs] == ["cosine", "mse", "cosine"]
    assert place_pairs([], sizes(), sizes()) == []


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(*modules):
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("decoder.layers.0", FULL),
        ("decoder.layers.3.mlp", FULL),
        ("decoder.layers.0.mlp", selective("mlp")),
        ("decoder.layers.0.mlp", selective("core_attn", "moe")),
        ("decoder.layers.0.input_layernorm", selective("layernorm")),
        ("decoder.layers.0.pre_mlp_layernorm", selective("layernorm")),
    ],
)
def test_what_is_recomputed_cannot_teach(name, settings):
    changes = {"num_moe_experts": 2} if "moe" in settings.get("recompute_modules", ()) else {}
    student = sizes(normalization="RMSNorm", transformer_impl="transformer_engine", **settings, **changes)
    with pytest.raises(ConfigError, match=f"'{name}' of the student is recomputed.*{settings['recompute_granularity']}.*no gradient"):
        placed(name, FINAL_NORM, student=student)
    # The teacher's needs none.
    placed(FINAL_NORM, name, teacher=student)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (FINAL_NORM, FULL),
        ("decoder.layers.0", selective("mlp", "layernorm", "core_attn")),
        ("decoder.layers.0.self_attention", selective("core_attn")),
        ("decoder.layers.0.mlp", selective("layernorm")),
        ("decoder.layers.0.input_layernorm", selective("mlp")),
        ("decoder.layers.0.mlp", {}),
    ],
)
def test_what_is_not_recomputed_can(name, settings):
    placed(name, FINAL_NORM, student=sizes(normalization="RMSNorm", transformer_impl="transformer_engine", **settings))
