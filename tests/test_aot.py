"""Kernels compile for every architecture with no GPU, without spills, within its shared memory, as they should.

The real launchers run, on fake tensors, in a few processes of their own. What they compile is held against the limits of its
architecture, and its resources against the tables in tests/aot/resources, so that a change of them shows as a diff. After a change
that is meant: `python -m tests.test_aot --write`, or with the names of the kernels' files after it for some of them.

A process of its own: what is compiled here must not have been imported under TRITON_INTERPRET.
"""

# ruff: noqa: E402  (the skips below come before the imports they guard)

import os
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling ahead of time needs a process without TRITON_INTERPRET", allow_module_level=True)

from mg_fast.kernels.configs import ProductTile, Tile
from tests.aot import dual_resize, dwconv_norm, patch_mining, pointwise
from tests.aot.gate import ARCHITECTURES, TWINS, compiling, faults, read_table, write_table
from tests.aot.patch_mining import Mining
from tests.aot.pointwise import Pointwise

# one a file of kernels/
FAMILIES = {"dual_resize": dual_resize, "dwconv_norm": dwconv_norm, "patch_mining": patch_mining, "pointwise": pointwise}
REWRITE = "python -m tests.test_aot --write"


@pytest.fixture(scope="module")
def put_off():
    with compiling() as put_off:
        yield put_off


@pytest.fixture(scope="module")
def jobs(request, put_off):
    """The cases of the tests that were selected, all under way at once: futures by case."""
    parametrised = (getattr(item, "callspec", None) for item in request.session.items)
    return {case: put_off(case) for case in dict.fromkeys(c.params["kernel"][0] for c in parametrised if c and "kernel" in c.params)}


KERNELS = [pytest.param((case, name), id=name) for family in FAMILIES.values() for case in family.cases() for name in case.names()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(jobs, kernel):
    case, name = kernel
    assert not faults(case, name, jobs[case].result()[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_resources_are_those_recorded(jobs, family):
    table = read_table(family)
    if table["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {table['triton']}, this is {triton.__version__}: other compilers need other resources")
    cases = FAMILIES[family].cases()
    chosen = [case for case in cases if case in jobs]
    found = {name: used for case in chosen for name, used in jobs[case].result().items()}
    assert found, "run it with the kernels' tests, whose resources it compares"
    recorded = table["kernels"]
    if chosen == cases:
        # or kernels that are gone would stay in the table
        assert list(recorded) == list(found), f"other kernels than recorded; if that is meant: {REWRITE} {family}"
    changed = [f"{name}\n  recorded {recorded.get(name)}\n  found    {used}" for name, used in found.items() if recorded.get(name) != used]
    assert not changed, "\n".join(["resources changed", *changed, f"if that is meant: {REWRITE} {family}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_is_compiled(family):
    """For the architecture it is keyed by, the defaults for all, or for their twins."""
    compiled = {(case.architecture, bucket) for case in FAMILIES[family].cases() for bucket in case.buckets()}
    assert {architecture for architecture, _ in compiled} == set(ARCHITECTURES)
    compiled |= {(twin, bucket) for architecture, bucket in compiled for twin, other in TWINS.items() if architecture == other}
    for architecture, table in FAMILIES[family].TABLE.items():
        assert {(a, bucket) for bucket in table for a in ([architecture] if architecture else ARCHITECTURES)} <= compiled


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_need_the_same(family):
    """As recorded, which what is compiled is held against; their tiles too are the same, or it would mean nothing."""
    recorded, table = read_table(family)["kernels"], FAMILIES[family].TABLE
    for twin, other in TWINS.items():
        assert table.get(twin) == table.get(other)
        names = [name for name in recorded if f"-sm_{twin}-" in name]
        assert names
        for name in names:
            assert recorded[name] == recorded[name.replace(f"-sm_{twin}-", f"-sm_{other}-")], name


# ---- that the gate can fail


@pytest.mark.parametrize(
    "case, tile, fault",
    [
        # a tile of twice the default's channels, and stages that an H100 has room for and this card has not
        pytest.param(Mining("pool_windows_fwd", 120, "bf16", "768"), Tile(128, 4, 2), "spills", id="spills"),
        pytest.param(
            Mining("pool_windows_fwd", 86, "bf16", "768"), Tile(64, 8, 14), "bytes of shared memory, sm_86 has 101376", id="shared"
        ),
        # why products on an H100 are no wider: configs.py says so
        pytest.param(Pointwise("linear_gelu_fwd", 90, "bf16", "stage2"), ProductTile(128, 256, 64, 8, 8, 3), "spills", id="wide products"),
    ],
)
def test_the_gate_can_fail(put_off, case, tile, fault):
    [[name, found]] = put_off(case, tile).result().items()
    assert any(fault in found for found in faults(case, name, found)), found


def test_the_gate_sees_narrow_loads_and_missing_products(put_off):
    """Of widths that no wide load fits; and of float32, whose products would not be exact in TF32, taken for bfloat16's."""
    real = Mining("pool_windows_fwd", 90, "bf16", "768")
    [odd] = put_off(real._replace(shape="odd8")).result().values()
    assert any("narrow loads" in fault for fault in faults(real, "", odd))
    single = real._replace(dtype="fp32")
    [exact] = put_off(single).result().values()
    assert faults(single, "", exact) == []
    assert any("0 instructions on tensor cores" in fault for fault in faults(real, "", exact))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or not FAMILIES.keys() >= set(sys.argv[2:]):
        sys.exit(f"usage: {REWRITE} [{' '.join(FAMILIES)}]")
    wrong = []
    with compiling() as put_off:
        for family in sys.argv[2:] or FAMILIES:
            jobs = {case: put_off(case) for case in FAMILIES[family].cases()}
            write_table(family, {name: found for job in jobs.values() for name, found in job.result().items()})
            wrong += [
                f"{name}: {fault}"
                for case, job in jobs.items()
                for name, found in job.result().items()
                for fault in faults(case, name, found)
            ]
    sys.exit("\n".join(wrong) or None)
