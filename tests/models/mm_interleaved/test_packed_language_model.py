"""The packed language model costs hardly more than plain Llama, shares its weights, and notices changes."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import mg_fast
from bench.counting import Count
from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.language_model import SynchronizedLlamaModel, TextDecoder
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding, pack_language_model
from mg_fast.models.protocol import CACHE, check_decodable
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES, PROMPT = 4, 400


def published(layers: int = 40) -> MMInterleavedConfig:
    """The published sizes of the language model, with all of its layers or fewer."""
    text = LlamaConfig(
        vocab_size=32002,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=layers,
        num_attention_heads=40,
        max_position_embeddings=2048,
        pad_token_id=31999,
    )
    return MMInterleavedConfig(text_config=text)


def flop_of_a_token(model, head, **read) -> int:
    """FLOP of one decoded token after a prompt, on the meta device."""
    cache, shape = DynamicCache(config=model.config), (1, model.config.num_attention_heads, PROMPT, 128)
    with torch.inference_mode():
        for layer in range(model.config.num_hidden_layers):
            cache.update(torch.empty(shape, device="meta"), torch.empty(shape, device="meta"), layer)
        with Count() as count:
            token = torch.empty(1, 1, dtype=torch.long, device="meta")
            head(model(token, use_cache=True, **{CACHE: cache}, **read).last_hidden_state)
    return count.total.flop


def test_flop_of_a_decoded_token_with_four_pictures():
    """At most 1.05 times the plain language model's; the original's steps take more than five times as many."""
    with torch.device("meta"):
        config = published()
        model, head = SynchronizedLlamaModel(config).eval(), TextDecoder(config)
        first_layers = SynchronizedLlamaModel(published(4)).eval()
        index = torch.ones(1, 1, PICTURES, dtype=torch.long)
        values = torch.empty(1, PICTURES, config.pixels_of_llm, 10 * config.image_embed_dim)
        maps = torch.empty(1, PICTURES, config.pixels_of_llm, config.image_embed_dim)
    plain = flop_of_a_token(model, head)
    packed = flop_of_a_token(pack_language_model(model), head, picture_values=values, picture_index=index)
    with mg_fast.use_backend("reference"):
        original = flop_of_a_token(first_layers, head, picture_features=maps, picture_index=index)
    # Four layers have one synchronizer, and all layers have ten.
    original = plain + 10 * (original - flop_of_a_token(first_layers, head))
    assert plain > 24e9
    assert 1.005 < packed / plain <= 1.05
    assert original / plain > 5


def test_packed_decoding_shares_the_model_s_weights():
    model = load("mmi-tiny")
    packed = PackedInterleavedDecoding(model)
    check_decodable(packed)
    language = packed.language_model
    assert language.layers[1].self_attn is model.mm_decoder.layers[1].self_attn
    assert language.embed_tokens is model.mm_decoder.embed_tokens and packed.head is model.text_decoder
    assert language.config is model.mm_decoder.config and not language.training
    # The projection of pictures is one tensor, and each synchronizer has a part of it.
    whole = language.value_weight
    assert [part.attn.value_weight.data_ptr() - whole.data_ptr() for part in language.synchronizers()] == [
        0,
        whole[32:].data_ptr() - whole.data_ptr(),
    ]


def test_prompts_that_were_prepared_for_the_original_s_steps():
    """Maps instead of values are projected by the packed model itself."""
    model, answers = load("mmi-tiny"), recorded.answers("mmi-tiny")
    given = inputs("mmi-tiny", "vqa", answers)
    with mg_fast.use_backend("reference"):
        read = model.with_pictures(given["input_ids"], given)
    assert "picture_features" in read
    embeddings = model.embed(given["input_ids"], image_tokens=read.pop("image_tokens"))
    del read["num_image_per_seq"]
    with torch.no_grad():
        hidden = PackedInterleavedDecoding(model).language_model(inputs_embeds=embeddings, **read).last_hidden_state
    assert torch.allclose(hidden, answers["vqa.hidden"][-1], atol=1e-4)


def test_changed_weights_are_noticed():
    model = SynchronizedLlamaModel(recorded.read_config("mmi-tiny")).eval()
    packed = pack_language_model(model)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.zero_()
        assert not packed.layers[1].mlp.up_proj.weight.any()
        packed.check_unchanged()
        model.layers[2].llama_cross_attn.gate.fill_(1)
    with pytest.raises(RuntimeError, match="were changed since it was packed: pack the model again"):
        packed.check_unchanged()


def test_models_that_cannot_be_packed():
    model = SynchronizedLlamaModel(recorded.read_config("mmi-tiny")).eval()
    model.layers[0].llama_cross_attn.norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a synchronizer cannot be packed: norm1 has hooks"):
        pack_language_model(model)
    model.layers[3].to("meta")
    with pytest.raises(ValueError, match="expected the language model on one device, got cpu, meta"):
        pack_language_model(model)


def test_bfloat16_stays_near_float32():
    """The bound allows for the roundings of four layers, and would not allow for a synchronizer that is left out."""
    exact, answers = load("mmi-tiny"), recorded.answers("mmi-tiny")
    model = SynchronizedLlamaModel(exact.config).eval()
    model.load_state_dict(exact.mm_decoder.state_dict())
    given = inputs("mmi-tiny", "fewshot", answers)
    embeddings = answers["fewshot.inputs_embeds"].bfloat16()
    model.bfloat16()
    arguments = given["input_ids"], given["num_image_per_seq"], given["image_maps"].bfloat16()
    for language in (model, pack_language_model(model)):
        with torch.no_grad():
            read = language.picture_arguments(*arguments)
            hidden = language(inputs_embeds=embeddings, **read).last_hidden_state
        assert hidden.dtype == read["picture_values"].dtype == torch.bfloat16
        assert relative_error(hidden, answers["fewshot.hidden"][-1]) <= 0.05
        without = language(inputs_embeds=embeddings).last_hidden_state
        assert relative_error(without, answers["fewshot.hidden"][-1]) > 0.2
