"""What tests need and users may reuse: rank pools, the parity oracle, comparators, tiny checkpoints and the suite runner."""
