"""The plugin for vLLM is found by its entry point, knows every architecture, and is all of mg_fast that needs vLLM."""

import ast
import importlib
import re

from mg_fast.integrations.vllm.names import ARCHITECTURES
from mg_fast.models.mini_gemini.configuration import PUBLISHED_ARCHITECTURES
from tests.imports import sources
from tests.paths import ROOT

PLUGIN = "mg_fast.integrations.vllm"


def imported(tree: ast.Module) -> set[str]:
    """The packages of other projects that a module names in its imports, those in functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_nothing_else_of_the_package_imports_vllm():
    trees = {name: ast.parse(source.path.read_text(encoding="utf-8")) for name, source in sources().items()}
    users = {name for name, tree in trees.items() if name.startswith("mg_fast") and "vllm" in imported(tree)}
    assert users and all(name.startswith(f"{PLUGIN}.") for name in users)
    # What vLLM calls first, and the names beside it, import it only when they are called.
    for name in (PLUGIN, f"{PLUGIN}.registration", f"{PLUGIN}.names"):
        assert "vllm" not in {getattr(node, "module", None) or "" for node in trees[name].body}
    inside = {name for name in trees if name == PLUGIN or name.startswith(f"{PLUGIN}.")}
    reached = {name for name, source in sources().items() if inside & set(source.imports)}
    assert {name for name in reached if name.startswith("mg_fast")} <= inside


def test_the_entry_point_names_a_function():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [(module, function)] = re.findall(r'"vllm\.general_plugins"\]\nmg_fast = "([\w.]+):(\w+)"', project)
    assert callable(getattr(importlib.import_module(module), function))


def test_every_published_architecture_is_known():
    assert set(PUBLISHED_ARCHITECTURES.values()) < set(ARCHITECTURES)
    assert {name.replace("MGM", "MiniGemini") for name in PUBLISHED_ARCHITECTURES.values()} < set(ARCHITECTURES)
