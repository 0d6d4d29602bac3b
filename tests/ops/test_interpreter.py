"""TRITON_INTERPRET=1 works as a user sets it: in a new process, in which no test has changed Triton."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch

from mg_fast import BackendError, ops
from mg_fast.ops import interpreter
from tests.paths import ROOT

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is published for Linux only"
)

# This compares every operation that has a kernel with its reference in float64, in every dtype that the kernels take.
EVERY_OPERATION = """
import threading, sys, torch
from mg_fast import ops
from mg_fast.ops.reference import Projection

torch.manual_seed(0)


def on_both(operation, *tensors, **options):
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]
    oracle = operation(*wide, backend="reference", **options)
    ours = operation(*tensors, backend="triton", **options).double()
    error = ((ours - oracle).abs().max() / oracle.abs().max()).item()
    # Rounding to nearest makes as many results larger as smaller; dropping bits makes all of them smaller.
    bias = ((ours.abs() - oracle.abs()).sum() / oracle.abs().sum()).abs().item()
    return error, bias


def mine(queries, *tensors, backend):
    *pyramid, a, b, c, d, e, f, g, h, i, j, k, l = tensors
    projections = Projection(a, b, c, d), Projection(e, f, g, h), Projection(i, j, k, l)
    return ops.patch_mining(queries, pyramid, *projections, backend=backend)


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def some(*shape):
        return torch.randn(shape).to(dtype)

    def projection(width):
        return some(width), some(width), some(8, width) / width**0.5, some(8)

    cases = {
        "linear_gelu": (ops.linear_gelu, some(40, 24), some(60, 24), some(60)),
        "linear_residual": (ops.linear_residual, some(40, 24), some(60, 24), some(60), some(40, 60)),
        "dwconv_norm": (ops.dwconv_norm, some(1, 5, 7, 20), some(49, 20), some(20), some(20), some(20)),
        "patch_mining": (
            mine, some(1, 4, 8), some(1, 8, 8, 6), some(1, 4, 4, 10), *projection(8), *projection(16), *projection(16)
        ),
    }
    for name, (operation, *tensors) in cases.items():
        print(name, str(dtype)[6:], *on_both(operation, *tensors))

picture = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
resized = [ops.dual_resize(picture, 5, 2, backend=backend)[0] for backend in ("reference", "triton")]
print("dual_resize", torch.equal(*resized))

# Two threads at the same time take turns as often as Python lets them.
sys.setswitchinterval(1e-6)
found = {}


def work(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (150, 8), (70, 8), (70,), (150, 70)
    x, weight, bias, residual = (torch.randn(*shape, generator=generator) for shape in shapes)
    expected = ops.linear_residual(x, weight, bias, residual, backend="reference")
    right = [
        torch.allclose(ops.linear_residual(x, weight, bias, residual, backend="triton"), expected, atol=1e-4)
        for _ in range(5)
    ]
    found[seed] = all(right)


threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("threads", [found.get(seed) for seed in range(2)])
"""


def interpreted(script: str, value: str = "1") -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": value}
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@needs_triton
def test_every_operation_with_nothing_mended_by_hand():
    done = interpreted(EVERY_OPERATION)
    assert done.returncode == 0, done.stderr
    *accuracy, resized, threads = done.stdout.splitlines()
    assert resized == "dual_resize True"
    assert threads == "threads [True, True]"
    assert len(accuracy) == 12
    for line in accuracy:
        operation, dtype, error, bias = line.split()
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert float(error) < 4 * eps, line
        # Mining ends in a small product of torch's, whose few numbers say nothing about the kernel's rounding.
        assert operation == "patch_mining" or float(bias) < max(eps / 16, 1e-6), line


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("value", ["true", "ON"])
def test_any_value_that_triton_takes_for_true(value):
    script = (
        "from mg_fast.ops import backend; "
        "print(backend.why_not('dual_resize', 'triton'), backend.choose('dual_resize', 'triton'))"
    )
    done = interpreted(script, value)
    assert done.stdout == "None triton\n", done.stderr


@pytest.mark.slow
@needs_triton
def test_too_late_is_said_and_not_run_into():
    script = (
        "import os, triton; from mg_fast.ops import backend; os.environ['TRITON_INTERPRET'] = '1'; "
        "backend.choose('dual_resize', 'triton')"
    )
    done = interpreted(script, "0")
    assert done.returncode == 1
    assert (
        "TRITON_INTERPRET=1 was set after Triton had been imported, which is too late: set it before Python starts"
        in done.stderr
    )


def test_the_recommendation_names_the_variable_and_when(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    picture = torch.zeros(2, 2, 3, dtype=torch.uint8)
    reason = (
        "triton is not installed"
        if importlib.util.find_spec("triton") is None
        else "TRITON_INTERPRET=1, set before Python starts"
    )
    with pytest.raises(BackendError, match=reason):
        ops.dual_resize(picture, 2, 2, backend="triton")


@needs_triton
def test_the_mend_ends_with_the_launch(monkeypatch):
    """Kernels of others in the process meet Triton unchanged, and a Triton without that function is left alone."""
    from triton.runtime import interpreter as tritons

    original = tritons._convert_float
    with interpreter.launching():
        assert tritons._convert_float is not original
    assert tritons._convert_float is original
    monkeypatch.delattr(tritons, "_convert_float")
    with interpreter.launching():
        assert not hasattr(tritons, "_convert_float")


def test_triton_that_was_imported_without(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled = types.SimpleNamespace(language=types.SimpleNamespace(cdiv=object()))
    monkeypatch.setitem(sys.modules, "triton", compiled)
    assert "too late" in interpreter.why_not()
    monkeypatch.delitem(sys.modules, "triton")
    assert interpreter.why_not() is None
