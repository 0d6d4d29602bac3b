"""The tiny models of the original's recorded answers, loaded once in a process, and the inputs of recorded requests."""

import functools

import torch

from mg_fast import MMInterleavedForConditionalGeneration
from tests.models.mm_interleaved import recorded


@functools.cache
def load(name: str) -> MMInterleavedForConditionalGeneration:
    """A tiny checkpoint's model in float32 on the default device, which no test changes."""
    model = MMInterleavedForConditionalGeneration.from_pretrained(recorded.folder_of(name), dtype=torch.float32)
    return model.to(torch.get_default_device())


@functools.cache
def features(name: str, picture) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, T, D] and maps [1, 5440, C] of a recorded picture."""
    with torch.inference_mode(False), torch.no_grad():
        model, pixels = load(name), recorded.pixels(name, [picture], recorded.answers(name))
        seen = model.get_image_features(pixels.to(model.device))
    return seen.pooler_output, seen.last_hidden_state


def inputs(name: str, request: str, answers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a recorded request, its pictures as tokens and maps."""
    ids = answers[f"{request}.text_ids"]
    pictures = [picture for row in recorded.requests(name)[request]["images"] for picture in row]
    tokens, maps = (torch.cat(parts) for parts in zip(*(features(name, picture) for picture in pictures)))
    found = dict(input_ids=ids, image_tokens=tokens, image_maps=maps)
    found["attention_mask"] = answers.get(f"{request}.attention_mask", torch.ones_like(ids))
    if (numbers := answers.get(f"{request}.num_image_per_seq")) is not None:
        found["num_image_per_seq"] = numbers
    return {key: tensor.to(load(name).device) for key, tensor in found.items()}
