"""The number of examples of a fuzzer: few by default, more on demand."""

import os


def fuzz_examples(default: int = 50) -> int:
    """Return ``$TENSORMASK_FUZZ_EXAMPLES``, or `default` if it is not set."""
    return int(os.environ.get("TENSORMASK_FUZZ_EXAMPLES") or default)
