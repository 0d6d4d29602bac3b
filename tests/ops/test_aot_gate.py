"""The ahead-of-time gate fails for spills, for too much shared memory, for narrow loads and for missing products."""

import fnmatch
import json

import pytest

from mg_fast.kernels.configs import ProductTile, Tile
from tests.ops import ahead_of_time_checks as checks
from tests.ops import ahead_of_time_gate as gate
from tests.ops.ahead_of_time_gate import faults
from tests.ops.patch_mining.ahead_of_time import Mining
from tests.ops.pointwise.ahead_of_time import Pointwise


@pytest.mark.parametrize(
    "case, tile, fault",
    [
        # A tile of twice the default's channels, and one with stages that only an H100 has shared memory for.
        pytest.param(Mining("pool_windows_fwd", 120, "bf16", "768"), Tile(128, 4, 2), "spills", id="spills"),
        pytest.param(
            Mining("pool_windows_fwd", 86, "bf16", "768"),
            Tile(64, 8, 14),
            "bytes of shared memory, sm_86 has 101376",
            id="shared",
        ),
        # A thread would hold 256 sums.
        pytest.param(
            Pointwise("linear_gelu_fwd", 90, "bf16", "stage2"),
            ProductTile(128, 256, 64, 8, 4, 3),
            "spills",
            id="wide products",
        ),
    ],
)
def test_the_gate_can_fail(put_off, case, tile, fault):
    [[name, found]] = put_off(case, tile).result().items()
    assert any(fault in found for found in faults(case, name, found)), found


def test_the_gate_sees_narrow_loads_and_missing_products(put_off):
    """The gate sees widths that allow no wide loads, and products without tensor cores.

    For the latter, the exact products of a float32 kernel are checked as if they were bfloat16's.
    """
    real = Mining("pool_windows_fwd", 90, "bf16", "768")
    [odd] = put_off(real._replace(shape="odd8")).result().values()
    assert any("narrow loads" in fault for fault in faults(real, "", odd))
    single = real._replace(dtype="fp32")
    [exact] = put_off(single).result().values()
    assert faults(single, "", exact) == []
    assert any("0 instructions on tensor cores" in fault for fault in faults(real, "", exact))


# One that is not always compiled.
RECORDED = Mining("pool_windows_bwd", 90, "bf16", "odd8")


def test_what_is_recorded_is_compiled_again_where_anything_changed(monkeypatch):
    monkeypatch.delenv("MG_FAST_AOT", raising=False)
    assert not checks.is_compiled(RECORDED)
    tile = gate.digest_case(RECORDED, Tile(32, 2, 2))
    assert tile.keys() == gate.digest_case(RECORDED).keys() and tile != gate.digest_case(RECORDED)
    with monkeypatch.context() as patched:
        patched.setattr(gate, "code_of", lambda module: "another kernel")
        assert checks.is_compiled(RECORDED)
    with monkeypatch.context() as patched:
        patched.setattr(gate.triton, "__version__", "0.0")
        assert checks.is_compiled(RECORDED)
    monkeypatch.setenv("MG_FAST_AOT", "all")
    assert checks.is_compiled(RECORDED)


def test_the_digest_of_code_is_that_of_all_files_it_comes_from_without_comments(monkeypatch):
    code = gate.code_of("mg_fast.kernels.patch_mining")
    assert "load_pixels" in code and "SHARED_MEMORY_LIMITS" not in code, "windows.py is part of it, configs.py is not"
    sources = {"one": '"""Doc."""\ndef f(x):\n    # Why.\n    return x\n', "same": "def f(x): return (x)\n"}
    sources["other"] = "def f(x): return -x\n"
    monkeypatch.setattr(gate.importlib, "import_module", lambda name: name)
    monkeypatch.setattr(gate.inspect, "getsource", sources.__getitem__)
    assert gate.code_of("one") == gate.code_of("same") != gate.code_of("other")
    gate.code_of.cache_clear()


def test_every_exception_is_needed():
    """Where only one program resides on a multiprocessor, a reason is given, and no reason is left over.

    A reason may be needed with one release of Triton only.
    """
    for family, module in checks.FAMILIES.items():
        tables = gate.table(family).parent.glob("resources-*.json")
        recorded = {f"{path.stem} {name}": found for path in tables for name, found in kernels_in(path).items()}
        lonely = {name.split()[1] for name, found in recorded.items() if found["resident"] < 2}
        given = {pattern: reason for case in module.cases() for pattern, reason in case.alone.items()}
        assert recorded and all(reason for reason in given.values())
        unneeded = [pattern for pattern in given if not fnmatch.filter(lonely, pattern)]
        assert not unneeded, f"{family}: {', '.join(unneeded)}"


def kernels_in(path):
    return json.loads(path.read_text(encoding="utf-8"))["kernels"]
