"""What the CPU backend costs in a training step: the same step with PyTorch's own functions and with the redirected ones.

Both run in this process, interleaved and in alternating order, and processor time is compared, so that other load on the machine does not
decide. The step is plain PyTorch at a size at which computing dominates; it asks for devices the way GPU programs do (`.to(device)`,
factories with `device=`), so that it passes through the redirects. Asserted is only that both compute the same; the ratio is recorded, the
goal being 1.03.
"""

import time
from contextlib import nullcontext

import torch

from nemo_opt import device
from nemo_opt.cpu import redirect
from nemo_opt.perf.interleave import ratios

STEPS, WARMUP = 40, 3


class Step:
    """One training step of a transformer of 2 layers, hidden 256, on 4 sequences of 128 tokens."""

    def __init__(self, where):
        torch.manual_seed(0)
        self.where = where
        layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.model = torch.nn.Sequential(torch.nn.Embedding(512, 256), torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(256, 512))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(512, (4, 129))

    def __call__(self):
        tokens = self.tokens.to(self.where)
        weights = torch.ones(4 * 128, device=self.where) / torch.full((), 512.0, device=self.where)
        logits = self.model(tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def test_cost_of_the_cpu_backend_in_a_training_step(benchmark, figure):
    device.activate(announce=False)
    steps = {"plain": Step("cpu"), "redirected": Step("cuda")}
    losses = {name: [] for name in steps}
    times_s = {name: [] for name in steps}

    def run(name):
        with redirect.suspended() if name == "plain" else nullcontext():
            start = time.process_time()
            losses[name].append(steps[name]())
            times_s[name].append(time.process_time() - start)

    def both():
        order = ("plain", "redirected") if len(losses["plain"]) % 2 else ("redirected", "plain")
        for name in order:
            run(name)

    benchmark.pedantic(both, rounds=STEPS, warmup_rounds=WARMUP)
    assert losses["plain"] == losses["redirected"]
    samples = ratios(times_s["redirected"][WARMUP:], times_s["plain"][WARMUP:])
    figure(
        bench="CPU backend",
        case="training step",
        metric="processor time of plain PyTorch's",
        samples=samples,
        peer="the same step without it",
        peer_value=1.0,
        limit=1.0,
        goal=1.03,
    )
