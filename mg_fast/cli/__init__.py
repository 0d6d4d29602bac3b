"""The command line, `mg-fast`: `program` has the parser and the exit codes, and every command a module of its own."""

from .program import main

__all__ = ["main"]
