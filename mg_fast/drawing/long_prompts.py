"""Prompts that are longer than a CLIP text encoder reads at once."""

import logging

import torch

logger = logging.getLogger(__name__)

# Pipelines whose text encoders are all CLIP's, so that chunks of a prompt can be encoded one after the other.
_SDXL, _SD = "StableDiffusionXL", "StableDiffusion"


def token_counts(pipeline, prompt: str) -> list[tuple[int, int]]:
    """For each CLIP tokenizer of a pipeline: the tokens of a prompt, and how many its encoder reads at once."""
    return [
        (len(tokenizer(prompt, truncation=False, verbose=False).input_ids), tokenizer.model_max_length)
        for tokenizer in _clip_tokenizers(pipeline)
    ]


def expect_long_texts(pipeline) -> None:
    """Keeps the tokenizers from warning of texts longer than one call, such as Mini-Gemini's negative prompt."""
    for tokenizer in _clip_tokenizers(pipeline):
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True


def is_long(pipeline, prompt: str) -> bool:
    """Whether a CLIP text encoder of the pipeline would not read the whole prompt."""
    return any(count > most for count, most in token_counts(pipeline, prompt))


def encoded_in_chunks(
    pipeline, prompt: str, negative: str | None, device: torch.device
) -> dict[str, torch.Tensor] | None:
    """The pipeline's arguments in place of a long prompt and its negative prompt, encoded in chunks by compel.

    Args:
        device: where the text encoders run, and where the tensors are made.

    Returns:
        `prompt_embeds` and the other tensors; None where this pipeline's text encoders are not read in chunks, or where
        compel is not installed. Then the pipeline cuts the prompt, and a warning says so.
    """
    texts, kind = [prompt, negative or ""], type(pipeline).__name__
    try:
        from compel import Compel, ReturnedEmbeddingsType
    except ImportError:
        return _cut(pipeline, texts, "compel is not installed (pip install compel)")
    last = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    penultimate = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    if kind.startswith(_SDXL):
        encoders = [
            (pipeline.tokenizer, pipeline.text_encoder, penultimate, False),
            (pipeline.tokenizer_2, pipeline.text_encoder_2, penultimate, True),
        ]
        if any(None in encoder[:2] for encoder in encoders):
            return _cut(pipeline, texts, "the pipeline has only one of its text encoders")
    elif kind in (f"{_SD}Pipeline", f"{_SD}Img2ImgPipeline"):
        encoders = [(pipeline.tokenizer, pipeline.text_encoder, last, False)]
    else:
        return _cut(pipeline, texts, f"{kind} is not read in chunks")
    # Of each encoder: the embeddings [1, rows, width] of both texts, and those of an empty one.
    embedded, pooled = [], None
    with torch.no_grad():
        for tokenizer, encoder, returned, has_pooled in encoders:
            compel = Compel(
                tokenizer=tokenizer,
                text_encoder=_Encoder(encoder, device),
                returned_embeddings_type=returned,
                truncate_long_prompts=False,
                requires_pooled=has_pooled,
                device=str(device),
            )
            embedded.append(([_plain(compel, text) for text in texts], _plain(compel, "")))
            if has_pooled:
                provider = compel.conditioning_provider
                pooled = [provider.get_pooled_embeddings([text], device=compel.device) for text in texts]
    rows, dtype = max(one.shape[1] for both, _ in embedded for one in both), pipeline.text_encoder.dtype

    def joined(i: int) -> torch.Tensor:
        """The embeddings of one of the texts by all encoders, side by side, and filled up to as many rows."""
        filled = [
            torch.cat([both[i], *[empty] * ((rows - both[i].shape[1]) // empty.shape[1])], dim=1)
            for both, empty in embedded
        ]
        return torch.cat(filled, dim=-1).to(dtype)

    found = {"prompt_embeds": joined(0), "negative_prompt_embeds": joined(1)}
    if pooled is not None:
        found |= {"pooled_prompt_embeds": pooled[0].to(dtype), "negative_pooled_prompt_embeds": pooled[1].to(dtype)}
    return found


def _clip_tokenizers(pipeline) -> list:
    """The tokenizers of a pipeline that has only CLIP's; none for one with another encoder, which reads more."""
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    tokenizers = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    return tokenizers if all("CLIP" in type(tokenizer).__name__ for tokenizer in tokenizers) else []


class _Encoder:
    """A text encoder as compel calls it. It names the device where it runs, because offloaded weights lie elsewhere."""

    def __init__(self, encoder, device: torch.device):
        self.encoder, self.device, self.dtype = encoder, device, encoder.dtype

    def __call__(self, *args, **options):
        return self.encoder(*args, **options)


def _plain(compel, text: str) -> torch.Tensor:
    """The embeddings [1, rows, width] of a text in which no character has a special meaning."""
    from compel.prompt_parser import Conjunction, FlattenedPrompt, Fragment

    # compel's own parser would take brackets and plus signs of a sentence as weights.
    whole = Conjunction([FlattenedPrompt([Fragment(text, 1.0)])])
    return compel.build_conditioning_tensor_for_conjunction(whole, return_tokenization=True)[0]


def _cut(pipeline, texts: list[str], reason: str) -> None:
    for name, text in zip(("prompt", "negative prompt"), texts):
        counts = [(count, most) for count, most in token_counts(pipeline, text) if count > most]
        if counts:
            count, most = max(counts)
            logger.warning(
                "the end of the %s is cut (%d tokens, of which %d are read), because %s", name, count, most, reason
            )
