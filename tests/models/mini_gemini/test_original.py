"""The model gives what the original's own code answered, for checkpoints of six families."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.testing.tolerances import IMAGE_TOKENS, LOGITS, LR_PIXELS, relative_error
from tests.paths import original_golden

NAMES = ["mgm-gemma", "mgm-llama", "mgm-llama-hd", "mgm-llama3", "mgm-mixtral", "mgm-yi-hd"]


@pytest.fixture(scope="module", params=NAMES)
def recorded(request, golden):
    folder = golden / request.param
    return (
        folder,
        MiniGeminiProcessor.from_pretrained(folder),
        MiniGeminiForConditionalGeneration.from_pretrained(folder),
        load_file(folder / "expected.safetensors"),
        cases(folder),
    )


def cases(folder):
    """(key prefix, picture numbers, prompt) of every recorded case."""
    expected = json.loads((folder / "expected.json").read_text())
    seen: dict[int, int] = {}
    found = []
    for case in expected["cases"]:
        image = case["image"]
        found.append((f"image{image}.prompt{seen.setdefault(image, 0)}", [image], case["prompt"]))
        seen[image] += 1
    if "multi" in expected:
        found.append(("multi", expected["multi"]["images"], expected["multi"]["prompt"]))
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tokens_logits_and_ids(recorded, backend):
    folder, processor, model, expected, recorded_cases = recorded
    for key, numbers, prompt in recorded_cases:
        inputs = processor(text=prompt, images=[folder / f"image{i}.png" for i in numbers], return_tensors="pt")
        with mg_fast.use_backend(backend), torch.inference_mode():
            tokens = model.get_image_features(inputs["pixel_values"], inputs["pixel_values_hr"]).pooler_output
            logits = model(**inputs, logits_to_keep=8).logits
            generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert (
            relative_error(tokens, torch.cat([expected[f"image{i}.image_tokens"] for i in numbers])) <= IMAGE_TOKENS
        ), key
        assert relative_error(logits, expected[f"{key}.last_logits"]) <= LOGITS, key
        assert generated.tolist() == expected[f"{key}.generated_ids"].tolist(), key


def test_pixels_and_prompt_ids(recorded):
    folder, processor, _, expected, recorded_cases = recorded
    for key, numbers, prompt in recorded_cases:
        inputs = processor(text=prompt, images=[folder / f"image{i}.png" for i in numbers], return_tensors="pt")
        # The original marks a picture by one -200. This project marks it by as many fillers as it has tokens.
        ids, marks = inputs["input_ids"][0].tolist(), inputs["mm_token_type_ids"][0].tolist()
        folded = [-200 if mark else i for i, mark, before in zip(ids, marks, [0, *marks]) if not (mark and before)]
        assert folded == expected[f"{key}.input_ids"][0].tolist(), key
        if len(numbers) > 1:
            continue
        low = expected[f"image{numbers[0]}.lr_pixels"]
        assert (inputs["pixel_values"] - low.reshape(inputs["pixel_values"].shape)).abs().max() <= LR_PIXELS, key
        if (high := expected.get(f"image{numbers[0]}.hr_pixels")) is not None:
            assert torch.equal(inputs["pixel_values_hr"], high), key


def test_every_stage(recorded):
    folder, processor, model, expected, _ = recorded
    images = processor.image_processor(folder / "image0.png")
    core, config = model.model, model.config
    with torch.inference_mode():
        pyramid = core.vision_tower_aux(images["pixel_values_hr"])
        queries = core.low_resolution_queries(images["pixel_values"])
        mined = core.patch_mining(queries, pyramid, grid=config.image_grid)[0]
    for s, stage in enumerate(pyramid):
        if (recorded_stage := expected.get(f"image0.hr_stage_{s}")) is not None:
            assert relative_error(stage.permute(0, 3, 1, 2), recorded_stage) <= IMAGE_TOKENS, s
    if (features := expected.get("image0.lr_features")) is not None:
        assert relative_error(queries[0], features) <= IMAGE_TOKENS
    if config.image_grid == 1:
        assert relative_error(mined, expected["image0.mined0"]) <= IMAGE_TOKENS
    else:
        assert relative_error(mined[-1:], expected["image0.mined0"]) <= IMAGE_TOKENS
        assert relative_error(mined[:-1], expected["image0.mined1"]) <= IMAGE_TOKENS


def test_prompts(golden):
    for case in json.loads((golden / "prompts.json").read_text()):
        turns = [tuple(turn) for turn in case["turns"]]
        assert mg_fast.models.templates.render(case["template"], turns) == case["prompt"]


def test_chat_templates(golden):
    """The processor's Jinja templates give the same text as `render`, for plain and for structured content."""
    folder = golden / "mgm-llama"
    for template in mg_fast.models.templates.TEMPLATES:
        processor = MiniGeminiProcessor.from_pretrained(folder, template=template)
        for case in json.loads((golden / "prompts.json").read_text()):
            if case["template"] != template:
                continue
            for structured in (False, True):
                messages = as_messages(case["turns"], structured)
                assert processor.apply_chat_template(messages, add_generation_prompt=True) == case["prompt"]


def as_messages(turns, structured):
    messages = []
    for user, assistant in turns:
        content = user
        if structured:
            text = user.removeprefix("<image>\n").removeprefix("<image>\n")
            content = [{"type": "image"}] * user.count("<image>") + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
    return messages


def test_golden_folder_is_whole():
    folder = original_golden()
    if folder is None:
        pytest.skip("the original's outputs are not here: set MG_FAST_GOLDEN to their folder")
    assert {name for name in NAMES if not (folder / name / "expected.json").is_file()} == set()
