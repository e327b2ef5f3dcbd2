"""A small student beside a wider and deeper teacher: every layout must equal the run on one rank."""

from dataclasses import replace

import nemo_opt._stack

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from modelopt.torch.distill.plugins.megatron import TopKLogitsKLLoss

from nemo_opt import parallel
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.load import restore_model
from nemo_opt.checkpoint.save import save_checkpoint
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.convert import export_student
from nemo_opt.distill.losses import distillation_loss_fn
from nemo_opt.errors import ConfigError
from nemo_opt.models.build import build_model, transformer_config
from nemo_opt.models.shards import parameter_shards
from nemo_opt.testing.parity import (
    TINY_MOE,
    Measurement,
    case_batches,
    compare,
    gradient_pieces,
    measure,
    pieces_of,
    require_parity,
)
from nemo_opt.testing.parity_cases import DistillationCase, distillation_model, projection_pieces
from nemo_opt.training.evaluate import evaluate
from nemo_opt.training.optimizer import wrap, zero_gradients
from nemo_opt.training.step import MegatronStep

STUDENT = DistillationCase().model
PAIRS = (("decoder.final_layernorm", "decoder.final_layernorm"),)
ANYWHERE = (
    *PAIRS,
    ("decoder.layers.0.pre_mlp_layernorm", "decoder.layers.1.input_layernorm"),  # both on the first of two stages
    ("decoder.layers.1", "decoder.layers.6", "mse"),  # the student's on the first, the teacher's on the last
    ("decoder.layers.3.mlp", "decoder.layers.2.self_attention", "mse"),  # the other way
    ("decoder.layers.3.mlp", "decoder.layers.7.mlp"),  # a layer that is in two pairs
)
SETTINGS = DistillationCase().settings


def step_of(case, chunks, topology, *, forward_only=False):
    return MegatronStep(
        model=chunks,
        data_iterator=iter(case_batches(case, topology)),
        loss_fn=distillation_loss_fn,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        num_microbatches=case.global_batch_size // (case.micro_batch_size * (topology.dp or 1)),
        forward_only=forward_only,
    )


def largest_gradient(measurement):
    return max(float(piece.tensor.abs().max()) for piece in measurement.pieces)


def number_of(measurement, name):
    return measurement.numbers[f"{name} of step 1"]


def losses_by_definition(case):
    """Both losses of the first micro-batch from the two models run alone, in double precision. Models of one width."""
    with parallel.parallel(case.topology, model=case.teacher) as topology:
        batch = case_batches(case, topology)[0]
        student, student_hidden = run_alone(case, topology, batch, case.model, case.seed)
        teacher, teacher_hidden = run_alone(case, topology, batch, case.teacher, case.teacher_seed)
        real = case.model.vocab_size  # what pads the vocabulary is not compared
        log_p, log_q = ((logits[..., :real].double() / case.settings.logit_kl_temperature).log_softmax(-1) for logits in (student, teacher))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        cosine = 1 - torch.nn.functional.cosine_similarity(student_hidden.double(), teacher_hidden.double(), dim=-1)
        mask = batch["loss_mask"]
        return {name: float((loss * mask).sum() / mask.sum()) for name, loss in (("logits_loss", kl), ("intermediate_loss", cosine))}


def run_alone(case, topology, batch, sizes, seed):
    """Logits and final hidden states, both [B, S, ...]."""
    [model] = build_model(sizes, topology, spec=case.spec, seed=seed)
    hidden = []
    model.decoder.final_layernorm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.no_grad():
        logits = model(batch["tokens"], batch["position_ids"], None)
    return logits, hidden[0].transpose(0, 1)


