"""Numbers of NumPy and torch count as numbers wherever a caller passes one, and other values still do not."""

import itertools
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast import CheckpointError, PromptError, ops
from mg_fast.models import templates as conversation
from mg_fast.models.logits_to_keep import kept_positions
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.runtime.arguments import plain, plain_numbers, real_number, whole_number

WHOLE = [np.int8, np.int32, np.int64, np.uint8, np.uint64, np.array, torch.tensor, lambda n: np.asarray([n, 0])[0]]
REAL = [np.float16, np.float32, np.float64, np.array, torch.tensor, np.longdouble]
MISSING = [torch.tensor(3, device="meta"), torch.ones(2, device="meta"), np.ma.masked, np.ma.masked_array(3, mask=True)]
NO_WHOLE = [
    *MISSING,
    np.array([3]),
    torch.tensor([3]),
    torch.tensor([True]),
    True,
    np.True_,
    torch.tensor(True),
    2.0,
    np.float64(2),
    np.float32("nan"),
    np.array([2]),
    "2",
    b"2",
    None,
    [2],
    2 + 0j,
]
NO_REAL = [
    *MISSING,
    torch.tensor([0.5]),
    Decimal("sNaN"),
    True,
    np.True_,
    np.array(False),
    "0.5",
    b"0.5",
    np.array([0.5]),
    1j,
    [0.5],
    np.str_("0.5"),
]


def test_whole_numbers():
    for make in WHOLE:
        found = whole_number(make(3))
        assert type(found) is int and found == 3
    assert whole_number(7) == 7 and whole_number(-(2**70)) == -(2**70)
    assert [whole_number(value) for value in NO_WHOLE] == [None] * len(NO_WHOLE)


def test_real_numbers():
    for make in (*WHOLE, *REAL):
        found = real_number(make(1))
        assert type(found) is float and found == 1
    assert (
        real_number(0.25) == 0.25 and real_number(np.float16(0.5)) == 0.5 and math.isnan(real_number(np.float32("nan")))
    )
    assert real_number(10**400) is None and real_number(Fraction(10**400)) is None
    assert real_number(Decimal("0.25")) == real_number(Fraction(1, 4)) == 0.25
    assert [real_number(value) for value in NO_REAL] == [None] * len(NO_REAL)


