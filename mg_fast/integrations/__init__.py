"""Ties mg_fast to other libraries. This package imports nothing, because `import mg_fast` itself passes through it."""
