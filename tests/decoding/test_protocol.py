"""The decode loop decodes models other than Mini-Gemini.

These are text-only models of transformers, and a model that attends to features in every pass.
"""

import ast
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import mg_fast.decoding
from mg_fast.decoding import Decoder, model_runner
from mg_fast.errors import PromptError
from mg_fast.models.causal_lm import CausalLM
from mg_fast.models.protocol import PassInputs, check_decodable
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

TEXT_ONLY = {
    "llama": lambda: random_model(LlamaForCausalLM, LlamaConfig(**SIZES)),
    "gemma": lambda: random_model(GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8)),
    "mistral": lambda: random_model(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=8)),
    "qwen2": lambda: random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES)),
}


@pytest.fixture(scope="module", params=sorted(TEXT_ONLY))
def text_only(request):
    return TEXT_ONLY[request.param]()


# --- a language model that looks at features ---


class BlindKeysLM(SeeingLM):
    """A wrong model: its keys leave out the features that positions see."""

    def position_keys(self, ids, model_inputs, digests):
        return CausalLM.position_keys(self, ids, model_inputs, digests)


class ForgetfulLM(CausalLM):
    """A model that takes features in every pass, but does not define keys for them."""

    pass_inputs = SeeingLM.pass_inputs


@pytest.fixture(scope="module")
def seeing():
    return random_model(SeeingLlama, LlamaConfig(**SIZES))


# --- text only ---


def test_text_only_alone(text_only):
    decoder = Decoder(CausalLM(text_only))
    answers = set()
    for length in (1, 5, 40):
        ids = prompt(length, length)
        expected = text_only.generate(**options(ids))
        assert torch.equal(decoded(text_only, decoder, ids=ids), expected)
        answers.add(tuple(expected[0, length:].tolist()))
    # A model with the same answer to everything would prove nothing.
    assert len(answers) == 3


def test_text_only_ragged_batch(text_only):
    ids, mask = prompt(12, 1, rows=3), torch.ones(3, 12, dtype=torch.long)
    mask[0, :7] = mask[2, :3] = 0
    alone = [text_only.generate(**options(row[pad:][None]))[0, 12 - pad :] for row, pad in zip(ids, (7, 0, 3))]
    eos = [alone[0][4].item(), alone[1][7].item()]
    for given in (dict(eos_token_id=None), dict(eos_token_id=eos, pad_token_id=0)):
        decoder = Decoder(CausalLM(text_only))
        request = decoder.request()
        out = decoded(text_only, decoder, request, ids=ids, attention_mask=mask, **given)
        assert torch.equal(out, text_only.generate(**options(ids, attention_mask=mask, **given)))
        for row, full, length in zip(out[:, 12:], alone, request.lengths):
            assert row[:length].tolist() == full[:length].tolist()


def test_text_only_second_turn(text_only):
    decoder = Decoder(CausalLM(text_only))
    first = decoded(text_only, decoder, ids=prompt(20, 2))
    second = torch.cat([first, prompt(6, 3)], dim=1)
    request = decoder.request()
    assert torch.equal(decoded(text_only, decoder, request, ids=second), text_only.generate(**options(second)))
    # No pass was run over the last new token of the first turn.
    assert request.reused == first.shape[1] - 1


def test_text_only_streamed(text_only):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), prompt(9, 4)
    decoder = Decoder(CausalLM(text_only))
    out = decoded(text_only, decoder, decoder.request(streamer=streamer), ids=ids)
    assert streamer.ended and streamer.got == out[0].tolist() == text_only.generate(**options(ids))[0].tolist()


def test_text_only_sampled(text_only):
    ids, drawn = prompt(9, 5), []
    for custom in ({}, {"custom_generate": Decoder(CausalLM(text_only)).request()}):
        torch.manual_seed(3)
        drawn.append(text_only.generate(**options(ids, do_sample=True, temperature=1.5, top_k=20), **custom))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", sorted(TEXT_ONLY.keys() - {"mistral"}))
def test_text_only_by_graph(name, by_graph):
    """Passes as captured give transformers' ids. Mistral is left out: its attention slides, so it is never captured."""
    model = TEXT_ONLY[name]()
    decoder = Decoder(CausalLM(model), kv_cache_bytes=0)
    for length in (3, 30, 50):
        ids = prompt(length, length)
        assert torch.equal(decoded(model, decoder, ids=ids), model.generate(**options(ids)))
    assert by_graph


def test_layers_that_are_not_finite_are_named():
    model = TEXT_ONLY["llama"]()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    message = "begins in layers 2 to 2 of 0 to 2; the weights of layer 2 are not finite either"
    with pytest.raises(FloatingPointError, match=message):
        decoded(model, Decoder(CausalLM(model)), ids=prompt(5, 0))


# --- models that this loop refuses ---


def test_logits_that_are_not_the_head_s_are_refused():
    model = random_model(Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8))
    with pytest.raises(ValueError, match="expected logits as the head gives them, got final_logit_softcapping=30.0"):
        CausalLM(model)


