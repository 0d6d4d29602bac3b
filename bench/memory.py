"""`python -m bench memory`: memory, bytes moved, launches and FLOP of the published models, predicted without a GPU.

The reference and our forms run at their real sizes on fake CUDA tensors, which have shapes and no values, and are
counted at torch's dispatcher (bench.counting). What torch allocates is counted; what libraries allocate for themselves
is not seen (`LIBRARIES`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch._subclasses import FakeTensorMode

from mg_fast.runtime.device_tables import caching_fake_tensors
from mg_fast.testing.environment import environment

from . import fake_interleaved, fake_models, records
from .costs.gpus import CARDS_GB
from .counting import Count
from .errors import BadRecord
from .fake_models import FakeCall
from .registry import choose_names

PREDICTED = records.RESULTS / "predicted.json"
# How the names of whole models begin.
WHOLE = ("end-to-end/", f"{fake_interleaved.GROUP}whole")
SAVE = "`python -m bench memory --save`"
LIBRARIES = """\
What libraries take for themselves is not in these figures:
  cuBLAS      a workspace per handle and stream, twice for two streams: 8.1 MiB, on Hopper 32 MiB
              (torch, CublasHandlePool.cpp)
  cuBLASLt    for products with a bias: 1 to 4 MiB on Ampere, up to 32 MiB from compute capability 9.0 on
              (torch, CUDABlas.cpp)
  cuDNN       by convolution and algorithm: unknown
  context     CUDA's own and the code of the kernels, outside of torch's figures: unknown
  allocator   up to 1 MiB per block that it does not split, and what it keeps but has not given out: two streams share
              no memory, and a CUDA graph keeps all that was allocated within it for as long as it lives"""


@dataclass(frozen=True)
class Prediction:
    """The resources that one call takes, in bytes unless the list below says otherwise.

    Args:
        peak: the most that is allocated at once beside weights and inputs; what is held is part of it.
        held: what the call leaves behind: its results, the language model's cache.
        moved: read and written.
        launches: number of kernels.
        flop: of products of matrices and convolutions.
        weights: of parameters and packed copies of them.
    """

    peak: int
    held: int
    moved: int
    launches: int
    flop: int
    weights: int


# Predictions by case, then by provider.
Predictions = dict[str, dict[str, Prediction]]


# The modules that make models without values; each has `subjects`, `cases` and TABLES.
FAMILIES = (fake_models, fake_interleaved)


def cases() -> dict[str, tuple[str, Callable[[object], dict[str, FakeCall]]]]:
    """By name the subject of every case, and what makes its providers."""
    return {name: case for family in FAMILIES for name, case in family.cases().items()}


def predict(patterns: Sequence[str] = (), providers: Sequence[str] = ()) -> Predictions:
    """Predictions of the cases that patterns choose; raises UnknownCase for a pattern that names none.

    Args:
        patterns: names, shell patterns or groups; none: all cases.
        providers: the providers that are predicted; none: all.
    """
    chosen, found = choose_names(list(cases()), patterns, "memory"), {}
    tables = [table for family in FAMILIES for table in family.TABLES]
    subjects = {name: make for family in FAMILIES for name, make in family.subjects().items()}
    # Only one model exists at a time. Making the modules of one takes seconds.
    for subject, make_subject in subjects.items():
        with FakeTensorMode(), caching_fake_tensors(*tables) as tables_made:
            made = make_subject()
            for name in chosen:
                needed, make = cases()[name]
                if needed == subject:
                    calls = {label: call for label, call in make(made).items() if not providers or label in providers}
                    found[name] = {label: _predict(call, tables_made) for label, call in calls.items()}
    return {name: found[name] for name in chosen}


def _predict(provider: FakeCall, tables_made: Callable[[], int]) -> Prediction:
    with torch.inference_mode():
        made = None
        # The first call also makes tables, so a later call, which makes none, is counted.
        while made != tables_made():
            made = tables_made()
            with Count("cuda") as count:
                out = provider.call()
                held = count.live
                del out
    moved, flop = count.total.bytes, count.total.flop
    return Prediction(count.peak, held, moved, count.launches.total(), flop, provider.weights)


def record(predictions: Predictions) -> dict:
    """The document that is kept of predictions."""
    cases = {name: {label: asdict(p) for label, p in providers.items()} for name, providers in predictions.items()}
    return {"versions": versions(), "cases": cases}


def versions() -> dict[str, str | None]:
    """The versions of the packages that the predictions depend on."""
    stack = environment()
    return {package: stack[package] for package in ("torch", "triton", "transformers", "diffusers")}


def recorded() -> dict[str, dict[str, dict[str, int]]]:
    """The recorded figures by case and provider.

    Raises:
        BadRecord: nothing is recorded, or it was recorded with other versions of what it depends on.
    """
    if not PREDICTED.exists():
        raise BadRecord(f"{PREDICTED} is missing: {SAVE} writes it")
    document = json.loads(PREDICTED.read_text(encoding="utf-8"))
    if document["versions"] != versions():
        before, here = _named(document["versions"]), _named(versions())
        raise BadRecord(f"{PREDICTED.name} was recorded with {before}, here are {here}")
    return document["cases"]


def _named(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def differences(recorded: Mapping, predictions: Predictions) -> Iterator[str]:
    """A sentence for every figure of some cases that is not as recorded (see `recorded`)."""
    for name, providers in predictions.items():
        for provider, prediction in providers.items():
            before, now = recorded.get(name, {}).get(provider), asdict(prediction)
            if before is None:
                yield f"{name}, {provider}: not recorded. {SAVE} records it"
                continue
            for figure, new in now.items():
                old = before[figure]
                if new != old:
                    verdict = "got worse; if it must," if new > old else "got better: record it,"
                    change = f"{figure} {old:,} -> {new:,} ({new / max(old, 1) - 1:+.2%})"
                    yield f"{name}, {provider}: {change} {verdict} {SAVE}"


def table(predictions: Predictions) -> str:
    """Predictions as plain text."""
    head = ("case", "provider", "weights GiB", "held MiB", "peak MiB", "GB moved", "launches", "GFLOP")
    rows = []
    for name, provider, p in _each(predictions):
        memory = f"{p.weights / 2**30:.2f}", f"{p.held / 2**20:.1f}", f"{p.peak / 2**20:.1f}"
        rows.append((name, provider, *memory, f"{p.moved / 1e9:.2f}", str(p.launches), f"{p.flop / 1e9:.1f}"))
    return _columns([head, *rows])


def fit_table(predictions: Predictions) -> str:
    """Whether weights and peak of the whole models fit on common cards; empty where no whole model was predicted."""
    rows = []
    for name, provider, p in _each(predictions):
        if name.startswith(WHOLE):
            needed = (p.weights + p.peak) / 1e9
            rows.append((name, provider, f"{needed:.1f}", *("yes" if needed <= gb else "no" for gb in CARDS_GB)))
    return _columns([("would it fit?", "provider", "GB", *(f"{gb} GB" for gb in CARDS_GB)), *rows]) if rows else ""


def _each(predictions: Predictions) -> Iterator[tuple[str, str, Prediction]]:
    return ((name, provider, p) for name, providers in predictions.items() for provider, p in providers.items())


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as text, all but the first two columns flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )


def main(patterns: Sequence[str], *, check: bool, save: bool, train: str | None = None, **step) -> int:
    """Prints predictions, and compares them with the recorded ones or records them; returns the exit status.

    Args:
        train: a model; a step of its training is predicted instead (`bench.training.TrainingStep` of it and `step`).

    Raises:
        BadRecord: the recorded predictions are of other versions, or only a part is to be recorded.
        UnknownName: there is no such model or stage.
    """
    if train is not None:
        from .training import TrainingStep
        from .training import table as training_table

        if patterns or check or save:
            raise BadRecord("--train predicts one step, and neither takes cases nor records anything")
        print(training_table(TrainingStep(train, **step)))
        return 0
    if save and patterns:
        raise BadRecord("--save records the predictions of all cases: name none")
    predictions = predict(choose_names(list(cases()), patterns, "memory"))
    print("\n\n".join(part for part in (table(predictions), fit_table(predictions), LIBRARIES) if part))
    if save:
        records.write(PREDICTED, record(predictions))
    if not check:
        return 0
    found = list(differences(recorded(), predictions))
    print("\n" + ("\n".join(found) or "as recorded"))
    return int(bool(found))
