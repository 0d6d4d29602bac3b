"""Where numbers stop being finite in a language model."""

import torch
from torch import nn
from torch.nn import functional as F

from ..models.mini_gemini.modeling import PICTURE_INPUTS
from ..runtime.layer_dtypes import call


def where_not_finite(model: nn.Module, ids: torch.Tensor, model_inputs: dict) -> str:
    """Runs the tokens so far once more, and says in which layers NaN or infinity begins.

    Args:
        model: the MiniGeminiForConditionalGeneration.
        ids: [B, L], prompt and answer.
        model_inputs: what the prompt came with: pictures, marks [B, prompt], attention_mask [B, prompt].
    """
    new = ids.shape[1] - model_inputs["attention_mask"].shape[1]
    told = f"the logits of new token {new + 1} are not finite"
    pictures = {name: model_inputs.get(name) for name in PICTURE_INPUTS}
    if pictures["mm_token_type_ids"] is not None:
        pictures["mm_token_type_ids"] = F.pad(pictures["mm_token_type_ids"], (0, new))
    embeddings = model.model.embed(ids, **pictures)
    if not embeddings.isfinite().all():
        tokens = pictures["image_tokens"]
        source = "image tokens" if tokens is not None and not tokens.isfinite().all() else "embeddings of the prompt"
        return f"{told}: the {source} are not finite before any layer of the language model"
    language, broken = model.model.language_model, []
    layers = language.layers

    def watch(number: int):
        def hook(module, arguments, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not hidden.isfinite().all():
                broken.append(number)

        return hook

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        mask = F.pad(model_inputs["attention_mask"], (0, new), value=1)
        hidden = language(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if broken:
        first = broken[0]
        parameters = list(layers[first].parameters())
        if any(p.is_meta for p in parameters):
            weights = "are offloaded, and were not looked at"
        else:
            weights = "are finite" if all(p.isfinite().all() for p in parameters) else "are not finite either"
        return f"{told}: that begins in layers {first} to {broken[-1]} of 0 to {len(layers) - 1}; the weights of layer {first} {weights}"
    if not hidden[:, -1].isfinite().all() or not call(model.lm_head, hidden[:, -1:]).isfinite().all():
        return f"{told}: all {len(layers)} layers are finite, the last norm or lm_head is not"
    return f"{told}, but a second pass over the same tokens is: keys and values or the hardware were at fault, not the weights"
