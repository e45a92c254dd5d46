"""Errors with a reason that is said to people: the two that end a command with one line and an exit code, and BadImage.

Everything above raises and catches these; this file imports nothing.
"""

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


class _Explained(Exception):
    def __init__(self, text: str, *, on_all_ranks: bool = False):
        """on_all_ranks: every rank raises the same, so that one of them is enough to say it."""
        super().__init__(text)
        self.on_all_ranks = on_all_ranks


class UsageError(_Explained):
    """Wrong usage, recipe or input: says what was found, what was expected and what to do. Exit code 2."""

    exit_code = EXIT_USAGE


class RunError(_Explained):
    """A run that cannot go on for a reason that is known and said. Exit code 1."""

    exit_code = EXIT_FAILED


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def reason_of(error: Exception) -> str:
    """Return what happened as one line for people: the operating system's text, else the error's own."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
