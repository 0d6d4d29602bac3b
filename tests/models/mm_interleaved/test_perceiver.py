"""The perceiver resampler gives what the original's gave, and its per-head norms are those of the formula."""

import pytest
import torch

from mg_fast.models.mm_interleaved.perceiver import PerceiverResampler
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "num_queries": 3,
    "hidden_size": 16,
    "encoder_hidden_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "qk_normalization": True,
}


@pytest.mark.parametrize("name", recorded.NAMES)
def test_conditions_are_the_recorded_ones(name):
    """The condition of every picture request comes from a padded context, whose padding the mask hides."""
    perceiver = PerceiverResampler(recorded.read_config(name).image_perceiver).eval()
    perceiver.load_state_dict(recorded.state(name, "image_decoder.perceiver_resampler."))
    answers = recorded.answers(name)
    requests = [key.removesuffix(".context_features") for key in answers if key.endswith(".context_features")]
    padded = 0
    for request in requests:
        context, mask = answers[f"{request}.context_features"], answers[f"{request}.context_attention_mask"]
        with torch.no_grad():
            condition = perceiver(context, mask)
        assert relative_error(condition, answers[f"{request}.prompt_embeds"]) <= 2e-5, request
        padded += not mask.all()
    assert len(requests) == 4 and padded


def test_heads_are_normalised_and_every_second_layer_reads():
    perceiver = PerceiverResampler(SETTINGS).eval()
    names = perceiver.state_dict()
    assert "blip2qformer.encoder.layer.2.crossattention.attention.k_norm.weight" in names
    assert not any(".layer.1.crossattention" in name for name in names)
    attention = perceiver.blip2qformer.encoder.layer[0].crossattention.attention
    hidden, features = torch.randn(2, 3, 16), torch.randn(2, 5, 12)
    with torch.no_grad():
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.normal_()
            norm.bias.normal_()
        mixed, _ = attention(hidden, encoder_hidden_states=features)
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            query = attention.q_norm(attention.query(hidden)[..., part])
            key = attention.k_norm(attention.key(features)[..., part])
            weights = (query @ key.mT / 8**0.5).softmax(-1)
            assert torch.allclose(mixed[..., part], weights @ attention.value(features)[..., part], atol=1e-6)


def test_hidden_features_change_nothing():
    perceiver = PerceiverResampler(SETTINGS).eval()
    features, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = features.clone()
    other[0, 3:] = 7.0
    with torch.no_grad():
        tokens = perceiver(features, mask)
        assert torch.equal(tokens, perceiver(other, mask.bool()))
        assert torch.allclose(tokens[0], perceiver(features[:1, :3])[0], atol=1e-6)
        assert perceiver.bfloat16()(features.bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "features, mask, message",
    [
        (torch.zeros(2, 5, 11), None, r"expected floating-point features \['n', 'S', 12\], got \[2, 5, 11\]"),
        (torch.zeros(2, 5, 12, dtype=torch.int64), None, "got .* of torch.int64"),
        (torch.zeros(2, 5, 12), torch.ones(2, 4), r"expected a mask \[2, 5\], got \[2, 4\]"),
    ],
)
def test_refusals(features, mask, message):
    with pytest.raises(ValueError, match=message):
        PerceiverResampler(SETTINGS)(features, mask)


def test_settings_without_queries():
    with pytest.raises(ValueError, match="num_queries must be a positive whole number, got None"):
        PerceiverResampler({**SETTINGS, "num_queries": None})
