"""The folder kernels/ is importable as mg_fast.kernels from a checkout and from a wheel, and never as `kernels`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.forked_python import LIBRARIES, python
from tests.paths import ROOT

# The files of the checkpoint in the package.
NANO = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "painter/drawing_config.json",
    "painter/model_index.json",
    "painter/scheduler/scheduler_config.json",
    "painter/text_encoder/config.json",
    "painter/text_encoder/model.safetensors",
    "painter/text_encoder_2/config.json",
    "painter/text_encoder_2/model.safetensors",
    "painter/tokenizer/tokenizer.json",
    "painter/tokenizer/tokenizer_config.json",
    "painter/tokenizer_2/tokenizer.json",
    "painter/tokenizer_2/tokenizer_config.json",
    "painter/unet/config.json",
    "painter/unet/diffusion_pytorch_model.safetensors",
    "painter/vae/config.json",
    "painter/vae/diffusion_pytorch_model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
)

# This code runs with the repository root as the working directory and first on the path, which is the hardest case.
PROBE = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or not spec.origin.startswith({root!r}), spec
import mg_fast
import mg_fast.kernels.configs
assert "kernels" not in sys.modules, sys.modules["kernels"]
"""
TRANSFORMERS = """
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
CLIPVisionModel(CLIPVisionConfig(**small, image_size=28, patch_size=14))
LlamaForCausalLM(LlamaConfig(**small, vocab_size=8))
"""


def run(code, *, cwd=ROOT):
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    done = python("-c", code, imported=LIBRARIES, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    run(PROBE.format(root=str(ROOT)))


@pytest.mark.slow
def test_transformers_imports_from_the_root():
    run(PROBE.format(root=str(ROOT)) + TRANSFORMERS)


@pytest.mark.slow
def test_transformers_imports_beside_hugging_faces_kernels():
    """transformers finds and uses the PyPI package `kernels`, although it is later on the path than this folder."""
    site = Path(sys.prefix) / "hf-kernels"
    if not site.is_dir():
        pytest.skip("Hugging Face's `kernels` is not here: `make` installs it into .venv/hf-kernels")
    code = (
        f"import sys; sys.path.append({str(site)!r})\n"
        "import mg_fast.kernels.configs\n"
        "import kernels\n"
        f"assert kernels.__file__.startswith({str(site)!r}), kernels.__file__\n"
        "from transformers.utils import is_kernels_available\n"
        "assert is_kernels_available()\n"
    )
    run(code + TRANSFORMERS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build does not use the checkout's own build folder: files left there from an earlier tree would be packed too.
    apart = ["-C--global-option=build", f"-C--global-option=--build-base={folder / 'build'}"]
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", *apart, "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mg_fast"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mg_fast").rglob("*.py")}
    sources |= {f"mg_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert "mg_fast/kernels/__init__.py" not in names
    nano = {f"mg_fast/nano/{file}" for file in NANO}
    assert nano == {name for name in names if name.startswith("mg_fast/nano/")}
    assert wheel.stat().st_size < 25e6
    assert any(name.endswith("LICENSE") for name in names) and any(name.endswith("NOTICE") for name in names)


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel, tmp_path, standard, photo):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import mg_fast, mg_fast.kernels, mg_fast.kernels.configs\n"
        f"assert mg_fast.__file__.startswith({str(site)!r}), mg_fast.__file__\n"
        f"assert list(mg_fast.kernels.__path__) == [{str(site / 'mg_fast' / 'kernels')!r}]\n"
        f"answer = mg_fast.load({str(standard)!r}).chat('What?', [{str(photo)!r}], max_new_tokens=3)\n"
        "assert len(answer.token_ids) == 3\n"
        f"assert mg_fast.load('nano').chat('What?', [{str(photo)!r}], max_new_tokens=3).image_tokens == 36\n"
    )
    run(code, cwd=tmp_path)