def test_plain():
    assert type(plain(np.float32(0.5))) is float and type(plain(np.bool_(True))) is bool
    array = np.ones((2, 2))
    assert plain(array) is array and plain("text") == "text" and plain(None) is None
    assert (
        plain_numbers([np.int64(1), "a"]) == [1, "a"]
        and plain_numbers((np.int64(1),)) == (1,)
        and plain_numbers(np.arange(2)) == [0, 1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", WHOLE)
def test_options_of_an_answer(pipeline, photo, make):
    options = {"max_new_tokens": 4, "top_k": 5, "no_repeat_ngram_size": 2, "min_new_tokens": 2, "seed": 3}
    # As a 16-bit number 0.5 is exact.
    sampled = {"temperature": 1, "top_p": 0.5, "repetition_penalty": 1.5}
    expected = pipeline.conversation().chat("What?", [photo], **options, **sampled)
    given = {name: make(value) for name, value in options.items()}
    for real in REAL:
        others = {name: real(value) for name, value in sampled.items()}
        assert pipeline.conversation().chat("What?", [photo], **given, **others) == expected
    [answer] = pipeline.chat_batch([("What?", [photo])], batch_size=make(2), progress=False, **given, **sampled)
    assert answer == expected
    greedy = pipeline.conversation().chat("What?", max_new_tokens=4, eos_token_id=[5, 6])
    for ends in ([make(5), make(6)], np.array([5, 6]), torch.tensor([5, 6])):
        assert pipeline.conversation().chat("What?", max_new_tokens=make(4), eos_token_id=ends) == greedy
    stream = pipeline.conversation().chat("What?", max_new_tokens=make(4), eos_token_id=make(5), stream=True)
    assert "".join(stream) == pipeline.conversation().chat("What?", max_new_tokens=4, eos_token_id=5).text


def test_numbers_that_are_none(pipeline):
    for value in NO_WHOLE:
        if value is not None:
            for options in ({"max_new_tokens": value}, {"temperature": 1.0, "seed": value}):
                with pytest.raises(PromptError, match="expected a whole number"):
                    pipeline.chat("What?", **options)
        with pytest.raises(PromptError, match="batch_size: expected a whole number of 1 or more"):
            pipeline.chat_batch(["What?"], batch_size=value)
    for value in (*NO_REAL, float("nan"), np.float32("inf"), -1, np.float64(-0.5), 10**400):
        with pytest.raises(PromptError, match="temperature: expected a number of 0 or more"):
            pipeline.chat("What?", temperature=value)
        with pytest.raises(PromptError, match="top_p: expected a share from 0 to 1"):
            pipeline.chat("What?", temperature=1.0, top_p=value)
    for value in (0, np.int64(0), np.int8(-3)):
        with pytest.raises(PromptError, match="max_new_tokens: expected a whole number of 1 or more"):
            pipeline.chat("What?", max_new_tokens=value)


def test_an_integer_temperature_samples_as_a_float_does(pipeline):
    """An integer works, although transformers' own loop refuses a temperature that is not a float."""
    with mg_fast.use_backend("reference"):
        first, second = (
            pipeline.conversation().chat("What?", temperature=t, seed=1, max_new_tokens=4) for t in (2, 2.0)
        )
    assert first == second


def test_caches_and_explanations(model, processor, photo):
    pipeline = mg_fast.Pipeline(model, processor, image_cache_bytes=np.int64(2**20), kv_cache_bytes=np.uint32(2**20))
    assert len(pipeline.explain(photo, "What?", max_new_tokens=np.int64(2)).answer.token_ids) == 2


def test_configurations(tmp_path):
    values = {
        "image_grid": 2,
        "image_size_aux": 1536,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 5000.0,
    }
    expected = mg_fast.MiniGeminiConfig(**values, image_global=True)
    for make in (np.int64, np.array, torch.tensor):
        found = mg_fast.MiniGeminiConfig(**{name: make(value) for name, value in values.items()}, image_global=np.True_)
        assert json.loads(found.to_json_string()) == json.loads(expected.to_json_string())
        assert type(found.image_grid) is int and found.text_config.hidden_size == 64
    for value in (True, np.int64(0), 2.0, np.float32(2), "2", None):
        with pytest.raises(CheckpointError, match="image_grid: expected a whole number above 0"):
            mg_fast.MiniGeminiConfig(image_grid=value)


@pytest.mark.parametrize("make", (np.int64, np.array, torch.tensor))
def test_nested_configurations(make, tmp_path):
    given = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    tower = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "norm_eps": 1e-6}
    expected = mg_fast.MiniGeminiConfig(text_config=given, vision_config_aux=tower)
    nested = {**tower, "dims": [make(dim) for dim in tower["dims"]]}
    found = mg_fast.MiniGeminiConfig(
        text_config={name: make(value) for name, value in given.items()}, vision_config_aux=nested
    )
    assert found.to_json_string() == expected.to_json_string()
    assert type(found.text_config.hidden_size) is int and type(found.vision_config_aux["dims"][0]) is int


def test_configurations_that_are_changed_later(tmp_path):
    config = mg_fast.MiniGeminiConfig()
    config.image_grid, config.vision_config_aux["dims"] = np.int64(1), list(np.array([8, 16, 32, 64]))
    config.check()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["image_grid"], written["vision_config_aux"]["dims"]) == (1, [8, 16, 32, 64])


