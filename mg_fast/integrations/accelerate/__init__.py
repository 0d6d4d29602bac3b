"""`accelerate(model)`: puts mg_fast's operations into a model that someone else built, says what it did, and undoes it.

A rule recognises one kind of thing and says for each find what becomes of it. What cannot be swapped without other
numbers stays as it is, with the reason.
"""

from .report import Finding, Report
from .rules import accelerate

__all__ = ["Finding", "Report", "accelerate"]
