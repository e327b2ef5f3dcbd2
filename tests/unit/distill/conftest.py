from types import SimpleNamespace

import pytest

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.convert import convert_to_distillation_model
from nemo_opt.models.build import build_model
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology, parallel

STUDENT = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=2, vocab_size=120)
TEACHER = STUDENT.with_(num_layers=3, hidden_size=24)
SETTINGS = DistillationConfig(intermediate_layer_pairs=[("decoder.final_layernorm", "decoder.final_layernorm")])


@pytest.fixture(scope="module")
def world():
    """Model parallel state of one rank, in this process."""
    with parallel(Topology()) as topology:
        yield topology


@pytest.fixture
def make(world):
    """Builds ordinary models and distillation models of this package's small sizes."""

    def distillation(student=STUDENT, teacher=TEACHER, settings=SETTINGS):
        [model] = convert_to_distillation_model(gpt(student, 1), gpt(teacher, 2), settings)
        return model

    def gpt(sizes=STUDENT, seed=1):
        return build_model(sizes, world, spec="local", seed=seed)[0]

    return SimpleNamespace(gpt=gpt, distillation=distillation, student=STUDENT, teacher=TEACHER, settings=SETTINGS)
