"""A training step of distillation beside ModelOpt's plugin, and beside the student's own step plus the teacher's forward pass.

All run in the same processes, interleaved and in rotating order; each time is that between two barriers, so it is the slowest rank's.
The same weights, samples, wrapper and optimizer: ModelOpt's model is driven as Megatron-LM drives it. Asserted is that both compute the
same loss and the same gradients; figures stand beside their goals. Memory is that of tensors, at its highest in a step. Idle is time inside
messages between pipeline stages.

Limits, as shares of ModelOpt's time:
- without pipeline stages: the student's step and the teacher's forward pass, one after the other, of the same turn;
- over pipeline stages: that work without a bubble and spread evenly, (sum over ranks of time not spent in messages between stages) / ranks.
  The contender is again the two models one after the other, whose own two bubbles are thus left out. What the last stage does once for all
  (the logits) counts as work that could be spread. Messages themselves cost something: no schedule reaches it wholly.

At 128 tokens a short step at TP1PP1 took 0.28 s, of which 0.12 s remained at 8 tokens: launching operations and the optimizer. So the
short set has 256 tokens; what does not grow with them is, reckoned from these, a quarter of its step. The full size computes far more.
"""

import statistics
import time
from contextlib import contextmanager
from functools import partial

import pytest

from nemo_opt.perf.interleave import ratios

LAYOUTS = {"TP1PP1": {}, "TP2PP1": {"tp": 2}, "TP1PP2": {"pp": 2}}
SHAPES = {
    # a student of 10.5 million parameters and, twice as wide, a teacher of 33.6: products of matrices take nearly all of the time
    "full": {"hidden": 256, "layers": 8, "vocabulary": 8192, "seq": 256, "rounds": 6},
    # for many numbers of micro-batches and sizes of the teacher
    "sweep": {"hidden": 128, "layers": 8, "vocabulary": 4096, "seq": 128, "rounds": 4},
    "short": {"hidden": 128, "layers": 4, "vocabulary": 4096, "seq": 256, "rounds": 10},
}
MICRO_BATCH = 2
PAIRS = {"logits": (), "hidden": (("decoder.final_layernorm", "decoder.final_layernorm"),)}
"""What is learnt: the logits, or hidden states too, of the last stage, since ModelOpt compares no others."""
MEMORY_TURNS = 3
GOAL = 1.0
"""Of ModelOpt's time and memory. The student's step and the teacher's forward pass, which know no loss between them, are a limit."""


def compare(layout, pairs, microbatches, teacher_width, hidden, layers, vocabulary, seq, rounds):
    """Seconds of each turn and bytes of each contender on this rank, after they were seen to compute the same."""
    import torch

    from nemo_opt.models.config import ModelConfig
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.testing.memory import extra_bytes
    from nemo_opt.training.config import TrainingConfig

    def sizes(hidden):
        heads = hidden // 32
        return ModelConfig(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=3 * hidden, num_attention_heads=heads, num_query_groups=heads // 2,
            vocab_size=vocabulary, max_position_embeddings=seq,
        )  # fmt: skip

    training = TrainingConfig(
        max_steps=1000, seq_length=seq, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * microbatches, lr=1e-4
    )
    batches = _batches(microbatches, seq, vocabulary)
    with parallel(Topology(**layout)) as topology:
        models = sizes(hidden), sizes(teacher_width * hidden)
        runs, contenders = {}, {}
        for name, make in (("ours", _ours), ("ModelOpt", _modelopts), ("limit", _limit)):
            runs[name], contenders[name] = make(topology, training, *models, pairs, batches)
        _copy_weights(runs["ours"], runs["ModelOpt"])
        first = {name: step() for name, step in contenders.items()}
        _assert_same(first["ours"], first["ModelOpt"], runs["ours"], runs["ModelOpt"])
        times_s, processor_s, idle_s = ({name: [] for name in contenders} for _ in range(3))
        for turn in range(rounds):
            names = list(contenders)
            for name in names[turn % 3 :] + names[: turn % 3]:
                start = time.process_time()
                with _idle_time() as idle:
                    times_s[name].append(_time_s(contenders[name]))
                processor_s[name].append(time.process_time() - start)
                idle_s[name].append(sum(idle))
        last = {name: contenders[name]() for name in ("ours", "ModelOpt")}
        torch.testing.assert_close(last["ours"][0], last["ModelOpt"][0], rtol=1e-3, atol=0.0)  # after some steps of Adam
        extra = {name: [extra_bytes(step) for _ in range(MEMORY_TURNS)] for name, step in contenders.items()}
    return {"time": times_s, "processor": processor_s, "idle": idle_s, "memory": extra}


def _batches(count, seq, vocabulary):
    import torch

    generator = torch.Generator().manual_seed(0)

    def batch():
        tokens = torch.randint(0, vocabulary, (MICRO_BATCH, seq + 1), generator=generator)
        kept = (torch.rand(MICRO_BATCH, seq, generator=generator) > 0.1).float()
        positions = torch.arange(seq).expand(MICRO_BATCH, -1)
        values = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": kept, "position_ids": positions}
        return {name: value.contiguous().to("cuda") for name, value in values.items()} | {"attention_mask": None}

    return [batch() for _ in range(count)]


