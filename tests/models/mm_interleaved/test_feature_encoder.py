"""The packed encoder gives the tokenizer's own features and refuses a tokenizer that it cannot stand for."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.encoder import FeatureEncoder
from mg_fast.models.mm_interleaved.seeing import InterleavedSeeing
from mg_fast.models.mm_interleaved.visual_tokenizer import VisualTokenizer
from mg_fast.runtime.meter import Meter
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.models.mm_interleaved import recorded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original() -> VisualTokenizer:
    tokenizer = VisualTokenizer(recorded.read_config("mmi-tiny")).eval()
    tokenizer.load_state_dict(recorded.state("mmi-tiny", "visual_tokenizer."), strict=False)
    return tokenizer


@pytest.fixture
def tokenizer(original) -> VisualTokenizer:
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return recorded.pixels("mmi-tiny", [0, 1], recorded.answers("mmi-tiny"))


class Seeing(InterleavedSeeing, nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.visual_tokenizer = tokenizer


def test_features_are_the_recorded_and_the_models(tokenizer, pixels):
    model, answers = Seeing(tokenizer), recorded.answers("mmi-tiny")
    features = model.picture_encoder().encode(pixel_values=pixels)
    for i in range(2):
        assert relative_error(features.tokens[i], answers[f"image{i}.visual_tokens"]) <= 2e-5
        smallest = features.maps[i, -64:].t().unflatten(1, (8, 8))
        assert relative_error(smallest, answers[f"image{i}.map8"]) <= 2e-5
    with torch.no_grad():
        own = model.get_image_features(pixels, backend="reference")
    assert relative_error(features.tokens, own.pooler_output) <= 2e-6
    assert relative_error(features.maps, own.last_hidden_state) <= 2e-6
    assert torch.equal(model.picture_encoder()(pixels).tokens, features.tokens)


def test_bfloat16_is_as_accurate_as_the_models(tokenizer, pixels):
    exact_tokenizer = copy.deepcopy(tokenizer).double()
    tokenizer.bfloat16()
    with torch.no_grad():
        exact, plain = exact_tokenizer(pixels, backend="reference"), tokenizer(pixels, backend="reference")
    for packed, own, oracle in zip(FeatureEncoder(tokenizer).encode(pixels), plain, exact):
        assert_accurate(packed, own, oracle)


def test_steps_are_measured(tokenizer, pixels):
    meter = Meter(torch.device("cpu"))
    FeatureEncoder(tokenizer).encode(pixels[:1], stage=meter.stage)
    assert [stage.name for stage in meter.stages] == ["vision tower", "perceiver"]


def test_changes_are_noticed(tokenizer, pixels):
    model = Seeing(tokenizer)
    encoder, state = model.picture_encoder(), model.picture_state()
    assert state == model.picture_state()
    with torch.no_grad():
        tokenizer.vision_model.adapter_interactions[0].injector.gamma.mul_(2)
    with pytest.raises(RuntimeError, match="weights of the visual tokenizer were changed"):
        encoder.encode(pixels)
    assert state != model.picture_state()
    encoder = model.picture_encoder()
    tokenizer.double()
    with pytest.raises(RuntimeError, match="was changed, moved or converted since it was packed"):
        encoder(pixels)


def test_what_cannot_be_packed(tokenizer):
    layer = tokenizer.vision_model.encoder.layers[3]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layers.3.mlp has hooks"):
        FeatureEncoder(tokenizer)
    handle.remove()
    own, layer.mlp.fc1 = layer.mlp.fc1, nn.Sequential(layer.mlp.fc1)
    with pytest.raises(ValueError, match="PackedClip: .* expected a plain layer"):
        FeatureEncoder(tokenizer)
    layer.mlp.fc1 = own
    with pytest.raises(ValueError, match="in training mode"):
        FeatureEncoder(tokenizer.train())
    FeatureEncoder(tokenizer.eval())
    with pytest.raises(ValueError, match="on one device with its values, got meta"):
        FeatureEncoder(tokenizer.to("meta"))


def test_pixels_of_another_shape(tokenizer, pixels):
    with pytest.raises(ValueError, match="pixel_values: expected"):
        FeatureEncoder(tokenizer).encode(pixels[..., 1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_graphs_give_what_plain_calls_give(dtype):
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=24,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
    )
    perceiver = {"num_queries": 8, "hidden_size": 64, "encoder_hidden_size": 64, "num_hidden_layers": 2}
    perceiver |= {"num_attention_heads": 4, "intermediate_size": 96, "qk_normalization": True}
    config = MMInterleavedConfig(
        text_config=LlamaConfig(hidden_size=64),
        vision_config=vision,
        visual_perceiver=perceiver,
        image_embed_dim=64,
        num_img_token=8,
    )
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(config).to("cuda", dtype).eval()
    with torch.no_grad():
        for interaction in tokenizer.vision_model.adapter_interactions:
            interaction.injector.gamma.fill_(0.5)
    graphed, plain = FeatureEncoder(tokenizer), FeatureEncoder(tokenizer, graphs=False)
    for count in (1, 1, 2, 1):
        pixels = torch.rand(count, 3, 224, 224)
        for ours, expected in zip(graphed.encode(pixels), plain.encode(pixels)):
            assert relative_error(ours, expected) <= 1e-6
    assert {name for name in graphed.first_use if "graph" in name} == {
        f"kernels and CUDA graph of {count} picture(s)" for count in (1, 2)
    }
