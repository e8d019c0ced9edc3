"""The commands, one module each: a parser and a `main`. `tools/*.py` only call them."""
