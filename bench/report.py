"""Tables of the README and a page of pictures, from what is kept under bench/results."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from . import records
from .errors import BadRecord
from .figures import (
    NOT_YET,
    Kept,
    cell,
    conditions,
    duration,
    figure,
    gpu_note,
    gpus,
    is_measured,
    kept,
    ratio,
    row_of,
    shown,
    wrapped,
)
from .registry import OURS
from .report_page import page

README = Path(__file__).parents[1] / "README.md"
MEND = "python -m bench report --readme"

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)

# as the meter calls them, and as a reader does
STAGES = {
    "preprocess": "preprocess",
    "LR tower": "low-resolution tower (CLIP ViT-L/14-336)",
    "HR tower": "high-resolution tower (ConvNeXt-L)",
    "patch info mining": "**patch info mining**",
    "projector": "projector",
}


# ---- tables


def picture_table(found: Kept) -> str:
    """One picture to image tokens, stage by stage: the original's steps and mg_fast."""
    columns = [("cpu", "768", "float32"), ("cpu", "1536-hd", "float32"), ("cpu", "768", "bfloat16")]
    columns += [(device, setting, "bfloat16") for device in gpus(found) for setting in ("768", "1536-hd")]
    pairs = [(device, f"picture/{setting}-b1-{dtype}") for device, setting, dtype in columns]
    titles = [
        f"{who}, {'' if device == 'cpu' else f'{device}, '}{setting}, {dtype}"
        for device, setting, dtype in columns
        for who in ("the original's steps", "mg_fast")
    ]
    lines = ["| one picture to image tokens | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    rows = [row_of(found, device, case, provider) for device, case in pairs for provider in ("reference", "auto")]
    for stage, title in STAGES.items():
        lines.append(f"| {title} | " + " | ".join(_stage(row, stage) for row in rows) + " |")
    lines.append(
        "| **all of it** | "
        + " | ".join(f"**{figure(row)}**" if is_measured(row) else figure(row) for row in rows)
        + " |"
    )
    notes = "Pictures of 768 pixels, and HD's of 1536 in five views; on a CPU where no device is named. Medians; stages from runs of their"
    notes += " own; memory is the peak above inputs and weights; random weights, whose values change no work."
    return "\n".join([*lines, "", wrapped(notes + gpu_note(found)), *conditions(found, pairs)])


def mining_table(found: Kept) -> str:
    """Patch info mining by every provider that was measured."""
    columns = [("cpu", f"patch_mining/{setting}-b1-float32") for setting in ("768", "1536-hd")]
    columns += [
        (device, f"patch_mining/{setting}-b1-bfloat16") for device in gpus(found) for setting in ("768", "1536-hd")
    ]
    documents = [found.get(device, {}).get(case, {"cases": []}) for device, case in columns]
    providers = dict.fromkeys(row["provider"] for document in documents for row in document["cases"] if shown(row))
    titles = [
        f"{'CPU' if device == 'cpu' else device}, {case.removeprefix('patch_mining/')}" for device, case in columns
    ]
    lines = ["| patch info mining by | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for provider in providers or ("reference", "torch"):
        name = {"reference": "`reference`: the original's steps", "torch": "`torch` backend"}.get(provider, provider)
        lines.append(
            f"| {name} | "
            + " | ".join(figure(row_of(found, device, case, provider)) for device, case in columns)
            + " |"
        )
    notes = "Medians; the ratio is to the original's steps, its median over the turns; memory is the peak above inputs and weights."
    return "\n".join([*lines, "", wrapped(notes + gpu_note(found)), *conditions(found, columns)])


def answers_table(found: Kept) -> str:
    """The language model's part of an answer: transformers' own loop, and ours."""
    columns = [("cpu", "0.5b", "float32"), ("cpu", "0.5b", "bfloat16"), ("cpu", "0.5b-int8", "bfloat16")]
    columns += [(device, size, "bfloat16") for device in gpus(found) for size in ("7b", "7b-int8", "7b-hd", "34b")]
    forms = {
        "reference": "`generate`",
        "auto": "mg_fast",
        "auto, compiled": "mg_fast, compiled",
        "auto, static cache": "`generate`, static cache",
    }
    measures = {
        "first-token-b1": "first token of a picture and a question",
        "second-turn-b1": "first token of the second question",
        "decode-b1": "one more token",
        "decode-b8": "one more token of 8 sequences each",
        "decode-b32": "one more token of 32 sequences each",
    }
    cases = {
        (
            device,
            f"end-to-end/{size}-{name}-{dtype}",
        ): f"{'CPU' if device == 'cpu' else device}, {size}, {dtype}: {told}"
        for device, size, dtype in columns
        for name, told in measures.items()
    }
    rows = {pair: {form: row_of(found, *pair, form) for form in forms} for pair in cases}
    measured = {form for row in rows.values() for form, cell in row.items() if cell is not None and shown(cell)}
    titles = {form: title for form, title in forms.items() if form in measured | {"reference", "auto"}}
    lines = ["| an answer's part | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]
    for pair, title in cases.items():
        if any(row is not None for row in rows[pair].values()):
            lines.append(f"| {title} | " + " | ".join(figure(rows[pair][form]) for form in titles) + " |")
    notes = "Medians; random weights. `generate` is transformers' with its default cache, towers and mining by the original's steps; it"
    notes += " keeps image tokens between questions, too. 0.5b: a Llama of 0.56 B parameters behind narrow towers, 576 image tokens."
    return "\n".join([*lines, "", wrapped(notes + gpu_note(found)), *conditions(found, list(cases))])


def status_table(found: Kept) -> str:
    """What has been measured on GPUs: which cases, whether our providers were right, and where one was slower than the
    original's steps.
    """
    if not gpus(found):
        told = "**On a GPU: nothing has been measured yet.** The kernels were interpreted on a CPU and compiled ahead of time for six"
        told += " architectures. [docs/gpu.md](docs/gpu.md) describes how everything is to be measured on a GPU that is borrowed for a"
        told += " quarter of an hour."
        return wrapped(told)
    lines = []
    for device in gpus(found):
        documents = found[device].values()
        rows = [row for document in documents for row in document["cases"] if row["provider"] in OURS and shown(row)]
        wrong = [
            f"{row['name']} by `{row['provider']}` ({cell(row['why'] or 'no reason kept')})"
            for row in rows
            if row["ok"] is False
        ]
        slower = [
            f"{row['name']} by `{row['provider']}` ({ratio(row['speedup'])})"
            for row in rows
            if is_measured(row) and row.get("speedup") and row["speedup"] < 1
        ]
        conditions = sorted({f"{document['date']} at commit {document['commit']}" for document in documents})
        told = f"- **{device}**, measured on {', '.join(conditions)}: {len(documents)} cases, in which {len(rows)} providers of ours ran."
        told += (
            f" Wrong or broken: {'; '.join(wrong) or 'none'}. Slower than the baseline: {'; '.join(slower) or 'none'}."
        )
        lines.append(wrapped(told))
    return "\n".join(lines)


def predicted_table(found: Kept) -> str:
    """What was counted of a GPU that is not here; where one was, what was measured."""
    parts = {"patch info mining": "patch_mining", "high-resolution tower": "tower", "picture to tokens": "picture"}
    forms = {"reference": "the original's steps", "auto": "mg_fast", "triton": "mg_fast, kernels everywhere"}
    predicted = json.loads((records.RESULTS / "predicted.json").read_text(encoding="utf-8"))
    lines = ["| on a GPU, predicted | " + " | ".join(forms.values()) + " |", "|---" * (len(forms) + 1) + "|"]
    for setting in ("768", "1536-hd"):
        for title, group in parts.items():
            rows = predicted["cases"][f"{group}/{setting}-b1-bfloat16"]
            # where no form is called auto, it is the kernel
            measured = {form: _measured_on_gpu(found, f"{group}/{setting}-b1-bfloat16", form) for form in forms}
            cells = [measured[form] or _counted(rows.get(form) or rows["triton"]) for form in forms]
            lines.append(f"| {title}, {setting} | " + " | ".join(cells) + " |")
    notes = "bfloat16, one picture. GFLOP of products, MB that operators read and write one by one, launches, and the most allocated at"
    notes += " once above weights and inputs; counted on tensors without values (`python -m bench memory`), without what libraries take."
    return "\n".join([*lines, "", wrapped(notes)])


def _measured_on_gpu(found: Kept, case: str, form: str) -> str | None:
    """The figures of a case on every GPU on which it was measured."""
    rows = {device: row_of(found, device, case, form) for device in gpus(found)}
    return "; ".join(f"measured on {device}: {figure(row)}" for device, row in rows.items() if is_measured(row)) or None


def _counted(row: Mapping) -> str:
    return f"{row['flop'] / 1e9:,.0f} GFLOP, {row['moved'] / 1e6:,.0f} MB, {row['launches']} launches, {row['peak'] / 2**20:,.0f} MiB"


TABLES = {
    "picture": picture_table,
    "patch_mining": mining_table,
    "answers": answers_table,
    "predicted": predicted_table,
    "status": status_table,
}


def _stage(row: Mapping | None, name: str) -> str:
    found = next((stage for stage in (row or {}).get("stages") or () if stage["name"] == name), None)
    return duration(found["ms"]) if found else NOT_YET


# ---- the README


def fill(text: str, found: Kept) -> str:
    """The README with the tables that stand between its markers made anew.

    Raises:
        BadRecord: it has no marker, or one of a table that there is not.
    """
    names = [match["name"] for match in _MARKED.finditer(text)]
    if not names or (unknown := [name for name in names if name not in TABLES]):
        what = f"a table called {unknown[0]!r}" if names else "no marker"
        raise BadRecord(
            f"the README has {what}: expected <!-- bench:NAME --> ... <!-- /bench -->, NAME one of {', '.join(TABLES)}"
        )
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match['name']](found)}\n{match[4]}", text)


def report(*, readme: bool, check: bool, html: Path | None) -> list[str]:
    """Writes what was asked for.

    Args:
        readme: the README's tables.
        check: write nothing, and say where the README is not what the records give.
        html: the page.

    Returns:
        What to tell: in a check what differs; nothing where all is well.
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


def differences(text: str, found: Kept) -> list[str]:
    """One line per table of a README that is not what the records give."""
    made = _MARKED.finditer(fill(text, found))
    return [
        f"README.md: the table {before['name']!r} is not what bench/results gives: run `{MEND}` and commit what it changes"
        for before, after in zip(_MARKED.finditer(text), made, strict=True)
        if before["table"] != after["table"]
    ]
