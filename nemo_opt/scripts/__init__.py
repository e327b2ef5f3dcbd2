"""NeMo's scripts by their own flags: `python -m nemo_opt.scripts.{ptq,gpt_prune,gpt_train}`.

Flags and defaults are NeMo's, verbatim; what nemo_opt adds stands in a group of its own in `--help`. A flag that has no meaning here is
either accepted with a printed line, or refused by name; none is ignored silently. The scripts start their own ranks unless torchrun did.
"""
