"""The records of the operations: everything that reads them sees a new operation, and no operation is forgotten."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.cases import all_cases, operation_modules
from bench.cases.operations import forms
from bench.counting import Count
from bench.registry import NotHere
from mg_fast import BackendError, cli, ops
from mg_fast.ops import backend as backends
from mg_fast.ops.operation import OPERATIONS, Operation, Operator, operators, register
from tests.ops.test_interpreted_published_sizes import published
from tests.paths import ROOT

OF_AN_OPERATION = (
    "ahead_of_time.py",
    "operator_calls.py",
    "resources-3.6.0.json",
    "test_{}.py",
    "test_aot_{}.py",
    "test_interpreted_{}.py",
    "test_fuzz_{}.py",
)


@torch.library.custom_op("mg_fast::toy_square", mutates_args=())
def toy_square_operator(x: torch.Tensor) -> torch.Tensor:
    return x * x


@toy_square_operator.register_fake
def _(x):
    return torch.empty_like(x)


def refuse_integers(x: torch.Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"toy_square: x must be floating point, got {x.dtype}")


def make_toy(forms: dict[str, Callable], auto: tuple[str, ...]) -> Operation:
    return Operation(
        name="toy_square",
        check=refuse_integers,
        why_not=lambda x: "the kernel takes vectors" if x.dim() != 1 else None,
        forms=forms,
        auto=auto,
        operators=(
            Operator(
                name="mg_fast::toy_square",
                launches=lambda x: 3,
                workspaces=lambda x: [2 * x.nbytes],
                flop=lambda x: 7 * x.numel(),
                reads_again=lambda x: [x],
            ),
        ),
    )


FORMS = {"reference": lambda x: x**2, "torch": lambda x: x.square(), "triton": toy_square_operator}


@pytest.fixture
def toy():
    """A new operation that has a record and nothing else."""
    toy = register(make_toy(FORMS, ("triton", "reference", "torch")))
    yield toy
    del OPERATIONS["toy_square"]


def test_the_backend_choice_sees_a_new_operation(toy, monkeypatch):
    monkeypatch.delenv("MG_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends.choose("toy_square") == "reference"
    assert backends.choose("toy_square", "torch") == "torch"
    assert backends.choose("toy_square", "auto", "cuda") == "triton"
    with pytest.raises(BackendError, match="'triton' cannot run toy_square: triton runs on CUDA tensors"):
        backends.choose("toy_square", "triton")
    x = torch.ones(3)
    assert backends.choose_form(toy, None, "cpu", x) is FORMS["reference"]
    assert backends.choose_form(toy, None, "cuda", x) is FORMS["triton"]
    assert backends.choose_form(toy, None, "cuda", x[None]) is FORMS["reference"]
    with (
        backends.only_compiling(),
        pytest.raises(BackendError, match="'triton' cannot run toy_square: the kernel takes vectors"),
    ):
        backends.choose_form(toy, "triton", "cuda", x[None])
    with pytest.raises(ValueError, match="toy_square: x must be floating point, got torch.int32"):
        backends.choose_form(toy, None, "cpu", x.int())


def test_a_model_is_refused_where_a_new_operation_cannot_run(monkeypatch):
    """Loading a model first asks this of every operation."""
    monkeypatch.setitem(OPERATIONS, "toy_square", make_toy({"reference": FORMS["reference"]}, ("reference",)))
    asked = []
    monkeypatch.setattr(backends, "choose", lambda operation, backend, device: asked.append(operation))
    backends.check_everywhere("torch", "cpu")
    assert asked == list(OPERATIONS) and asked[-1] == "toy_square"


def test_doctor_sees_a_new_operation(toy, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    at = lines.index("toy_square on cpu: auto runs reference")
    assert lines[at + 1 : at + 3] == ["reference can run", "torch can run"]
    assert lines[at + 3].startswith("triton cannot: triton ")


def test_the_launch_counter_sees_a_new_operation(toy):
    x = torch.ones(5)
    with Count() as count:
        kept = toy.forms["triton"](x)
        held = count.live
    assert count.launches == {"mg_fast.toy_square.default": 3}
    assert count.total.flop == 7 * 5
    assert (count.total.bytes_read, count.total.bytes_written) == (2 * x.nbytes, kept.nbytes)
    assert count.peak == held + 2 * x.nbytes


def test_the_benchmark_sees_a_new_operation(toy, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Inputs:
        device = "cpu"

    providers = forms("toy_square", lambda inputs, backend: lambda: backend)
    assert list(providers) == ["reference", "torch", "triton"]
    assert providers["torch"](Inputs)() == "torch"
    with pytest.raises(NotHere, match="triton runs on CUDA tensors|triton is not installed"):
        providers["triton"](Inputs)


def test_a_record_that_cannot_be_right_is_refused(toy):
    with pytest.raises(ValueError, match="there is an operation called toy_square already"):
        register(toy)
    with pytest.raises(ValueError, match="toy_square: there is no reference form, only torch"):
        make_toy({"torch": torch.square}, ("torch",))
    with pytest.raises(ValueError, match="toy_square: auto must name every form once, got torch for reference, torch"):
        make_toy({"reference": torch.square, "torch": torch.square}, ("torch",))


def files_with_kernels() -> set[str]:
    """The files of kernels, by the operation that they belong to.

    An operation may have several, whose names begin with its own.
    """
    files = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if re.search(r"^def \w+_kernel\(", path.read_text(), re.MULTILINE)
    }
    return {file for file in files if not any(file.startswith(f"{other}_") for other in files)}


def file_of(operation: Operation) -> str:
    """The file in mg_fast/ops that an operation's record stands in: the one that its check is defined in."""
    return Path(inspect.getfile(operation.check)).stem


