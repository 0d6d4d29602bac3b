"""Finds the layers of a language model where numbers stop being finite."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from ..models.protocol import DecodableModel
from ..runtime.layer_dtypes import call


def where_not_finite(
    model: DecodableModel,
    ids: torch.Tensor,
    prompt: int,
    model_inputs: Mapping[str, object],
    *,
    symptom: str | None = None,
) -> str:
    """Runs the tokens so far once more, and says in which layers NaN or infinity begins.

    Args:
        model: the model that the logits came from.
        ids: [B, L], prompt and answer.
        prompt: the number of positions of the prompt.
        model_inputs: the inputs that `generate` was called with. transformers from 5.18 on leaves out an attention_mask
            [B, prompt] that masks nothing.
        symptom: what was seen, where it is not the logits of the next token.
    """
    new = ids.shape[1] - prompt
    symptom = symptom or f"the logits of new token {new + 1} are not finite"
    prompt_inputs = {name: model_inputs.get(name) for name in model.prompt_inputs}
    pass_inputs = model.pass_inputs(model_inputs)
    embeddings = torch.cat([model.embed(ids[:, :prompt], **prompt_inputs), model.embed_ids(ids[:, prompt:])], dim=1)
    infinite = [name for name, tensor in prompt_inputs.items() if tensor is not None and not tensor.isfinite().all()]
    # A mask among these may hold infinities on purpose, so only NaN is looked for.
    nan = [name for name, tensor in {**pass_inputs.constant, **pass_inputs.by_position}.items() if tensor.isnan().any()]
    if nan or not embeddings.isfinite().all():
        source = [*nan, *infinite, "embeddings of the prompt"][0].replace("_", " ")
        return f"{symptom}: the {source} are not finite before any layer of the language model"
    language, broken = model.language_model, []
    layers = language.layers

    def watch(number: int):
        def hook(module, arguments, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not hidden.isfinite().all():
                broken.append(number)

        return hook

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        mask = model_inputs.get("attention_mask")
        mask = None if mask is None else F.pad(mask, (0, new), value=1)
        further = pass_inputs.at(torch.arange(ids.shape[1], device=ids.device))
        hidden = language(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **further).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if broken:
        first = broken[0]
        # Packed layers hold their weights as buffers.
        parameters = [*layers[first].parameters(), *layers[first].buffers()]
        if any(p.is_meta for p in parameters):
            weights = "are offloaded, and were not checked"
        else:
            weights = "are finite" if all(p.isfinite().all() for p in parameters) else "are not finite either"
        return (
            f"{symptom}: that begins in layers {first} to {broken[-1]} of 0 to {len(layers) - 1}; "
            f"the weights of layer {first} {weights}"
        )
    if not hidden[:, -1].isfinite().all() or not call(model.head, hidden[:, -1:]).isfinite().all():
        return (
            f"{symptom}: the outputs of all {len(layers)} layers are finite, those of the last norm or lm_head are not"
        )
    return (
        f"{symptom}, but those of a second pass over the same tokens are: "
        "the kept keys and values or the hardware were at fault, not the weights"
    )
