"""The command line, `mg-fast`."""

from .command_line import main

__all__ = ["main"]
