"""The two stacks of packages that the tests run with, what is said of them, and the supported releases of Python."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mg_fast.cli import doctor
from tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STACKS = ("constraints.txt", "constraints-newest.txt")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Compiles every file that it is given, and writes nothing.
COMPILE = "import sys\nfor path in sys.argv[1:]:\n    compile(open(path, encoding='utf-8').read(), path, 'exec')"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(stack: str, python: str) -> dict[str, str]:
    """The pinned releases of a stack by package, for one release of Python."""
    lines = (ROOT / stack).read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        plain(one.name): str(one.specifier).removeprefix("==")
        for one in pinned
        if one.marker is None or one.marker.evaluate({"python_version": python})
    }


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("stack", STACKS)
def test_the_ranges_take_what_is_pinned(stack, python):
    pinned = pins(stack, python)
    # gradio wants an older Pillow than the newest, so it is in the first stack only.
    installed = ("quant", "dev", "ui") if stack == STACKS[0] else ("quant", "dev")
    extras = [one for extra in installed for one in PROJECT["optional-dependencies"][extra]]
    for required in map(Requirement, PROJECT["dependencies"] + extras):
        if plain(required.name) in ("setuptools",):
            continue
        assert required.specifier.contains(pinned[plain(required.name)]), f"{required} and {stack}"


def test_the_oldest_stack_is_the_lower_bound():
    pinned = pins(STACKS[0], "3.11")
    for required in map(Requirement, PROJECT["dependencies"]):
        if required.name in ("torch", "torchvision", "transformers", "triton"):
            [bound] = [one.version for one in required.specifier if one.operator == ">="]
            assert Version(pinned[required.name]).release[:2] == Version(bound).release[:2], required


def test_doctor_names_the_stacks():
    oldest, newest = (pins(stack, "3.11") for stack in STACKS)
    assert {name: (oldest[name], newest[name]) for name in doctor.TESTED} == doctor.TESTED


@pytest.mark.parametrize("document", ["README.md", "docs/deployment.md"])
def test_documents_name_the_stacks(document):
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    for name, said in (("torch", "torch"), ("transformers", "transformers"), ("triton", "Triton")):
        assert "{} {} and {}".format(said, *doctor.TESTED[name]) in text


def interpreter(python: str) -> str | None:
    """The path of an interpreter of a release of Python that runs, or None where there is none."""
    beside = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python{python}"))
    for path in filter(None, (*map(str, beside), shutil.which(f"python{python}"))):
        told = subprocess.run([path, "--version"], capture_output=True, text=True)
        if told.returncode == 0 and told.stdout.startswith(f"Python {python}."):
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_every_supported_python_reads_the_sources_and_shows_the_help(python):
    path = interpreter(python)
    if path is None:
        pytest.skip(f"no Python {python} here")
    files = [
        str(file) for package in ("mg_fast", "kernels", "bench", "recipes") for file in (ROOT / package).rglob("*.py")
    ]
    read = subprocess.run([path, "-W", "error", "-c", COMPILE, *files], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    shown = subprocess.run([path, "-B", "-m", "mg_fast", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "doctor" in shown.stdout, shown.stderr
