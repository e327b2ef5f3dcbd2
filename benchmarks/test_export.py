"""Exports to a Hugging Face directory, plain and FP8, beside one raw `safetensors.save_file` of the same tensors.

The raw save is the limit: what is exported is in memory in its final form (names, types, codes), and is written to one file and flushed to
the disk, as an export is before it has its name. Ours converts too: it gathers each weight, cuts the fused ones, rounds to bfloat16 or
FP8. The peer is ModelOpt's `export_mcore_gpt_to_hf` of the same model, which flushes nothing, so each of its calls is followed by a flush
of its files. All are interleaved on one rank, each to a folder that is not there, with nothing left to be written.

Asserted is, of the directories opened anew, that ours holds each tensor that ModelOpt's does, with the same values within the rounding of
a scale, and that FP8 codes stand for the weights of the plain export within half a step. ModelOpt divides weights by their scale in
bfloat16, ours in float32: some 3 to 6 % of the codes differ. That theirs come from that division is asserted, which accounts for all of
it. No goal was set beforehand; no slower than ModelOpt's is what this project wants.
"""

import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

from nemo_opt.perf.interleave import ratios

SIZES = {
    # 27 million parameters, 55 MB in bfloat16
    "short": {"hidden_size": 512, "num_layers": 6, "ffn_hidden_size": 1536, "vocab_size": 8192},
    # 134 million, 269 MB
    "full": {"hidden_size": 1024, "num_layers": 8, "ffn_hidden_size": 3072, "vocab_size": 16384},
}
ROUNDS = 6
GOAL = 1.0
"""Of ModelOpt's time."""
SCALE_TOL_REL = 1e-6
"""Float32 scales, divided in another order: 1.2e-7 was seen."""
HALF_STEP = 2**-4
"""Of an FP8 number with three bits after the one that is implied, relative to it; bfloat16 rounds once more, by 2^-9."""


def measure(folder, sizes, form):
    """Seconds of each turn by what ran, and bytes of the weights, after what was written was seen to be right."""
    import torch
    from modelopt.torch.export import export_mcore_gpt_to_hf
    from safetensors.torch import save_file

    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import ModelConfig
    from nemo_opt.models.huggingface import export_hf
    from nemo_opt.parallel import Topology, parallel
    from nemo_opt.quantize.export.unified import export_quantized_hf

    config = ModelConfig(**sizes, num_attention_heads=8, num_query_groups=4, max_position_embeddings=256)
    plain, ours, modelopts, raw = (Path(folder) / name for name in ("plain", "ours", "modelopts", "raw"))
    with parallel(Topology()) as topology:
        (model,) = build_model(config, topology, spec="te", seed=1)
        export_hf([model], plain, dtype=torch.bfloat16)  # also the configuration that ModelOpt's wants
        if form == "fp8":
            _quantize(model, config.vocab_size)
        export = export_quantized_hf if form == "fp8" else export_hf
        export([model], ours, dtype=torch.bfloat16)
        tensors = _opened(ours)

        def with_modelopt():
            export_mcore_gpt_to_hf(model, str(plain), dtype=torch.bfloat16, export_dir=str(modelopts))
            _flush(modelopts)

        def raw_save():
            raw.mkdir()
            save_file(tensors, raw / "model.safetensors")
            _flush(raw)

        contenders = {"ours": lambda: export([model], ours, dtype=torch.bfloat16), "ModelOpt": with_modelopt, "raw": raw_save}
        times_s = _turns(contenders, (ours, modelopts, raw))
    _assert_same(_opened(ours), _opened(modelopts), _opened(plain))
    _assert_near(_opened(ours), _opened(plain))
    return times_s, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _quantize(model, vocabulary):
    import copy

    import modelopt.torch.quantization as mtq
    import torch

    from nemo_opt.training.forward import forward_loop

    tokens = torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand(2, -1).contiguous()
    loop = forward_loop([{"tokens": tokens.to("cuda"), "position_ids": positions.to("cuda")}], description="")
    mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), loop)


def _turns(contenders, folders):
    """Seconds of each by turn, the first one left out; ahead of each nothing is there, and nothing waits to be written."""
    names, times_s = list(contenders), {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            shutil.rmtree(folders[names.index(name)], ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            contenders[name]()
            times_s[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in times_s.items()}


def _flush(folder):
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _opened(folder):
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _assert_same(ours, modelopts, plain):
    """ModelOpt keeps norms in float32 and gives scales a dim."""
    import torch

    assert ours.keys() == modelopts.keys()
    for name, tensor in ours.items():
        theirs = modelopts[name].reshape(tensor.shape)
        if "scale" in name:
            torch.testing.assert_close(tensor, theirs, rtol=SCALE_TOL_REL, atol=0.0)
        elif tensor.dtype == torch.float8_e4m3fn:  # scales that differ in the last bit move a weight that lies between two codes
            rounded = (plain[name] / ours[f"{name}_scale"]).to(torch.float8_e4m3fn)  # a scalar does not make it float32
            assert (rounded.view(torch.uint8) != theirs.view(torch.uint8)).float().mean() < 1e-3, name
        else:
            assert torch.equal(tensor, theirs.to(tensor.dtype)), name


def _assert_near(ours, plain):
    """Each weight stands for the plain export's."""
    import torch

    for name, weight in plain.items():
        tensor = ours[name].float()
        if ours[name].dtype == torch.float8_e4m3fn:
            scale = ours[f"{name}_scale"]
            # below its smallest normal number, 2^-6, FP8 has steps of 2^-9
            torch.testing.assert_close(tensor * scale, weight.float(), rtol=HALF_STEP + 2**-8, atol=2**-10 * float(scale))
        else:
            assert torch.equal(tensor, weight.float()), name


@pytest.mark.parametrize("form", ["plain", "fp8"])
@pytest.mark.parametrize("shape", ["short", pytest.param("full", marks=pytest.mark.wide)])
def test_export(benchmark, figure, ranks, tmp_path, shape, form):
    arguments = (str(tmp_path), SIZES[shape], form)
    ((times_s, total_bytes),) = benchmark.pedantic(ranks(1).run, args=(measure, *arguments), kwargs={"timeout_s": 280.0}, rounds=1)
    common = {"bench": "export to Hugging Face", "case": f"TP1PP1, {shape}, {form}", "peer": "ModelOpt's export_mcore_gpt_to_hf"}
    limit = statistics.median(ratios(times_s["raw"], times_s["ModelOpt"]))
    whole = ratios(times_s["ours"], times_s["ModelOpt"])
    figure(**common, metric="time of ModelOpt's", samples=whole, peer_value=1.0, limit=limit, goal=GOAL)
    modelopts = statistics.median(ratios(times_s["ModelOpt"], times_s["raw"]))
    figure(**common, metric="time of a raw save's", samples=ratios(times_s["ours"], times_s["raw"]), peer_value=modelopts, limit=1.0)
    speed = {name: [total_bytes / 1e6 / time_s for time_s in times] for name, times in times_s.items()}
    units = {"kind": "time", "unit": "MB/s", "direction": "higher"}
    middle = {name: statistics.median(values) for name, values in speed.items()}
    figure(**common, metric="speed", samples=speed["ours"], **units, peer_value=middle["ModelOpt"], limit=middle["raw"])
