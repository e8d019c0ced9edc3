"""The commands, one module each: a parser and a `main`.

`tensormask.cli` and `tools/*.py` only call them.
"""
