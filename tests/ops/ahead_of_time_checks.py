"""The checks of every file of kernels that is compiled ahead of time; tests/ops/*/test_aot_*.py run them.

The real launchers run on fake tensors. What they compile is held against the limits of its architecture, and its
resources against the table beside the tests, of which there is one for each supported release of Triton, so that a
change of them shows as a diff. A kernel is compiled if anything that goes into the compiler differs from what was
recorded, and one case of each launcher is always compiled, so that a table that is wrong does not go unseen. `make
aot-all` compiles every kernel.
After an intended change run `python -m tests.ops.record_resources`, optionally with the names of some of the kernels'
files.
"""

import concurrent.futures
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import triton

from .ahead_of_time_gate import ARCHITECTURES, TWINS, Case, digest_case, faults, read_table

# One module for each file of kernels/, found by its name.
FAMILIES = {
    path.parent.name: importlib.import_module(f"{__package__}.{path.parent.name}.ahead_of_time")
    for path in sorted(Path(__file__).parent.glob("*/ahead_of_time.py"))
}
REWRITE = "python -m tests.ops.record_resources"


def kernels(family: str) -> list:
    """The parameters of a test for each kernel: its case and its name, `kernel-architecture-configuration`."""
    return [pytest.param((case, name), id=name) for case in FAMILIES[family].cases() for name in case.names()]


def start(cases: Iterable[Case], put_off: Callable) -> dict[Case, concurrent.futures.Future]:
    """The resources of cases as futures: recorded ones, or those of kernels that are being compiled."""
    return {case: put_off(case) if is_compiled(case) else _recorded(case) for case in cases}


def is_compiled(case: Case) -> bool:
    """Whether a case is compiled, and not taken from the table."""
    if os.environ.get("MG_FAST_AOT") == "all" or case in _samples():
        return True
    return digest_case(case) != {name: _tables().get(name, {}).get("ingredients") for name in case.names()}


def _recorded(case: Case) -> concurrent.futures.Future:
    future = concurrent.futures.Future()
    future.set_result({name: _tables()[name] for name in case.names()})
    return future


@functools.cache
def _tables() -> dict[str, dict]:
    return {name: used for family in FAMILIES for name, used in read_table(family).items()}


@functools.cache
def _samples() -> set[Case]:
    """A case of every launcher, on an architecture that is another one from launcher to launcher."""
    by_launcher: dict[str, list[Case]] = {}
    for family in FAMILIES.values():
        for case in family.cases():
            by_launcher.setdefault(case.names()[0].split("-")[0], []).append(case)
    chosen = set()
    for cases, architecture in zip(by_launcher.values(), itertools.cycle(ARCHITECTURES)):
        chosen.add(next((case for case in cases if case.architecture == architecture), cases[0]))
    return chosen


def within_limits(jobs: dict, kernel: tuple[Case, str]) -> None:
    case, name = kernel
    assert not faults(case, name, jobs[case].result()[name])


def _without_ingredients(used: dict) -> dict[str, int]:
    return {key: value for key, value in used.items() if key != "ingredients"}


def resources_are_those_recorded(jobs: dict, family: str) -> None:
    recorded = _recorded_table(family)
    cases = FAMILIES[family].cases()
    chosen = [case for case in cases if case in jobs]
    found = {name: used for case in chosen for name, used in jobs[case].result().items()}
    assert found, "run this test with the tests of the kernels whose resources it compares"
    if chosen == cases:
        # Without this check, kernels that were removed would stay in the table.
        assert list(recorded) == list(found), f"other kernels than recorded; if this is intended: {REWRITE} {family}"
    changed = [
        f"{name}\n  recorded {recorded.get(name)}\n  found    {used}"
        for name, used in found.items()
        if _without_ingredients(recorded.get(name, {})) != _without_ingredients(used)
    ]
    assert not changed, "\n".join(["resources changed", *changed, f"if this is intended: {REWRITE} {family}"])
    # Python 3.10 writes the code that goes into the digest in another way, so there every kernel is compiled.
    stale = [name for name, used in found.items() if recorded[name]["ingredients"] != used["ingredients"]]
    assert not stale or sys.version_info < (3, 11), (
        f"the resources are the same, their digests are not: {REWRITE} {family}"
    )


def _recorded_table(family: str) -> dict[str, dict]:
    """The recorded resources. The test is skipped where none were recorded, as every compiler needs others."""
    return read_table(family) or pytest.skip(
        f"nothing was recorded with triton {triton.__version__}: {REWRITE} does that"
    )


def every_configuration_is_compiled(family: str) -> None:
    """Each configuration is compiled for its architecture, and each default for all architectures or their twins."""
    compiled = {(case.architecture, bucket) for case in FAMILIES[family].cases() for bucket in case.buckets()}
    assert {architecture for architecture, _ in compiled} == set(ARCHITECTURES)
    compiled |= {
        (twin, bucket) for architecture, bucket in compiled for twin, other in TWINS.items() if architecture == other
    }
    for architecture, table in FAMILIES[family].TABLE.items():
        assert {
            (a, bucket) for bucket in table for a in ([architecture] if architecture else ARCHITECTURES)
        } <= compiled


def twins_need_the_same(family: str) -> None:
    """The recorded resources of twins are equal, and so are their tiles, without which this would mean nothing.

    The recorded resources stand for the compiled ones, which another check compares with them.
    """
    recorded, table = _recorded_table(family), FAMILIES[family].TABLE
    for twin, other in TWINS.items():
        assert table.get(twin) == table.get(other)
        names = [name for name in recorded if f"-sm_{twin}-" in name]
        assert names
        for name in names:
            own, others = (
                _without_ingredients(recorded[of]) for of in (name, name.replace(f"-sm_{twin}-", f"-sm_{other}-"))
            )
            assert own == others, name
