"""The language model sees the pictures that the original's sees, with packed layers and without vision too."""

import pytest
import torch
from transformers import LlamaConfig

from mg_fast.models.mm_interleaved.configuration import MMInterleavedConfig
from mg_fast.models.mm_interleaved.language_model import SynchronizedLlamaModel, TextDecoder
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.models.mm_interleaved.visible_pictures import visible
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = ["vqa", "caption", "fewshot", "textonly", "ragged", "twodocs"]


@pytest.mark.parametrize("name", recorded.NAMES)
def test_every_prompt_has_the_recorded_mask(name):
    """Prompts for texts are padded on the left, prompts for pictures on the right."""
    answers, config, found = recorded.answers(name), recorded.read_config(name), 0
    for request, mask in answers.items():
        if request.endswith(".cross_attention_mask"):
            request = request.removesuffix(".cross_attention_mask")
            seen = visible(answers[f"{request}.text_ids"], answers[f"{request}.num_image_per_seq"], config)
            assert torch.equal(seen.to(torch.uint8), mask), request
            found += 1
    assert found >= 10


@pytest.mark.parametrize("name", recorded.NAMES)
def test_packed_layers_give_the_recorded_states(name):
    answers, model = recorded.answers(name), load(name)
    packed = PackedInterleavedDecoding(model)
    for request in TEXT:
        given, kept = inputs(name, request, answers), answers[f"{request}.attention_mask"].bool()
        read = packed.with_pictures(given["input_ids"], given)
        embeddings = packed.embed(given["input_ids"], image_tokens=read.pop("image_tokens"))
        del read["num_image_per_seq"]
        with torch.no_grad():
            hidden = packed.language_model(
                inputs_embeds=embeddings,
                attention_mask=given["attention_mask"],
                position_ids=answers[f"{request}.position_ids"],
                **read,
            ).last_hidden_state
        assert relative_error(hidden[kept], answers[f"{request}.hidden"][-1][kept]) <= 2e-5, request


def test_projected_pictures_of_layers_that_are_more_than_weights():
    """A hooked layer is called itself, and gives what the one product gives."""
    model, maps = load("mmi-tiny").mm_decoder, torch.randn(2, 5440, 32)
    with torch.no_grad():
        expected, called = model.project_pictures(maps), []
        hook = model.layers[2].llama_cross_attn.attn.value_proj.register_forward_hook(lambda *_: called.append(1))
        try:
            values = model.project_pictures(maps)
        finally:
            hook.remove()
    assert called and values.shape == expected.shape == (2, 1344, 64)
    assert relative_error(values, expected) <= 1e-6


@pytest.mark.parametrize("name", recorded.NAMES)
def test_without_vision_the_synchronizers_are_left_out(name):
    """That is another function than a prompt without pictures, which gets what a row that sees nothing gets."""
    answers, model = recorded.answers(name), load(name)
    ids, expected = answers["textonly.alone.text_ids"], answers["textonly.alone.last_hidden_without_synchronizer"]
    with torch.no_grad():
        hidden = model.mm_decoder(ids).last_hidden_state
        logits = model(ids).logits
    assert relative_error(hidden, expected) <= 2e-5
    with torch.no_grad():
        assert relative_error(model.text_decoder(hidden), logits) > 1e-3
    # The same prompt stands in row 1 of the recorded batch, where row 0 has a picture.
    last = answers["textonly.last_logits"][1:]
    assert relative_error(logits[:, -1], last) <= 5e-5


def test_published_names_and_initial_values():
    """The names and sizes are those of the published state dict; a new model begins as the original does."""
    text = LlamaConfig(
        vocab_size=32002, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    )
    with torch.device("meta"):
        config = MMInterleavedConfig(text_config=text)
        shapes = {name: list(tensor.shape) for name, tensor in SynchronizedLlamaModel(config).state_dict().items()}
    crossed = {int(name.split(".")[1]) for name in shapes if "llama_cross_attn" in name}
    assert crossed == set(range(0, 40, 4)) and shapes["embed_tokens.weight"] == [32002, 5120]
    names = {name.split("llama_cross_attn.")[1]: shape for name, shape in shapes.items() if "layers.36.llama_c" in name}
    assert len(names) == 15 and names["gate"] == [1] and names["norm2.weight"] == [1024]
    assert names["attn.attention_weights.weight"] == [432, 5120] and names["attn.query_relpos.weight"] == [50, 5120]
    assert len(shapes) == 40 * 9 + 2 + 10 * 15

    small = MMInterleavedConfig(text_config={**SMALL_TEXT}, image_embed_dim=32)
    model, head = SynchronizedLlamaModel(small), TextDecoder(small)
    synchronizer = model.layers[0].llama_cross_attn
    assert synchronizer.gate == 0 and not synchronizer.attn.sampling_offsets.weight.any()
    logits = head(torch.randn(1, 64))
    assert logits.shape == (1, 40) and logits[0, -2:].tolist() == [-5.0, -5.0]


SMALL_TEXT = dict(
    vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)


def test_pictures_in_part_are_refused():
    model = load("mmi-tiny").mm_decoder
    index, values = torch.ones(1, 3, 1, dtype=torch.long), torch.zeros(1, 1, 1344, 64)
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(ValueError, match="expected picture_index together with .* got picture_index$"):
        model(ids, picture_index=index)
    with pytest.raises(ValueError, match="got picture_values$"):
        model(ids, picture_values=values)
    with pytest.raises(ValueError, match=r"1 row\(s\) of tokens cannot share the pictures of 2 row\(s\)"):
        model(ids, picture_values=values.expand(2, -1, -1, -1), picture_index=index)
