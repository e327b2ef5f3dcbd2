"""Performance tracking: figures that benchmarks measure, their history, and what has changed in it.

Nothing here loads torch: a history is read and judged on any machine.
"""
