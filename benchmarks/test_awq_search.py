"""AWQ's calibration beside ModelOpt's own and beside a plain forward pass over the same data, interleaved on one rank.

Processor time is compared, so that other load on the machine does not decide. Asserted is only that both choose the same alphas; the
ratios to the forward pass are recorded, the goal being 3 (ModelOpt: 11 scalings of each linear on each micro-batch).
"""

import statistics
from types import SimpleNamespace

SAMPLES, SEQ, MICRO_BATCH, ROUNDS = 64, 128, 8, 3


def _measure():
    """(processor seconds by what ran, alphas by who chose)."""
    import copy
    import time

    import modelopt.torch.quantization as mtq
    import torch

    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, initialize
    from nemo_opt.quantize.awq import calibrate_awq
    from nemo_opt.quantize.calibration import calibration_loop
    from nemo_opt.training.forward import forward_loop

    torch.set_num_threads(1)
    topology, config = initialize(Topology()), preset("tiny")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, config.vocab_size, (100,), generator=generator).tolist() for _ in range(100)]
    sizes = {"seq_length": SEQ, "num_samples": SAMPLES, "micro_batch_size": MICRO_BATCH}
    batches = calibration_batches(documents, SimpleNamespace(eod=0), **sizes)
    loop = calibration_loop(batches)
    alphas = {}

    def ours(model):
        alphas["ours"] = calibrate_awq(model, loop)

    def modelopts(model):
        mtq.calibrate(model, algorithm={"method": "awq_lite", "debug": True}, forward_loop=loop)
        alphas["modelopt"] = {name: module.awq_lite.best_alpha for name, module in model.named_modules() if hasattr(module, "awq_lite")}

    runs = {"forward": forward_loop(batches, description=""), "ours": ours, "modelopt": modelopts}
    times_s = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            (model,) = build_model(config, topology, spec="local", seed=5)
            if name != "forward":
                mtq.quantize(model, copy.deepcopy(mtq.INT4_AWQ_CFG) | {"algorithm": None})
            start = time.process_time()
            run(model)
            times_s[name].append(time.process_time() - start)
    return times_s, alphas


def test_cost_of_awqs_calibration(benchmark, ranks):
    (times_s, alphas) = benchmark.pedantic(lambda: ranks(1).run(_measure)[0], rounds=1)
    assert alphas["ours"] == alphas["modelopt"]
    forward_s = statistics.median(times_s["forward"])
    ratios = {name: statistics.median(times_s[name]) / forward_s for name in ("ours", "modelopt")}
    benchmark.extra_info.update(ratios, tokens=SAMPLES * SEQ, forward_s=forward_s)
    print(f"\nAWQ takes {ratios['ours']:.2f} forward passes, ModelOpt's {ratios['modelopt']:.2f} ({forward_s * 1000:.0f} ms each)")
