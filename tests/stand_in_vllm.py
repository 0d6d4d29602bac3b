"""A stand-in for an installed vLLM, for tests of the command that starts its server."""

from pathlib import Path

from mg_fast.integrations.vllm_command import SERVER
from tests.paths import ROOT

NANO = ROOT / "mg_fast" / "nano"


def make_vllm(folder: Path, distribution: str, version: str, *torch: str) -> Path:
    """Writes vLLM's packages without their content, and an entry point that looks like this project's plugin.

    Args:
        folder: a folder of the module path.
        distribution, version: what the metadata name.
        torch: the requirements of torch in the metadata.

    Returns:
        The file of the server's module, which does not exist yet.
    """
    *packages, server = SERVER.split(".")
    for i in range(len(packages)):
        package = folder.joinpath(*packages[: i + 1])
        package.mkdir()
        (package / "__init__.py").touch()
    described = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    described.mkdir()
    needed = "".join(f"Requires-Dist: {text}\n" for text in torch)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needed}")
    plugin = folder / "stand_in-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nstand_in = mg_fast.errors:quoted\n")
    return package / f"{server}.py"
