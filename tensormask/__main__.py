"""`python -m tensormask` is the command `tensormask`."""

import sys

from tensormask.cli import main

if __name__ == "__main__":
    sys.exit(main())
