"""Training on layouts: the same losses everywhere, the metrics log, validation, divergence, and resume."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.testing.parity import TINY, TINY_MOE, TokenSamples
from nemo_opt.training.config import TrainingConfig

SETTINGS = {"seq_length": 16, "global_batch_size": 4, "micro_batch_size": 1, "lr": 3e-3, "limit_val_batches": 2}

# float32 sums in another order, through Adam: measured 4e-7 over the layouts below after 4 steps
TOL_REL = 1e-5


def _batches(topology, samples=64):
    from megatron.core import parallel_state

    from nemo_opt.data.batches import batches

    dataset = TokenSamples(samples, 16, TINY.vocab_size, seed=3)

    def from_sample(start=0):
        dp_rank = parallel_state.get_data_parallel_rank()
        return batches(dataset, micro_batch_size=1, dp_rank=dp_rank, dp_size=topology.dp, start_sample=start)

    return from_sample


def _train(name, *, spec="local", model=TINY, log_dir=None, **changes):
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import train

    log = []
    with parallel.parallel(parallel.Topology.from_name(name), model=model) as topology:
        config = TrainingConfig(**({"max_steps": 4} | SETTINGS | changes))
        data = _batches(topology)
        result = train(
            build_model(model, topology, spec=spec),
            config=config,
            topology=topology,
            train_batches=data,
            valid_batches_fn=data,
            log_dir=log_dir,
            on_start=lambda run: log.append(("start", run.iteration)),
            on_interval=lambda run: log.append(("interval", run.iteration)),
            interval=2,
            on_end=lambda run: log.append(("end", run.iteration, run.consumed_samples)),
        )
    assert log == [("start", 0), ("interval", 2), ("end", config.max_steps, 4 * config.max_steps)]
    return result


@pytest.fixture(scope="module")
def single(ranks):
    [result] = ranks(1).run(_train, "TP1PP1")
    return result


@pytest.mark.ranks
def test_training_lowers_the_loss_and_says_what_it_did(single):
    assert single.steps == 4
    assert single.losses[0] == pytest.approx(math.log(120), rel=0.1)  # uniform over the vocabulary, plus the initial weights' noise
    assert single.losses[-1] < single.losses[0]
    assert set(single.validation_losses) == {4}
    assert single.validation_loss == single.validation_losses[4]
    assert single.tokens_per_s == pytest.approx(4 * 16 / single.step_time_s)
    assert [row["step"] for row in single.history] == [1, 2, 3, 4]
    assert [row["loss"] for row in single.history] == single.losses
    assert ["validation_loss" in row for row in single.history] == [False, False, False, True]
    assert 1e8 < single.peak_memory_bytes < 1e11, "the process alone holds more than the first"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("TP1PP2VP2", "local"),
        ("TP1PP1DP2", "te"),
        pytest.param("TP2PP1SP", "te", marks=pytest.mark.wide),
        pytest.param("TP1PP1CP2", "te", marks=pytest.mark.wide),
    ],
)
def test_every_layout_trains_alike(ranks, single, layout, spec):
    validation = {"limit_val_batches": 1} if "DP2" in layout else {}  # batches of each of the two ranks
    for result in ranks(2).run(_train, layout, spec=spec, **validation):
        assert result.losses == pytest.approx(single.losses, rel=TOL_REL)
        assert result.validation_loss == pytest.approx(single.validation_loss, rel=TOL_REL)


def _norms(name, model, spec):
    """Gradient norms of three steps, which count every shard once and every replica not at all."""
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import TrainingRun

    with parallel.parallel(parallel.Topology.from_name(name), model=model) as topology:
        run = TrainingRun(chunks=build_model(model, topology, spec=spec), config=TrainingConfig(max_steps=3, **SETTINGS), topology=topology)
        data = iter(_batches(topology)())
        return [run.step(data)["grad_norm"] for _ in range(3)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "model", "spec"),
    [
        ("TP1PP2", TINY.with_(tie_embeddings=True), "te"),
        ("TP1PP1EP2", TINY_MOE, "te"),
        pytest.param("TP2PP2", TINY, "te", marks=pytest.mark.wide),
        pytest.param("TP2PP1SP", TINY, "local", marks=pytest.mark.wide),
    ],
)
def test_gradient_norm_is_that_of_one_rank(ranks, layout, model, spec):
    from nemo_opt.parallel import Topology

    [expected] = ranks(1).run(_norms, "TP1PP1", model, spec)
    for norms in ranks(Topology.from_name(layout).world_size).run(_norms, layout, model, spec):
        assert norms == pytest.approx(expected, rel=TOL_REL)


@pytest.mark.ranks
def test_metrics_log_has_a_line_a_step(ranks, tmp_path):
    first, second = ranks(2).run(_train, "TP1PP1DP2", log_dir=tmp_path, val_check_interval=2, warmup_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first.peak_memory_bytes == second.peak_memory_bytes
    merged = [{k: v for line in lines if line["step"] == row["step"] for k, v in line.items()} for row in first.history]
    assert merged == first.history
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"step", "loss", "grad_norm", "lr", "tokens_per_s", "step_time_s"} == set(steps[0])
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    # linear to lr over two steps, then a cosine over four
    assert [line["lr"] for line in steps] == pytest.approx([1.5e-3, 3e-3, 3e-3 * 0.5 * (1 + math.cos(math.pi / 3)), 7.5e-4])


def _train_with_nan(name, explain):
    """Rank 0 meets a weight that is not a number before its second step; returns the error and whether the weights were spared."""
    import torch

    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import DivergedError, TrainingRun

    with parallel.parallel(parallel.Topology.from_name(name)) as topology:
        config = TrainingConfig(max_steps=4, **SETTINGS)
        run = TrainingRun(chunks=build_model(TINY, topology, spec="local"), config=config, topology=topology, explain=explain)
        data = iter(_batches(topology)())
        run.step(data)
        parameter = next(p for n, p in run.chunks[0].named_parameters() if "linear_proj" in n)
        if torch.distributed.get_rank() == 0:
            with torch.no_grad():
                parameter[0, 0] = math.nan
        finite = [p.detach().clone() for p in run.chunks[0].parameters()]
        with pytest.raises(DivergedError) as caught:
            run.step(data)
        unchanged = all(torch.equal(a.nan_to_num(), p.nan_to_num()) for a, p in zip(finite, run.chunks[0].parameters(), strict=True))
        return str(caught.value), unchanged


def _knows_nothing():
    return None


def _knows_the_same():
    return "the weights are broken"


def _knows_its_rank():
    import torch

    return "rank 1 saw it" if torch.distributed.get_rank() else None


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("explain", "cause"),
    [
        (None, "lower lr or look at the data"),
        (_knows_nothing, "lower lr or look at the data"),
        (_knows_the_same, "the weights are broken on rank [0, 1]"),
        (_knows_its_rank, "rank 1 saw it on rank [1]"),
    ],
)
def test_a_loss_that_is_no_number_stops_every_rank_and_names_the_one(ranks, explain, cause):
    for message, unchanged in ranks(2).run(_train_with_nan, "TP1PP1DP2", explain):
        assert message == f"the loss of step 2 is not finite on rank [0]: {cause}"
        assert unchanged


@pytest.mark.ranks
def test_a_gradient_that_is_no_number_is_found_too(ranks):
    [(message, unchanged)] = ranks(1).run(_overflowing_gradient)
    assert "the gradient of step 1 is not finite on rank [0]" in message
    assert unchanged


def _overflowing_gradient():
    import torch

    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import DivergedError, TrainingRun
    from nemo_opt.training.losses import language_model_loss

    def steep(model, batch):
        inner = language_model_loss(model, batch)

        def reduce(output):
            loss, count, metrics = inner(output)
            return loss * 1e38 * 1e38, count, metrics

        return reduce

    with parallel.parallel(parallel.Topology()) as topology:
        config = TrainingConfig(max_steps=4, **SETTINGS)
        run = TrainingRun(chunks=build_model(TINY, topology, spec="local"), config=config, topology=topology, loss_fn=steep)
        before = [p.detach().clone() for p in run.chunks[0].parameters()]
        with pytest.raises(DivergedError) as caught:
            run.step(iter(_batches(topology)()))
        return str(caught.value), all(torch.equal(a, p) for a, p in zip(before, run.chunks[0].parameters(), strict=True))


def _bad_inputs():
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.evaluate import evaluate
    from nemo_opt.training.loop import TrainingRun, train
    from nemo_opt.training.step import MegatronStep

    with parallel.parallel(parallel.Topology()) as topology:
        chunks = build_model(TINY, topology, spec="local")
        config = TrainingConfig(max_steps=4, **SETTINGS)
        data = _batches(topology, samples=8)
        with pytest.raises(DataError, match="the data ended after 0 of 4 micro-batches"):
            train(chunks, config=config, topology=topology, train_batches=data)
        with pytest.raises(DataError, match="there is no validation batch"):
            evaluate(chunks, [], 2)
        with pytest.raises(DataError, match="the data ended after 2 of 3"):
            evaluate(chunks, list(islice(data(), 2)), 3)
        masked = [batch | {"loss_mask": batch["loss_mask"] * 0} for batch in islice(data(), 2)]
        with pytest.raises(DataError, match="no valid token"):
            evaluate(chunks, masked, 2)
        with pytest.raises(ConfigError, match="num_microbatches must be positive"):
            MegatronStep(model=chunks[0], data_iterator=iter([]), seq_length=16, micro_batch_size=1, num_microbatches=0)
        with pytest.raises(ConfigError, match="global_batch_size"):
            TrainingRun(chunks=chunks, config=TrainingConfig(**(SETTINGS | {"max_steps": 1})), topology=parallel.Topology(dp=3))


@pytest.mark.ranks
def test_bad_input_is_refused(ranks):
    ranks(1).run(_bad_inputs)


def _half_precision(name):
    import torch

    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import TrainingRun

    with parallel.parallel(parallel.Topology.from_name(name)) as topology:
        chunks = build_model(TINY, topology, spec="te", dtype=torch.bfloat16)
        run = TrainingRun(chunks=chunks, config=TrainingConfig(max_steps=2, **SETTINGS), topology=topology)
        data = iter(_batches(topology)())
        losses = [run.step(data)["loss"] for _ in range(2)]
        assert {p.dtype for p in run.chunks[0].parameters()} == {torch.bfloat16}
        assert {p.main_grad.dtype for p in run.chunks[0].parameters()} == {torch.float32}
        return losses


@pytest.mark.ranks
def test_half_precision_trains_with_float32_gradients(ranks, single):
    # bfloat16 holds 8 bits: 2^-9 = 2e-3 an operation; measured 1e-4 on the loss
    assert ranks(2).run(_half_precision, "TP1PP2")[0] == pytest.approx(single.losses[:2], rel=2e-3)


def _experts_without_sequence_parallelism():
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import TrainingRun

    with parallel.parallel(parallel.Topology(tp=2)) as topology, pytest.raises(ConfigError, match="experts with tp 2 needs sequence"):
        TrainingRun(chunks=build_model(TINY_MOE, topology, spec="te"), config=TrainingConfig(max_steps=1, **SETTINGS), topology=topology)


@pytest.mark.ranks
def test_experts_on_tensor_parallel_ranks_need_sequence_parallelism(ranks):
    ranks(2).run(_experts_without_sequence_parallelism)


def _evaluate(name, num_batches):
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.evaluate import evaluate

    with parallel.parallel(parallel.Topology.from_name(name)) as topology:
        chunks = build_model(TINY, topology, spec="local")
        chunks[0].eval()
        loss = evaluate(chunks, _batches(topology)(), num_batches)
        assert [chunk.training for chunk in chunks] == [False, *[True] * (len(chunks) - 1)], "the mode of before is restored"
        assert all(parameter.grad is None for chunk in chunks for parameter in chunk.parameters())
        return loss


@pytest.mark.ranks
def test_interleaved_stages_need_as_many_batches_as_stages(ranks):
    ranks(2).run(_too_few_batches)


def _too_few_batches():
    with pytest.raises(ConfigError, match="1 micro-batches < pp 2"):
        _evaluate("TP1PP2VP2", 1)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP1PP2VP2", *(pytest.param(name, marks=pytest.mark.wide) for name in ("TP2PP1", "TP1PP2"))])
def test_validation_loss_is_that_of_one_rank_on_every_rank(ranks, layout):
    [expected] = ranks(1).run(_evaluate, "TP1PP1", 3)  # an odd number of batches
    assert ranks(2).run(_evaluate, layout, 3) == pytest.approx([expected] * 2, rel=1e-6)


def _train_with_resume(name, folder, steps, resume, spec):
    from nemo_opt import parallel
    from nemo_opt.models.build import build_model
    from nemo_opt.training.loop import train

    with parallel.parallel(parallel.Topology.from_name(name)) as topology:
        config = TrainingConfig(max_steps=steps, lr_decay_steps=4, **(SETTINGS | {"limit_val_batches": 0}))
        result = train(
            build_model(TINY, topology, spec=spec, seed=1 if resume else 1234),
            config=config,
            topology=topology,
            train_batches=_batches(topology),
            resume=Path(folder) / "two" if resume else None,
            log_dir=folder,
            on_end=None if resume else lambda run: run.save(Path(folder) / "two") if run.iteration == 2 else None,
        )
        return result.losses


def _resume_past_the_end(name, folder):
    with pytest.raises(ConfigError, match="two is at step 2 already, max_steps is 2"):
        _train_with_resume(name, folder, 2, True, "te")


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "layout"), [(1, "TP1PP1"), pytest.param(2, "TP2PP1", marks=pytest.mark.wide)])
def test_four_steps_equal_two_steps_saved_and_two_resumed(ranks, tmp_path, size, layout):
    pool = ranks(size)
    [four, *_] = pool.run(_train_with_resume, layout, tmp_path, 4, False, "te")
    [two, *_] = pool.run(_train_with_resume, layout, tmp_path, 2, False, "te")
    [rest, *_] = pool.run(_train_with_resume, layout, tmp_path, 4, True, "te")
    assert two + rest == four
    logged = [(line["step"], line["loss"]) for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert logged == list(enumerate(four, start=1))
    pool.run(_resume_past_the_end, layout, tmp_path)
    [elsewhere, _] = ranks(2).run(_train_with_resume, "TP1PP2", tmp_path, 4, True, "local")
    assert elsewhere == pytest.approx(four[2:], rel=TOL_REL)
