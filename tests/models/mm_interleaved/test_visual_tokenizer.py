"""The visual tokenizer gives the original's tokens and maps, for single pictures and batches, and has its names."""

import functools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mg_fast.errors import CheckpointError
from mg_fast.models.mm_interleaved.configuration import MAP_SIDES, MMInterleavedConfig
from mg_fast.models.mm_interleaved.visual_tokenizer import VisualTokenizer
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded

pytestmark = pytest.mark.usefixtures("one_thread")
PREFIX = "visual_tokenizer."


@functools.cache
def loaded(name: str) -> VisualTokenizer:
    """A tiny checkpoint's tokenizer, which no test changes."""
    tokenizer = VisualTokenizer(recorded.read_config(name)).eval()
    tokenizer.load_state_dict(recorded.state(name, PREFIX))
    return tokenizer


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", recorded.NAMES)
def test_every_stage_is_the_recorded_one(name, backend):
    answers, compared = recorded.answers(name), 0
    with torch.no_grad():
        features = loaded(name)(recorded.pixels(name, [0, 1, 2], answers), backend=backend)
    for i, (tokens, maps, vit_tokens) in enumerate(zip(*features)):
        stages = {"visual_tokens": tokens, "vit_tokens": vit_tokens}
        for side, level in zip(MAP_SIDES, maps.split([side * side for side in MAP_SIDES])):
            stages[f"map{side}"] = level.t().unflatten(1, (side, side))
        for stage, ours in stages.items():
            if (expected := answers.get(f"image{i}.{stage}")) is not None:
                assert relative_error(ours, expected) <= 2e-5, f"image{i}.{stage}"
                compared += 1
    # The two largest maps were recorded for the first picture alone.
    assert compared == 3 * 4 + 2


def test_a_batch_gives_what_its_pictures_give_alone():
    tokenizer = loaded("mmi-tiny")
    pixels = recorded.pixels("mmi-tiny", [0, "grey", 2], recorded.answers("mmi-tiny"))
    with torch.no_grad():
        together = tokenizer(pixels)
        for i in range(3):
            for batched, alone in zip(together, tokenizer(pixels[i : i + 1])):
                assert relative_error(batched[i], alone[0]) <= 2e-6


def test_no_pictures_give_no_features():
    tokenizer, pixels = loaded("mmi-wide"), torch.zeros(2, 3, 224, 224)
    with torch.no_grad():
        for none, some in zip(tokenizer(pixels[:0]), tokenizer(pixels)):
            assert len(none) == 0 and none.shape[1:] == some.shape[1:] and none.dtype == some.dtype


def test_every_weight_but_the_positions_gets_a_gradient():
    """In the original, the position table is fixed, too."""
    tokenizer = VisualTokenizer(recorded.read_config("mmi-tiny")).eval()
    tokenizer.load_state_dict(loaded("mmi-tiny").state_dict())
    features = tokenizer(recorded.pixels("mmi-tiny", [1], recorded.answers("mmi-tiny")), backend="torch")
    (features.tokens.square().sum() + features.maps.square().sum()).backward()
    without = [name for name, weight in tokenizer.named_parameters() if weight.grad is None]
    assert without == ["pos_embed"]


def test_bfloat16_stays_near_float32():
    """The bound allows for 24 layers of bfloat16, and would not allow for a step that is left out."""
    tokenizer = VisualTokenizer(recorded.read_config("mmi-tiny")).eval().bfloat16()
    tokenizer.load_state_dict(loaded("mmi-tiny").state_dict())
    pixels = recorded.pixels("mmi-tiny", [1], recorded.answers("mmi-tiny"))
    with torch.no_grad():
        for ours, exact in zip(tokenizer(pixels), loaded("mmi-tiny")(pixels)):
            assert ours.dtype == torch.bfloat16 and relative_error(ours, exact) <= 0.05


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(3, 224, 224), r"expected \['n', 3, 224, 224\], got \[3, 224, 224\]"),
        (torch.zeros(1, 3, 336, 336), r"got \[1, 3, 336, 336\]"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.uint8), "expected floating-point numbers in 0..1, got torch.uint8"),
    ],
)
def test_refused_pixels(pixels, message):
    with pytest.raises(ValueError, match=f"pixel_values: .*{message}"):
        loaded("mmi-tiny")(pixels)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"image_embed_dim": 512}, "image_embed_dim, .* must agree, got 512, 1024 and 1024"),
        ({"num_img_token": 32}, "num_queries must be num_img_token, which is 32, got 64"),
        ({"layers": 12}, "must have 24 layers and 16 x 16 patches, got 12 layers"),
    ],
)
def test_refused_sizes(changed, message):
    with pytest.raises(CheckpointError, match=message), torch.device("meta"):
        VisualTokenizer(published(**changed))


