"""Tables of the README and a page of pictures, from what is kept under bench/results."""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from . import measure, records
from .cases import all_cases
from .records import BadRecord
from .registry import OURS

README = Path(__file__).parents[1] / "README.md"
MEND = "python -m bench report --readme"
NOT_YET = "not measured yet"

# device -> case -> the document that was kept of it
Kept = Mapping[str, Mapping[str, dict]]

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)

# as the meter calls them, and as a reader does
STAGES = {
    "preprocess": "preprocess",
    "LR tower": "low-resolution tower (CLIP ViT-L/14-336)",
    "HR tower": "high-resolution tower (ConvNeXt-L)",
    "patch info mining": "**patch info mining**",
    "projector": "projector",
}


def kept(results: Path = records.RESULTS) -> Kept:
    """What was measured, by device: the folders of bench/results.

    Raises:
        BadRecord: a file there is no document of this benchmark.
    """
    devices = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for path in sorted(folder.rglob("*.json")):
            document = records.read(path)
            for name in dict.fromkeys(row["name"] for row in document["cases"]):
                rows = [row for row in document["cases"] if row["name"] == name]
                devices.setdefault(folder.name, {})[name] = document | {"cases": rows}
    order = list(all_cases())
    in_order = {device: dict(sorted(cases.items(), key=lambda item: _place(order, item[0]))) for device, cases in devices.items()}
    # a CPU first
    return dict(sorted(in_order.items(), key=lambda item: (item[0] != "cpu", item[0])))


def _place(order: list[str], name: str) -> tuple[int, str]:
    """As the registry lists them; what it no longer has comes last."""
    return (order.index(name) if name in order else len(order), name)


def row_of(found: Kept, device: str, case: str, provider: str) -> dict | None:
    """A provider's row; None where nothing is kept of it."""
    rows = found.get(device, {}).get(case, {"cases": []})["cases"]
    return next((row for row in rows if row["provider"] == provider), None)


def gpus(found: Kept) -> list[str]:
    return [device for device in found if device != "cpu"]


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
    for stage, shown in STAGES.items():
        lines.append(f"| {shown} | " + " | ".join(_stage(row, stage) for row in rows) + " |")
    lines.append("| **all of it** | " + " | ".join(f"**{figure(row)}**" if is_measured(row) else figure(row) for row in rows) + " |")
    notes = "Pictures of 768 pixels, and HD's of 1536 in five views; on a CPU where no device is named. Medians; stages from runs of their"
    notes += " own; memory is the peak above inputs and weights; random weights, whose values change no work."
    return "\n".join([*lines, "", _wrapped(notes + _gpu_note(found)), *conditions(found, pairs)])