def test_a_model_that_is_not_wrapped_is_told_how():
    with pytest.raises(TypeError, match="got LlamaForCausalLM without .*embed_ids.*CausalLM"):
        Decoder(TEXT_ONLY["llama"]())


def test_mini_gemini_is_decodable(own):
    check_decodable(own.model)
    assert own.model.get_decoder() is own.model.language_model is own.model.model.language_model
    before = own.model.language_model
    other = nn.Identity()
    try:
        own.model.set_decoder(other)
        assert own.model.language_model is own.model.model.language_model is other
    finally:
        own.model.set_decoder(before)


def test_inputs_that_text_has_none_of_are_refused(seeing):
    given = dict(ids=prompt(9, 1), features=features(1), feature_mask=seen_from(9, 3))
    with pytest.raises(
        PromptError, match="SeeingLlama is decoded as a text-only model here, got feature_mask, features"
    ):
        decoded(seeing, Decoder(CausalLM(seeing)), **given)


# --- with features ---


def test_features_alone(seeing):
    decoder, ids, mask = Decoder(SeeingLM(seeing)), prompt(20, 1), seen_from(20, 5)
    answers = []
    for seed in (1, 2):
        given = dict(ids=ids, features=features(seed), feature_mask=mask)
        answers.append(decoded(seeing, decoder, **given))
        assert torch.equal(answers[-1], seeing.generate(**options(**given)))
    assert not torch.equal(*answers) and not torch.equal(answers[0], decoded(seeing, decoder, ids=ids))


@pytest.mark.parametrize("graph", [False, True], ids=["as it is", "by graph"])
def test_features_in_a_ragged_batch(seeing, graph, request):
    """Rows of a batch with two pictures each, seen from different places, are answered as alone."""
    run = request.getfixturevalue("by_graph") if graph else None
    decoder, ids, mask = Decoder(SeeingLM(seeing)), prompt(30, 6, rows=3), torch.ones(3, 30, dtype=torch.long)
    mask[0, :11] = mask[2, :3] = 0
    seen = torch.cat([seen_from(30, a, b) for a, b in ((13, 20), (1, 29), (3, 31))])
    for seed in (1, 2):
        given = dict(ids=ids, attention_mask=mask, features=features(seed, pictures=2, rows=3), feature_mask=seen)
        out = decoded(seeing, decoder, **given)
        assert torch.equal(out, seeing.generate(**options(**given)))
        for i, pad in enumerate((11, 0, 3)):
            alone = dict(
                ids=ids[i : i + 1, pad:], features=given["features"][i : i + 1], feature_mask=seen[i : i + 1, pad:]
            )
            assert out[i, pad:].tolist() == seeing.generate(**options(**alone))[0].tolist()
    assert run or not graph


def test_long_prompts_in_chunks(seeing, monkeypatch):
    """Each chunk of a prompt takes the mask's rows of its own positions."""
    monkeypatch.setattr(model_runner, "PREFILL_CHUNK", 7)
    given = dict(ids=prompt(40, 7), features=features(1, pictures=3), feature_mask=seen_from(40, 4, 17, 33))
    assert torch.equal(decoded(seeing, Decoder(SeeingLM(seeing)), **given), seeing.generate(**options(**given)))


def turns(seeing, decoder, digests):
    """Runs a second turn with the picture of the first, then with another; checks both against transformers' own loop.

    Returns:
        The length of the first turn, and the numbers of positions that the two second turns reused.
    """
    ids, seen, reused = prompt(20, 8), seen_from(20, 6), []
    first = decoded(
        seeing, decoder, decoder.request(digests and digests[:1]), ids=ids, features=features(1), feature_mask=seen
    )
    second = torch.cat([first, prompt(6, 9)], dim=1)
    for seed in (1, 2):
        given = dict(ids=second, features=features(seed), feature_mask=seen_from(second.shape[1], 6))
        request = decoder.request(digests and digests[seed - 1 : seed])
        assert torch.equal(decoded(seeing, decoder, request, **given), seeing.generate(**options(**given)))
        reused.append(request.reused)
    return first.shape[1], reused


DIGESTS = [hashlib.sha256(bytes([i])).digest() for i in range(3)]


@pytest.mark.parametrize("graph", [False, True], ids=["as it is", "by graph"])
def test_a_second_turn_reuses_what_the_same_features_gave(seeing, graph, request):
    if graph:
        request.getfixturevalue("by_graph")
    length, reused = turns(seeing, Decoder(SeeingLM(seeing)), DIGESTS)
    # With other features, only the positions before the first one that sees features are reused.
    assert reused == [length - 1, 6]


def test_without_digests_nothing_is_reused(seeing):
    assert turns(seeing, Decoder(SeeingLM(seeing)), None)[1] == [0, 0]


def test_without_keys_of_its_own_a_model_with_features_reuses_nothing(seeing):
    ids, inputs = prompt(5, 1), {"features": features(1), "feature_mask": torch.ones(1, 5, 1)}
    assert ForgetfulLM(seeing).position_keys(ids, inputs, None) is None
    assert CausalLM(seeing).position_keys(ids, {}, None) == ids[0].tolist()


