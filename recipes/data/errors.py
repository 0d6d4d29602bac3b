"""The errors of this recipe, of which each message says what was expected and what came."""

from mg_fast.errors import MgFastError


class SourceError(MgFastError, ValueError):
    """A file of captions or dialogues that cannot be read."""


class JournalError(MgFastError, RuntimeError):
    """A journal that belongs to another run, is in use, or is damaged."""


class AskingError(MgFastError, RuntimeError):
    """Nothing more can be asked: the endpoint takes no request or cannot be reached, or the local model fails.

    Attributes:
        tally: what had happened in the run until then, a `Tally`; None where nothing was asked.
    """

    tally = None
