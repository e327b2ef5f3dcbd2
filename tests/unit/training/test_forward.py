"""The forward loop: shapes run together, disagreement is refused everywhere, a bar only on rank 0's terminal."""

from unittest.mock import MagicMock, patch

import pytest
import torch

from nemo_opt.errors import DataError
from nemo_opt.training import forward


def _batch(batch=2, seq=4, mask=None):
    return {
        "tokens": torch.zeros(batch, seq, dtype=torch.long),
        "position_ids": torch.arange(seq).expand(batch, seq),
        "attention_mask": mask,
    }


def _model(spec="local"):
    model = MagicMock(side_effect=lambda tokens, *_, **__: tokens.float())
    model.spec = spec
    return model


def _run_all(**call):
    """A schedule without stages."""
    for _ in range(call["num_microbatches"]):
        call["forward_step_func"](call["data_iterator"], call["model"])


@pytest.fixture(autouse=True)
def _specs_of_models():
    with patch.object(forward, "spec_of", side_effect=lambda model: model.spec):
        yield


@pytest.fixture
def ranks_with():
    """`ranks_with(shapes by rank, dp rank by rank)`: the other ranks of a world in which this process is rank 0."""

    def world(others=(), dp_ranks=None, cp=1):
        def gather(everyone, own):
            everyone[:] = [own, *[((dp_ranks or [0] * len(others))[i], shapes) for i, shapes in enumerate(others)]]

        dist = MagicMock()
        dist.get_world_size.return_value = 1 + len(others)
        dist.get_rank.return_value = 0
        dist.all_gather_object.side_effect = gather
        state = MagicMock()
        state.get_data_parallel_rank.return_value = 0
        state.get_context_parallel_world_size.return_value = cp
        return patch.multiple(forward, dist=dist, parallel_state=state)

    return world


def test_no_batches_are_refused(ranks_with):
    with ranks_with(), pytest.raises(DataError, match=r"no batches on ranks \[0\] of 1"):
        forward.forward_loop([], description="")


def test_another_ranks_lack_of_batches_is_refused_here_too(ranks_with):
    with ranks_with(others=[[]], dp_ranks=[1]), pytest.raises(DataError, match=r"no batches on ranks \[1\] of 2"):
        forward.forward_loop([_batch()], description="")


def test_ranks_of_one_replica_must_agree(ranks_with):
    with ranks_with(others=[[(2, 4), (2, 4)]]), pytest.raises(DataError, match="ranks 0 and 1 work on the same data"):
        forward.forward_loop([_batch()], description="")
    with ranks_with(others=[[(2, 4), (2, 4)]], dp_ranks=[1]):
        forward.forward_loop([_batch()], description="")


@pytest.mark.parametrize("cp", [1, 2])
def test_batches_of_one_shape_share_a_schedule_call(ranks_with, cp):
    seen = []

    def schedule(**call):
        step, model = call["forward_step_func"], call["model"]
        for _ in range(call["num_microbatches"]):
            output, loss = step(call["data_iterator"], model)
            assert loss(output)[0].item() == 0.0
        seen.append((call["num_microbatches"], call["micro_batch_size"], call["seq_length"], call["forward_only"]))

    model = MagicMock(side_effect=lambda tokens, positions, mask: tokens.float())
    batches = (_batch(*shape) for shape in [(2, 4), (2, 4), (1, 4), (2, 8)])
    with ranks_with(cp=cp), patch.object(forward, "get_forward_backward_func", return_value=schedule):
        loop = forward.forward_loop(batches, description="")
        loop(model)
        loop(model)
    assert seen == [(2, 2, 4 * cp, True), (1, 1, 4 * cp, True), (1, 2, 8 * cp, True)] * 2
    assert model.call_count == 8


def test_no_gradient_is_recorded(ranks_with):
    enabled = []
    schedule = MagicMock(side_effect=lambda **call: enabled.append(torch.is_grad_enabled()))
    with ranks_with(), patch.object(forward, "get_forward_backward_func", return_value=schedule):
        forward.forward_loop([_batch()], description="")(MagicMock())
    assert enabled == [False]


