"""How long the fuzzers run: briefly with the other tests, longer where one asks for it."""

import os


def fuzz_examples(default: int = 50) -> int:
    """Examples of each fuzzer: ``$TENSORMASK_FUZZ_EXAMPLES`` where it is set, else `default`."""
    return int(os.environ.get("TENSORMASK_FUZZ_EXAMPLES") or default)
