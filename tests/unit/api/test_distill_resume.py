"""A distillation that is interrupted and goes on ends where it would have ended: to the bit at its layout, to rounding at another.

The student is narrower than the teacher, so that a projection between their hidden states is trained along, on the last pipeline stage.
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import pytest

import nemo_opt.api as api
from nemo_opt.checkpoint.info import read_info
from nemo_opt.checkpoint.manifest import read_manifest
from nemo_opt.checkpoint.safe_unpickle import inspect_weights
from nemo_opt.data.tokenizer import train_tokenizer
from nemo_opt.distill.config import DistillationConfig
from nemo_opt.errors import CheckpointError
from nemo_opt.models.config import ModelConfig
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.training.config import TrainingConfig

pytestmark = [pytest.mark.ranks, pytest.mark.wide]

STUDENT = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2, vocab_size=384, max_position_embeddings=32
)
TEACHER = STUDENT.with_(num_layers=4, hidden_size=32)
PAIRS = [("decoder.final_layernorm", "decoder.final_layernorm"), ("decoder.layers.0", "decoder.layers.1", "mse")]
TRAINING = TrainingConfig(
    max_steps=5, lr_decay_steps=5, seq_length=16, micro_batch_size=2, global_batch_size=4, lr=1e-2, warmup_steps=2, val_check_interval=4,
    limit_val_batches=1,
)  # fmt: skip
TOL_REL = 1e-5
"""float32 sums in another order, through Adam; the largest seen is 3.6e-6, of a loss on logits of 0.006"""
SPEEDS = ("tokens_per_s", "step_time_s")


class StoppedError(Exception):
    """What happens to a run in these tests."""


@dataclass(frozen=True)
class Outcome:
    """What a run reached, with what is not a matter of time."""

    result: dict
    metrics: list


def build(root):
    """A teacher, a student, and the student quantised."""
    from nemo_opt.checkpoint.save import save_checkpoint
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import parallel

    for name, sizes, seed in (("teacher", TEACHER, 1), ("wider", TEACHER.with_(hidden_size=64), 1), ("student", STUDENT, 2)):
        with parallel(Topology()) as topology:
            save_checkpoint(
                root / name, build_model(sizes, topology, spec="local", seed=seed), topology=topology, tokenizer_dir=root / "tokenizer"
            )
    calibration = QuantizationConfig(
        algorithm="int4", awq_block_size=16, calibration_dataset="builtin", calibration_dataset_size=2, calibration_batch_size=2,
        calibration_seq_len=16,
    )  # fmt: skip
    api.ptq(
        checkpoint=str(root / "student"),
        quantization=calibration,
        export=ExportConfig(path=str(root / "int4"), export_format="nemo"),
        data=data(root, global_batch_size=2),
        topology=Topology(),
        eval_batches=0,
        spec="local",
    )


def data(root, **changes):
    values = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4, "index_mapping_dir": str(root / "index")}
    return api.data_config(**(values | changes))


def distil(root, layout, student, output, *, interrupt_at=None, **settings):
    """One run, interrupted in the step after `interrupt_at`."""
    from nemo_opt.training.loop import TrainingRun
    from nemo_opt.training.metrics_log import read_metrics

    step = TrainingRun.step

    def interrupted(run, batches):
        if run.iteration == interrupt_at:
            raise StoppedError
        return step(run, batches)

    arguments = {
        "student": str(root / student),
        "teacher": str(root / "teacher"),
        "output": str(root / output),
        "distillation": DistillationConfig(intermediate_layer_pairs=PAIRS, skip_lm_loss=False),
        "data": data(root),
        "training": TRAINING,
        "topology": Topology.from_name(layout),
        "eval_batches": 2,
        "spec": "local",
        "log_dir": str(root / f"{output}-log"),
        "save_interval": 2,
    }
    result = None
    try:
        with patch.object(TrainingRun, "step", interrupted):
            result = api.distill(**(arguments | settings)).to_dict()
    except StoppedError:
        pass
    metrics = [{k: v for k, v in line.items() if k not in SPEEDS} for line in read_metrics(root / f"{output}-log")]
    return Outcome(result, metrics)


def loss_of(root, path):
    return api.evaluate(path=str(path), data=data(root), topology=Topology(), eval_batches=2, spec="local").loss


@pytest.fixture(scope="module")
def root(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("distil")
    train_tokenizer(api.builtin_corpus().read_text().splitlines()[:40], STUDENT.vocab_size, path / "tokenizer")
    ranks(1).run(build, path)
    return path


@pytest.fixture(scope="module")
def straight(ranks, root):
    """The run of five steps on one rank, by student."""
    return {student: ranks(1).run(distil, root, "TP1PP1", student, f"{student} straight")[0] for student in ("student", "int4")}


@pytest.fixture(scope="module")
def left(ranks, root, straight):
    """What a run on one rank that ended in its fourth step has left, by student."""
    for student in straight:
        ranks(1).run(distil, root, "TP1PP1", student, f"{student} interrupted", interrupt_at=3)
    return {student: root / f"{student} interrupted-resume" for student in straight}


def weights(path):
    """Checksums of the files that hold the tensors."""
    return {name: entry.sha256 for name, entry in read_manifest(path).items() if name.endswith(".distcp")}


def stored(path):
    """Names of the tensors of a checkpoint."""
    return set(inspect_weights(read_info(path).weights_dir).state_dict_metadata)


def test_what_is_left_holds_the_projection_and_its_moments(root, left):
    for student, path in left.items():
        info = read_info(path)
        assert (info.iteration, info.consumed_samples, info.has_optimizer, info.has_modelopt_state) == (2, 8, True, student == "int4")
        assert not (root / f"{student} interrupted").exists()
    names = stored(left["student"])
    projection = {name for name in names if name.startswith("_loss_modules.")}
    assert len(projection) == 2, "weight and bias, which both pairs share"
    assert {f"optimizer.state.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in projection} < names
    assert not any("_loss_modules" in name or "optimizer" in name for name in stored(root / "student straight"))


@pytest.mark.parametrize("student", ["student", "int4"])
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(ranks, root, straight, left, student):
    [resumed] = ranks(1).run(distil, root, "TP1PP1", left[student], f"{student} resumed", resume=True)
    assert resumed.metrics == [line for line in straight[student].metrics if line["step"] > 2]
    assert weights(root / f"{student} resumed") == weights(root / f"{student} straight")
    assert (resumed.result["steps"], resumed.result["resumed_at"]) == (5, 2)
    [ordinary] = ranks(1).run(loss_of, root, left[student])
    assert resumed.result["loss_before"] == ordinary != straight[student].result["loss_before"], "that of the student as it was left"
    assert left[student].exists(), "it is not this output's"


@pytest.mark.parametrize("student", ["student", "int4"])
def test_so_does_one_over_stages_which_clears_up(ranks, root, student):
    name = f"{student} TP1PP2"
    straight, *_ = ranks(2).run(distil, root, "TP1PP2", student, f"{name} straight")
    ranks(2).run(distil, root, "TP1PP2", student, name, interrupt_at=3)
    page = root / f"{name}.html"
    first, second = ranks(2).run(distil, root, "TP1PP2", root / f"{name}-resume", name, resume=True, report=str(page))
    assert first.metrics == straight.metrics, "lines of steps that were done again are there once"
    assert [line["step"] for line in first.metrics if "kd_loss" in line] == [1, 2, 3, 4, 5]
    assert weights(root / name) == weights(root / f"{name} straight")
    assert sorted(path.name for path in root.iterdir() if "TP1PP2-resume" in path.name) == []
    assert page.read_text().count("<svg") == 3
    assert first.result["peak_memory_bytes"] == second.result["peak_memory_bytes"] > 0


@pytest.mark.parametrize("layout", ["TP1PP2", "TP2PP1SP"])
def test_it_goes_on_at_another_layout(ranks, root, straight, left, layout):
    resumed, _ = ranks(2).run(distil, root, layout, left["student"], f"elsewhere {layout}", resume=True)
    for name in ("loss_after", "kd_loss_last", "logits_loss_last", "intermediate_loss_last"):
        assert resumed.result[name] == pytest.approx(straight["student"].result[name], rel=TOL_REL)


def test_an_output_with_its_optimizer_is_trained_for_more_steps(ranks, root, straight):
    shorter = replace(TRAINING, max_steps=3)
    [three] = ranks(1).run(distil, root, "TP1PP1", "student", "three", training=shorter, save_optimizer=True, save_interval=0)
    assert three.result["resumable"] == str(root / "three")
    [five] = ranks(1).run(distil, root, "TP1PP1", "three", "five", resume=True)
    assert three.metrics[:3] + five.metrics == straight["student"].metrics
    assert weights(root / "five") == weights(root / "student straight")
    assert five.result["resumable"] is None


def halves(root, name, *, resume=False, save=False, **changes):
    """Losses and weights of a run in bfloat16, whose optimizer has a float32 copy of all that it trains."""
    import torch

    from nemo_opt.data.batches import batches
    from nemo_opt.distill.convert import convert_to_distillation_model
    from nemo_opt.distill.losses import distillation_loss_fn
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import parallel
    from nemo_opt.testing.parity import TokenSamples
    from nemo_opt.training.loop import train

    with parallel(Topology()) as topology:
        build = partial(build_model, topology=topology, spec="te", dtype=torch.bfloat16)
        student, teacher = build(STUDENT, seed=3 if resume else 2), build(TEACHER, seed=1)
        chunks = convert_to_distillation_model(student, teacher[0], DistillationConfig(intermediate_layer_pairs=PAIRS))
        samples = TokenSamples(64, TRAINING.seq_length, STUDENT.vocab_size, seed=3)
        trained = train(
            chunks,
            config=replace(TRAINING, limit_val_batches=0, **changes),
            topology=topology,
            train_batches=lambda start: batches(samples, micro_batch_size=2, dp_rank=0, dp_size=1, start_sample=start),
            loss_fn=distillation_loss_fn,
            resume=root / name if resume else None,
            on_end=(lambda run: run.save(root / name)) if save else None,
        )
        rows = [{k: v for k, v in row.items() if k not in SPEEDS} for row in trained.history]
        return rows, {key: tensor.float() for key, tensor in chunks[0].named_parameters() if "_teacher_model" not in key}


def test_so_does_one_in_half_precision(ranks, root):
    import torch

    [(rows, expected)] = ranks(1).run(halves, root, "half")
    [(first, _)] = ranks(1).run(halves, root, "half", save=True, max_steps=2)
    [(rest, weights)] = ranks(1).run(halves, root, "half", resume=True)
    assert first + rest == rows
    assert any("_loss_modules" in key for key in weights)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def _mismatch(root, layout, *arguments, **settings):
    with pytest.raises(CheckpointError) as caught:
        distil(root, layout, *arguments, resume=True, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [("wider", r"_loss_modules\.\d.* has shape \(32,.* in the checkpoint and \(64,"), ("student", "unexpected _loss_modules")],
)
def test_another_teacher_is_refused_on_every_rank(ranks, root, left, teacher, message):
    for text in ranks(2).run(_mismatch, root, "TP1PP2", left["student"], "refused", teacher=str(root / teacher)):
        assert re.search(message, text)
    assert not (root / "refused").exists()
