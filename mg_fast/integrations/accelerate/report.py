"""The report of what `accelerate` did, for reading and for undoing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import MgFastError


@dataclass
class Finding:
    """One thing that `accelerate` recognised.

    Attributes:
        name: its place, as a dotted name from the given model.
        what: what was found there.
        reason: what replaced it, or why nothing did.
    """

    name: str
    what: str
    reason: str
    apply: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.what}): {self.reason}"


@dataclass
class Report:
    """What `accelerate` did to a model, for reading (`print(report)`) and for undoing.

    The report does not keep the model alive.
    Attributes:
        model: the class name of the model.
        swapped: what was swapped.
        skipped: what was recognised and left as it is.
        looked_for: what every rule looks for, in words.
    """

    model: str
    swapped: list[Finding]
    skipped: list[Finding]
    looked_for: list[str] = field(repr=False)

    def undo(self) -> None:
        """Puts the originals back, including those that an earlier call had swapped already.

        A second call does nothing.
        Raises:
            MgFastError: something else has replaced a swap since. That one stays until `undo` is called again.
        """
        stuck = []
        for entry in self.swapped + self.skipped:
            if entry.undo is None:
                continue
            try:
                entry.undo()
                # This undo is spent. The swap of a later call is undone by that call's report.
                entry.undo = None
            except MgFastError as error:
                stuck.append(f"{entry.name}: {error}")
        if stuck:
            raise MgFastError(f"not undone: {'; '.join(stuck)}")

    def __str__(self) -> str:
        if not self.swapped and not self.skipped:
            nothing = f"mg_fast.accelerate: nothing recognised in {self.model}, and nothing changed. Looked for:"
            return "\n".join([nothing, *(f"  {what}" for what in self.looked_for)])
        lines = [f"mg_fast.accelerate: {self.model}, {len(self.swapped)} swapped, {len(self.skipped)} not swapped"]
        lines += [f"  swapped      {entry}" for entry in self.swapped]
        lines += [f"  not swapped  {entry}" for entry in self.skipped]
        return "\n".join(lines)
