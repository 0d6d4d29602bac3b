"""vLLM's Mistral answers as mg_fast's does: a random checkpoint, as none is published with this language model."""

import json
import shutil

import pytest
import torch

from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.models.templates import render
from mg_fast.testing.random_checkpoints import LLM_TINY, TINY_TOWERS, make_model, save
from mg_fast.testing.tolerances import relative_error
from tests.families import plain
from tests.paths import OWN_GOLDEN
from tests.serve.engine import NEW_TOKENS, TEXTS, answered, needs_vllm

pytestmark = [needs_vllm, pytest.mark.xdist_group("mistral")]

TEMPLATE = "mistral_instruct"
# The prompts are longer, so the window counts.
WINDOW = 40
QUESTIONS = {"image0.prompt0": (0, "What is shown here?"), "image1.prompt0": (1, "Which colour has the sky?")}


def turns(text: str):
    return [(f"<image>\n{text}", None)]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """The checkpoint's folder, with the two pictures and the questions that the program of the engine asks."""
    # vLLM has no attention on CPUs for heads of 16.
    text = LLM_TINY | {"hidden_size": 128, "max_position_embeddings": 4096, "sliding_window": WINDOW}
    config = MiniGeminiConfig(
        model_type="mgm_mistral",
        **text,
        vision_config=TINY_TOWERS["clip"],
        vision_config_aux=TINY_TOWERS["convnext"],
        mm_hidden_size=TINY_TOWERS["clip"]["hidden_size"],
        mm_hidden_size_aux=sum(TINY_TOWERS["convnext"]["dims"]),
        image_size_aux=160,
        tokenizer_model_max_length=2048,
    )
    folder = save(make_model(config), tmp_path_factory.mktemp("mistral"))
    for i, name in enumerate(("photo.png", "drawing.png")):
        shutil.copyfile(OWN_GOLDEN / name, folder / f"image{i}.png")
    asked = [{"image": i, "prompt": render(TEMPLATE, turns(question))} for i, question in QUESTIONS.values()]
    (folder / "expected.json").write_text(json.dumps({"conv": TEMPLATE, "cases": asked}))
    return folder


def test_mistral_answers_as_in_mg_fast(mistral, tmp_path):
    model = MiniGeminiForConditionalGeneration.from_pretrained(mistral)
    processor = MiniGeminiProcessor.from_pretrained(mistral, template=TEMPLATE)
    said = answered(mistral, tmp_path / "said.json")
    expected = {text: plain(model, processor, [(text, None)], (), NEW_TOKENS) for text in TEXTS}
    for key, (i, question) in QUESTIONS.items():
        picture = mistral / f"image{i}.png"
        inputs = processor(text=render(TEMPLATE, turns(question)), images=[picture], return_tensors="pt")
        assert inputs["input_ids"].shape[1] > WINDOW
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=1).logits[0, -1]
        expected[key] = plain(model, processor, turns(question), [picture], NEW_TOKENS)
        alone = said["alone"][key]
        assert alone["prompt_ids"] == inputs["input_ids"][0].tolist(), key
        assert relative_error(torch.tensor(alone["logits"]), logits) <= 1e-4, key
        assert alone["ids"] == said["again"][key]["ids"] == expected[key], key
    assert said["encoded"] == len(QUESTIONS)
    assert [answer["ids"] for _, answer in said["together"]] == [expected[asked] for asked, _ in said["together"]]
    assert len({tuple(ids) for ids in expected.values()}) == len(expected)
