"""What is said of unexpected errors: their kinds. Their texts and their traces may hold what users wrote."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType

logger = logging.getLogger("mg_fast.web")

# Loggers that tell of errors in a request, or in what was begun by one.
_LOGGERS = ("uvicorn.error", "asyncio")


class _KindOnly:
    """Stands for the module `traceback` in a module that prints errors with it."""

    def print_exc(self, *_, **__) -> None:
        logger.error("a fault in the page's library: %s", told(sys.exc_info()[1]))

    def __getattr__(self, name: str):
        return getattr(traceback, name)


def told(error: BaseException | None) -> str:
    """The kind of an error, and the place in the code where it was raised."""
    if error is None:
        return "no error"
    last = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    place = "" if last is None else f" at {last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
    return f"{type(error).__name__}{place}"


def _without_texts(record: logging.LogRecord) -> bool:
    """Takes the text and the trace of an error out of a line of the log."""
    if record.exc_info:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else sys.exc_info()[1]
        record.msg, record.args = f"a fault in a request: {told(error)}", ()
        record.exc_info = record.exc_text = record.stack_info = None
    return True


@contextlib.contextmanager
def only_kinds_of_errors(modules: list[ModuleType]) -> Iterator[None]:
    """Within the block, errors in requests are logged by their kinds.

    Args:
        modules: that print errors with `traceback`.
    """
    quiet = _KindOnly()
    for module in modules:
        module.traceback = quiet
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_without_texts)
    try:
        yield
    finally:
        for module in modules:
            module.traceback = traceback
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(_without_texts)