def _build(topology, student, teacher):
    from nemo_opt.models.build import build_model

    (student_model,), (teacher_model,) = build_model(student, topology, seed=1), build_model(teacher, topology, seed=2)
    return student_model, teacher_model.eval().requires_grad_(False)


def _ours(topology, training, student, teacher, pairs, batches):
    from nemo_opt.distill import DistillationConfig, convert_to_distillation_model, distillation_loss_fn
    from nemo_opt.training.loop import TrainingRun

    settings = DistillationConfig(intermediate_layer_pairs=pairs)
    chunks = convert_to_distillation_model(*_build(topology, student, teacher), settings)
    run = TrainingRun(chunks=chunks, config=training, topology=topology, loss_fn=distillation_loss_fn)

    def step():
        metrics = run.step(iter(batches))
        return metrics["kd_loss"], metrics["grad_norm"]

    return run, step


def _modelopts(topology, training, student, teacher, pairs, batches):
    """ModelOpt's plugin, used as Megatron-LM's training loop uses it."""
    import modelopt.torch.distill as mtd
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from modelopt.torch.distill.plugins import megatron as plugin

    from nemo_opt.training.loop import TrainingRun
    from nemo_opt.training.optimizer import zero_gradients

    student_model, teacher_model = _build(topology, student, teacher)
    config = plugin.DistillationConfig(intermediate_layer_pairs=list(pairs))
    config = plugin.setup_distillation_config(config, student_model.config, teacher_model.config)
    settings = {"teacher_model": teacher_model, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    model = mtd.convert(student_model, mode=[("kd_loss", settings)])
    plugin.adjust_distillation_model_for_mcore(model, config)
    run = TrainingRun(chunks=[model], config=training, topology=topology)

    def masked_sum(mask, losses):
        losses, over_tensor_parallel, _ = losses if isinstance(losses, tuple) else (losses, False, False)
        total = torch.sum(losses.reshape(-1).float() * mask.reshape(-1))
        if over_tensor_parallel:
            torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total

    def reduce(mask, output):
        losses = model.compute_kd_loss(student_loss=masked_sum(mask, output), loss_reduction_fn=partial(masked_sum, mask))
        count = mask.sum()
        report = {name: torch.stack([loss.detach(), count]) for name, loss in losses.items()}
        return losses["kd_loss"], count.to(torch.int), report

    def forward_step(iterator, chunk):
        batch = next(iterator)
        output = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
        return output, partial(reduce, batch["loss_mask"])

    shape = {"seq_length": training.seq_length, "micro_batch_size": training.micro_batch_size}
    widen = {}
    if topology.pp > 1:
        widen["adjust_tensor_shapes_fn"] = plugin.get_tensor_shapes_adjust_fn_for_distillation(run.chunks, **shape, decoder_seq_length=None)

    def step():
        zero_gradients(run.chunks, run.optimizer)
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=run.chunks,
            num_microbatches=len(batches),
            forward_only=False,
            **shape,
            **widen,
        )
        _, grad_norm, _ = run.optimizer.step()
        run.scheduler.step(1)
        total = torch.stack([report["kd_loss"] for report in reports]).sum(0) if reports else torch.zeros(2)
        if topology.pp > 1:
            torch.distributed.broadcast(
                total, parallel_state.get_pipeline_model_parallel_last_rank(), parallel_state.get_pipeline_model_parallel_group()
            )
        return (total[0] / total[1]).item(), float(grad_norm)

    return run, step


def _limit(topology, training, student, teacher, pairs, batches):
    """Both models one after the other, knowing nothing of each other."""
    from nemo_opt.training.forward import forward_loop
    from nemo_opt.training.loop import TrainingRun

    student_model, teacher_model = _build(topology, student, teacher)
    run = TrainingRun(chunks=[student_model], config=training, topology=topology)
    run_teacher = forward_loop(batches, description="")

    def step():
        run_teacher(teacher_model)
        metrics = run.step(iter(batches))
        return metrics["loss"], metrics["grad_norm"]

    return run, step


