"""The whole model gives what the original's own code answered: texts by ids, and pictures."""

import functools

import pytest
import torch

import mg_fast
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved.loaded import load
from tests.models.mm_interleaved.recorded import NAMES, answers, folder_of, pixels, requests

STAGES, LOGITS = 2e-5, 5e-5
TEXTS = ["vqa", "caption", "fewshot", "textonly", "ragged", "twodocs"]
DRAWN = ["t2i", "t2i_batch", "segm", "story"]
GREEDY = [("vqa", "greedy"), ("vqa", "greedy_free"), ("caption", "greedy"), ("caption", "repetition")] + [
    (request, "greedy") for request in TEXTS[2:]
]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because both models are tiny."""


@functools.cache
def recorded(name: str) -> tuple[dict, dict]:
    return requests(name), answers(name)


def inputs_of(name: str, request: str) -> dict[str, torch.Tensor]:
    """What the processor gives for a recorded request, put together from the recording."""
    asked, given = recorded(name)
    pictures = [picture for row in asked[request]["images"] for picture in row]
    return {
        "input_ids": given[f"{request}.text_ids"].long(),
        "attention_mask": given[f"{request}.attention_mask"].long(),
        "num_image_per_seq": given[f"{request}.num_image_per_seq"].long(),
        "pixel_values": pixels(name, pictures, given),
    }


@pytest.fixture(params=NAMES)
def name(request) -> str:
    folder_of(request.param)
    return request.param


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_picture_features(name, backend):
    model, (_, given) = load(name), recorded(name)
    with torch.inference_mode():
        seen = model.get_image_features(pixels(name, [0, 1, 2], given), backend=backend)
    for i in range(3):
        assert relative_error(seen.pooler_output[i], given[f"image{i}.visual_tokens"]) <= STAGES
        start = 0
        for side in (64, 32, 16, 8):
            level = seen.last_hidden_state[i, start : start + side * side]
            start += side * side
            if (expected := given.get(f"image{i}.map{side}")) is not None:
                assert relative_error(level, as_rows(expected)) <= STAGES, (i, side)


def as_rows(level: torch.Tensor) -> torch.Tensor:
    """A map [C, side, side] as [side * side, C]."""
    return level.flatten(1).t() if level.dim() == 3 else level


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("request_name", [*TEXTS, *DRAWN])
def test_states_and_logits(name, request_name, backend):
    model, (_, given) = load(name), recorded(name)
    inputs = inputs_of(name, request_name)
    # For drawing, the original counts padding among the positions.
    positions = given.get(f"{request_name}.position_ids")
    mask = inputs["attention_mask"].bool()
    with mg_fast.use_backend(backend), torch.inference_mode():
        features = model.get_image_features(inputs["pixel_values"])
        embeddings = model.embed(inputs["input_ids"], image_tokens=features.pooler_output)
        output = model(**inputs, position_ids=positions, output_hidden_states=True)
    assert relative_error(embeddings[mask], given[f"{request_name}.inputs_embeds"][mask]) <= STAGES
    if request_name in DRAWN:
        expected = [given[f"{request_name}.last_hidden"]]
    else:
        expected = given[f"{request_name}.hidden"]
        assert len(output.hidden_states) == 1 + len(expected)
        assert relative_error(output.logits[:, -1], given[f"{request_name}.last_logits"]) <= LOGITS
    for ours, theirs in zip(output.hidden_states[-len(expected) :], expected):
        assert relative_error(ours[mask], theirs[mask]) <= STAGES


def ends_of(model) -> set[int]:
    """The ids that end a text."""
    return set(model.generation_config.eos_token_id)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("request_name", "variant"), GREEDY)
def test_greedy_ids_and_logits(name, request_name, variant, backend):
    model, (asked, given) = load(name), recorded(name)
    inputs = inputs_of(name, request_name)
    settings = asked[request_name]["generations"][variant]["kwargs"]
    with mg_fast.use_backend(backend):
        found = model.generate(
            **inputs,
            max_new_tokens=settings["max_length"],
            min_length=settings["min_length"],
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            return_dict_in_generate=True,
            output_logits=True,
        )
    expected = given[f"{request_name}.{variant}.ids"].long()
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found.sequences[:, : -new.shape[1]], inputs["input_ids"])
    # The original returns one BOS and the new tokens.
    assert new.tolist() == expected[:, 1:].tolist()
    for step, (ours, theirs) in enumerate(zip(found.logits, given[f"{request_name}.{variant}.logits"])):
        # What comes after the end of a row means nothing.
        running = [not set(row[:step]) & ends_of(model) for row in new.tolist()]
        assert relative_error(ours[running], theirs[running]) <= LOGITS


def test_one_pass_is_many_passes(name):
    """Passes over parts of a prompt with kept keys and values give what one pass over the whole prompt gives."""
    model, inputs = load(name), inputs_of(name, "ragged")
    ids = inputs["input_ids"]
    with torch.inference_mode():
        whole = model(**inputs).logits
        read = model.with_pictures(ids, inputs)
        embeddings = model.embed(ids, image_tokens=read["image_tokens"])
        cache, parts = None, []
        for first, last in ((0, 20), (20, 21), (21, ids.shape[1])):
            output = model(
                inputs_embeds=embeddings[:, first:last],
                attention_mask=inputs["attention_mask"][:, :last],
                past_key_values=cache,
                **model.pass_inputs(read).at(torch.arange(first, last)),
            )
            cache = output.past_key_values
            parts.append(output.logits)
    mask = inputs["attention_mask"].bool()
    assert relative_error(torch.cat(parts, dim=1)[mask], whole[mask]) <= LOGITS


PICTURES = [("t2i", "steps4"), ("t2i", "noguide"), ("t2i_batch", "steps4"), ("segm", "steps4"), ("story", "steps4")]


@pytest.mark.parametrize(("request_name", "variant"), PICTURES)
def test_pictures(name, request_name, variant):
    model, (asked, given) = load(name), recorded(name)
    inputs, about = inputs_of(name, request_name), asked[request_name]
    targets = about["target_image_idxs"]
    drawn = model.generate_images(
        **inputs,
        target_image_idxs=range(len(inputs["pixel_values"])) if targets is None else targets,
        guidance_scale=about["generations"][variant]["kwargs"]["guidance_scale"],
        num_inference_steps=about["generations"][variant]["kwargs"]["num_inference_steps"],
        generator=torch.Generator("cpu").manual_seed(about["generations"][variant]["seed"]),
        output_type="pt",
    )
    expected = given[f"{request_name}.{variant}.picture"]
    assert drawn.shape == expected.shape
    assert (drawn - expected).abs().max() <= 1e-4