def published(layers: int = 24, **changed) -> MMInterleavedConfig:
    """The published sizes of the picture side."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    perceiver = {
        "num_queries": 64,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "cross_attention_frequency": 2,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "qk_normalization": True,
    }
    text = LlamaConfig(hidden_size=5120)
    return MMInterleavedConfig(text_config=text, vision_config=vision, visual_perceiver=perceiver, **changed)


def test_real_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        tokenizer = VisualTokenizer(published())
    shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    tower, resampler = "encoder.vision_model.", "perceiver_resampler."
    layer, last = f"{tower}encoder.layers.23.", f"{tower}adapter_interactions.3."
    reads = f"{resampler}blip2qformer.encoder.layer.10.crossattention."
    expected = {
        "pos_embed": [257, 1024],
        "clip_mean": [1, 3, 1, 1],
        "pos_proj.weight": [1024, 1024],
        "post_ln.bias": [1024],
        "proj.weight": [5120, 768],
        f"{tower}embeddings.class_embedding": [1024],
        f"{tower}embeddings.patch_embedding.weight": [1024, 3, 14, 14],
        f"{tower}embeddings.position_embedding.weight": [257, 1024],
        f"{tower}pre_layrnorm.weight": [1024],
        f"{tower}adapter_level_embed": [3, 1024],
        f"{tower}adapter_spm.stem.6.weight": [64, 64, 3, 3],
        f"{tower}adapter_spm.stem.7.bias": [64],
        f"{tower}adapter_spm.conv4.0.weight": [256, 256, 3, 3],
        f"{tower}adapter_spm.fc4.weight": [1024, 256, 1, 1],
        f"{tower}adapter_up.weight": [1024, 1024, 2, 2],
        f"{layer}self_attn.out_proj.weight": [1024, 1024],
        f"{layer}mlp.fc1.weight": [4096, 1024],
        f"{last}injector.gamma": [1024],
        f"{last}injector.attn.sampling_offsets.weight": [384, 1024],
        f"{last}injector.attn.attention_weights.bias": [192],
        f"{last}injector.attn.value_proj.weight": [512, 1024],
        f"{last}extra_extractors.1.attn.sampling_offsets.weight": [128, 1024],
        f"{last}extra_extractors.1.attn.attention_weights.bias": [64],
        f"{last}extractor.ffn.fc1.weight": [256, 1024],
        f"{last}extractor.ffn.dwconv.dwconv.weight": [256, 1, 3, 3],
        f"{last}extractor.ffn_norm.weight": [1024],
        f"{resampler}queries": [1, 64, 768],
        f"{resampler}blip2qformer.layernorm.weight": [768],
        f"{reads}attention.key.weight": [768, 1024],
        f"{reads}attention.q_norm.weight": [64],
        f"{reads}output.LayerNorm.bias": [768],
        f"{resampler}blip2qformer.encoder.layer.11.output_query.dense.weight": [768, 3072],
    }
    assert {name: shapes.get(name) for name in expected} == expected
    # Nothing asks for the value of a number on the way, as CUDA graphs need it.
    features = tokenizer.eval()(torch.zeros(2, 3, 224, 224, device="meta"), backend="torch")
    assert [list(each.shape) for each in features] == [[2, 64, 5120], [2, 5440, 1024], [2, 257, 1024]]
    assert not any("post_layernorm" in name or "layer.11.crossattention" in name for name in shapes)
    # A tiny checkpoint has the names of the layers that both have, and no others.
    tiny = recorded.state("mmi-tiny", PREFIX).keys()
    qformer = f"{resampler}blip2qformer.encoder.layer."
    deeper = {name for name in shapes if name.startswith(qformer) and int(name.removeprefix(qformer).split(".")[0]) > 3}
    assert shapes.keys() - deeper == tiny