@pytest.mark.parametrize(("rank", "terminal", "shown"), [(0, True, True), (1, True, False), (0, False, False)])
def test_progress_bar_is_for_rank_0_on_a_terminal(ranks_with, rank, terminal, shown):
    with ranks_with() as _, patch.object(forward, "tqdm") as tqdm, patch.object(forward.sys, "stderr") as stderr:
        forward.dist.get_rank.return_value = rank
        stderr.isatty.return_value = terminal
        with forward._progress(3, "calibrating") as advance:
            advance()
    assert tqdm.call_args.kwargs["disable"] is not shown
    assert tqdm.call_args.kwargs["total"] == 3


def _packed(bounds=(0, 3, 4, 8)):
    return _batch() | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def _show(ranks_with, batch, model, **options):
    with ranks_with(cp=2), patch.object(forward, "get_forward_backward_func", return_value=MagicMock(side_effect=_run_all)) as get:
        forward.forward_loop([batch], description="", **options)(model)
    return get.return_value.call_args.kwargs


def test_packed_rows_are_one_sequence_for_transformer_engine(ranks_with):
    model = _model("te")
    call = _show(ranks_with, _packed(), model)
    tokens, positions, mask = model.call_args.args
    assert (call["micro_batch_size"], call["seq_length"]) == (1, 8 * 2)
    assert tokens.shape == positions.shape == (1, 8)
    assert mask is None
    packed = model.call_args.kwargs["packed_seq_params"]
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 4, 8]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 4 * 2


def test_packed_rows_get_a_mask_of_blocks_under_the_local_spec(ranks_with):
    model = _model()
    call = _show(ranks_with, _packed(), model)
    assert (call["micro_batch_size"], call["seq_length"]) == (2, 4 * 2)
    mask = model.call_args.args[2]
    assert (~mask).long().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    ]
    assert "packed_seq_params" not in model.call_args.kwargs


@pytest.mark.parametrize(("mask", "passed"), [(torch.ones(2, 4), False), (torch.ones(2, 1, 4, 4), True), (None, False)])
def test_only_a_mask_of_attention_reaches_the_model(ranks_with, mask, passed):
    model = _model()
    _show(ranks_with, _batch(mask=mask), model)
    assert (model.call_args.args[2] is not None) == passed


@pytest.mark.parametrize("skip", [False, True])
def test_the_head_is_left_out_on_request(ranks_with, skip):
    model = _model()
    _show(ranks_with, _batch(), model, skip_head=skip)
    assert ("output_processor" in model.call_args.kwargs) == skip
    if skip:
        hidden = torch.ones(1)
        assert model.call_args.kwargs["output_processor"](hidden_states=hidden, labels=None) is hidden


def test_each_micro_batch_is_surrounded(ranks_with):
    model, batch, surround = _model(), _batch(), MagicMock()
    model.side_effect = lambda tokens, *_: (surround.return_value.__enter__.assert_called_once(), tokens.float())[1]
    _show(ranks_with, batch, model, surround=surround)
    surround.assert_called_once_with(model, batch)
    surround.return_value.__exit__.assert_called_once()


def test_batches_with_and_without_bounds_run_apart(ranks_with):
    counts = []
    schedule = MagicMock(side_effect=lambda **call: counts.append(call["num_microbatches"]))
    with ranks_with(), patch.object(forward, "get_forward_backward_func", return_value=schedule):
        forward.forward_loop([_packed(), _packed(), _batch(), _packed()], description="")(_model("te"))
    assert counts == [2, 1, 1]


@pytest.mark.parametrize(
    ("spec", "packed", "expected"), [("te", True, [[1], [2], [3], [4]]), ("te", False, [[1, 3], [2, 4]]), ("local", True, [[1, 3], [2, 4]])]
)
def test_values_of_tokens_follow_the_decoder(spec, packed, expected):
    batch = _packed() if packed else _batch()
    assert forward.tokens_in_order(_model(spec), batch, torch.tensor([[1, 2], [3, 4]])).tolist() == expected
