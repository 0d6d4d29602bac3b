"""`python -m bench report`: the tables of the README, and a page of pictures."""

import re
from pathlib import Path

from . import tables
from .errors import BadRecord
from .figures import Kept, kept
from .report_page import page

README = Path(__file__).parents[1] / "README.md"
MEND = "python -m bench report --readme"
TABLES = {
    "picture": tables.picture_table,
    "patch_mining": tables.mining_table,
    "answers": tables.answers_table,
    "predicted": tables.predicted_table,
    "status": tables.status_table,
}

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)


def report(*, readme: bool, check: bool, html: Path | None) -> list[str]:
    """Writes what was asked for, or returns the tables where nothing was.

    Args:
        readme: write the README's tables.
        check: write nothing, and find where the README is not what the records give.
        html: where to write the page.

    Returns:
        What to print: of a check what differs, nothing where all is well.
    """
    found, text = kept(), README.read_text(encoding="utf-8")
    if check:
        return differences(text, found)
    told = []
    if readme:
        README.write_text(fill(text, found), encoding="utf-8")
        told.append(f"{README.name}: {', '.join(TABLES)} as recorded")
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(found), encoding="utf-8")
        told.append(str(html))
    return told or [f"{title}\n{table(found)}\n" for title, table in TABLES.items()]


def fill(text: str, found: Kept) -> str:
    """The README with the tables between its markers made anew.

    Raises:
        BadRecord: the README has no marker, or one for a table that does not exist.
    """
    names = [match["name"] for match in _MARKED.finditer(text)]
    if not names or (unknown := [name for name in names if name not in TABLES]):
        what = f"a table called {unknown[0]!r}" if names else "no marker"
        expected = f"expected <!-- bench:NAME --> ... <!-- /bench -->, NAME one of {', '.join(TABLES)}"
        raise BadRecord(f"the README has {what}: {expected}")
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match['name']](found)}\n{match[4]}", text)


def differences(text: str, found: Kept) -> list[str]:
    """A line for each table of the README that is not what the records give."""
    made = _MARKED.finditer(fill(text, found))
    return [
        f"README.md: the table {before['name']!r} is not what bench/results gives: "
        f"run `{MEND}` and commit what it changes"
        for before, after in zip(_MARKED.finditer(text), made, strict=True)
        if before["table"] != after["table"]
    ]
