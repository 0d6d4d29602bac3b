"""A server opens pictures as mg_fast does, and what vLLM cannot load is refused before any weight is read."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from mg_fast.models.pictures import open_picture
from tests.checkpoints import edit_config, make_adapter, remake
from tests.serve.engine import needs_vllm

pytestmark = needs_vllm


def picture(mode: str) -> Image.Image:
    values = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(values.integers(0, 2**16, (12, 20), dtype=np.uint16))
    return Image.fromarray(values.integers(0, 256, (12, 20, 4), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "I;16"])
def test_a_file_s_own_pixels_are_used(mode):
    """vLLM puts transparent pixels over white and clips greys of 16 bits; the original drops alpha."""
    from vllm.multimodal.media.image import ImageMediaIO

    from mg_fast.integrations.vllm.processing import open_pictures

    data = io.BytesIO()
    picture(mode).save(data, "PNG")
    sent = ImageMediaIO().load_bytes(data.getvalue())
    [opened] = open_pictures(sent)
    expected = np.asarray(open_picture(data.getvalue()))
    assert np.array_equal(np.asarray(opened.media), expected) and opened.original_bytes == data.getvalue()
    [opened] = open_pictures([picture(mode)])
    assert np.array_equal(np.asarray(opened), expected)
    # A background that someone chose is kept.
    chosen = ImageMediaIO(rgba_background_color=[0, 0, 0]).load_bytes(data.getvalue())
    [opened] = open_pictures(chosen)
    assert np.array_equal(np.asarray(opened.media), np.asarray(chosen.media))


def test_what_is_no_picture_is_refused():
    from vllm.exceptions import VLLMValidationError

    from mg_fast.integrations.vllm.processing import open_pictures

    good = picture("RGB")
    for bad, told in (("/etc/passwd", "got str"), (np.zeros((4, 4, 3), np.float32), "expected uint8 values")):
        with pytest.raises(VLLMValidationError, match=f"picture 2 of 2: .*{told}"):
            open_pictures([good, bad])
    # A path is one wrong picture, and no list of letters.
    with pytest.raises(VLLMValidationError, match="^picture: .*got str"):
        open_pictures("/etc/passwd")
    assert open_pictures([good, None]) == [good, None]


@pytest.fixture
def model_config():
    """Makes vLLM's configuration of a checkpoint folder."""
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return lambda folder, **options: ModelConfig(model=str(folder), dtype="float32", **options)


def test_vllm_s_configuration_is_completed(model_config, built, tmp_path):
    found = model_config(built["gemma"])
    text = found.hf_config.text_config
    assert found.tokenizer_mode == "mg_fast" and text.hidden_activation == text.hidden_act


def test_checkpoints_and_options_that_do_not_fit_are_refused(model_config, standard, tmp_path):
    adapter, _ = make_adapter(standard, tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match="stage-1 adapter"):
        model_config(adapter)
    quantized = remake(standard, tmp_path / "quantized")
    edit_config(quantized, quantization_config={"quant_method": "torchao", "quant_type": {"default": {}}})
    assert "quantization_config" in json.loads((quantized / "config.json").read_text())
    with pytest.raises(ValueError, match="is quantized"):
        model_config(quantized)
    with pytest.raises(ValueError, match="tokenizer_mode: Mini-Gemini's prompts need 'mg_fast'"):
        model_config(standard, tokenizer_mode="slow")
    with pytest.raises(ValueError, match="enable_mm_embeds"):
        model_config(standard, enable_mm_embeds=True)


def test_a_closed_repository_is_asked_with_the_token(model_config, standard, monkeypatch):
    """The token that vLLM was given is used for the small files, too, as it is for the weights."""
    from mg_fast.integrations.vllm import processing

    asked = {}
    monkeypatch.setattr(processing, "resolve_folder", lambda name, **how: asked.update(how) or standard)
    config = model_config(standard, revision="main", hf_token="secret")
    processing.make_processor(config, AutoTokenizer.from_pretrained(standard))
    assert asked == {"weights": False, "revision": "main", "token": "secret"}
