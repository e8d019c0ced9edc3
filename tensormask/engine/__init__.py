"""Training and evaluation runs: the loop, the solver, checkpoints, ranks, logs and metrics."""
