"""The subcommands of `dev/benchmark.py`, one a module, and `timing` for all of them.

A module has a docstring of one line, `add_arguments(parser)`, and `run(args)`, which prints a
table and returns what `--json` writes.
"""
