"""Documents that share a row: each one's logits are those it has alone, under both layer specs and on every layout."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from nemo_opt.parallel import Topology

TOL = 2e-5
"""Absolute, of logits of size 1 in float32: the local attention turns keys and queries by positions in the row, whose differences are the
document's (2e-6 seen); tensor parallel ranks sum in another order."""
TOKENIZER = SimpleNamespace(eod=0)
SEQ = 32


def documents():
    """No token twice, beside the end-of-document token: a token says where it stands."""
    tokens = (torch.randperm(119, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    return [[tokens.pop() for _ in range(size)] for size in (7, 11, 23, 3, 15, 39, 19)]


def _sizes(**changes):
    from nemo_opt.testing.parity import TINY

    return TINY.with_(num_layers=2, **changes)


def _logits_of(chunks, batches):
    """[tokens, V / tp] that the output layer makes of each batch, tokens by row; [] on stages without it."""
    from nemo_opt.training.forward import forward_loop, tokens_in_order

    made, chunk = [], chunks[0]
    if (head := getattr(chunk, "output_layer", None)) is not None:
        head.register_forward_hook(lambda _module, _inputs, output: made.append(output[0].detach().clone()))
    forward_loop(batches, description="")(chunk)
    return [_by_row(logits, tokens_in_order(chunk, batch, batch["tokens"]), batch) for logits, batch in zip(made, batches, strict=False)]


def _by_row(logits, order, batch):
    assert logits.shape[:2] == order.shape
    flat = logits.flatten(0, 1) if order.shape[1] == 1 else logits.transpose(0, 1).flatten(0, 1)
    assert flat.shape[0] == batch["tokens"].numel()
    return flat


def _packed(name, spec, isolate=True):
    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    chunks = build_model(_sizes(), topology, spec=spec, seed=5)
    sizes = {"seq_length": SEQ, "num_samples": 9, "micro_batch_size": 2, "multiple": 4}
    batches = calibration_batches(documents(), TOKENIZER, **sizes)
    assert batches[0]["cu_seqlens"] is not None
    if not isolate:
        batches = [batch | {"cu_seqlens": None} for batch in batches]
    logits = _logits_of(chunks, batches)
    return [(batch["tokens"].flatten(), made) for batch, made in zip(batches, logits, strict=False)]


def _alone():
    """token -> logits [V] in its piece of a document (as packing cuts them) run alone."""
    from nemo_opt.data.calibration import calibration_batches
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology())
    chunks = build_model(_sizes(), topology, spec="local", seed=5)
    pieces = []
    for batch in calibration_batches(documents(), TOKENIZER, seq_length=SEQ, num_samples=9, multiple=4):
        bounds = [0, SEQ] if batch["cu_seqlens"] is None else batch["cu_seqlens"].tolist()
        pieces += [batch["tokens"][:, start:end] for start, end in pairwise(bounds)]
    own = [{"tokens": piece, "position_ids": torch.arange(piece.shape[1])[None]} for piece in pieces]
    assert len(own) > len(documents()) - 1
    return {
        token: row
        for piece, made in zip(pieces, _logits_of(chunks, own), strict=True)
        for token, row in zip(piece[0].tolist(), made, strict=True)
    }


@pytest.fixture(scope="module")
def alone(ranks):
    return ranks(1).run(_alone)[0]


def _largest_difference(results, alone, name):
    """Between packed logits and those of the pieces alone, over all ranks."""
    found = {}
    for rank, batches in enumerate(results):
        for tokens, logits in batches:
            part = slice(rank % 2 * logits.shape[1], (rank % 2 + 1) * logits.shape[1]) if "TP2" in name else slice(None)
            for token, row in zip(tokens.tolist(), logits, strict=True):
                if token != TOKENIZER.eod:
                    found[token, part.start] = float((alone[token][part] - row).abs().max())
    assert {token for token, _ in found} == alone.keys() - {TOKENIZER.eod}
    return max(found.values())


CASES = [("TP1PP1", "local"), ("TP1PP1", "te"), ("TP2PP1", "te"), ("CP2", "te")]
WIDE = [("TP2PP1", "local"), ("TP1PP2", "local"), ("TP1PP2", "te"), ("TP2PP2", "te"), ("TP2PP1SP", "te"), ("TP2PP1CP2SP", "te")]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "spec"), [*CASES, *(pytest.param(*case, marks=pytest.mark.wide, id="-".join(case)) for case in WIDE)])
def test_a_documents_logits_are_those_it_has_alone(ranks, alone, name, spec):
    results = ranks(Topology.from_name(name).world_size).run(_packed, name, spec)
    assert _largest_difference(results, alone, name) < TOL


@pytest.mark.ranks
def test_without_the_bounds_documents_do_change_each_other(ranks, alone):
    assert _largest_difference(ranks(1).run(_packed, "TP1PP1", "te", isolate=False), alone, "TP1PP1") > 1000 * TOL
