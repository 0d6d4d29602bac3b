"""transformers' Auto classes know our models in any order of imports, and mg_fast breaks no import of transformers."""

import pytest

import mg_fast
from mg_fast.testing.random_interleaved import build_interleaved
from tests.forked_python import LIBRARIES, python
from tests.models.mm_interleaved.recorded import folder_of
from tests.paths import OWN_GOLDEN

MODEL = f"""
from transformers import AutoConfig, AutoModelForImageTextToText
folder = {str(OWN_GOLDEN / "standard")!r}
assert type(AutoConfig.from_pretrained(folder)).__name__ == "MiniGeminiConfig"
assert type(AutoModelForImageTextToText.from_pretrained(folder)).__name__ == "MiniGeminiForConditionalGeneration"
"""
# The folder of a saved processor names the processor's class, so that no configuration is made.
PROCESSOR = """
from transformers import AutoProcessor
assert type(AutoProcessor.from_pretrained({folder!r})).__name__ == "MiniGeminiProcessor"
"""


def run(code: str) -> None:
    done = python("-c", code, imported=LIBRARIES)
    assert done.returncode == 0, done.stderr


# Some of these import the auto classes while modules that mg_fast's needs are half imported.
FIRST = [
    "from transformers import LlamaForCausalLM",
    "from transformers import CLIPVisionModel",
    "from transformers import Trainer, pipeline",
    "import transformers.models.auto.modeling_auto",
    "from transformers import AutoModelForImageTextToText",
]


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_any_import_of_transformers_works_after_ours(first, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    run(f"import mg_fast\n{first}\n{PROCESSOR.format(folder=str(tmp_path))}{MODEL}")


@pytest.mark.slow
def test_a_pipeline_of_transformers_finds_the_model():
    folder = str(OWN_GOLDEN / "standard")
    imports = "import mg_fast\nfrom transformers import LlamaForCausalLM, pipeline\n"
    made = (
        f"assert type(pipeline('image-text-to-text', {folder!r}).model).__name__ "
        "== 'MiniGeminiForConditionalGeneration'"
    )
    run(imports + made)


@pytest.mark.slow
def test_imports_before_ours_are_registered_with():
    run(f"from transformers import AutoModelForImageTextToText, LlamaForCausalLM\nimport mg_fast\n{MODEL}")


# diffusers is optional, and its import takes more than a second: it is imported where MM-Interleaved is built.
INTERLEAVED = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "MMInterleavedConfig"
assert type(AutoProcessor.from_pretrained({folder!r})).__name__ == "MMInterleavedProcessor"
assert "diffusers" not in sys.modules
assert type(AutoModelForImageTextToText.from_pretrained({folder!r})).__name__ == "MMInterleavedForConditionalGeneration"
"""


@pytest.mark.slow
def test_mm_interleaved_is_known_and_costs_others_nothing(tmp_path):
    source, saved = build_interleaved(tmp_path / "source"), tmp_path / "saved"
    for kind in (mg_fast.MMInterleavedForConditionalGeneration, mg_fast.MMInterleavedProcessor):
        kind.from_pretrained(source).save_pretrained(saved)
    run(f"import mg_fast\nfrom transformers import CLIPVisionModel\n{MODEL}{INTERLEAVED.format(folder=str(saved))}")


@pytest.mark.slow
def test_without_diffusers_only_mm_interleaved_is_refused():
    without = "import sys\nsys.modules['diffusers'] = None\nimport mg_fast\n"
    refused = """
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
assert len(list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.values())) > 2
from mg_fast.testing.random_interleaved import make_interleaved_config
try:
    mg_fast.MMInterleavedForConditionalGeneration(make_interleaved_config())
except mg_fast.BackendError as error:
    assert "pip install 'mg_fast[draw]'" in str(error)
else:
    raise AssertionError("was built")
"""
    run(f"{without}{MODEL}{refused}")


@pytest.mark.slow
def test_the_tokenizer_of_a_saved_processor_is_found(tmp_path):
    """Otherwise AutoTokenizer would make a tokenizer with other ids of the same files, without an error."""
    mg_fast.MMInterleavedProcessor.from_pretrained(folder_of("mmi-tiny")).save_pretrained(tmp_path)
    used = f"assert type(AutoTokenizer.from_pretrained({str(tmp_path)!r})).__name__ == 'MMInterleavedTokenizer'"
    run(f"import mg_fast\nfrom transformers import LlamaForCausalLM, AutoTokenizer\n{used}")
    run(f"from transformers import AutoTokenizer\nimport mg_fast\n{used}")
