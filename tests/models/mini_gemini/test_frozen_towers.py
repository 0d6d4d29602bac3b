"""Towers taken out of a model: their features, and the gradients of a model that is trained on them."""

import pytest
import torch

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers
from mg_fast.models.mini_gemini.naming import ours_to_published, published_to_ours
from mg_fast.models.templates import render
from tests.families import family


@pytest.fixture(params=["standard", "hd", "mgm-gemma"])
def case(request, one_thread):
    """A model that a test may change, and the inputs of two rows with a picture each."""
    found = family(request.param)
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, template=found.processor.template).train()
    prompts = [render(found.processor.template, [(f"<image>\n{text}", "Yes.")]) for text in ("What?", "Is it so?")]
    inputs = dict(found.processor(text=prompts, images=list(found.pictures), return_tensors="pt"))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    return model, inputs


def gradients(model, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    learned = ("patch_mining", "mm_projector", "lm_head")
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if any(part in n for part in learned)}


def test_features_train_as_pixels_do(case):
    model, inputs = case
    for tower in (model.model.vision_tower, model.model.vision_tower_aux):
        tower.requires_grad_(False)
    loss, expected = gradients(model, **inputs)
    towers = FrozenTowers(model.model)
    assert model.model.vision_tower is None and not any("vision_tower" in name for name, _ in model.named_parameters())
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "pixel_values_hr")}
    features = towers(**pixels)
    assert not features.queries.requires_grad
    found_loss, found = gradients(model, tower_features=features, **inputs)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Packed towers round otherwise than modules. The gradient of the biases of mining's keys is zero.
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name
    towers.put_back(model.model)
    assert gradients(model, **inputs, **pixels)[0] == loss


def test_a_batch_without_pictures_gives_mining_a_gradient_of_zero(case):
    model, inputs = case
    towers = FrozenTowers(model.model)
    text = {"input_ids": torch.tensor([[1, 17, 42, 99]]), "labels": torch.tensor([[-100, 17, 42, 99]])}
    with torch.no_grad():
        plain = model(**text)
    loss, found = gradients(model, tower_features=towers.nothing(), **text)
    assert loss == plain.loss.item()
    assert all(torch.equal(found[n], torch.zeros_like(found[n])) for n in found if "lm_head" not in n)
    # Gemma's head is its embedding.
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_features_of_zero_have_the_shapes_of_real_ones(case):
    model, inputs = case
    towers = FrozenTowers(model.model)
    seen, nothing = towers(inputs["pixel_values"], inputs["pixel_values_hr"]), towers.nothing()
    for real, zero in zip((seen.queries, *seen.pyramid), (nothing.queries, *nothing.pyramid)):
        assert real.shape[1:] == zero.shape[1:] and real.dtype == zero.dtype


def test_what_is_refused(case):
    model, inputs = case
    towers = FrozenTowers(model.model)
    features = towers(inputs["pixel_values"], inputs["pixel_values_hr"])
    with pytest.raises(ValueError, match="expected one of .*, got pixel_values and tower_features"):
        model(**inputs, tower_features=features)
    marks = {"mm_token_type_ids", "pixel_values", "pixel_values_hr"}
    with pytest.raises(ValueError, match="tower_features: expected mm_token_type_ids beside features of pictures"):
        model(**{name: value for name, value in inputs.items() if name not in marks}, tower_features=features)
    with pytest.raises(ValueError, match="expected a model with both towers"):
        FrozenTowers(model.model)
    with pytest.raises(ValueError, match="pixel_values_hr: expected"):
        towers(inputs["pixel_values"], inputs["pixel_values_hr"][..., 1:])


def test_state_has_the_models_names():
    found = family("standard")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder)
    names = set(model.state_dict())
    state = FrozenTowers(model.model).state_dict()
    assert names == set(model.state_dict()) | set(state)
    shapes = MiniGeminiForConditionalGeneration.published_shapes(model.config)
    assert {ours_to_published(name) for name in names} == set(shapes)
    assert all(published_to_ours(ours_to_published(name)) == name for name in names)
