"""Weights of a quantised model are rounded once in a pass that does not change them: fewer roundings, the same numbers, nothing left."""

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo_opt.parallel import Topology, parallel
from nemo_opt.testing.parity import TINY_MOE
from nemo_opt.testing.quantized import SMALL, labelled_batches, small_quantized
from nemo_opt.training.evaluate import evaluate
from nemo_opt.training.rounding import rounded_once

MODELS = {
    "fp8": ("fp8", SMALL, "te", 8),
    "int8": ("int8", SMALL, "local", 8),
    "blocks": ("int4_awq", SMALL, "te", 8),
    "one after another": ("w4a8_awq", SMALL, "te", 16),
    "grouped experts": ("fp8", TINY_MOE, "te", 20),
    "experts apart": ("fp8", TINY_MOE, "local", 20),
}
"""Algorithm, model, spec, roundings of weights in a pass: four linears a layer; two of attention and two of each of four experts."""


def _of_weights(chunk):
    return [module for name, module in chunk.named_modules() if "weight_quantizer" in name and isinstance(module, TensorQuantizer)]


class Counted:
    """How often weights are really rounded."""

    def __init__(self, chunk):
        self.count = 0
        for quantizer in _of_weights(chunk):
            quantizer._fake_quantize = self._counting(quantizer._fake_quantize)

    def _counting(self, function):
        def counting(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counting

    def during(self, function):
        before = self.count
        return function(), self.count - before


def run_model(name):
    """(roundings in an evaluation of four micro-batches, in two plain passes; the outputs, and whether anything was left behind)."""
    algorithm, model, spec, _ = MODELS[name]
    with parallel(Topology()) as topology:
        chunks = small_quantized(algorithm, topology, model=model, spec=spec)
        counted = Counted(chunks[0])
        batches = labelled_batches(4, vocab_size=model.vocab_size)

        def outputs():
            return [chunks[0](batch["tokens"], batch["position_ids"], None).detach().clone() for batch in batches]

        with torch.no_grad():
            plain, in_plain = counted.during(outputs)
            with rounded_once(chunks):
                kept, in_kept = counted.during(outputs)
        _, in_evaluation = counted.during(lambda: evaluate(chunks, iter(batches), 4))
        left = sum("forward" in vars(quantizer) for quantizer in chunks[0].modules())
        return in_plain, in_kept, in_evaluation, all(map(torch.equal, plain, kept)), left


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_is_rounded_once(ranks, name):
    once = MODELS[name][-1]
    assert ranks(1).run(run_model, name)[0] == (4 * once, once, once, True, 0)


def run_changes():
    """Losses of one batch: as it is, after a weight was changed, and changed within a pass that has gradients."""
    with parallel(Topology()) as topology:
        chunks = small_quantized("fp8", topology)
        batch = labelled_batches(1)
        weight = chunks[0].decoder.layers[0].mlp.linear_fc2._parameters["weight"]
        losses = [evaluate(chunks, iter(batch), 1)]
        with torch.no_grad():
            weight.mul_(2)
        losses.append(evaluate(chunks, iter(batch), 1))

        def output():
            return chunks[0](batch[0]["tokens"], batch[0]["position_ids"], None)

        with rounded_once(chunks):
            first = output()
            with torch.no_grad():
                weight.mul_(2)
            second = output()
        first.sum().backward()
        return losses, torch.equal(first, second), weight.grad is not None


def test_what_was_kept_is_forgotten(ranks):
    """A later evaluation sees changed weights, and a pass with gradients keeps nothing at all."""
    (before, after), equal, has_gradient = ranks(1).run(run_changes)[0]
    assert before != after
    assert not equal
    assert has_gradient


def run_failure():
    with parallel(Topology()) as topology:
        chunks = small_quantized("fp8", topology)
        try:
            with rounded_once(chunks), rounded_once(chunks):
                assert any("forward" in vars(quantizer) for quantizer in _of_weights(chunks[0]))
                raise KeyError("planted")
        except KeyError:
            return any("forward" in vars(quantizer) for quantizer in _of_weights(chunks[0]))


def test_an_error_leaves_the_model_as_it_was(ranks):
    assert ranks(1).run(run_failure) == [False]


def run_uncalibrated():
    """A quantizer that still looks at its data is not touched, nor one that is off."""
    with parallel(Topology()) as topology:
        chunks = small_quantized("fp8", topology)
        first, second, *others = _of_weights(chunks[0])
        first.enable_calib()
        second.disable()
        with rounded_once(chunks):
            return ["forward" in vars(quantizer) for quantizer in (first, second)], any("forward" in vars(other) for other in others)


def test_only_what_rounds_now(ranks):
    assert ranks(1).run(run_uncalibrated) == [([False, False], True)]
