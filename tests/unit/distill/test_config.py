from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_opt.distill.config import DistillationConfig, load_distillation_config
from nemo_opt.errors import ConfigError
from nemo_opt.parallel import Topology

SMALL, LARGE = SimpleNamespace(num_layers=2), SimpleNamespace(num_layers=4)
FINAL_NORM = "decoder.final_layernorm"

NEMO_L2_YAML = """
intermediate_layer_pairs:
  - ["decoder.final_layernorm", "decoder.final_layernorm"]
logit_layers: ["output_layer", "output_layer"]
skip_lm_loss: true
kd_loss_scale: 1.0
"""


def load(tmp_path, text):
    path = tmp_path / "kd.yaml"
    path.write_text(text)
    return load_distillation_config(path, SMALL, LARGE)


def test_nemos_file_is_read(tmp_path):
    config = load(tmp_path, NEMO_L2_YAML)
    assert config.intermediate_layer_pairs == ((FINAL_NORM, FINAL_NORM),)
    assert (config.skip_lm_loss, config.kd_loss_scale) == (True, 1.0)


def test_no_file_and_an_empty_one_give_nemos_defaults(tmp_path):
    for config in (load_distillation_config(None, SMALL, LARGE), load(tmp_path, ""), DistillationConfig()):
        assert config.intermediate_layer_pairs == ()
        assert config.logit_layers == ("output_layer", "output_layer")
        assert config.skip_lm_loss
        assert config.kd_loss_scale == config.logit_kl_temperature == 1.0
        assert config.logit_kl_topk is config.criterion is config.loss_balancer is None


def test_layers_have_global_numbers_of_their_model(tmp_path):
    config = load(tmp_path, "intermediate_layer_pairs: [[decoder.layers.1, decoder.layers.3, mse]]")
    assert config.intermediate_layer_pairs == (("decoder.layers.1", "decoder.layers.3", "mse"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd_loss_scal: 2", "'kd_loss_scal'.*did you mean 'kd_loss_scale'"),
        ("criterion: {}", "unknown distillation setting 'criterion'"),
        ("zzz: 1", "unknown distillation setting 'zzz' in .*; known are"),
        ("- 1", "hold a list"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system [true]", "not YAML"),
        ("intermediate_layer_pairs: 3", "expected a list"),
        ("intermediate_layer_pairs: [[decoder.final_layernorm]]", "intermediate pair"),
        ("intermediate_layer_pairs: [[decoder.final_layernorm, 3]]", "intermediate pair"),
        ("intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm, mae]]", "unknown intermediate loss 'mae'"),
        ("intermediate_layer_pairs: [[decoder.final_layer_norm, decoder.final_layernorm]]", "did you mean 'decoder.final_layernorm'"),
        ("intermediate_layer_pairs: [[decoder.layers.0.mlp.linear_fc1, decoder.layers.0.mlp]]", "no layer with a full hidden state"),
        ("intermediate_layer_pairs: [[decoder.layers.2, decoder.layers.2]]", r"not in the student, whose layers are 0\.\.1"),
        ("intermediate_layer_pairs: [[decoder.layers.1.mlp, decoder.layers.4.mlp]]", r"not in the teacher, whose layers are 0\.\.3"),
        ("logit_layers: [output_layer]", "logit_layers"),
        ("logit_layers: [output_layer, lm_head]", "logit_layers"),
        ("skip_lm_loss: 1", "skip_lm_loss"),
        ("kd_loss_scale: 0", "kd_loss_scale"),
        ("kd_loss_scale: .nan", "kd_loss_scale"),
        ("kd_loss_scale: yes", "kd_loss_scale"),
        ("logit_kl_temperature: -1", "logit_kl_temperature"),
        ("logit_kl_topk: 0", "logit_kl_topk"),
        ("logit_loss: forward-kl", "unknown logit_loss 'forward-kl', did you mean 'forward_kl'"),
        ("logit_kl_scale_by_temperature_squared: 1", "logit_kl_scale_by_temperature_squared must be true or false, got 1"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_distillation_config(tmp_path / "none.yaml", SMALL, LARGE)


@given(st.text(min_size=1, max_size=12).filter(lambda name: name not in ("decoder.final_layernorm",)))
def test_no_other_name_passes_as_a_layer(name):
    if not name.startswith("decoder.layers."):
        with pytest.raises(ConfigError):
            DistillationConfig(intermediate_layer_pairs=[(name, FINAL_NORM)])


def test_layouts():
    DistillationConfig().check_topology(Topology(tp=2, pp=2, sp=True))
    DistillationConfig(logit_kl_topk=4).check_topology(Topology(tp=2, pp=2))
    with pytest.raises(ConfigError, match="vp 2"):
        DistillationConfig().check_topology(Topology(pp=2, vp=2))
