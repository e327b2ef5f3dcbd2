"""`nemo-opt`: the commands for a person. Help and refusals load no torch; results end in a table of numbers and the place of the result."""

from nemo_opt.cli.main import main

__all__ = ["main"]
