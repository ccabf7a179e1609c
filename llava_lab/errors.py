"""Errors a user can cause and mend. Each message is one line: expected, got, what to do.

All derive from ``ValueError`` through `LabError`, so `except ValueError` works and the
command line can turn any of them into exit code 2. Our own bugs stay `AssertionError`.
"""


class LabError(ValueError):
    """Base of every mistake a user can make and mend."""


class PictureError(LabError):
    """A picture that cannot be read, is empty, or is far too large."""


class CheckpointError(LabError):
    """A model name or folder that cannot be loaded exactly as it was saved."""


class OptionError(LabError):
    """An unknown option, or a value outside its range; the message lists the choices."""


class TargetError(LabError):
    """A target that does not occur in the answer; the message lists what does."""


class DataError(LabError):
    """A data file or world request that does not make sense."""


class EndpointError(LabError):
    """A server that cannot be reached, refuses, or answers with something that is not an answer."""


class BudgetError(LabError):
    """More requests to a server than were allowed; nothing that was paid for is lost."""


def one_line(error: BaseException) -> str:
    """Another library's error as one short line, for the message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
