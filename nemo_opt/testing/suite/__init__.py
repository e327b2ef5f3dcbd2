"""The suite runner: discovers functional scripts, runs them within the machine's ranks and memory, and says what became of each.

`script` the header and what is selected, `schedule` and `process` how they run, `supplies` what they need, `verdict` what that means,
`terminal`, `report`, `junit` and `page` how it is told, `history` what was before, `runner` all of it in order. Loads no torch.
"""

from nemo_opt.testing.suite.runner import Options, main
from nemo_opt.testing.suite.script import Script, discover, select
from nemo_opt.testing.suite.terminal import show_matrix
from nemo_opt.testing.suite.verdict import Outcome, Status

__all__ = ["Options", "Outcome", "Script", "Status", "discover", "main", "select", "show_matrix"]
