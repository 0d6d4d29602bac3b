"""Documents of figures: written as they grow, read and checked.

`mg_fast.testing.environment` gives the part that says what they were measured on.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from .errors import BadRecord

RESULTS = Path(__file__).parent / "results"
# The keys that every document has, and those that must be equal where two documents are joined.
CONDITIONS = ("date", "device", "gpu", "cpu", "threads", "torch", "commit")
SAME = ("gpu", "driver", "cpu", "threads", "torch", "triton", "transformers", "commit")
# The keys that every row of a document has. Others are there where they were measured.
ROW = ("name", "provider", "ok", "why", "median_ms", "p20_ms", "p80_ms", "peak_mib", "first_call_ms")


def device_name(document: dict) -> str:
    """The name of a device's folder under bench/results: `cpu`, or the GPU's name as in `nvidia-h200`."""
    return (document["gpu"] or "cpu").lower().replace(" ", "-") if document["device"] == "cuda" else "cpu"


def write(path: Path, document: dict) -> None:
    """Writes a document in place of a file; a reader finds either of them whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def check_writable(path: Path) -> None:
    """Raises BadRecord where a document could not be kept there."""
    if path.is_dir():
        raise BadRecord(f"{path} is a folder: expected the name of a file for the document")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadRecord(f"{path} cannot be written: {error.strerror}") from None


def save(document: dict) -> list[Path]:
    """Keeps every case of a document under bench/results, and returns the files, one by device and name for each case.

    Rows of providers that were not measured this time stay if commit, machine and versions were the same.
    """
    paths = []
    for name in dict.fromkeys(row["name"] for row in document["cases"]):
        path = RESULTS / device_name(document) / f"{name.replace('/', '-')}.json"
        rows = {row["provider"]: row for row in document["cases"] if row["name"] == name}
        before = read(path) if path.exists() else None
        if before and all(before.get(key) == document.get(key) for key in SAME):
            rows = {row["provider"]: row for row in before["cases"]} | rows
        write(path, document | {"cases": list(rows.values())})
        paths.append(path)
    return paths


def read(path: Path) -> dict:
    """The document in a file, or all documents below a folder as one, which has the conditions of the first.

    Raises:
        BadRecord: the file is missing, is not JSON, or is not a document of this benchmark; the folder holds none.
    """
    if path.is_dir():
        documents = []
        for file in sorted(path.rglob("*.json")):
            # Predictions and the steps of a run are kept beside the documents.
            with contextlib.suppress(BadRecord):
                documents.append(read(file))
        if not documents:
            raise BadRecord(
                f"{path} holds no document: expected a file that `python -m bench run --out` wrote, or a folder of such"
            )
        return documents[0] | {"cases": [row for document in documents for row in document["cases"]]}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadRecord(f"{path} is not valid JSON: {error}") from None
    rows = document.get("cases") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(ROW) <= row.keys() for row in rows):
        expected = f"expected an object with `cases`, each of which has {', '.join(ROW)}"
        raise BadRecord(f"{path} is not a document of this benchmark: {expected}")
    if missing := [key for key in CONDITIONS if key not in document]:
        raise BadRecord(f"{path} does not say what it was measured on: {', '.join(missing)} missing")
    return document
