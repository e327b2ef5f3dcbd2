"""What the tests of models share."""

import pytest

from nemo_opt.parallel import Topology, parallel


@pytest.fixture(scope="module")
def one_rank():
    """Model parallel state of one rank, for a whole module: to release it takes a garbage collection of seconds."""
    with parallel(Topology()) as topology:
        yield topology