def validation_losses(case):
    """Of the student alone; of the distillation model in evaluation; of it left in training mode, without gradients; after export."""
    with parallel.parallel(case.topology, model=case.teacher) as topology:
        batches = case_batches(case, topology)
        alone = evaluate(build_model(case.model, topology, spec=case.spec, seed=case.seed), batches, len(batches))
        chunks = distillation_model(case, topology)
        chunks[0].teacher_model.forward = lambda *args, **kwargs: pytest.fail("the teacher ran")
        evaluated = evaluate(chunks, batches, len(batches))
        assert chunks[0].training
        forward_only = step_of(case, chunks, topology, forward_only=True)()
        kept = [layer._intermediate_output for layer, _ in chunks[0]._layers_to_loss]
        exported = evaluate(export_student(chunks), batches, len(batches))
        return [alone, evaluated, forward_only["loss"], exported], set(forward_only), kept


def train_evaluate_train(case):
    """Losses and gradients of a training pass, and of the same one after an evaluation."""
    with parallel.parallel(case.topology, model=case.teacher) as topology:
        batches = case_batches(case, topology)
        chunks = wrap(distillation_model(case, topology))
        passes = []
        for _ in range(2):
            zero_gradients(chunks)
            numbers = step_of(case, chunks, topology)()
            passes.append((numbers, [piece.tensor for piece in (*gradient_pieces(chunks), *projection_pieces(chunks))]))
            evaluate(chunks, batches, len(batches))
        return passes


def save_student(case, path):
    """Saves a distillation model as it is; returns its student's weights by key and offset."""
    with parallel.parallel(case.topology, model=case.teacher) as topology:
        chunks = distillation_model(case, topology)
        save_checkpoint(path, chunks, topology=topology)
        names = list(chunks[0].state_dict())
        return gradient_free(parameter_shards(chunks)), names


def load_student(case, path):
    with parallel.parallel(case.topology, model=case.model) as topology:
        chunks, _ = restore_model(path, topology, spec=case.spec)
        return gradient_free(parameter_shards(chunks))


def gradient_free(shards):
    return Measurement(numbers={"shards": 1.0}, pieces=pieces_of(shards))


def topk_gradient(case):
    """This rank's part of the gradient of ModelOpt's top-k loss with respect to the student's logits."""
    with parallel.parallel(case.topology, model=case.model) as topology:
        config = transformer_config(case.model, topology, spec=case.spec)
        student, teacher = torch.randn(2, 4, 2, 64, generator=torch.Generator().manual_seed(0))
        group = parallel_state.get_tensor_model_parallel_group()
        student, teacher = (logits.chunk(group.size(), dim=-1)[group.rank()].clone() for logits in (student, teacher))
        student.requires_grad_(True)
        losses, _, _ = TopKLogitsKLLoss(config, top_k=8)(student, teacher)
        losses.sum().backward()
        return losses.detach(), student.grad


def logits_after_cross_entropy(case):
    """Whether Megatron-Core's cross-entropy leaves the logits as they were."""
    with parallel.parallel(case.topology):
        logits = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0))
        before = logits.clone()
        vocab_parallel_cross_entropy(logits, torch.zeros(4, 2, dtype=torch.long))
        return torch.equal(logits, before)


def refused(case):
    try:
        with parallel.parallel(case.topology, model=case.teacher) as topology:
            distillation_model(case, topology)
    except ConfigError as error:
        return str(error)
    return None


def wide(*layouts):
    """For the functional suite: see tests/unit/conftest.py."""
    return [pytest.param(layout, marks=pytest.mark.wide) for layout in layouts]


STEPS = 3
CASE = DistillationCase()
DEEPER = STUDENT.with_(num_layers=8, ffn_hidden_size=64)
MOE = {"model": TINY_MOE.with_(hidden_size=16), "teacher": TINY_MOE.with_(num_layers=4, num_moe_experts=2)}
MOE_PAIRS = (*PAIRS, ("decoder.layers.0.mlp", "decoder.layers.3.mlp"), ("decoder.layers.1", "decoder.layers.2", "mse"))
LM = {"skip_lm_loss": False, "kd_loss_scale": 0.5, "logit_kl_temperature": 2.0}
CASES = {
    "wider teacher": DistillationCase(steps=STEPS, settings=DistillationConfig(intermediate_layer_pairs=ANYWHERE)),
    "as wide": DistillationCase(steps=STEPS, teacher=DEEPER, settings=DistillationConfig(intermediate_layer_pairs=ANYWHERE)),
    "with labels": DistillationCase(steps=STEPS, settings=DistillationConfig(intermediate_layer_pairs=ANYWHERE, **LM)),
    "experts": DistillationCase(steps=STEPS, settings=DistillationConfig(intermediate_layer_pairs=MOE_PAIRS), **MOE),
}


