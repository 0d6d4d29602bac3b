"""The report of a run for a person to read: what became of every source, and what happened to the requests."""

from collections import Counter
from collections.abc import Mapping

from .asking import Tally
from .checks import CLIP_TOKENS
from .counts import TITLES, Counts
from .sources import KINDS

_HEAD = "".join(f" {TITLES[kind]} |" for kind in KINDS)
_LINE = "---|" * len(KINDS)


def report(counts: Counts, settings: Mapping, tally: Tally | None) -> str:
    """The report of a run in Markdown.

    Args:
        counts: what became of the sources.
        settings: what the replies depend on, from the journal.
        tally: what happened in this run; None where nothing was asked.
    """
    parts = (
        ("not read: no source in it", _by_kind(counts.skipped)),
        ("says the same as an earlier one", counts.repeated),
        ("not asked about, because of what it says", _by_kind(counts.unfit)),
        ("more than --most", counts.beyond),
        ("no good answer yet, asked about by the next run", counts.open),
        ("refused by the endpoint", _by_kind(counts.refused)),
        ("all answers were bad", _by_kind(counts.rejected)),
        ("dialogue nearly the same as an earlier one", counts.alike),
        ("**dialogues**", counts.made),
    )
    lines = ["# Generation data", "", ", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += [f"| |{_HEAD}", f"|---|{_LINE}"]
    lines += [_row(name, counter) for name, counter in parts]
    lines.append(_row("captions and conversations in the files, the sum", sum((one for _, one in parts), Counter())))
    if counts.made:
        long = " and ".join(f"{counts.long[kind]} of {TITLES[kind]}" for kind in KINDS)
        ordered = sorted(counts.lengths)
        quartiles = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        lines += ["", f"Longer than {CLIP_TOKENS} CLIP tokens, and marked: {long}."]
        lines += [f"CLIP tokens of the prompts, least, quartiles and most: {', '.join(map(str, quartiles))}."]
    if counts.tokens:
        lines += ["", "Tokens so far: " + ", ".join(f"{n} of {name}" for name, n in counts.tokens.items()) + "."]
    if counts.elsewhere:
        lines += ["", f"Answered earlier, but not given this time: {counts.elsewhere} sources."]
    for title, counter in (
        ("Rows of the files that are no source", counts.skipped),
        ("Sources that are not asked about", counts.unfit),
        ("Questions that the endpoint refused", counts.refused),
        ("Sources whose answers were all bad, by the last one", counts.rejected),
        ("Bad answers, the corrected ones included", counts.faults),
    ):
        lines += _reasons(title, counter)
    if tally is not None:
        state = "It was stopped before its end. " if tally.stopped else ""
        lines += ["", "## This run", ""]
        lines += [f"{state}{tally.sent} requests, {tally.replies} replies, {tally.seconds:.0f} seconds."]
        lines += _table("Requests that failed", tally.troubles)
        lines += _table("Questions left for the next run", tally.left)
    return "\n".join(lines) + "\n"


def _by_kind(counter: Counter) -> Counter:
    """The numbers by kind, of numbers by kind and reason."""
    found: Counter = Counter()
    for (kind, _), count in counter.items():
        found[kind] += count
    return found


def _row(name: str, counter: Mapping) -> str:
    return f"| {_cell(name)} |" + "".join(f" {counter.get(kind, 0)} |" for kind in KINDS)


def _reasons(title: str, counter: Counter) -> list[str]:
    if not counter:
        return []
    totals: Counter = Counter()
    for (_, reason), count in counter.items():
        totals[reason] += count
    rows = [_row(reason, {kind: counter[kind, reason] for kind in KINDS}) for reason, _ in totals.most_common()]
    return ["", f"## {title}", "", f"| reason |{_HEAD}", f"|---|{_LINE}", *rows]


def _table(title: str, counter: Counter) -> list[str]:
    if not counter:
        return []
    rows = [f"| {_cell(name)} | {count} |" for name, count in counter.most_common()]
    return ["", f"## {title}", "", "| reason | number |", "|---|---|", *rows]


def _cell(text: str) -> str:
    # A table's cell ends at a bar.
    return " ".join(text.split()).replace("|", "/")
