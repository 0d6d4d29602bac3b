"""The errors of a command that its user can mend: `python -m bench` prints them as one line, without a traceback."""


class BenchError(Exception):
    """A command cannot do what was asked; the message says what was expected and what came."""


class UnknownCase(BenchError):
    """A name or pattern chooses no case, provider, kernel or step; the message lists what can be chosen."""


class UnknownName(BenchError):
    """There is no GPU, model or dtype of this name; the message lists the names that exist."""


class NoDevice(BenchError):
    """The device that was asked for is not on this machine."""


class BadRecord(BenchError):
    """A file is not a document of this benchmark, or cannot be written as one; the message says what is wrong."""


class NoServer(BenchError):
    """A server did not start; the message has the end of its log."""
