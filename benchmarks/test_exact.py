"""What does not depend on the machine's mood: parameters, bytes on disk, quantizers, and what ranks tell each other in a step.

These figures are of kind "exact": the same in each run on one platform, so any change of them is a change of the code. Here they are only
held to what must be true of them; that they stay as they are is for the comparison of runs.

Messages are counted where torch hands them to the backend (the operators `c10d::*`), so none is missed, whoever sends it. Bytes are those
that a rank hands in: the whole tensor of an all-reduce, its own share of an all-gather, the tensor of a message to another stage. What a
rank tells itself (groups of one) and barriers do not count.
"""

import pytest

LAYOUTS = {"TP1PP1": {}, "TP2PP1": {"tp": 2}, "TP1PP2": {"pp": 2}}
SEQ, MICRO_BATCH, MICRO_BATCHES = 64, 2, 4
TEACHER_WIDTH = 2  # of the student's
TABLE_OF_CONTENTS = ".metadata"
"""Of a checkpoint's weights. It holds the name of the folder that was written to first, with the number of a process: of varying length."""
LOGITS = (16, 2, 2048)


def _size(layout):
    return max(LAYOUTS[layout].values(), default=1)


def count_parameters(name, layout):
    """Of this rank."""
    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, parallel

    with parallel(Topology(**LAYOUTS[layout])) as topology:
        chunks = build_model(preset(name), topology, seed=None)
        return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def _expected_parameters(config, tp):
    """Over all ranks; norms are on each tensor-parallel one."""
    heads = config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_query_groups * config.head_dim
    layer = config.hidden_size * (2 * heads + keys_and_values + 3 * config.ffn_hidden_size)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return config.num_layers * layer + 2 * config.padded_vocab_size * config.hidden_size + tp * norms


@pytest.mark.parametrize("name", ["tiny", "68m"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters(ranks, figure, name, layout):
    from nemo_opt.models.config import preset

    of_ranks = ranks(_size(layout)).run(count_parameters, name, layout)
    assert sum(of_ranks) == _expected_parameters(preset(name), LAYOUTS[layout].get("tp", 1))
    figure(bench="parameters", case=f"{name}, {layout}", metric="of all ranks", value=sum(of_ranks), kind="exact")
    figure(bench="parameters", case=f"{name}, {layout}", metric="of the largest rank", value=max(of_ranks), kind="exact")


def measure_files():
    """Bytes of the files of a checkpoint and of an FP8 export of the tiny Llama, each written twice; and of its parameters."""
    import tempfile
    from pathlib import Path

    import torch

    from nemo_opt.checkpoint import save_checkpoint
    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize import Quantizer, calibration_loop

    def sizes(folder):
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != TABLE_OF_CONTENTS]
        return {str(file.relative_to(folder)): file.stat().st_size for file in files}

    with parallel(Topology()) as topology, tempfile.TemporaryDirectory() as folder:
        chunks = build_model(preset("tiny"), topology, seed=1)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in chunks[0].parameters())
        written = {"checkpoint": [], "FP8 export": []}
        for copy in ("a", "b"):
            save_checkpoint(Path(folder, copy), chunks, topology=topology)
            written["checkpoint"].append(sizes(Path(folder, copy)))
        tokens = torch.arange(SEQ, device="cuda")[None]
        quantizer = Quantizer({"algorithm": "fp8"}, {"path": folder, "export_format": "hf"})
        quantizer.quantize(chunks, calibration_loop([{"tokens": tokens, "position_ids": tokens}]))
        for copy in ("c", "d"):
            quantizer.export(chunks, Path(folder, copy))
            written["FP8 export"].append(sizes(Path(folder, copy)))
    return written, weights


