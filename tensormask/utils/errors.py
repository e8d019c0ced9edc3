"""The error for what a user can correct: its message says what was given and what to change."""


class UserError(ValueError):
    """A config, a file or an argument is invalid. The commands print it as one line.

    Every other exception is a bug or a failure of the machine, and keeps its traceback.
    """
