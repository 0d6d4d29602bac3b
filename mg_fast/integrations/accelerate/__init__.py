"""`accelerate(model)` puts mg_fast's operations into a model that someone else built, reports it, and can undo it.

A rule recognises one kind of module and says for each find what becomes of it. Whatever could not be swapped without a
change in numbers stays as it is, and the report gives the reason.
"""

from .report import Finding, Report
from .rules import accelerate

__all__ = ["Finding", "Report", "accelerate"]
