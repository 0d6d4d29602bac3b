"""Checkpoints of all families, each loaded once, and the answers that transformers' own loop gives with them."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, Pipeline
from mg_fast.models.templates import render
from tests.paths import OWN_GOLDEN, original_golden

OWN = ["standard", "hd"]
_PLAIN: dict[tuple, list[int]] = {}
ORIGINAL = ["mgm-gemma", "mgm-llama", "mgm-llama-hd", "mgm-llama3", "mgm-mixtral", "mgm-yi-hd"]


@dataclass(frozen=True)
class Family:
    """A checkpoint with its model (which tests must not change), its processor and two pictures."""

    name: str
    folder: Path
    model: MiniGeminiForConditionalGeneration
    processor: MiniGeminiProcessor
    pictures: tuple[Path, Path]

    def pipeline(self, **options) -> Pipeline:
        return Pipeline(self.model, self.processor, **options)

    def plain(self, turns, pictures, max_new_tokens=8, **options) -> list[int]:
        """The new ids of transformers' own loop for turns [(user, assistant or None)] with `<image>` tags.

        They are computed once per session.
        """
        key = self.name, repr(turns), tuple(pictures), max_new_tokens, repr(options)
        if key not in _PLAIN:
            _PLAIN[key] = plain(self.model, self.processor, turns, pictures, max_new_tokens, **options)
        return _PLAIN[key]

    def recorded(self) -> list[tuple[str, list[Path], list[int]]]:
        """(question, pictures, ids) of the original's answers; an empty list for the project's own checkpoints."""
        if self.name in OWN:
            return []
        cases, tensors = (
            json.loads((self.folder / "expected.json").read_text())["cases"],
            load_file(self.folder / "expected.safetensors"),
        )
        found, seen = [], {}
        for case in cases:
            number = seen[case["image"]] = seen.get(case["image"], -1) + 1
            ids = tensors[f"image{case['image']}.prompt{number}.generated_ids"].flatten().tolist()
            found.append((case["question"], [self.pictures[case["image"]]], ids))
        return found


def plain(model, processor, turns, pictures, max_new_tokens=8, **options) -> list[int]:
    inputs = processor(text=render(processor.template, turns), images=list(pictures) or None, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@functools.cache
def family(name: str) -> Family:
    """A family by name. The test is skipped where the original's checkpoints are not on this machine."""
    if name in OWN:
        folder, pictures = OWN_GOLDEN / name, (OWN_GOLDEN / "photo.png", OWN_GOLDEN / "drawing.png")
    else:
        if original_golden() is None:
            pytest.skip("the original's outputs are not here: set MG_FAST_GOLDEN to their folder")
        folder = original_golden() / name
        pictures = (folder / "image0.png", folder / "image1.png")
    # Nothing in the folders names the template, nor do the names of two of the families.
    template = "vicuna_v1" if name in OWN else json.loads((folder / "expected.json").read_text())["conv"]
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder, template=template)
    return Family(name, folder, model, MiniGeminiProcessor.from_pretrained(folder, template=template), pictures)
