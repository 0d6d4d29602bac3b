"""Logits of the same weights in a wider dtype, which the end-to-end cases are held against."""

import copy

import torch
from torch import nn

from .sessions import Session


class WidenedPart(nn.Module):
    """Calls a part of a model with its weights in another dtype, to which they are converted in every call.

    Only one part is wide at a time, so even the largest model leaves enough memory for it.
    """

    def __init__(self, part: nn.Module, dtype: torch.dtype):
        super().__init__()
        # The list keeps the part from being a submodule. Without weights this module has no dtype, so the model does
        # not round its inputs.
        self.part, self.dtype = [part], dtype

    def forward(self, *args, **kwargs):
        [part] = self.part
        weights = {name: _dense(parameter).to(self.dtype) for name, parameter in part.named_parameters()}
        return torch.func.functional_call(part, weights, args, kwargs)


def _dense(parameter: nn.Parameter) -> torch.Tensor:
    """The numbers of a weight. Those of a rounded weight are rounded in the exact result too."""
    return parameter.dequantize() if hasattr(parameter, "__tensor_flatten__") else parameter


def exact_logits(shared: Session, count: int, prompt: str) -> torch.Tensor:
    """Logits [count, vocabulary] of the first tokens of the answer to a prompt with one picture, in a wider dtype.

    The weights are the same. The dtype is float64, or float32 for 16 bits.
    """
    dtype = torch.float64 if shared.model.dtype == torch.float32 else torch.float32
    model = shared.model.model
    language = model.language_model
    parts = [language.get_input_embeddings(), *language.layers, language.norm]
    wide = copy.deepcopy(model, {id(part): WidenedPart(part, dtype) for part in parts}).to(dtype)
    pixels = shared.processor.image_processor(shared.photo).to(shared.device)
    pixels = {name: value.to(dtype) for name, value in pixels.items()}
    ids, marks = shared.processor.encode(prompt)
    given = shared.answer[: count - 1]
    inputs = {"input_ids": [[*ids, *given]], "mm_token_type_ids": [[*marks, *[0] * len(given)]]}
    inputs = {name: torch.tensor(value, device=shared.device) for name, value in inputs.items()}
    # The original's mining of an HD picture would take more memory than a large model leaves.
    backend = "torch" if shared.hd else "reference"
    with torch.no_grad():
        tokens = wide.get_image_features(**pixels, backend=backend).pooler_output
        outputs, _ = wide(**inputs, image_tokens=tokens, use_cache=False)
        return WidenedPart(shared.model.lm_head, dtype)(outputs.last_hidden_state[0, -count:])
