"""Greedy continuations: against a model whose next token is known, and the same at several layouts."""

from unittest.mock import MagicMock, patch

import pytest
import torch

from nemo_opt.errors import ConfigError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.training.sample import generate

HERE = "nemo_opt.training.sample"
SMALL = preset(
    "tiny",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_position_embeddings=64,
)


class Letters:
    """Each letter is a token; a dot ends the text."""

    eod = ord(".")

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def successors(chunks, batch):
    """A model that counts: after b comes c, after z the end."""
    tokens = batch["tokens"]
    following = torch.where(tokens == ord("z"), torch.tensor(ord(".")), tokens + 1)
    successors.lengths.append(tokens.shape[1])
    return torch.nn.functional.one_hot(following.clamp(0, 127), 128).float()


@pytest.fixture
def counting():
    successors.lengths = []
    with (
        patch(f"{HERE}.gather_logits", side_effect=successors),
        patch(f"{HERE}.model_config_of", return_value=SMALL),
        patch(f"{HERE}.dist"),
        patch(f"{HERE}.parallel_state") as state,
    ):
        state.get_context_parallel_world_size.return_value = 2
        state.get_tensor_model_parallel_world_size.return_value = 2
        yield


def test_continuations_are_the_most_likely_and_end_where_the_text_does(counting):
    assert generate([], Letters(), ["abc", "xy"], new_tokens=4) == ["defg", "z."]
    assert set(successors.lengths) == {8}, "3 + 4 filled up to a multiple of 2 * cp * tp"


def test_no_pass_is_spent_after_the_last_end(counting):
    assert generate([], Letters(), ["z", "y"], new_tokens=9) == [".", "z."]
    assert len(successors.lengths) == 2


@pytest.mark.parametrize("prompts", [["a", ""], ["a" * 60]])
def test_prompts_that_do_not_fit_are_refused(counting, prompts):
    with pytest.raises(ConfigError, match=r"need 1\.\.64 positions"):
        generate([], Letters(), prompts, new_tokens=9)
    assert not successors.lengths


def _generate(name):
    from nemo_opt.models.build import build_model
    from nemo_opt.parallel import initialize

    topology = initialize(Topology.from_name(name))
    return generate(build_model(SMALL, topology, seed=5), Letters(), ["abc", "hello"], new_tokens=3)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["TP2PP1", pytest.param("TP1PP2", marks=pytest.mark.wide), pytest.param("CP2", marks=pytest.mark.wide)])
def test_every_layout_continues_alike(ranks, layout):
    (single,) = ranks(1).run(_generate, "TP1PP1")
    assert all(len(text) == 3 for text in single)
    assert all(other == single for other in ranks(2).run(_generate, layout))


def test_other_ranks_hear_what_rank_0_chose(counting):
    def hear(chosen, src):
        assert (chosen, src) == ([[]], 0)
        chosen[0] = [ord("q")]

    with patch(f"{HERE}.gather_logits", return_value=None), patch(f"{HERE}.dist", MagicMock(broadcast_object_list=hear)):
        assert generate([], Letters(), ["a"], new_tokens=2) == ["qq"]
