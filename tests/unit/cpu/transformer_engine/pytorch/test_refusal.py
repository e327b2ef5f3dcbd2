"""Options are refused by name, unless they have no effect."""

import pytest

from nemo_opt.cpu.transformer_engine.pytorch.refusal import refuse_options
from nemo_opt.errors import ConfigError


def test_options_without_effect_pass():
    refuse_options("Linear", {"a": None, "b": False, "c": 0}, {"c": 0})


@pytest.mark.parametrize("value", [True, 0, "text", 4])
def test_others_are_named_with_their_value(value):
    with pytest.raises(ConfigError, match=rf"Linear\(option={value!r}\).*Leave option unset"):
        refuse_options("Linear", {"fine": None, "option": value})