def _trained(run):
    """Parameters by name; the projection lies elsewhere in each."""
    named = ((name.rpartition("_fit.")[2] if "_fit." in name else name, parameter) for name, parameter in run.chunks[0].named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _copy_weights(source, target):
    """Projections would start from other weights."""
    import torch

    with torch.no_grad():
        for name, parameter in _trained(target).items():
            parameter.copy_(_trained(source)[name])
    target.optimizer.reload_model_params()


def _assert_same(ours, modelopts, our_run, modelopts_run):
    import torch

    torch.testing.assert_close(ours, modelopts, rtol=1e-5, atol=0.0)
    gradients = [{name: parameter.main_grad for name, parameter in _trained(run).items()} for run in (our_run, modelopts_run)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # float32: sums over the vocabulary and over tokens in another order; 1e-6 of the largest was seen
        scale = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0.0, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")


@contextmanager
def _idle_time():
    """Collects the seconds of each message between stages, its waiting included."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    spent, communicate = [], P2PCommunicator._communicate

    def timed(self, **arguments):
        start = time.perf_counter()
        try:
            return communicate(self, **arguments)
        finally:
            spent.append(time.perf_counter() - start)

    P2PCommunicator._communicate = timed
    try:
        yield spent
    finally:
        P2PCommunicator._communicate = communicate


def _time_s(step):
    import torch
    import torch.distributed as dist

    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


CASES = [
    ("short", "logits", 4, 2),
    *(("full", *case) for case in (("logits", 4, 2), ("logits", 8, 2), ("hidden", 4, 2))),
    *(("sweep", "logits", microbatches, width) for microbatches in (4, 8, 16) for width in (1, 2, 4)),
]
"""Size, what is learnt, micro-batches, and how many times as wide as the student the teacher is."""
WITHOUT_STAGES = {(4, 1), (4, 4), (16, 2)}
"""Micro-batches and teachers of the sweep that layouts without pipeline stages have, where no bubble depends on them."""


def _cases():
    for layout in LAYOUTS:
        for shape, *others in CASES:
            if shape != "sweep" or layout == "TP1PP2" or (others[1], others[2]) in WITHOUT_STAGES:
                yield pytest.param(layout, shape, *others, marks=[] if shape == "short" else pytest.mark.wide)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layout", "shape", "learns", "microbatches", "teacher_width"), list(_cases()))
def test_distillation_step(benchmark, figure, ranks, layout, shape, learns, microbatches, teacher_width):
    axes = LAYOUTS[layout]
    pool = ranks(max(axes.values(), default=1))
    sizes = {"microbatches": microbatches, "teacher_width": teacher_width, **SHAPES[shape]}
    arguments = {"layout": axes, "pairs": PAIRS[learns], **sizes, "timeout_s": 800.0}
    everyone = benchmark.pedantic(pool.run, args=(compare,), kwargs=arguments, rounds=1)
    case = f"{layout}, {shape}, {learns}, {microbatches} micro-batches, teacher {teacher_width}x"
    hand_in = partial(figure, bench="distillation step", case=case)
    _hand_in_times(hand_in, everyone, layout)
    for other, peer in _PEERS.items():
        # Over tensor parallel ranks no kind memory: how long a message's buffer lives is a matter of time, ModelOpt's peak moves by 8 %.
        shares = [max(turn) for turn in zip(*(ratios(rank["memory"]["ours"], rank["memory"][other]) for rank in everyone), strict=True)]
        goal = GOAL if other == "ModelOpt" else None
        name, kind = ("peak memory", "ratio") if "TP2" in layout else ("memory", "memory")
        hand_in(metric=f"{name} of {_OF[other]}, worst rank", samples=shares, kind=kind, peer=peer, peer_value=1.0, goal=goal)


_PEERS = {"ModelOpt": "ModelOpt's plugin", "limit": "student step + teacher forward"}
_OF = {"ModelOpt": "ModelOpt's", "limit": "student step and teacher forward"}


def _hand_in_times(hand_in, everyone, layout):
    times_s = everyone[0]["time"]
    # Of all ranks together: waiting does not count, and other load on the machine decides less.
    processor_s = {name: _over_ranks(everyone, lambda rank, name=name: rank["processor"][name]) for name in times_s}
    is_piped = "PP2" in layout
    work_s = _work_s(everyone) if is_piped else times_s["limit"]
    limit = statistics.median(ratios(work_s, times_s["ModelOpt"]))
    for other, peer in _PEERS.items():
        goal = GOAL if other == "ModelOpt" else None
        common = {"peer": peer, "peer_value": 1.0, "goal": goal}
        hand_in(
            metric=f"time of {_OF[other]}",
            samples=ratios(times_s["ours"], times_s[other]),
            limit=limit if other == "ModelOpt" else None if is_piped else 1.0,
            **common,
        )
        hand_in(metric=f"processor time of {_OF[other]}", samples=ratios(processor_s["ours"], processor_s[other]), **common)
    if is_piped:
        for number, rank in enumerate(everyone):
            idle = {name: ratios(rank["idle"][name], times_s[name]) for name in ("ours", "ModelOpt")}
            peer = {"peer": _PEERS["ModelOpt"], "peer_value": statistics.median(idle["ModelOpt"])}
            hand_in(metric=f"idle share of rank {number}", samples=idle["ours"], **peer, limit=0.0)


def _over_ranks(everyone, of_rank):
    """Turn by turn, the sum."""
    return [sum(turn) for turn in zip(*map(of_rank, everyone), strict=True)]


def _work_s(everyone):
    """Of the two models one after the other, a rank's share if no rank waited for another."""
    times_s = everyone[0]["time"]["limit"]
    idle_s = _over_ranks(everyone, lambda rank: rank["idle"]["limit"])
    return [time_s - idle / len(everyone) for time_s, idle in zip(times_s, idle_s, strict=True)]
