"""The README's status box, and its table of the original's steps against mg_fast in a few cases."""

from .figures import Records, cell, duration, gpus, is_measured, markdown, ratio, remarks, row_of, shown, wrapped
from .registry import OURS

# The cases of the table, and their titles for a reader. The last one shows where little is gained.
ON_A_CPU = {
    "picture/768-b1-float32": "one picture of 768x768 pixels to image tokens, float32",
    "picture/1536-hd-b1-float32": "one HD picture of 1536x1536 pixels to image tokens, float32",
    "picture/768-b1-bfloat16": "one picture of 768x768 pixels to image tokens, bfloat16",
    "patch_mining/768-b1-float32": "patch info mining alone, 768x768 pixels, float32",
    "deformable_attention/detr-encoder-b1-float32": "deformable attention, encoder of Deformable DETR, float32",
    "feature_sync/llm-decode-n4-b1-float32": "feature synchronizer, one token with four pictures, float32",
    "feature_sync/unet-64-b1-float32": "feature synchronizer, a block of 64x64 queries, float32",
    "end-to-end/0.5b-second-turn-b1-float32": "a second question about a picture, to its first token, float32",
    "end-to-end/0.5b-decode-b1-bfloat16": "one more token of an answer, bfloat16",
}
ON_A_GPU = {
    "picture/768-b1-bfloat16": "one picture of 768x768 pixels to image tokens, bfloat16",
    "picture/1536-hd-b1-bfloat16": "one HD picture of 1536x1536 pixels to image tokens, bfloat16",
    "end-to-end/7b-second-turn-b1-bfloat16": "a second question about a picture, to its first token, 7B, bfloat16",
    "end-to-end/7b-decode-b1-bfloat16": "one more token of an answer, 7B, bfloat16",
}
# The provider that stands for mg_fast: `auto`. Cases of one operation have none; on a CPU `auto` would run `torch`.
OF_MG_FAST = ("auto", "torch")


def readme_table(found: Records) -> str:
    """Time and memory of the original's steps and of mg_fast, a row for every case that was measured."""
    head = ["what", "time, original", "time, mg_fast", "speedup", "memory, original", "memory, mg_fast"]
    rows, machines = [], []
    for device in ("cpu", *gpus(found)):
        for case, title in (ON_A_CPU if device == "cpu" else ON_A_GPU).items():
            before = row_of(found, device, case, "reference")
            after = next(filter(None, (row_of(found, device, case, name) for name in OF_MG_FAST)), None)
            if not (is_measured(before) and is_measured(after)):
                continue
            document = found[device][case]
            machine = f"{document['cpu']}, {document['threads']} threads" if device == "cpu" else document["gpu"]
            machines.append(machine)
            what = title if device == "cpu" else f"{machine}: {title}"
            ratios = "; ".join([ratio(after["speedup"]), *map(cell, remarks(after))])
            times, peaks = zip(*((duration(row["median_ms"]), _peak(row)) for row in (before, after)))
            rows.append([what, *times, ratios, *peaks])
    where = "; ".join(dict.fromkeys(machines)) or "nothing yet"
    notes = (
        f"Measured on {where}: medians. Weights are random, because their values do not change the work. Memory is the "
        "peak above inputs and weights. For answers, the original is transformers' `generate`, on a CPU with a "
        "language model of 0.56 B parameters. [All results, with their conditions](docs/benchmarks.md)."
    )
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def status_table(found: Records) -> str:
    """What has been measured on GPUs: the cases, which of our providers were wrong, and which were slower."""
    if not gpus(found):
        return wrapped(
            "> **Measured on a CPU. On a GPU: predicted, not run yet.** The kernels were interpreted on a CPU and "
            "compiled ahead of time for [six GPU architectures](docs/kernels.md#what-runs-on-which-gpu). "
            "[docs/gpu.md](docs/gpu.md) describes how everything is to be measured on a GPU that is borrowed for a "
            "quarter of an hour."
        )
    return "\n".join(_measured_on(device, found[device]) for device in gpus(found))


def _measured_on(device: str, cases: dict[str, dict]) -> str:
    documents = cases.values()
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
    return wrapped(
        f"> - **{device}**, measured on {', '.join(conditions)}: {len(cases)} cases, in which {len(rows)} providers of "
        f"this project ran. Wrong or broken: {'; '.join(wrong) or 'none'}. "
        f"Slower than the baseline: {'; '.join(slower) or 'none'}."
    )


def _peak(row: dict) -> str:
    return "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB"
