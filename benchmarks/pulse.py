"""Short measurements for `nemo-opt bench compare`: one step each of what this project exists for, of a library that another tree holds.

This file is that of the tree that compares; `nemo_opt` is the measured tree's. A measuring process (`serve`) forks fresh ranks for each
pair; these set their measurement up once, then take turns with the other tree's ranks, second by second, so that whatever slows this
machine slows both. The result of each turn is checked: a step that computes nothing is fast.
"""

import itertools
import json
import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SEQ, MICRO_BATCH = 128, 2


@dataclass(frozen=True)
class Pulse:
    """A measurement: what it is called in a report, on how many ranks it runs, and the function that prepares it on each."""

    bench: str
    case: str
    ranks: int
    prepare: str


PULSES = (
    Pulse("distillation step", "TP1PP2, 4 microbatches", 2, "distillation_step"),
    Pulse("distillation step", "TP2PP1", 2, "distillation_step_tp"),
    Pulse("calibration", "fp8, TP1PP2", 2, "calibration"),
    Pulse("loss on logits", "TP1PP1", 1, "loss_on_logits"),
)


# ---------------------------------------------------------------------------------------------------------------- in ranks


def live(number, address):
    """The life of a pair on one rank: prepares `PULSES[number]`, then runs it at each byte from the address, until another one comes."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    step = globals()[PULSES[number].prepare]()
    is_first = dist.get_rank() == 0
    cores = _one_core_a_turn() if PULSES[number].ranks == 1 else itertools.repeat(None)
    with socket.socket(socket.AF_UNIX) as connection:
        if is_first:
            connection.connect(address)
        while _is_a_turn(connection, is_first):
            next(cores)
            _together()
            start, processor_start = time.perf_counter(), time.process_time()
            result = step()
            _together()
            time_s, processor_s = time.perf_counter() - start, _of_all_ranks(time.process_time() - processor_start)
            if not math.isfinite(result) or result == 0.0:
                raise AssertionError(f"{PULSES[number]}: computed {result}")
            if is_first:
                connection.sendall(json.dumps({"time_s": time_s, "processor_s": processor_s, "result": result}).encode() + b"\n")


def _one_core_a_turn():
    """Moves this process to the next core each time, as the other tree's does, which takes the same turns: a process that is alone stays on
    one core, and for a while that one may be the slower: by 8 % in one of four processes that were looked at."""
    if not hasattr(os, "sched_setaffinity"):
        yield from itertools.repeat(None)
    for core in itertools.cycle(sorted(os.sched_getaffinity(0))):
        os.sched_setaffinity(0, {core})
        yield


def _is_a_turn(connection, is_first):
    import torch
    import torch.distributed as dist

    message = torch.tensor([int(connection.recv(1) == b"t")]) if is_first else torch.zeros(1, dtype=torch.long)
    message = message.to("cuda")
    dist.broadcast(message, 0)
    return bool(message.item())


def _of_all_ranks(seconds):
    import torch
    import torch.distributed as dist

    total = torch.tensor([seconds], dtype=torch.float64).to("cuda")
    dist.all_reduce(total)
    return total.item()


def _together():
    import torch
    import torch.distributed as dist

    torch.cuda.synchronize()
    dist.barrier()


def _sizes(hidden):
    from nemo_opt.models.config import ModelConfig

    heads = hidden // 32
    return ModelConfig(
        num_layers=4, hidden_size=hidden, ffn_hidden_size=3 * hidden, num_attention_heads=heads, num_query_groups=heads // 2,
        vocab_size=4096, max_position_embeddings=SEQ,
    )  # fmt: skip


def _batches(count):
    import torch

    generator = torch.Generator().manual_seed(0)

    def batch():
        tokens = torch.randint(1, 4096, (MICRO_BATCH, SEQ + 1), generator=generator)
        values = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(MICRO_BATCH, SEQ)}
        values["position_ids"] = torch.arange(SEQ).expand(MICRO_BATCH, -1)
        return {name: value.contiguous().to("cuda") for name, value in values.items()} | {"attention_mask": None}

    return [batch() for _ in range(count)]


def distillation_step(tp=1, pp=2):
    from nemo_opt.distill import DistillationConfig, convert_to_distillation_model, distillation_loss_fn
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import Topology, initialize
    from nemo_opt.training.config import TrainingConfig
    from nemo_opt.training.loop import TrainingRun

    topology = initialize(Topology(tp=tp, pp=pp))
    (student,), (teacher,) = build_model(_sizes(128), topology, seed=1), build_model(_sizes(256), topology, seed=2)
    chunks = convert_to_distillation_model(student, teacher.eval().requires_grad_(False), DistillationConfig())
    settings = TrainingConfig(max_steps=1000, seq_length=SEQ, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * 4, lr=1e-5)
    run = TrainingRun(chunks=chunks, config=settings, topology=topology, loss_fn=distillation_loss_fn)
    batches = _batches(4)
    return lambda: run.step(iter(batches))["kd_loss"]


def distillation_step_tp():
    return distillation_step(tp=2, pp=1)


def calibration():
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import Topology, initialize
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.quantize.config import QuantizationConfig
    from nemo_opt.quantize.quantizer import Quantizer
    from nemo_opt.quantize.tensors import amax_by_name

    topology = initialize(Topology(pp=2))
    loop = calibration_loop(_batches(8))

    def step():
        chunks = build_model(_sizes(256), topology, seed=1)
        Quantizer(QuantizationConfig(algorithm="fp8")).quantize(chunks, loop)
        return float(sum(amax.double().sum() for amax in amax_by_name(chunks).values()))

    return step


def loss_on_logits():
    import torch

    from nemo_opt.distill.divergence import divergence

    generator = torch.Generator().manual_seed(0)
    # Once is 50 ms, less than what the system's own work now and then takes. Several tensors, so that no single place in memory decides.
    pairs = [[torch.randn((512, 2, 8192), generator=generator).to("cuda") for _ in range(2)] for _ in range(5)]
    for student, _ in pairs:
        student.requires_grad_()

    def once(student, teacher):
        student.grad = None
        loss = divergence(student, teacher).sum()
        loss.backward()
        return loss.item() * student.grad.abs().sum().item()

    return lambda: sum(once(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------------- measuring process


def serve():
    """Answers each line `{"pulse": number, "address": socket}` on stdin, when its ranks have ended, with `{"failure": text or null}`."""
    from nemo_opt.launch import ALLOCATOR_ENV
    from nemo_opt.testing.ranks import RankError, RankPool, prepare

    os.environ.update(ALLOCATOR_ENV)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what upstream prints is no answer
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        failure = None
        try:
            pool = RankPool(PULSES[request["pulse"]].ranks)
            try:
                pool.run(live, request["pulse"], request["address"], timeout_s=300.0)
            finally:
                pool.close()
        except RankError as error:
            failure = str(error)
        answers.write(json.dumps({"failure": failure}) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import pulse  # functions travel to ranks by their module's name, which must not be __main__

    pulse.serve()
