"""`python -m bench issue`: what the instructions of every kernel say about its time on a GPU that is not here."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mg_fast.ops.ahead_of_time import check_can_compile

from .. import records
from ..errors import BadRecord, UnknownName
from ..registry import choose_names
from . import choices, whole_models
from .multiprocessor import ERROR
from .predict import DEVICES, Device, TimePrediction
from .published import FIRST_GENERATION, RECORD, CasePrediction, predict_cases, published, read, save
from .whole_models import Generations, Row, predict_all, read_whole

# What the columns of the table mean, for a reader who has only the table.
LEGEND = (
    "blocks: programs on one multiprocessor at once. waves: rounds of programs over all multiprocessors. instr.:",
    "what one warp issues. /number: instructions of all threads for each number of the result. slots: the share of",
    "the issue slots that is used. issue, L2, memory: microseconds to issue all instructions, to deliver what the",
    "first-level cache is assumed not to hold, and to move every tensor once. The largest one is predicted.",
)


def issue(cases: Sequence[str], device: str, keep: bool, calibrate: Path | None) -> str:
    """A table of predictions for cases.

    Without names these are the cases of every kernel at its published shapes, and whole models follow.

    Args:
        keep: also write all predictions to bench/results.
        calibrate: a document or folder of documents that were measured on the device; recorded predictions are
            compared with it, and nothing is compiled.

    Raises:
        UnknownName: the device is not in DEVICES, or a name is that of no case.
        BackendError: kernels cannot be compiled here.
        BadRecord: nothing that was predicted was measured.
    """
    if keep and cases:
        raise UnknownName("--save keeps the predictions for all cases: name no case with it")
    if device not in DEVICES:
        raise UnknownName(f"the model knows no GPU called {device!r}: expected one of {', '.join(DEVICES)}")
    if calibrate is not None:
        return calibration(predicted_us(read(), read_whole()), records.read(calibrate))
    check_can_compile()
    names = published()
    found = predict_cases(choose_names(names, cases, "issue") if cases else names, DEVICES[device])
    whole = {} if cases else predict_all(read(FIRST_GENERATION), found, DEVICES[device])
    if keep:
        further = choices.record(choices.predict_choices(found, DEVICES[device]))
        save(found, DEVICES[device], whole_models.record(whole) | further)
    return "\n".join(
        [*table(found, DEVICES[device]), *whole_table(whole), *([f"kept {RECORD}"] if keep else [])],
    )


def table(found: Mapping[str, CasePrediction], device: Device) -> list[str]:
    """The predictions as lines, a line for each case and one for each of its launches."""
    lines = [
        f"PREDICTED for {device.name} at {device.gigahertz} GHz from instructions and bytes; nothing of it was "
        f"measured. Expect an error of about {ERROR:.0%}, which is an estimate: no GPU has calibrated the model.",
        "",
        f"{'case, kernel':<46}{'blocks':>7} {'limited by':<14}{'waves':>6}{'instr.':>9}{'/number':>8}{'slots':>6}"
        f"{'issue':>8}{'L2':>8}{'memory':>8}{'us':>8}  binds",
    ]
    for name, case in found.items():
        lines.append(f"{name:<46}{'':>74}{case.us:>8.1f}")
        lines += [_line(launch, case.outputs) for launch in case.launches]
    return [*lines, "", *LEGEND]


def _line(found: TimePrediction, outputs: int) -> str:
    of_a_number = 32 * found.instructions * found.warps * found.programs / outputs
    return (
        f"  {found.kernel:<44}{found.resident:>7} {found.limit:<14}{found.waves:>6.2f}{found.instructions:>9,}"
        f"{of_a_number:>8.1f}{found.slots_used:>6.0%}{found.issue_us:>8.1f}{found.l2_us:>8.1f}{found.memory_us:>8.1f}"
        f"{found.us:>8.1f}  {found.binds}"
    )


def whole_table(found: Mapping[Row, Generations]) -> list[str]:
    """The predictions of whole models as lines, with the first generation of kernels and with today's."""
    if not found:
        return []
    lines = [
        "",
        "Whole models: the kernels as above, and the library by a roofline of each launch (bench/issue/library.py).",
        f"{'case, provider':<50}{'launches':>9}{'first us':>10}{'today us':>10}  binds",
    ]
    return lines + [
        f"{row.case + ', ' + row.provider:<50}{both.today.launches:>9,}{both.first.us:>10,.0f}{both.today.us:>10,.0f}  "
        f"{both.today.binds}"
        for row, both in found.items()
    ]


def predicted_us(kernels: Mapping[str, CasePrediction], whole: Mapping[Row, Generations]) -> dict[Row, float]:
    """What is predicted of today's kernels and models, in microseconds, by case and provider."""
    alone = {Row(name, "triton"): case.us for name, case in kernels.items()}
    return alone | {row: both.today.us for row, both in whole.items()}


def measured_us(row: Mapping) -> float | None:
    """Microseconds of a provider on a GPU: as a CUDA graph where that was measured, otherwise of warm calls."""
    ms = row.get("graphed_ms") or row.get("warm_ms") or row["median_ms"]
    return None if ms is None or row["ok"] is False else 1e3 * ms


def calibration(predicted: Mapping[Row, float], document: Mapping) -> str:
    """Predictions in microseconds beside what a GPU measured, and how far they are off.

    Raises:
        BadRecord: the document was not measured on a GPU, or measured nothing that was predicted.
    """
    rows = {Row(row["name"], row["provider"]): measured_us(row) for row in document["cases"]}
    pairs = {row: (us, rows[row]) for row, us in predicted.items() if rows.get(row)}
    if document["device"] != "cuda" or not pairs:
        raise BadRecord("expected documents of a GPU that measured the kernels: none of the predicted cases is there")
    ratios = {row: measured / us for row, (us, measured) in pairs.items()}
    middle = statistics.median(ratios.values())
    lines = [f"{'case, provider':<56}{'predicted us':>14}{'measured us':>13}{'ratio':>8}"]
    lines += [
        f"{row.case + ', ' + row.provider:<56}{us:>14.1f}{measured:>13.1f}{ratios[row]:>8.2f}"
        for row, (us, measured) in pairs.items()
    ]
    lines += [
        "",
        f"Measured on {document['gpu']}: the median ratio is {middle:.2f}, from {min(ratios.values()):.2f} to "
        f"{max(ratios.values()):.2f}. Around that median the predictions are off by up to "
        f"{max(abs(ratio / middle - 1) for ratio in ratios.values()):.0%}; multiprocessor.ERROR says {ERROR:.0%}.",
        f"{len(predicted) - len(pairs)} of {len(predicted)} predictions were not measured.",
    ]
    return "\n".join(lines)