def mining_table(found: Kept) -> str:
    """Patch info mining by every provider that was measured."""
    columns = [("cpu", f"patch_mining/{setting}-b1-float32") for setting in ("768", "1536-hd")]
    columns += [(device, f"patch_mining/{setting}-b1-bfloat16") for device in gpus(found) for setting in ("768", "1536-hd")]
    documents = [found.get(device, {}).get(case, {"cases": []}) for device, case in columns]
    providers = dict.fromkeys(row["provider"] for document in documents for row in document["cases"] if shown(row))
    titles = [f"{'CPU' if device == 'cpu' else device}, {case.removeprefix('patch_mining/')}" for device, case in columns]
    lines = ["| patch info mining by | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for provider in providers or ("reference", "torch"):
        name = {"reference": "`reference`: the original's steps", "torch": "`torch` backend"}.get(provider, provider)
        lines.append(f"| {name} | " + " | ".join(figure(row_of(found, device, case, provider)) for device, case in columns) + " |")
    notes = "Medians; the ratio is to the original's steps, its median over the turns; memory is the peak above inputs and weights."
    return "\n".join([*lines, "", _wrapped(notes + _gpu_note(found)), *conditions(found, columns)])


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
        (device, f"end-to-end/{size}-{name}-{dtype}"): f"{'CPU' if device == 'cpu' else device}, {size}, {dtype}: {told}"
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
    return "\n".join([*lines, "", _wrapped(notes + _gpu_note(found)), *conditions(found, list(cases))])


def status_table(found: Kept) -> str:
    """What has been measured on GPUs: which cases, whether our providers were right, and where one was slower than the original's steps."""
    if not gpus(found):
        told = "**On a GPU: nothing has been measured yet.** The kernels were interpreted on a CPU and compiled ahead of time for six"
        told += " architectures. [docs/gpu.md](docs/gpu.md) describes how everything is to be measured on a GPU that is borrowed for a"
        told += " quarter of an hour."
        return _wrapped(told)
    lines = []
    for device in gpus(found):
        documents = found[device].values()
        rows = [row for document in documents for row in document["cases"] if row["provider"] in OURS and shown(row)]
        wrong = [f"{row['name']} by `{row['provider']}` ({_cell(row['why'] or 'no reason kept')})" for row in rows if row["ok"] is False]
        slower = [
            f"{row['name']} by `{row['provider']}` ({ratio(row['speedup'])})"
            for row in rows
            if is_measured(row) and row.get("speedup") and row["speedup"] < 1
        ]
        conditions = sorted({f"{document['date']} at commit {document['commit']}" for document in documents})
        told = f"- **{device}**, measured on {', '.join(conditions)}: {len(documents)} cases, in which {len(rows)} providers of ours ran."
        told += f" Wrong or broken: {'; '.join(wrong) or 'none'}. Slower than the baseline: {'; '.join(slower) or 'none'}."
        lines.append(_wrapped(told))
    return "\n".join(lines)


def predicted_table(found: Kept) -> str:
    """What was counted of a GPU that is not here; where one was, what was measured."""
    parts = {"patch info mining": "patch_mining", "high-resolution tower": "tower", "picture to tokens": "picture"}
    forms = {"reference": "the original's steps", "auto": "mg_fast", "triton": "mg_fast, kernels everywhere"}
    predicted = json.loads((records.RESULTS / "predicted.json").read_text(encoding="utf-8"))
    lines = ["| on a GPU, predicted | " + " | ".join(forms.values()) + " |", "|---" * (len(forms) + 1) + "|"]
    for setting in ("768", "1536-hd"):
        for shown, group in parts.items():
            rows = predicted["cases"][f"{group}/{setting}-b1-bfloat16"]
            # where no form is called auto, it is the kernel
            measured = {form: _measured_on_gpu(found, f"{group}/{setting}-b1-bfloat16", form) for form in forms}
            cells = [measured[form] or _counted(rows.get(form) or rows["triton"]) for form in forms]
            lines.append(f"| {shown}, {setting} | " + " | ".join(cells) + " |")
    notes = "bfloat16, one picture. GFLOP of products, MB that operators read and write one by one, launches, and the most allocated at"
    notes += " once above weights and inputs; counted on tensors without values (`python -m bench memory`), without what libraries take."
    return "\n".join([*lines, "", _wrapped(notes)])


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


def is_measured(row: Mapping | None) -> bool:
    return row is not None and row["median_ms"] is not None and row["ok"] is not False


def shown(row: Mapping) -> bool:
    """Whether it has something to say: what cannot run on a device has not."""
    return row["median_ms"] is not None or row["ok"] is False


def figure(row: Mapping | None) -> str:
    """Time, memory and ratio; FAIL with its reason instead of any of them."""
    if row is None:
        return NOT_YET
    if row["ok"] is False:
        return f"FAIL: {_cell(row['why'] or 'no reason kept')}"
    if row["median_ms"] is None:
        return _cell(row["why"] or NOT_YET)
    parts = [duration(row["median_ms"])]
    if row["peak_mib"] is not None:
        parts.append(f"{row['peak_mib']:.0f} MiB")
    notes = [ratio(row["speedup"])] if row["provider"] != row.get("baseline", "reference") and row.get("speedup") else []
    if row.get("graphed_ms"):
        # without it a gain at batch 1 may be launches only
        notes.append(f"as CUDA graphs {duration(row['graphed_ms'])}" + (f", {ratio(row['speedup_graphed'])}" if notes else ""))
    notes += [_cell(remark) for remark in remarks(row)]
    return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")


def remarks(row: Mapping) -> list[str]:
    """What a figure must not be read without."""
    told = []
    if row["ok"] is None:
        told.append(row["why"] or "accuracy unknown")
    if (row.get("halves_differ") or 0) > measure.STEADY:
        told.append(f"unsteady: halves of the turns differ by {row['halves_differ']:.0%}")
    return told


def ratio(speedup: float) -> str:
    """2.1 times; of what takes longer, how much slower."""
    return f"{speedup:.1f} times" if speedup >= 1 else f"slower: {speedup:.2f} times"


def duration(ms: float) -> str:
    """Three digits, in seconds from one on."""
    value, unit = (ms / 1e3, "s") if ms >= 1e3 else (ms, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def _stage(row: Mapping | None, name: str) -> str:
    found = next((stage for stage in (row or {}).get("stages") or () if stage["name"] == name), None)
    return duration(found["ms"]) if found else NOT_YET


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 140, subsequent_indent="  " * text.startswith("- "), break_long_words=False, break_on_hyphens=False)


def _gpu_note(found: Kept) -> str:
    return "" if gpus(found) else f" On a GPU: {NOT_YET}."


def conditions(found: Kept, used: list[tuple[str, str]]) -> list[str]:
    """A line for what was measured under the same conditions."""
    lines: dict[str, list[str]] = {}
    for device, case in used:
        if document := found.get(device, {}).get(case):
            lines.setdefault(condition(document), []).append(case)
    return ["", *(_wrapped(f"- `{'`, `'.join(cases)}`: {line}") for line, cases in lines.items())] if lines else []


def busy(document: Mapping) -> str | None:
    """A sentence where other processes took part in every turn."""
    share = max((row.get("others") or 0 for row in document["cases"]), default=0)
    return f"BUSY: other processes took {share:.0%} of the machine in every turn" if share > measure.BUSY else None


def condition(document: Mapping) -> str:
    """Machine, stack, date, load and the command of a document, in one line."""
    if document.get("device") == "cuda":
        where = f"{document['gpu']}, driver {document.get('driver')}, clocks {document.get('clocks')}"
    else:
        where = f"{document['cpu']}, {document['threads']} threads, {document.get('memory_gib')} GiB of memory"
    turns = sorted({row["samples"] for row in document["cases"] if row.get("samples")})
    told = [where, f"torch {document['torch']}", document["date"], f"commit {document['commit']}"]
    if turns:
        several = f" to {turns[-1]}" if len(turns) > 1 else ""
        told.append(f"{turns[0]}{several} {'samples' if document.get('device') == 'cuda' else 'turns'}")
    if left_out := max((row.get("left_out") or 0 for row in document["cases"]), default=0):
        told.append(f"{left_out} disturbed ones left out")
    if disturbed := busy(document):
        told.append(disturbed)
    told += [f"load {document['load']}" if document.get("load") is not None else None]
    told += [f"`{document['command']}`" if document.get("command") else None]
    return ", ".join(part for part in told if part) + "."


# ---- the README


def fill(text: str, found: Kept) -> str:
    """The README with the tables that stand between its markers made anew.

    Raises:
        BadRecord: it has no marker, or one of a table that there is not.
    """
    names = [match["name"] for match in _MARKED.finditer(text)]
    if not names or (unknown := [name for name in names if name not in TABLES]):
        what = f"a table called {unknown[0]!r}" if names else "no marker"
        raise BadRecord(f"the README has {what}: expected <!-- bench:NAME --> ... <!-- /bench -->, NAME one of {', '.join(TABLES)}")
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
        from .report_page import page

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
