"""The error that a user can correct: it says what was given, expected and to be changed."""


class UserError(ValueError):
    """A config, a file or an argument does not fit. The commands print it as one line.

    Every other exception is a bug or a failure of the machine, and keeps its traceback.
    """
