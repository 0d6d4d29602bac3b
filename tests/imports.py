"""Reads from the source what the project's modules import, and which underscored names they define and use."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import ROOT

PACKAGES = ("mg_fast", "bench", "recipes", "tests")


@dataclass
class Source:
    """What the source of one module says.

    Attributes:
        name: dotted name; the files of the top-level kernels/ folder are `mg_fast.kernels.*`.
        path: the file.
        imports: modules of the project that it imports anywhere in the file, functions included.
        from_face: names that it imports from mg_fast itself and that are not modules.
        defines: underscored names that it defines at any depth: functions, classes, variables and attributes.
        uses: underscored names that it takes from elsewhere, with the line: imported names, and attributes of
            something other than `self`.
    """

    name: str
    path: Path
    imports: set[str] = field(default_factory=set)
    from_face: set[str] = field(default_factory=set)
    defines: set[str] = field(default_factory=set)
    uses: list[tuple[str, int]] = field(default_factory=list)


@functools.cache
def sources() -> dict[str, Source]:
    """All modules of the project in the checkout, by name."""
    paths = {_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    paths |= {f"mg_fast.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    return {name: _read(name, path, paths.keys()) for name, path in paths.items()}


def cycle(of: dict[str, set[str]]) -> list[str] | None:
    """A circle in a graph of imports, from a module back to itself, or None where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(of.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(of) if (found := visit(name, []))), None)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(name: str, path: Path, known) -> Source:
    source, package = Source(name, path), name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            source.imports |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            for module, imported in _from(node, package, known):
                source.imports.add(module)
                if module == "mg_fast" and imported is not None:
                    source.from_face.add(imported)
                if imported is not None and _is_private(imported):
                    source.uses.append((imported, node.lineno))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            source.defines.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            source.defines.add(node.id)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store):
                source.defines.add(node.attr)
            if _is_private(node.attr) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                source.uses.append((node.attr, node.lineno))
    source.imports.discard(name)
    source.defines = {defined for defined in source.defines if _is_private(defined)}
    return source


def _from(node: ast.ImportFrom, package: str, known) -> Iterator[tuple[str, str | None]]:
    """The modules of a `from ... import ...`, each with the name that is imported from it.

    The name is None where the module itself is imported.
    """
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
    if base.split(".")[0] not in PACKAGES:
        return
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if inner in known:
            yield inner, None
        elif base in known:
            yield base, alias.name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
