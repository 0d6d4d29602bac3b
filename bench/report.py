"""`python -m bench report`: the tables of README.md and of pages under docs, and a page of pictures."""

import re
from pathlib import Path

from . import interleaved_tables, load_table, operation_tables, painters, serving_plan, tables, web_load
from .errors import BadRecord
from .figures import Records, records_by_device
from .page import page
from .readme_table import readme_table, status_table

ROOT = Path(__file__).parents[1]
# The files with tables between markers.
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "deployment.md",
    ROOT / "docs" / "drawing.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "web.md",
)
MEND = "python -m bench report --readme"
TABLES = {
    "status": status_table,
    "readme": readme_table,
    "picture": tables.picture_table,
    "patch_mining": tables.mining_table,
    "answers": tables.answers_table,
    "deformable_attention": operation_tables.deformable_table,
    "feature_sync": operation_tables.synchronizer_table,
    "issue": operation_tables.issue_table,
    "painters": painters.painter_table,
    "serving-load": load_table.load_of_serving,
    "web-load": web_load.load_of_page,
    "serving-memory": serving_plan.memory_of_serving,
    "serving-limits": serving_plan.limits_of_serving,
    "choice": operation_tables.choice_table,
    "predicted": tables.predicted_table,
    "interleaved": interleaved_tables.interleaved_table,
}

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)


def report(*, readme: bool, check: bool, html: Path | None) -> list[str]:
    """Writes the tables of DOCUMENTS and the page that are asked for, and returns lines to print.

    If nothing is asked for, these are all tables; for a check, which writes nothing, a line for each table that differs
    from what the records give.
    """
    found = records_by_device()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS} if readme or check else {}
    if check:
        return [line for path, text in texts.items() for line in differences(text, found, path.name)]
    told = []
    for path, text in texts.items():
        path.write_text(fill(text, found, path.name), encoding="utf-8")
        told.append(f"{path.name}: {', '.join(match['name'] for match in _MARKED.finditer(text))} as recorded")
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(found), encoding="utf-8")
        told.append(str(html))
    return told or [f"{title}\n{table(found)}\n" for title, table in TABLES.items()]


def fill(text: str, found: Records, name: str = "README.md") -> str:
    """A document with the tables between its markers made anew."""
    names = [match["name"] for match in _MARKED.finditer(text)]
    if not names or (unknown := [name for name in names if name not in TABLES]):
        what = f"a table called {unknown[0]!r}" if names else "no marker"
        expected = f"expected <!-- bench:NAME --> ... <!-- /bench -->, NAME one of {', '.join(TABLES)}"
        raise BadRecord(f"{name} has {what}: {expected}")
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match['name']](found)}\n{match[4]}", text)


def differences(text: str, found: Records, name: str = "README.md") -> list[str]:
    """A line for each table of a document that is not what the records give."""
    made = _MARKED.finditer(fill(text, found, name))
    return [
        f"{name}: the table {before['name']!r} is not what bench/results gives: run `{MEND}` and commit what it changes"
        for before, after in zip(_MARKED.finditer(text), made, strict=True)
        if before["table"] != after["table"]
    ]