@pytest.fixture(scope="module")
def reference(ranks):
    [measurement] = ranks(1).run(measure, CASE)
    return measurement


@pytest.fixture(scope="module")
def reference_of(ranks):
    """The run on one rank of a case in `CASES`, with the local layer spec; made once."""
    made = {}

    def run(name):
        if name not in made:
            [made[name]] = ranks(1).run(measure, CASES[name])
        return made[name]

    return run


MATRIX = [
    ("wider teacher", "TP2PP1", "local"),
    ("wider teacher", "TP1PP2", "te"),
    ("as wide", "TP1PP2", "local"),
    *[
        pytest.param("wider teacher", layout, spec, marks=pytest.mark.wide)
        for spec in ("local", "te")
        for layout in ("TP1PP1", "TP2PP1", "TP1PP2", "TP2PP2", "TP2PP1SP", "TP2PP2SP", "TP1PP1DP2", "TP1PP4", "CP2")
        if (layout, spec)
        not in [("TP1PP1", "local"), ("TP2PP1", "local"), ("TP1PP2", "te"), ("CP2", "local")]  # above; the reference; mcore's
    ],
    *[pytest.param("as wide", layout, "te", marks=pytest.mark.wide) for layout in ("TP1PP2", "TP2PP2SP", "TP1PP4", "TP1PP2CP2")],
    *[pytest.param("with labels", layout, "local", marks=pytest.mark.wide) for layout in ("TP2PP1SP", "TP2PP2")],
    *[pytest.param("experts", layout, spec, marks=pytest.mark.wide) for spec in ("local", "te") for layout in ("TP1PP1EP2", "TP1PP2")],
]


# Largest difference seen over these: 1.2e-6.
@pytest.mark.ranks
@pytest.mark.parametrize(("name", "layout", "spec"), MATRIX)
def test_losses_and_gradients_equal_one_rank(ranks, reference_of, name, layout, spec):
    """Every number of three steps, and every gradient of the first; Megatron-Core's local attention refuses context parallelism."""
    require_parity(ranks, CASES[name].at(layout, spec=spec), reference=reference_of(name))


@pytest.mark.ranks
@pytest.mark.wide
@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("name", ["wider teacher", "as wide"])
def test_uneven_stages_equal_one_rank(ranks, reference_of, name, spec):
    """The first stage has one layer of each model."""
    require_parity(ranks, CASES[name].at("TP1PP2", spec=spec, first_stage_layers=1), reference=reference_of(name))


OTHER_LOSSES = [
    {"logit_loss": "reverse_kl", "logit_kl_topk": 9},
    {"logit_loss": "jensen_shannon", "logit_kl_temperature": 2.0, "logit_kl_scale_by_temperature_squared": True},
]


@pytest.mark.ranks
@pytest.mark.wide
@pytest.mark.parametrize("options", OTHER_LOSSES)
def test_other_losses_equal_one_rank(ranks, options):
    case = CASE.at("TP1PP1", settings=DistillationConfig(intermediate_layer_pairs=PAIRS, **options))
    [alone] = ranks(1).run(measure, case)
    for layout in ("TP2PP1SP", "TP2PP2"):
        require_parity(ranks, case.at(layout), reference=alone)


