"""The commands, one module each: a parser and a `main`.

`tensormask.cli` and `tools/*.py` only call them.
"""

EXIT_MISTAKE = 2
# As if SIGINT or SIGPIPE ended the process.
EXIT_INTERRUPTED, EXIT_CLOSED = 128 + 2, 128 + 13

FILES = ("DIR", "FILE", "INPUT", "OUTPUT", "RUN")  # in the help of arguments that are paths
