"""Layers look down only, imports form no circle, no module takes another's underscored names, and files stay short."""

import collections
import re

import pytest
import torch
from torch import nn

from tests.imports import cycle, sources
from tests.paths import ROOT

# The layers from bottom to top. Beside the layers below, a module may import only from its own package.
LAYERS = (
    ("mg_fast.errors", "mg_fast.private_interfaces"),
    ("mg_fast.runtime", "mg_fast.quantization"),
    ("mg_fast.kernels",),
    ("mg_fast.ops",),
    ("mg_fast.modules",),
    ("mg_fast.models",),
    ("mg_fast.decoding",),
    ("mg_fast.drawing", "mg_fast.hints"),
    ("mg_fast.engine",),
    ("mg_fast.pipeline", "mg_fast.integrations", "mg_fast.testing", "mg_fast.templates"),
    ("mg_fast.integrations.lmms_eval",),
    ("mg_fast.web",),
    ("mg_fast.cli",),
    ("mg_fast", "mg_fast.__main__"),
)
LONGEST_FILE = 400
MOST_LOOSE_FILES = 8


def layer(module: str) -> tuple[int, str]:
    """The height of a module's layer, and the package that puts it there."""
    named = [(height, package) for height, packages in enumerate(LAYERS) for package in packages]
    return max(
        (
            (height, package)
            for height, package in named
            if module == package or module.startswith(f"{package}.") and package != "mg_fast"
        ),
        key=lambda found: len(found[1]),
    )


def ours() -> dict[str, set[str]]:
    """The imports of mg_fast's modules, without mg_fast itself, from which they take only the version."""
    found = {name: source.imports for name, source in sources().items() if name.split(".")[0] == "mg_fast"}
    return {name: {other for other in imports if other != "mg_fast"} for name, imports in found.items()}


def looks_up(name: str, imported: str) -> str | None:
    """The reason why the layers forbid one module to import another, or None where they allow it."""
    (own, own_package), (other, other_package) = layer(name), layer(imported)
    if other > own:
        return f"{name} imports {imported}, of a layer above it"
    if other == own and own_package != other_package:
        return f"{name} imports {imported}, of a package beside its own"
    return None


def test_every_module_has_a_layer():
    for name in ours():
        assert layer(name)[1] != "mg_fast" or name == "mg_fast", f"{name}: say in LAYERS where it belongs"


def test_nothing_within_takes_more_of_the_face_than_the_version():
    taken = {
        name: source.from_face - {"__version__"} for name, source in sources().items() if name.startswith("mg_fast.")
    }
    assert {name: names for name, names in taken.items() if names} == {}
    assert "MiniGeminiProcessor" in sources()["bench.cases.sessions"].from_face


def test_layers_look_down_only():
    assert [found for name, imports in ours().items() for other in imports if (found := looks_up(name, other))] == []


def test_looking_up_is_seen():
    assert looks_up("mg_fast.ops.pointwise", "mg_fast.modules.convnext") and looks_up(
        "mg_fast.runtime.meter", "mg_fast.quantization.stored"
    )
    assert looks_up("mg_fast.modules.clip", "mg_fast.ops.pointwise") is None


@pytest.mark.parametrize("package", ["mg_fast", "bench", "recipes"])
def test_no_circle(package):
    """Imports form no circle. Imports within functions count too: whatever a module needs at any time is below it."""
    inside = {name: source.imports for name, source in sources().items() if name.split(".")[0] == package}
    # A package's face imports its modules, so these must not import the face.
    assert cycle(inside) is None


def test_a_circle_is_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_what_each_tree_may_import():
    """mg_fast imports only itself, the benchmark only mg_fast, and recipes are imported by no one but tests."""
    may = {"mg_fast": {"mg_fast"}, "bench": {"mg_fast", "bench"}, "recipes": {"mg_fast", "recipes"}}
    for name, source in sources().items():
        tree = name.split(".")[0]
        allowed = may.get(tree, {"mg_fast", "bench", "recipes", "tests"})
        foreign = {imported for imported in source.imports if imported.split(".")[0] not in allowed}
        assert not foreign, f"{name} imports {', '.join(sorted(foreign))}"


def test_no_underscored_name_crosses_a_module():
    """No module uses an underscored name that another module of the project defines and that it does not define."""
    theirs = {tree: {} for tree in ("mg_fast", "bench", "recipes")}
    for name, source in sources().items():
        for defined in source.defines:
            theirs.get(name.split(".")[0], {}).setdefault(defined, name)
    crossing = []
    for name, source in sources().items():
        if name.split(".")[0] not in theirs:
            continue
        for used, line in source.uses:
            owner = next((names[used] for names in theirs.values() if used in names), None)
            if owner is not None and used not in source.defines and not _is_a_library_s(used):
                crossing.append(f"{source.path.relative_to(ROOT)}:{line}: {used} of {owner}")
    assert crossing == []


def _is_a_library_s(name: str) -> bool:
    """Whether torch's tensors or modules, or named tuples, have an attribute with this name."""
    return any(hasattr(kind, name) for kind in (torch.Tensor, nn.Module(), collections.namedtuple("Any", "")))


def test_files_are_short():
    long = {}
    for name, source in sources().items():
        lines = len(source.path.read_text(encoding="utf-8").splitlines())
        if name.split(".")[0] in ("mg_fast", "bench") and lines > LONGEST_FILE:
            long[name] = lines
    assert long == {}


def test_few_files_lie_loose():
    assert len(list((ROOT / "mg_fast").glob("*.py"))) <= MOST_LOOSE_FILES


def test_class_names_have_one_meaning():
    """No two classes within mg_fast and the benchmark share a name, private classes included."""
    seen: dict[str, str] = {}
    twice = []
    for name, source in sources().items():
        if name.split(".")[0] not in ("mg_fast", "bench"):
            continue
        for kind in re.findall(r"^class (\w+)", source.path.read_text(encoding="utf-8"), re.MULTILINE):
            if kind in seen:
                twice.append(f"{kind}: {seen[kind]} and {name}")
            seen[kind] = name
    assert twice == []


def test_contributing_names_places_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:mg_fast|kernels|bench|tests|recipes|docs)/[\w./*-]*|[A-Z]\w*\.md|\w+\.toml|Makefile|\.ci/run)`", text
    )
    assert len(named) > 20
    for path in named:
        assert list(ROOT.glob(path.rstrip("/"))), f"CONTRIBUTING.md names {path}, which is not there"
