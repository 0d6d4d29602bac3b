"""A small top model of MM-Interleaved's text side, with the tensors of a tiny checkpoint."""

import functools

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.decoding import InterleavedDecoding
from mg_fast.models.mm_interleaved.generation import InterleavedGeneration, default_generation_config
from mg_fast.models.mm_interleaved.language_model import SynchronizedLlamaModel, TextDecoder
from mg_fast.models.mm_interleaved.visual_tokenizer import VisualTokenizer
from mg_fast.models.protocol import CACHE
from tests.models.mm_interleaved import recorded


class TextSide(InterleavedGeneration, InterleavedDecoding, PreTrainedModel, GenerationMixin):
    """The parts of MM-Interleaved that text needs."""

    config_class = MMInterleavedConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.visual_tokenizer = VisualTokenizer(config)
        self.mm_decoder = SynchronizedLlamaModel(config)
        self.text_decoder = TextDecoder(config)
        self.soi_token = nn.Parameter(torch.zeros(1, config.text_config.hidden_size))
        self.seen = 0
        self.post_init()
        self.generation_config = default_generation_config(config)

    def get_input_embeddings(self):
        return self.mm_decoder.embed_tokens

    def get_image_features(self, pixel_values):
        self.seen += 1
        features = self.visual_tokenizer(pixel_values)
        return BaseModelOutputWithPooling(pooler_output=features.tokens, last_hidden_state=features.maps)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        logits_to_keep=0,
        picture_values=None,
        picture_features=None,
        picture_index=None,
        pixel_values=None,
        image_tokens=None,
        image_maps=None,
        num_image_per_seq=None,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        kwargs[CACHE] = past_key_values if cache is None else cache
        read = dict(picture_values=picture_values, picture_features=picture_features, picture_index=picture_index)
        if picture_index is None:
            given = dict(
                pixel_values=pixel_values,
                image_tokens=image_tokens,
                image_maps=image_maps,
                num_image_per_seq=num_image_per_seq,
            )
            read = self.with_pictures(input_ids, given)
            image_tokens = read.pop("image_tokens", None)
            num_image_per_seq = read.pop("num_image_per_seq")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_tokens=image_tokens, num_image_per_seq=num_image_per_seq)
        out = self.mm_decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **read, **kwargs
        )
        logits = self.text_decoder(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)})


@functools.cache
def loaded(name: str) -> TextSide:
    """A tiny checkpoint's text side, which no test changes."""
    model = TextSide(recorded.read_config(name)).eval()
    state = recorded.state(name)
    wanted = model.state_dict()
    missing = model.load_state_dict({key: tensor for key, tensor in state.items() if key in wanted}, strict=False)
    assert not missing.missing_keys, missing.missing_keys
    return model


@functools.cache
def features(name: str, picture) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, T, D] and maps [1, 5440, C] of a recorded picture."""
    with torch.inference_mode(False), torch.no_grad():
        seen = loaded(name).visual_tokenizer(recorded.pixels(name, [picture], recorded.answers(name)))
    return seen.tokens, seen.maps


def inputs(name: str, request: str, answers: dict[str, torch.Tensor], prefix: str | None = None) -> dict:
    """The inputs of a recorded request, its pictures as tokens and maps."""
    prefix, ids = prefix or request, answers[f"{prefix or request}.text_ids"]
    pictures = [picture for row in recorded.requests(name)[request]["images"] for picture in row]
    tokens, maps = (torch.cat(parts) for parts in zip(*(features(name, picture) for picture in pictures)))
    found = dict(input_ids=ids, image_tokens=tokens, image_maps=maps)
    found["attention_mask"] = answers.get(f"{prefix}.attention_mask", torch.ones_like(ids))
    if (numbers := answers.get(f"{prefix}.num_image_per_seq")) is not None:
        found["num_image_per_seq"] = numbers
    return found
