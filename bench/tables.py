"""The report's tables in Markdown, each made of what is kept of the cases."""

import json
from collections.abc import Mapping

from . import records
from .figures import (
    NOT_YET,
    Records,
    conditions,
    device_title,
    duration,
    figure,
    gpu_note,
    gpus,
    is_measured,
    markdown,
    row_of,
    rows_of,
    shown,
    wrapped,
)

# Stages by the meter's names, and how a reader calls them.
STAGES = {
    "preprocess": "preprocess",
    "LR tower": "low-resolution tower (CLIP ViT-L/14-336)",
    "HR tower": "high-resolution tower (ConvNeXt-L)",
    "patch info mining": "**patch info mining**",
    "projector": "projector",
}
SETTINGS = ("768", "1536-hd")


def picture_table(found: Records) -> str:
    """One picture to image tokens, stage by stage: the original's steps and mg_fast."""
    columns = [("cpu", "768", "float32"), ("cpu", "1536-hd", "float32"), ("cpu", "768", "bfloat16")]
    columns += [(device, setting, "bfloat16") for device in gpus(found) for setting in SETTINGS]
    pairs = [(device, f"picture/{setting}-b1-{dtype}") for device, setting, dtype in columns]
    titles = [
        f"{who}, {'' if device == 'cpu' else f'{device}, '}{setting}, {dtype}"
        for device, setting, dtype in columns
        for who in ("the original's steps", "mg_fast")
    ]
    measured = [row_of(found, *pair, provider) for pair in pairs for provider in ("reference", "auto")]
    rows = [[title, *(_stage(row, stage) for row in measured)] for stage, title in STAGES.items()]
    whole = [f"**{figure(row)}**" if is_measured(row) else figure(row) for row in measured]
    notes = (
        "Pictures of 768 pixels, and HD pictures of 1536 pixels in five views, on a CPU where no device is named. "
        "Times are medians; those of the stages come from runs of their own. Memory is the peak above inputs and "
        "weights. Weights are random: their values do not change the work."
    )
    head = ["one picture to image tokens", *titles]
    table = markdown(head, [*rows, ["**all of it**", *whole]])
    return "\n".join([table, "", wrapped(notes + gpu_note(found)), *conditions(found, pairs)])


def _stage(row: Mapping | None, name: str) -> str:
    found = next((stage for stage in (row or {}).get("stages") or () if stage["name"] == name), None)
    return duration(found["ms"]) if found else NOT_YET


def mining_table(found: Records) -> str:
    """Patch info mining by every provider that was measured."""
    columns = [("cpu", f"patch_mining/{setting}-b1-float32") for setting in SETTINGS]
    columns += [(device, f"patch_mining/{setting}-b1-bfloat16") for device in gpus(found) for setting in SETTINGS]
    titles = [f"{device_title(device)}, {case.removeprefix('patch_mining/')}" for device, case in columns]
    measured = [row["provider"] for column in columns for row in rows_of(found, *column) if shown(row)]
    names = {"reference": "`reference`: the original's steps", "torch": "`torch` backend"}
    rows = [
        [names.get(provider, provider), *(figure(row_of(found, *column, provider)) for column in columns)]
        for provider in dict.fromkeys(measured) or names
    ]
    notes = (
        "Times are medians. The ratio to the original's steps is the median of the ratios within the turns. Memory is "
        "the peak above inputs and weights."
    )
    table = markdown(["patch info mining by", *titles], rows)
    return "\n".join([table, "", wrapped(notes + gpu_note(found)), *conditions(found, columns)])


def answers_table(found: Records) -> str:
    """The language model's part of an answer: by transformers' own loop, and by mg_fast."""
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
    titles = {
        (device, f"end-to-end/{size}-{name}-{dtype}"): f"{device_title(device)}, {size}, {dtype}: {told}"
        for device, size, dtype in columns
        for name, told in measures.items()
    }
    measured = {row["provider"] for pair in titles for row in rows_of(found, *pair) if shown(row)}
    forms = {form: title for form, title in forms.items() if form in measured | {"reference", "auto"}}
    rows = []
    for pair, title in titles.items():
        cells = [row_of(found, *pair, form) for form in forms]
        if any(row is not None for row in cells):
            rows.append([title, *map(figure, cells)])
    notes = (
        "Times are medians; weights are random. `generate` is transformers' own loop with its default cache, where "
        "towers and mining take the original's steps; it keeps image tokens between questions, as mg_fast does. 0.5b "
        "is a Llama of 0.56 B parameters behind narrow towers, with 576 image tokens."
    )
    table = markdown(["an answer's part", *forms.values()], rows)
    return "\n".join([table, "", wrapped(notes + gpu_note(found)), *conditions(found, list(titles))])


def predicted_table(found: Records) -> str:
    """Predictions for a GPU; measured figures take their place as soon as there are any."""
    parts = {"patch info mining": "patch_mining", "high-resolution tower": "tower", "picture to tokens": "picture"}
    forms = {"reference": "the original's steps", "auto": "mg_fast", "triton": "mg_fast, kernels everywhere"}
    predicted = json.loads((records.RESULTS / "predicted.json").read_text(encoding="utf-8"))["cases"]
    rows = []
    for setting in SETTINGS:
        for title, group in parts.items():
            case = f"{group}/{setting}-b1-bfloat16"
            # A case without a form called `auto` shows the kernel in its place.
            counted = [_counted(predicted[case].get(form) or predicted[case]["triton"]) for form in forms]
            cells = [_measured_on_gpu(found, case, form) or told for form, told in zip(forms, counted)]
            rows.append([f"{title}, {setting}", *cells])
    notes = (
        "One picture in bfloat16: GFLOP of matrix products and convolutions, MB that the operators read and write one "
        "by one, launches of kernels, and the most memory that is allocated at once above weights and inputs. All were "
        "counted on tensors without values (`python -m bench memory`), without what libraries take for themselves."
    )
    return "\n".join([markdown(["on a GPU, predicted", *forms.values()], rows), "", wrapped(notes)])


def _measured_on_gpu(found: Records, case: str, form: str) -> str:
    """The figures of a case on every GPU that it was measured on."""
    rows = {device: row_of(found, device, case, form) for device in gpus(found)}
    return "; ".join(f"measured on {device}: {figure(row)}" for device, row in rows.items() if is_measured(row))


def _counted(row: Mapping) -> str:
    moved, peak = row["moved"] / 1e6, row["peak"] / 2**20
    return f"{row['flop'] / 1e9:,.0f} GFLOP, {moved:,.0f} MB, {row['launches']} launches, {peak:,.0f} MiB"
