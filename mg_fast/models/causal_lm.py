"""Wraps a plain language model of transformers (Llama, Gemma, Mistral, Qwen2 and others) for the decode loop."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PromptError
from ..runtime.layer_dtypes import at_seam
from .protocol import NO_PASS_INPUTS, PassInputs

# Settings with which some models change logits after their head, and the values that change nothing.
_LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
# Kinds of layers whose whole state is one key and one value per position.
_KEPT_LAYERS = {"full_attention", "sliding_attention"}
# Tensors that `generate` or a tokenizer gives, and that the loop makes itself or that text alone does not need.
_USUAL_INPUTS = {"attention_mask", "position_ids", "cache_position", "token_type_ids"}


class CausalLM:
    """Lets `mg_fast.decoding.Decoder` decode with a text-only model: `Decoder(CausalLM(model))`.

    It is also the base for models with other inputs: override `prompt_inputs` and `embed` for inputs of the prompt
    alone, `pass_inputs` for inputs of every pass, and `position_keys` in both cases.

    Args:
        model: a decoder-only model with a language-model head, for instance LlamaForCausalLM.

    Raises:
        ValueError: the model computes more than its layers and its head, or has layers without keys and values.
    """

    prompt_inputs: Sequence[str] = ()

    def __init__(self, model: PreTrainedModel):
        name, config = type(model).__name__, model.config.get_text_config()
        for setting, neutral in _LOGIT_SETTINGS.items():
            if (value := getattr(config, setting, None)) not in (None, neutral):
                raise ValueError(f"{name}: expected logits as the head gives them, got {setting}={value}")
        others = sorted(set(getattr(config, "layer_types", None) or []) - _KEPT_LAYERS)
        if others:
            raise ValueError(f"{name}: expected layers of attention to all earlier positions, got {', '.join(others)}")
        if not hasattr(model.base_model, "layers") or model.get_output_embeddings() is None:
            raise ValueError(f"{name}: expected a decoder with `layers` under a language-model head")
        self.model = model

    @property
    def language_model(self) -> nn.Module:
        return self.model.base_model

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config()

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    def embed(self, input_ids: torch.Tensor, **prompt_inputs: torch.Tensor | None) -> torch.Tensor:
        return self.embed_ids(input_ids)

    def embed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return at_seam(self.model.get_input_embeddings()(input_ids), self.language_model.layers)

    def pass_inputs(self, model_inputs: Mapping[str, object]) -> PassInputs:
        tensors = {name for name, value in model_inputs.items() if isinstance(value, torch.Tensor)}
        if others := sorted(tensors - _USUAL_INPUTS - set(self.prompt_inputs)):
            raise PromptError(
                f"{type(self.model).__name__} is decoded as a text-only model here, got {', '.join(others)}"
            )
        return NO_PASS_INPUTS

    def position_keys(
        self, ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None
    ) -> list[int] | None:
        kind = type(self)
        takes_more = kind.pass_inputs is not CausalLM.pass_inputs or self.prompt_inputs
        if takes_more and kind.position_keys is CausalLM.position_keys:
            # A subclass with further inputs must say what its positions depend on. Until it does, nothing is reused.
            return None
        return ids[0].tolist()