@pytest.mark.ranks
def test_losses_are_those_of_their_definitions(ranks):
    case = CASE.at(
        "TP1PP1", teacher=STUDENT.with_(num_layers=6), global_batch_size=2, settings=replace(CASE.settings, logit_kl_temperature=1.5)
    )
    [measured], [expected] = ranks(1).run(measure, case), ranks(1).run(losses_by_definition, case)
    assert {name: number_of(measured, name) for name in expected} == pytest.approx(expected, rel=1e-5)
    # With NeMo's balancer the hidden states count as much as the logits.
    assert number_of(measured, "kd_loss") == pytest.approx(2 * expected["logits_loss"], rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP1", *wide("TP2PP1")])
@pytest.mark.parametrize("skip_lm_loss", [True, False])
def test_a_teacher_that_is_the_student_teaches_nothing(ranks, layout, skip_lm_loss):
    """Only rounding is left: losses are some 1e-8, gradients of the distillation 1e-8 beside 1e-2 otherwise."""
    settings = DistillationConfig(intermediate_layer_pairs=PAIRS, skip_lm_loss=skip_lm_loss)
    case = CASE.at(layout, teacher=STUDENT, teacher_seed=CASE.seed, settings=settings)
    measurements = ranks(case.topology.world_size).run(measure, case)
    for measurement in measurements:
        assert abs(number_of(measurement, "logits_loss")) < 1e-6
        assert abs(number_of(measurement, "intermediate_loss")) < 1e-6
        if skip_lm_loss:
            assert largest_gradient(measurement) < 1e-5
        else:
            assert all(torch.isfinite(piece.tensor).all() for piece in measurement.pieces)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP1", "TP1PP2"])
def test_evaluation_runs_the_student_alone(ranks, layout):
    case = CASE.at(layout)
    for losses, names, kept in ranks(case.topology.world_size).run(validation_losses, case):
        assert losses == [losses[0]] * 4
        assert names == {"loss"}
        assert not any(output is not None for output in kept)


@pytest.mark.ranks
@pytest.mark.wide
def test_training_after_an_evaluation_is_unchanged(ranks):
    """No shape and no activation is left over."""
    for (numbers, gradients), (numbers_after, gradients_after) in ranks(2).run(train_evaluate_train, CASES["as wide"].at("TP1PP2")):
        assert numbers == numbers_after
        assert gradients
        assert all(torch.equal(one, other) for one, other in zip(gradients, gradients_after, strict=True))


@pytest.mark.ranks
def test_checkpoint_holds_the_student_alone(ranks, tmp_path):
    path = str(tmp_path / "student")
    saved = ranks(2).run(save_student, CASE.at("TP1PP2"), path)
    for _, names in saved:
        assert names
        assert not any("teacher" in name or "loss_modules" in name for name in names)
    info = read_info(path)
    assert info.model == STUDENT
    assert not info.has_modelopt_state
    [whole] = ranks(1).run(load_student, CASE, path)
    compare(whole, [measurement for measurement, _ in saved], tol_rel=0.0)
    compare(whole, ranks(2).run(load_student, CASE.at("TP2PP1"), path), tol_rel=0.0)


@pytest.mark.ranks
def test_upstreams_topk_gradient_is_tp_times_too_large(ranks):
    """Why nemo_opt/distill/top_k.py exists. Red when ModelOpt has mended it."""
    [(losses, gradient)] = ranks(1).run(topk_gradient, CASE)
    split = ranks(2).run(topk_gradient, CASE.at("TP2PP1"))
    torch.testing.assert_close(split[0][0], losses)
    torch.testing.assert_close(torch.cat([part for _, part in split], dim=-1), 2 * gradient)


@pytest.mark.ranks
def test_distillation_reads_logits_that_the_lm_loss_has_not_overwritten(ranks, reference):
    """Red when Megatron-Core no longer overwrites them: then drop the copy."""
    assert ranks(1).run(logits_after_cross_entropy, CASE) == [False]
    [both] = ranks(1).run(measure, CASE.at("TP1PP1", settings=replace(SETTINGS, skip_lm_loss=False)))
    for name in ("logits_loss", "intermediate_loss"):
        assert number_of(both, name) == number_of(reference, name)


@pytest.mark.ranks
def test_layouts_that_cannot_work_are_refused(ranks):
    assert all("set vp 1" in message for message in ranks(2).run(refused, CASE.at("TP1PP2VP2")))
