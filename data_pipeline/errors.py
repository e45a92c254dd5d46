"""Errors with a reason for people: two that end a command with one line and an exit code, and BadImage."""

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


class _Explained(Exception):
    """An error that explains itself; with `on_all_ranks` every rank raises it, so that only one need print it."""

    def __init__(self, text: str, *, on_all_ranks: bool = False):
        super().__init__(text)
        self.on_all_ranks = on_all_ranks


class UsageError(_Explained):
    """Wrong usage, recipe or input; the text says what was found, what was expected and what to do. Exit code 2."""

    exit_code = EXIT_USAGE


class RunError(_Explained):
    """The end of a run for a known reason, which the text gives. Exit code 1."""

    exit_code = EXIT_FAILED


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def reason_of(error: Exception) -> str:
    """Return an error's reason on one line: the operating system's text, else the error's own."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
