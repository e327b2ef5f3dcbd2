"""Whether two descriptions mean the same model, as far as weights and logits are concerned. Needs no torch."""

from dataclasses import fields

from nemo_opt.errors import NemoOptError
from nemo_opt.models.config import ModelConfig

__all__ = ["check_same_model"]

_IRRELEVANT = {"init_method_std", "max_position_embeddings", "kv_channels", "vocab_size"}
"""Neither stored nor used in a forward pass; head size and padded vocabulary are compared instead of the last two."""


def check_same_model(first_name: str, first: ModelConfig, second_name: str, second: ModelConfig, *, error: type[NemoOptError]) -> None:
    """Compares two models.

    Raises:
        error: naming every difference, with both values.

    """
    names = [f.name for f in fields(ModelConfig) if f.name not in _IRRELEVANT] + ["head_dim", "padded_vocab_size"]
    differences = [
        f"{name} {getattr(first, name)} in {first_name}, {getattr(second, name)} in {second_name}"
        for name in names
        if getattr(first, name) != getattr(second, name)
    ]
    if differences:
        raise error("the models differ: " + "; ".join(differences))