def test_image_processors():
    sizes = {"hr_size": 160, "lr_size": 70, "grid": 2}
    processor = MiniGeminiImageProcessor(
        **{name: np.int32(size) for name, size in sizes.items()}, global_view=np.True_, pad=np.False_
    )
    assert json.loads(processor.to_json_string()).items() >= {**sizes, "global_view": True, "pad": False}.items()
    image = Image.effect_noise((50, 40), 64).convert("RGB")
    expected = MiniGeminiImageProcessor(**sizes, global_view=True, pad=False)(image)
    assert all(torch.equal(processor(image)[name], tensor) for name, tensor in expected.items())


def test_operations_and_the_model(model):
    picture = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    expected = ops.dual_resize(picture, 160, 70, grid=2)
    for pair in zip(ops.dual_resize(picture, np.int64(160), np.int16(70), grid=np.int64(2)), expected):
        assert torch.equal(*pair)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(
        model(input_ids=ids, logits_to_keep=np.int64(2)).logits, model(input_ids=ids, logits_to_keep=2).logits
    )
    assert torch.equal(model.generate(ids, max_new_tokens=np.int64(2)), model.generate(ids, max_new_tokens=2))
    sampled = {"top_k": 5, "min_new_tokens": 1, "max_new_tokens": 4, "eos_token_id": 2, "num_beams": 1}
    real = {"repetition_penalty": 1.5, "temperature": 0.5, "top_p": 0.5}
    torch.manual_seed(0)
    expected = model.generate(ids, do_sample=True, **sampled, **real)
    for whole, fraction in itertools.product((np.int64, np.uint8, torch.tensor), (np.float32, np.array, torch.tensor)):
        given = {name: whole(value) for name, value in sampled.items()} | {
            name: fraction(value) for name, value in real.items()
        }
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, do_sample=np.True_, **given), expected)
    greedy = model.generate(ids, max_new_tokens=4, eos_token_id=[5, 6])
    for ends in ([np.int64(5), np.int64(6)], np.array([5, 6])):
        assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=ends), greedy)


def test_positions_that_get_logits(model):
    ids = torch.tensor([[1, 5, 6, 7]])

    def check(keep, expected):
        # A product of fewer rows may be rounded differently.
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=keep).logits, expected)

    whole = model(input_ids=ids).logits
    for make in (int, *WHOLE):
        for count in (0, 1, 3):
            check(make(count), whole[:, -count:])
    for index in (torch.tensor([0, 2]), [0, 2], np.array([0, 2])):
        check(index, whole[:, [0, 2]])
    for value in (None, "1", 1.0, np.float32(1), torch.tensor(1.0), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match="logits_to_keep: expected a whole number"):
            model(input_ids=ids, logits_to_keep=value)


def test_positions_that_get_logits_are_traced_whole():
    def kept(hidden, logits_to_keep):
        return hidden[:, kept_positions(logits_to_keep)] * 2

    compiled, hidden = torch.compile(kept, backend="eager", fullgraph=True), torch.rand(1, 4, 3)
    for keep in (0, 1, 2, torch.tensor([0, 2])):
        assert torch.equal(compiled(hidden, keep), kept(hidden, keep))


def test_texts_that_are_none(pipeline, model, processor):
    ids = torch.tensor([[1, 5, 6, 7]])
    for strings in ([3], 3, b"a", ["a", None], ["a\ud800"], "a\ud800"):
        with pytest.raises(PromptError, match="stop"):
            pipeline.chat("What?", stop_strings=strings)
        with pytest.raises(PromptError, match="stop"):
            model.generate(ids, stop_strings=strings, tokenizer=processor.tokenizer, max_new_tokens=2)
    for answer in (3, 0, [], b"yes", ["yes"]):
        with pytest.raises(PromptError, match="turn 1 of 2: expected a text"):
            conversation.render("vicuna_v1", [("What?", answer), ("And?", None)])
    with pytest.raises(PromptError, match="the system text: expected a text, got 3"):
        conversation.render("vicuna_v1", [("What?", None)], system=3)
