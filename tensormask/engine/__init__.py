"""Training and evaluation runs: the loop, the solver, checkpoints and what a run writes down."""
