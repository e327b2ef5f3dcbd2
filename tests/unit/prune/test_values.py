"""What the package offers, and that its values cannot be changed or built by position: they are compared, hashed and sent between ranks."""

from dataclasses import FrozenInstanceError, fields

import nemo_opt._stack

import pytest

from nemo_opt import prune
from nemo_opt.prune.candidates import Candidate
from nemo_opt.prune.config import PruningConfig
from nemo_opt.prune.importance import ImportanceScores, measure_importance
from nemo_opt.prune.pruner import prune_language_model, save_pruned_model
from nemo_opt.prune.report import Axis
from nemo_opt.prune.search import SearchResult
from nemo_opt.prune.selection import Kept, KeptLayer
from nemo_opt.prune.space import SearchSpace


def test_the_package_offers_its_entry_points():
    offered = [ImportanceScores, PruningConfig, measure_importance, prune_language_model, save_pruned_model]
    assert [getattr(prune, name) for name in prune.__all__] == offered
    assert set(prune.__all__) <= set(dir(prune))
    with pytest.raises(AttributeError, match="nothing"):
        _ = prune.nothing


@pytest.mark.parametrize("kind", [Axis, Candidate, ImportanceScores, Kept, KeptLayer, PruningConfig, SearchResult, SearchSpace])
def test_values_are_frozen_and_built_by_name(kind):
    value = object.__new__(kind)
    first = fields(kind)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(value, first, 1)
    with pytest.raises(TypeError, match="positional"):
        kind(*[None] * len(fields(kind)))