def test_bytes_on_disk(ranks, figure):
    written, weights = ranks(1).run(measure_files)[0]
    total = {}
    for name, (first, second) in written.items():
        assert first == second, f"{name}: two copies differ in size"
        total[name] = sum(first.values())
    assert weights < total["checkpoint"] < 1.1 * weights, "a checkpoint is the weights and some description"
    assert total["FP8 export"] < 0.7 * total["checkpoint"], "matrices have a byte a weight, embedding and head two or four"
    for name, size in total.items():
        figure(
            bench="bytes on disk", case=f"tiny, {name}", metric="of all files but the table of contents", value=size, unit="B", kind="exact"
        )


def count_quantizers(algorithm):
    """(of weights, of other tensors) that are enabled."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize import Quantizer

    with parallel(Topology()) as topology:
        (model,) = build_model(preset("tiny"), topology, seed=None)
        mtq.quantize(model, Quantizer({"algorithm": algorithm}).quant_cfg | {"algorithm": None})
        names = [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and module.is_enabled]
    weights = sum("weight_quantizer" in name for name in names)
    return weights, len(names) - weights


def test_quantizers(ranks, figure):
    from nemo_opt.quantize.config import ALGORITHMS

    for algorithm in sorted(ALGORITHMS):
        weights, others = ranks(1).run(count_quantizers, algorithm)[0]
        two_formats = algorithm == "w4a8_awq"  # one after the other
        assert weights == 4 * 4 * (2 if two_formats else 1), "four linears in each of four layers"
        case = f"tiny, {algorithm}"
        figure(bench="quantizers", case=case, metric="of weights", value=weights, kind="exact")
        figure(bench="quantizers", case=case, metric="of activations", value=others, kind="exact")


def _counting():
    """A context that counts what this rank tells others: {operator: [calls, bytes]}."""
    import torch
    from torch.distributed import ProcessGroup
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            if func.namespace == "c10d" and ProcessGroup.unbox(groups[0]).size() > 1:
                name = func._schema.name.removeprefix("c10d::").strip("_")
                handed_in = args[1] if name in _INPUT_SECOND else args[0]
                tensors = [leaf for leaf in tree_leaves(handed_in) if hasattr(leaf, "element_size")]
                count = self.counts.setdefault(name, [0, 0])
                count[0] += 1
                count[1] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return func(*args, **(kwargs or {}))

    return Counting()


_INPUT_SECOND = ("allgather", "allgather_base", "reduce_scatter", "reduce_scatter_base", "alltoall_base", "alltoall", "gather")
"""Operators whose first argument is what they write."""
_NO_COLLECTIVE = ("send", "recv", "recv_any_source", "barrier")


def _collectives(counts):
    """[calls, bytes] of all collectives."""
    return [sum(column) for column in zip((0, 0), *(value for name, value in counts.items() if name not in _NO_COLLECTIVE), strict=True)]


def count_step(layout, *, distils):
    """What this rank tells others in a training step; the first step, in which groups are made, does not count."""
    import torch

    from nemo_opt.distill import DistillationConfig, convert_to_distillation_model, distillation_loss_fn
    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.training.config import TrainingConfig
    from nemo_opt.training.loop import TrainingRun

    config = preset("tiny")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (MICRO_BATCH, SEQ + 1), generator=generator).to("cuda")
    positions = torch.arange(SEQ, device="cuda").expand(MICRO_BATCH, -1).contiguous()
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions}
    batch |= {"loss_mask": torch.ones(MICRO_BATCH, SEQ, device="cuda"), "attention_mask": None}
    training = TrainingConfig(
        max_steps=100, seq_length=SEQ, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH * MICRO_BATCHES, lr=1e-4
    )
    with parallel(Topology(**LAYOUTS[layout])) as topology:
        chunks, loss_fn = build_model(config, topology, seed=1), None
        if distils:
            (teacher,) = build_model(config.with_(hidden_size=TEACHER_WIDTH * config.hidden_size), topology, seed=2)
            teacher.eval().requires_grad_(False)
            chunks, loss_fn = convert_to_distillation_model(chunks[0], teacher, DistillationConfig()), distillation_loss_fn
        run = TrainingRun(chunks=chunks, config=training, topology=topology, loss_fn=loss_fn)
        run.step(iter([batch] * MICRO_BATCHES))
        counts = []
        for _ in range(2):
            with _counting() as counting:
                run.step(iter([batch] * MICRO_BATCHES))
            counts.append(counting.counts)
        assert counts[0] == counts[1], "two steps differ"
        message = MICRO_BATCH * SEQ * config.hidden_size * next(chunks[0].parameters()).element_size()
    return counts[0], message


@pytest.mark.parametrize("does", ["training", "distillation"])
@pytest.mark.parametrize("layout", ["TP2PP1", "TP1PP2"])
def test_messages_of_a_step(ranks, figure, does, layout):
    everyone, messages = zip(*ranks(2).run(count_step, layout, distils=does == "distillation"), strict=True)
    names = {"bench": f"messages of a {does} step", "case": f"tiny, {layout}", "kind": "exact"}
    collectives = [_collectives(counts) for counts in everyone]
    assert all(calls > 0 for calls, _ in collectives)
    if layout == "TP2PP1":
        assert everyone[0] == everyone[1], "tensor-parallel ranks must take part in the same collectives"
        assert "send" not in everyone[0]
    else:
        for way, counts, peer in (("forwards", everyone[0], everyone[1]), ("backwards", everyone[1], everyone[0])):
            assert counts["send"] == peer["recv"], "what one stage sends the other one receives"
            assert counts["send"][0] == MICRO_BATCHES
            assert counts["send"][1] >= MICRO_BATCHES * messages[0]
            figure(**names, metric=f"messages {way}", value=counts["send"][0], limit=MICRO_BATCHES)
            both_models = 1 + TEACHER_WIDTH if (does, way) == ("distillation", "forwards") else 1  # a frozen teacher has no gradient
            limit = MICRO_BATCHES * messages[0] * both_models
            figure(**names, metric=f"bytes {way}", value=counts["send"][1], unit="B", limit=limit)
    figure(**names, metric="collectives of both ranks", value=sum(calls for calls, _ in collectives))
    figure(**names, metric="bytes handed to collectives by both ranks", value=sum(size for _, size in collectives), unit="B")


def count_loss():
    """{who: (result, counts)} of the loss on logits, forward and backward, and bytes of one rank's logits."""
    from types import SimpleNamespace

    import torch
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    from nemo_opt.distill.divergence import divergence
    from nemo_opt.parallel import Topology, parallel

    with parallel(Topology(tp=2)):
        group = torch.distributed.group.WORLD
        generator = torch.Generator().manual_seed(group.rank())
        student, teacher = (torch.randn((*LOGITS[:2], LOGITS[2] // 2), generator=generator).to("cuda").requires_grad_() for _ in range(2))
        modelopts = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2))
        found = {}
        for name, loss in (
            ("ModelOpt", lambda: modelopts(student, teacher.detach())[0]),
            ("ours", lambda: divergence(student, teacher, group=group)),
        ):
            student.grad = None
            with _counting() as counting:
                loss().sum().backward()
            found[name] = counting.counts, student.grad.cpu()
        torch.testing.assert_close(found["ours"][1], found["ModelOpt"][1], rtol=0.0, atol=1e-6)
    return {name: _collectives(counts) for name, (counts, _) in found.items()}


def test_messages_of_the_loss_on_logits(ranks, figure):
    first, second = ranks(2).run(count_loss)
    assert first == second
    names = {"bench": "messages of the loss on logits", "case": f"TP2, {list(LOGITS)}", "kind": "exact", "peer": "ModelOpt's LogitsKLLoss"}
    tokens = LOGITS[0] * LOGITS[1]
    assert first["ours"][1] >= tokens * 4, "each token's sum must be told"
    figure(**names, metric="collectives of a rank", value=first["ours"][0], peer_value=first["ModelOpt"][0], limit=1, goal=1)
    figure(**names, metric="bytes handed in by a rank", value=first["ours"][1], unit="B", peer_value=first["ModelOpt"][1])
