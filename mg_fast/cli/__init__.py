"""The command line `mg-fast`: `program` has the parser and the exit codes, and every command has its own module."""

from .program import main

__all__ = ["main"]
