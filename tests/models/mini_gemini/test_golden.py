"""The model gives the outputs in tests/golden, which the reference path gave when it matched the original's.

See make_golden.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.testing.tolerances import IMAGE_TOKENS, LOGITS, relative_error
from tests.paths import OWN_GOLDEN


@pytest.fixture(scope="module", params=["standard", "hd"])
def recorded(request):
    folder = OWN_GOLDEN / request.param
    return (
        MiniGeminiProcessor.from_pretrained(folder),
        MiniGeminiForConditionalGeneration.from_pretrained(folder),
        load_file(folder / "expected.safetensors"),
        json.loads((folder / "expected.json").read_text())["cases"],
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_recorded_outputs(recorded, backend):
    processor, model, expected, cases = recorded
    for i, case in enumerate(cases):
        inputs = processor(
            text=case["prompt"], images=[OWN_GOLDEN / file for file in case["images"]], return_tensors="pt"
        )
        assert inputs["input_ids"].tolist() == expected[f"case{i}.input_ids"].tolist()
        sums = inputs["pixel_values_hr"].double().sum(dim=(-1, -2))
        assert relative_error(sums, expected[f"case{i}.pixel_sums"]) <= 1e-9
        with mg_fast.use_backend(backend), torch.inference_mode():
            tokens = model.get_image_features(inputs["pixel_values"], inputs["pixel_values_hr"]).pooler_output
            logits = model(**inputs, logits_to_keep=1).logits
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert relative_error(tokens, expected[f"case{i}.image_tokens"]) <= IMAGE_TOKENS
        assert relative_error(logits, expected[f"case{i}.last_logits"]) <= LOGITS
        assert ids.tolist() == expected[f"case{i}.generated_ids"].tolist()
