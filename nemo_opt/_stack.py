"""Activates the device backend. Every module that imports megatron or modelopt imports this first.

On a machine with CUDA that is only the choice; without it the CPU backend must be in place before Megatron-Core is loaded, since
Megatron-Core decides at import whether Transformer Engine exists.
"""

from nemo_opt.device import activate

activate()
