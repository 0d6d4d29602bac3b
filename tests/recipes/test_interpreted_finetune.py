"""Ten steps of training with each backend from the same start: the losses stay together."""

from pathlib import Path

import pytest
import torch

from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, use_backend
from mg_fast.models.templates import render
from mg_fast.testing import random_checkpoints
from recipes.finetune.run import fine_tune
from tests.recipes.finetuning import CAPTIONS, PICTURES, losses, make_config

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """A checkpoint whose pictures have four image tokens, because interpreted kernels take long."""
    config = random_checkpoints.make_config("tiny")
    config.vision_config.image_size, config.image_size_aux = 28, 64
    config.vision_config_aux["depths"] = [1, 1, 1, 1]
    return random_checkpoints.save(random_checkpoints.make_model(config), tmp_path_factory.mktemp("smallest"))


def test_the_recipe(smallest, tmp_path):
    """Stage 1 on frozen towers, whose features are kept from one step to the next."""
    found = {}
    for backend in ("reference", "torch", "triton"):
        config = make_config(
            tmp_path / backend,
            smallest,
            CAPTIONS[:1],
            1,
            global_batch=1,
            per_device_batch=1,
            max_steps=STEPS,
            schedule="constant",
            warmup=0.0,
            backend=backend,
            feature_cache=str(tmp_path / backend / "features"),
        )
        fine_tune(config)
        found[backend] = losses(config)
    for backend in ("torch", "triton"):
        assert len(found[backend]) == STEPS and found[backend][-1] < found[backend][0] - 0.1
        assert found[backend] == pytest.approx(found["reference"], rel=1e-5)


def test_a_tower_that_learns(smallest):
    """The high-resolution tower learns together with mining and projector, which the recipe does not do."""
    processor = MiniGeminiProcessor.from_pretrained(smallest, template="vicuna_v1")
    prompt = render("vicuna_v1", [("<image>\nWhat is it?", "A cat.")])
    inputs = dict(processor(text=prompt, images=[str(PICTURES[0])], return_tensors="pt"))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    found, changes = {}, {}
    for backend in ("reference", "torch", "triton"):
        model = MiniGeminiForConditionalGeneration.from_pretrained(smallest, template="vicuna_v1").train()
        model.requires_grad_(False)
        parts = [model.model.vision_tower_aux, model.model.patch_mining, model.model.mm_projector]
        learned = [list(part.requires_grad_(True).parameters()) for part in parts]
        before = [torch.cat([p.detach().flatten() for p in weights]) for weights in learned]
        optimizer = torch.optim.SGD(sum(learned, []), lr=1.0)
        found[backend] = []
        with use_backend(backend):
            for _ in range(STEPS):
                loss = model(**inputs, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found[backend].append(loss.item())
        after = [torch.cat([p.detach().flatten() for p in weights]) for weights in learned]
        changes[backend] = [now - start for start, now in zip(before, after)]
    for backend in ("torch", "triton"):
        assert found[backend][-1] < found[backend][0] - 0.1
        assert found[backend] == pytest.approx(found["reference"], rel=1e-5)
        for change, expected in zip(changes[backend], changes["reference"]):
            assert (change - expected).norm() <= 1e-3 * expected.norm()