def with_kernels() -> list[Operation]:
    return [operation for operation in OPERATIONS.values() if operation.operators]


def test_every_file_of_kernels_has_a_record_tests_and_a_benchmark():
    from tests.ops import ahead_of_time_checks

    files = files_with_kernels()
    assert files and files == {file_of(operation) for operation in with_kernels()}
    assert files == set(ahead_of_time_checks.FAMILIES)
    for file in files:
        missing = [
            name.format(file)
            for name in OF_AN_OPERATION
            if not (ROOT / "tests/ops" / file / name.format(file)).is_file()
        ]
        assert not missing, f"tests/ops/{file} has no {', '.join(missing)}"
    assert files == operation_modules().keys()
    assert all(module.launches() for module in operation_modules().values())


def test_every_operation_with_kernels_is_a_function_of_its_name_and_is_measured_at_published_sizes():
    groups = {name.split("/")[0] for name in published(list(all_cases()))}
    for operation in with_kernels():
        assert "triton" in operation.forms
        assert operation.name in ops.__all__ and callable(getattr(ops, operation.name))
        assert operation.name in groups


def test_every_registered_operator_with_a_kernel_is_declared():
    """The source shows it: an operator whose body calls a launcher is named in a record."""
    launching = set()
    for path in (ROOT / "mg_fast/ops").glob("*.py"):
        for name, body in re.findall(r'custom_op\("(mg_fast::\w+)"(.*?)\n\n\n', path.read_text(), re.DOTALL):
            if ".kernels." in body or "forms[form](" in body:
                launching.add(name)
    assert len(launching) >= 7 and launching == {name for name in operators() if name != "mg_fast::toy_square"}


def test_the_files_of_an_operation_are_at_most_six():
    """They are the files that docs/kernels.md names for dwconv_norm."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    table = text.split("<!-- files of an operation -->")[1].split("<!-- /files of an operation -->")[0]
    files = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert 4 <= len(files) <= 6 and len(set(files)) == len(files)
    assert all((ROOT / file).exists() for file in files), files
    # Only these files of the package, the kernels and the benchmark's cases are named after the operation.
    named = [
        path
        for folder in ("kernels", "mg_fast/ops", "bench/cases")
        for path in (ROOT / folder).rglob("*dwconv_norm*.py")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in named} <= set(files)


def test_the_page_names_every_kernel():
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for path in (ROOT / "kernels").glob("*.py"):
        for kernel in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            assert f"`{kernel}`" in text, f"docs/kernels.md does not name {kernel} of kernels/{path.name}"