def test_keys_that_ignore_features_give_wrong_answers(seeing):
    """Wrong keys make the tests above fail, so these tests prove something."""
    with pytest.raises(AssertionError):
        turns(seeing, Decoder(BlindKeysLM(seeing)), DIGESTS)


def test_a_later_picture_leaves_earlier_positions_as_they_were(seeing):
    decoder, ids = Decoder(SeeingLM(seeing)), prompt(20, 10)
    first = decoded(
        seeing, decoder, decoder.request(DIGESTS[:1]), ids=ids, features=features(1), feature_mask=seen_from(20, 6)
    )
    second, both = torch.cat([first, prompt(8, 11)], dim=1), torch.cat([features(1), features(2)], dim=1)
    given = dict(ids=second, features=both, feature_mask=seen_from(second.shape[1], 6, second.shape[1] - 5))
    request = decoder.request(DIGESTS[:2])
    assert torch.equal(decoded(seeing, decoder, request, **given), seeing.generate(**options(**given)))
    assert request.reused == first.shape[1] - 1


def test_features_by_graph(seeing, by_graph):
    """One cache serves requests with different features, different numbers of pictures, and none."""
    decoder = Decoder(SeeingLM(seeing), kv_cache_bytes=0)
    places = (3, 9)
    for length, seed, pictures in ((20, 1, 1), (30, 2, 1), (50, 3, 2), (50, 4, 0), (20, 1, 1)):
        given = dict(ids=prompt(length, 12))
        if pictures:
            given.update(features=features(seed, pictures), feature_mask=seen_from(length, *places[:pictures]))
        assert torch.equal(decoded(seeing, decoder, **given), seeing.generate(**options(**given)))
    assert by_graph


def test_captured_passes_find_later_features_where_they_read(seeing, by_graph):
    """Requests of the same layout write into the tensors that graphs read; other requests drop the graphs."""
    runner = Decoder(SeeingLM(seeing)).runner
    sequences = runner.sequences(1, 40)

    def inputs(seed, length=20, pictures=1):
        return PassInputs({"features": features(seed, pictures)}, {"feature_mask": seen_from(length, *range(pictures))})

    sequences.fill(None, inputs(1))
    places = [tensor.data_ptr() for tensor in sequences.pass_inputs.tensors]
    assert sequences.pass_inputs.by_position["feature_mask"].shape[1] == sequences.cache.capacity
    sequences.graphs.entry("one", object)
    later = inputs(2, length=33)
    sequences.fill(None, later)
    assert len(sequences.graphs) and [tensor.data_ptr() for tensor in sequences.pass_inputs.tensors] == places
    assert torch.equal(sequences.pass_inputs.constant["features"], later.constant["features"])
    sequences.fill(None, inputs(2, pictures=2))
    assert not len(sequences.graphs)
    sequences.graphs.entry("one", object)
    sequences.fill(None)
    assert not len(sequences.graphs) and not sequences.pass_inputs.tensors


def test_a_pass_with_features_is_traced_whole(seeing, by_graph):
    """A pass with features is traced as one full graph, which a question to the host would break."""
    runner = Decoder(SeeingLM(seeing)).runner
    sequences = runner.sequences(1, 40)
    with torch.no_grad():
        sequences.fill(None, PassInputs({"features": features(1)}, {"feature_mask": seen_from(20, 6)}))
        runner.prefill(sequences, runner.model.embed_ids(prompt(20, 1)))
        start, last, token = torch.tensor([20]), torch.tensor([0]), torch.tensor([[5]])
        places = torch.arange(64)
        expected = runner._pass(sequences, token, places, start, last)
        torch._dynamo.reset()
        traced = torch.compile(runner._pass, fullgraph=True, backend="eager", dynamic=False)
        assert torch.allclose(traced(sequences, token, places, start, last), expected, atol=1e-5)
    sequences.cache.positions = None


def test_features_are_let_go_with_the_request(seeing):
    decoder = Decoder(SeeingLM(seeing))
    decoded(seeing, decoder, ids=prompt(20, 1), features=features(1), feature_mask=seen_from(20, 5))
    assert not decoder._idle.pass_inputs.tensors


def test_features_that_are_not_finite_are_named(seeing):
    broken = features(1)
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the features are not finite before any layer"):
        decoded(seeing, Decoder(SeeingLM(seeing)), ids=prompt(20, 1), features=broken, feature_mask=seen_from(20, 5))


# --- the source ---


@pytest.mark.parametrize(
    "path", sorted(Path(mg_fast.decoding.__file__).parent.glob("*.py")), ids=lambda path: path.name
)
def test_decoding_knows_no_model(path):
    source = path.read_text()
    assert "mini_gemini" not in source and "MiniGemini" not in source
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    of_models = [name for name in modules if name.startswith(("..models", "mg_fast.models"))]
    assert all(name.startswith(("..models.protocol.", "mg_fast.models.protocol")) for name in of_models), of_models
