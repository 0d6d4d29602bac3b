"""A decoder keeps the last layer's hidden states beside keys and values, and gives those of any sequence."""

import pytest
import torch
from transformers import LlamaConfig

from mg_fast.decoding import Decoder
from mg_fast.decoding.kv_cache import position_bytes
from mg_fast.models.causal_lm import CausalLM
from tests.decoding.seeing_models import (
    SIZES,
    SeeingLlama,
    SeeingLM,
    decoded,
    features,
    options,
    prompt,
    random_model,
    seen_from,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DIGESTS = [b"first picture..!"]


@pytest.fixture(scope="module")
def seeing():
    return random_model(SeeingLlama, LlamaConfig(**SIZES))


@pytest.fixture(params=[False, True], ids=["as it is", "by graph"])
def passes(request):
    return request.getfixturevalue("by_graph") if request.param else None


@torch.no_grad()
def plain(model, ids, features=None, feature_mask=None, attention_mask=None):
    """The states by transformers' own forward pass."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    seen = dict(features=features, feature_mask=feature_mask)
    return model.model(input_ids=ids, attention_mask=mask, position_ids=positions, **seen).last_hidden_state


def run_positions(decoder, monkeypatch):
    """A list that gets the number of positions of every prompt or rest of a prompt that is run from now on."""
    run, prefill = [], decoder.runner.prefill
    monkeypatch.setattr(
        decoder.runner,
        "prefill",
        lambda sequences, embeddings: run.append(embeddings.shape[1]) or prefill(sequences, embeddings),
    )
    return run


def test_states_are_those_of_a_plain_forward(seeing, passes, monkeypatch):
    decoder = Decoder(SeeingLM(seeing), keep_states=True)
    given = dict(features=features(1, pictures=2), feature_mask=seen_from(50, 4, 29))
    digests = [*DIGESTS, b"second picture.!"]
    ids, run = prompt(50, 1), run_positions(decoder, monkeypatch)
    states = decoder.states(ids, given, digests)
    assert torch.allclose(states, plain(seeing, ids, **given), atol=1e-5)
    # All is remembered now, so a beginning and the whole are found without a pass.
    assert torch.equal(decoder.states(ids, given, digests), states) and run == [50]
    begun = dict(given, feature_mask=given["feature_mask"][:, :40])
    assert torch.equal(decoder.states(ids[:, :40], begun, digests), states[:, :40]) and run == [50]


def test_after_an_answer_only_its_last_token_is_run(seeing, passes, monkeypatch):
    decoder = Decoder(SeeingLM(seeing), keep_states=True)
    given = dict(features=features(1), feature_mask=seen_from(30, 6))
    whole = decoded(seeing, decoder, decoder.request(DIGESTS), ids=prompt(30, 2), **given)
    assert torch.equal(whole, seeing.generate(**options(ids=prompt(30, 2), **given)))
    run = run_positions(decoder, monkeypatch)
    given["feature_mask"] = seen_from(whole.shape[1], 6)
    assert torch.allclose(decoder.states(whole, given, DIGESTS), plain(seeing, whole, **given), atol=1e-5)
    assert run == [1]
    # The next turn finds what `states` has run, and differs nowhere from a turn that began anew.
    second = torch.cat([whole, prompt(5, 3)], dim=1)
    given["feature_mask"] = seen_from(second.shape[1], 6)
    request = decoder.request(DIGESTS)
    assert torch.equal(
        decoded(seeing, decoder, request, ids=second, **given), seeing.generate(**options(ids=second, **given))
    )
    assert request.reused == whole.shape[1]


def test_a_ragged_batch(seeing, passes):
    ids, mask = prompt(30, 6, rows=3), torch.ones(3, 30, dtype=torch.long)
    mask[0, :11] = mask[2, :3] = 0
    given = dict(features=features(1, rows=3), feature_mask=seen_from(30, 13, rows=3), attention_mask=mask)
    states = Decoder(SeeingLM(seeing), keep_states=True).states(ids, given)
    for i, pad in enumerate((11, 0, 3)):
        alone = dict(features=given["features"][i : i + 1], feature_mask=given["feature_mask"][i : i + 1, pad:])
        assert torch.allclose(states[i : i + 1, pad:], plain(seeing, ids[i : i + 1, pad:], **alone), atol=1e-5)


def test_limits_count_the_states(seeing):
    model = CausalLM(seeing)
    of_one = position_bytes(model.text_config, torch.float32, states=True)
    assert of_one == position_bytes(model.text_config, torch.float32) + 4 * SIZES["hidden_size"]
    decoder = Decoder(model, kv_cache_bytes=30 * of_one, keep_states=True)
    ids = prompt(31, 4)
    decoder.states(ids[:, :30], {})
    assert decoder.prefixes.held_bytes == 30 * of_one
    # One position more exceeds the limit.
    decoder.forget()
    decoder.states(ids, {})
    assert decoder.prefixes.held_bytes == 0


def test_a_decoder_without_states(seeing):
    decoder = Decoder(CausalLM(seeing))
    with pytest.raises(ValueError, match="keeps no states: make it by Decoder"):
        decoder.states(prompt(5, 1), {})
    decoded(seeing, decoder, ids=prompt(9, 1))
    assert decoder._idle.cache.states is None
    assert decoder.prefixes.held_bytes == 18 * position_bytes(decoder.model.text_config, torch.float32)


def test_states_that_are_not_finite_are_refused(seeing):
    broken = features(1)
    broken[0, 0, 0, 0] = torch.nan
    given = dict(features=broken, feature_mask=seen_from(20, 5))
    with pytest.raises(FloatingPointError, match="hidden states are not finite: the features are not finite before"):
        Decoder(SeeingLM(seeing), keep_states=True).states(prompt(20, 1), given)
