"""Published sizes without their memory: the name and shape of every published tensor, on the meta device."""

import pytest
import torch

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.testing.random_checkpoints import make_config

CLIP = "model.vision_tower.vision_tower.vision_model."
CONVNEXT = "model.vision_tower_aux."


def towers_and_mining(hidden):
    """The published layout around the language model, written out from its description (the original's spec, 3-5)."""
    shapes = {
        f"{CLIP}embeddings.class_embedding": (1024,),
        f"{CLIP}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{CLIP}embeddings.position_embedding.weight": (577, 1024),
    }
    for norm in (
        "pre_layrnorm",
        "post_layernorm",
        *(f"encoder.layers.{i}.layer_norm{n}" for i in range(24) for n in (1, 2)),
    ):
        shapes |= {f"{CLIP}{norm}.weight": (1024,), f"{CLIP}{norm}.bias": (1024,)}
    for i in range(24):
        layer = f"{CLIP}encoder.layers.{i}."
        for name, out, width in [(f"self_attn.{p}_proj", 1024, 1024) for p in ("q", "k", "v", "out")] + [
            ("mlp.fc1", 4096, 1024)
        ]:
            shapes |= {f"{layer}{name}.weight": (out, width), f"{layer}{name}.bias": (out,)}
        shapes |= {f"{layer}mlp.fc2.weight": (1024, 4096), f"{layer}mlp.fc2.bias": (1024,)}

    dims, depths = (192, 384, 768, 1536), (3, 3, 27, 3)
    stem = {"0.weight": (192, 3, 4, 4), "0.bias": (192,), "1.weight": (192,), "1.bias": (192,)}
    shapes |= {f"{CONVNEXT}vision_stem.{name}": shape for name, shape in stem.items()}
    for s, (c, depth) in enumerate(zip(dims, depths)):
        stage = f"{CONVNEXT}vision_stages.{s}."
        if s:
            before = dims[s - 1]
            shapes |= {f"{stage}downsample.0.weight": (before,), f"{stage}downsample.0.bias": (before,)}
            shapes |= {f"{stage}downsample.1.weight": (c, before, 2, 2), f"{stage}downsample.1.bias": (c,)}
        for b in range(depth):
            block = {
                "gamma": (c,),
                "conv_dw.weight": (c, 1, 7, 7),
                "conv_dw.bias": (c,),
                "norm.weight": (c,),
                "norm.bias": (c,),
            }
            block |= {
                "mlp.fc1.weight": (4 * c, c),
                "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c),
                "mlp.fc2.bias": (c,),
            }
            shapes |= {f"{stage}blocks.{b}.{name}": shape for name, shape in block.items()}

    for part, width in (("query", 1024), ("aux", 2880), ("val", 2880)):
        projector = f"model.vlm_uni_{part}_projector."
        shapes |= {f"{projector}0.weight": (width,), f"{projector}0.bias": (width,)}
        shapes |= {f"{projector}1.weight": (1024, width), f"{projector}1.bias": (1024,)}
    shapes |= {"model.mm_projector.0.weight": (hidden, 1024), "model.mm_projector.0.bias": (hidden,)}
    shapes |= {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}
    return shapes


def language_model(hidden, layers, kv, ffn, vocab, *, q=None, experts=0, tied=False):
    q = q or hidden
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": shape for p, shape in attention.items()}
        if experts:
            shapes[f"{layer}block_sparse_moe.gate.weight"] = (experts, hidden)
            for e in range(experts):
                expert = f"{layer}block_sparse_moe.experts.{e}."
                shapes |= {
                    f"{expert}w1.weight": (ffn, hidden),
                    f"{expert}w2.weight": (hidden, ffn),
                    f"{expert}w3.weight": (ffn, hidden),
                }
        else:
            shapes |= {f"{layer}mlp.{p}_proj.weight": (ffn, hidden) for p in ("gate", "up")}
            shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


PUBLISHED = {
    "2b": language_model(2048, 18, 256, 16384, 256000, tied=True),
    "7b": language_model(4096, 32, 4096, 11008, 32000),
    "13b": language_model(5120, 40, 5120, 13824, 32000),
    "8b": language_model(4096, 32, 1024, 14336, 128256),
    "8x7b": language_model(4096, 32, 1024, 14336, 32000, experts=8),
    "34b": language_model(7168, 60, 1024, 20480, 64000),
}


@pytest.mark.slow
@pytest.mark.parametrize("size,hd", [*((size, False) for size in PUBLISHED), ("7b", True)])
def test_every_tensor_of_the_published_layout(size, hd):
    config = make_config(size, hd=hd)
    expected = PUBLISHED[size] | towers_and_mining(config.text_config.hidden_size)
    found = MiniGeminiForConditionalGeneration.published_shapes(config)
    assert found.keys() == expected.keys()
    assert found == expected


def test_counts_of_the_published_7b():
    """The parameter counts are those of the original's files: 6.738 B, 303.5 M, 196.2 M and 6.96 M.

    In half precision these are 14.53 GB.
    """
    shapes = MiniGeminiForConditionalGeneration.published_shapes(make_config("7b"))

    def count(*prefixes):
        return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefixes))

    assert count("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.") == 6_738_415_616
    assert round(count(CLIP) / 1e6, 1) == 303.5
    assert round(count(CONVNEXT) / 1e6, 2) == 196.23
    assert round(count("model.vlm_uni_") / 1e6, 2) == 6.96
    assert round(count("") * 2 / 1e9, 2) == 14.53
    assert sum(name.startswith(f"{CONVNEXT}vision_stages.") for name in shapes) == 336


def test_a_picture_through_the_7b_hd_on_the_meta_device():
    """Shapes fit all the way from pixels to logits at real size: 2880 image tokens, one row of logits."""
    config = make_config("7b", hd=True)
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(config).eval()
        low, high = torch.zeros(1, 5, 3, 336, 336), torch.zeros(1, 3, 1536, 1536)
        with torch.inference_mode():
            tokens = model.get_image_features(low, high).pooler_output
            assert tokens.shape == (1, 2880, 4096)
            hidden = model.model.language_model(inputs_embeds=tokens).last_hidden_state
            assert model.lm_head(hidden[:, -1:]).shape == (1, 1, 32000)
    assert model.config.tokens_per_picture == 2880
