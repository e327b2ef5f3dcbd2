"""nemo_opt: PTQ, pruning and distillation of Megatron-Core models, with the tests and the performance tracking that guard them.

Importing this package loads no torch: the stack takes seconds, and `--help` or a wrong flag must answer at once.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
