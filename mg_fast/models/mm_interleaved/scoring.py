"""Ranks given answers by their log-likelihood after a prompt."""

import copy
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from ...errors import PromptError
from ...runtime.layer_dtypes import call
from ..protocol import CACHE, DecodableModel, PassInputs

# Options of one pass: enough to keep matrix products busy, and few copies of the prompt's keys and values.
OPTIONS_PER_PASS = 16


def score_options(
    model: DecodableModel,
    input_ids: torch.Tensor,
    option_ids: torch.Tensor,
    option_mask: torch.Tensor,
    model_inputs: dict,
    options_per_pass: int = OPTIONS_PER_PASS,
) -> torch.Tensor:
    """The log-likelihood of each option after a prompt, summed over its tokens: float32 [O].

    The prompt is run once. Its keys and values, and those of its pictures, serve all options.

    Args:
        model: the model that computes.
        input_ids: [1, L], the prompt without padding.
        option_ids: [O, M], padded on the right.
        option_mask: [O, M], 0 at the padding.
        model_inputs: the prompt's pictures, as the model's `generate` hands them to a loop.
        options_per_pass: most options of one pass.
    """
    inputs = model.pass_inputs(model_inputs)
    prompt = {name: model_inputs.get(name) for name in model.prompt_inputs}
    cache, length = DynamicCache(config=model.text_config), input_ids.shape[1]
    hidden = _run(model, model.embed(input_ids, **prompt), 0, cache, inputs)
    first = call(model.head, hidden[:, -1:]).float().log_softmax(dim=-1)
    scores = []
    for ids, mask in _chunks(option_ids, option_mask, options_per_pass):
        logs = first.expand(len(ids), -1, -1)
        if ids.shape[1] > 1:
            shared = copy.deepcopy(cache)
            shared.batch_repeat_interleave(len(ids))
            rows = {name: rows.expand(len(ids), *rows.shape[1:]) for name, rows in inputs.by_position.items()}
            hidden = _run(model, model.embed_ids(ids[:, :-1]), length, shared, PassInputs(inputs.constant, rows))
            logs = torch.cat([logs, call(model.head, hidden).float().log_softmax(dim=-1)], dim=1)
        chosen = logs.gather(-1, ids[..., None])[..., 0]
        scores.append(torch.where(mask, chosen, 0.0).sum(dim=1))
    return torch.cat(scores)


def check_options(input_ids: torch.Tensor, option_ids: torch.Tensor, option_mask: torch.Tensor) -> None:
    """Raises PromptError unless options [B, O, M] and their mask fit prompts [B, L], and there are two of them."""
    if option_ids.dim() != 3 or len(option_ids) != len(input_ids):
        raise PromptError(
            f"option_ids must be [{len(input_ids)}, options, tokens], got {list(option_ids.shape)}; every prompt has "
            "the same number of options"
        )
    if option_mask.shape != option_ids.shape:
        raise PromptError(f"option_mask must be {list(option_ids.shape)}, got {list(option_mask.shape)}")
    if option_ids.shape[1] < 2:
        raise PromptError(f"expected at least two options to choose from, got {option_ids.shape[1]}")
    if option_ids.shape[2] == 0 or not bool((option_mask != 0).any(dim=-1).all()):
        raise PromptError("expected at least one token in every option, got an empty one")


def _chunks(ids: torch.Tensor, mask: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(ids.split(size), (mask != 0).split(size))


def _run(model, embeddings: torch.Tensor, start: int, cache: DynamicCache, inputs: PassInputs) -> torch.Tensor:
    """The last hidden states [B, Q, D] of positions from `start` on."""
    places = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)
    return model.language_model(
        inputs_embeds=embeddings,
        position_ids=places[None],
        use_cache=True,
        **{CACHE: cache},
        **inputs.at(places),
    ).last_hidden_state
