"""transformers' Auto classes know Mini-Gemini, in whatever order things are imported; and mg_fast breaks no import of transformers."""

import subprocess
import sys

import pytest

from tests.paths import OWN_GOLDEN, ROOT

LOADED = f"""
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
folder = {str(OWN_GOLDEN / "standard")!r}
assert type(AutoConfig.from_pretrained(folder)).__name__ == "MiniGeminiConfig"
assert type(AutoModelForImageTextToText.from_pretrained(folder)).__name__ == "MiniGeminiForConditionalGeneration"
assert type(AutoProcessor.from_pretrained(folder)).__name__ == "MiniGeminiProcessor"
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import LlamaForCausalLM",
        "from transformers import CLIPVisionModel",
        "import transformers.models.auto.modeling_auto",
        "from transformers import AutoModelForImageTextToText",
    ],
)
def test_imports_of_transformers_work_after_ours_and_the_auto_classes_too(first):
    """The first two import the auto classes while modules that ours needs are half imported."""
    run(f"import mg_fast\n{first}\n{LOADED}")


def test_imports_before_ours_are_registered_with():
    run(f"from transformers import AutoModelForImageTextToText, LlamaForCausalLM\nimport mg_fast\n{LOADED}")
