"""Texts after items: they are those of model.generate and of the original, and continue from what is kept."""

import contextlib
import copy
import gc
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mg_fast.engine.interleaved.items import read_items
from mg_fast.engine.interleaved.settings import sampling_for
from mg_fast.errors import PictureError, PromptError
from mg_fast.models.mm_interleaved.encoder import FeatureEncoder
from mg_fast.models.mm_interleaved.packed import PackedLlamaModel
from mg_fast.testing.tolerances import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(recorded, name, row=0):
    """A row of a recorded request as a text with marks, and its pictures."""
    request = recorded.requests[name]
    text = re.sub(r"<\|beginofimage\|>( <\|image\|>)+", "<image>", request["prompt"][row]).removeprefix("<s>").strip()
    return text, [recorded.pictures[i] for i in request["images"][row]]


def without_padding(recorded, name, row=0):
    """The recorded new ids of a row, without BOS and without what fills it up after its end."""
    ids, config = recorded.answers[name][row, 1:].tolist(), recorded.pipeline.model.config
    ends = [i for i, token in enumerate(ids) if token in (config.eos_token_id, config.soi_token_id)]
    return ids[: ends[0] + 1] if ends else ids


@pytest.mark.parametrize("name", ["vqa", "fewshot", "twodocs"])
def test_chat_is_generate_and_the_originals(recorded, name):
    pipeline, (text, images) = recorded.pipeline, asked(recorded, name)
    settings = recorded.requests[name]["generations"]["greedy"]["kwargs"]
    options = {"max_new_tokens": settings["max_length"], "min_new_tokens": settings["min_length"] - 1}
    answer = pipeline.chat(text, images, **options)
    inputs = pipeline.processor(text=text, images=images, return_tensors="pt")
    out = pipeline.model.generate(**inputs, **options)
    assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.token_ids == without_padding(recorded, f"{name}.greedy.ids")
    assert answer.text == recorded.requests[name]["generations"]["greedy"]["text"][0].strip()
    stream = pipeline.chat(text, images, stream=True, **options)
    streamed = list(stream)
    assert "".join(streamed) == answer.text and len(streamed) > 1
    assert stream.answer.token_ids == answer.token_ids


@pytest.mark.parametrize("name, task, row", [("vqa", "question", 0), ("caption", "caption", 1)])
def test_tasks_have_the_originals_settings(recorded, name, task, row):
    text, images = asked(recorded, name, row)
    answer = recorded.pipeline.chat(text, images, task=task)
    assert answer.token_ids == without_padding(recorded, f"{name}.default.ids", row)


def test_a_batch_answers_as_alone(recorded):
    """Rows of several pictures, of one and of none are answered together as each by itself, and faults stay apart."""
    pipeline = recorded.fresh()
    options = {"max_new_tokens": 14, "min_new_tokens": 5}
    rows = [asked(recorded, name, row) for name in ("ragged", "textonly", "caption") for row in (0, 1)]
    text, images = rows[0]
    listed = [part for pair in zip(text.split("<image>"), [*images, None]) for part in pair if part is not None]
    listed = [part for part in listed if not isinstance(part, str) or part.strip()]
    batch = pipeline.chat_batch([listed, *rows[1:], ("about <image>", None)], progress=False, **options)
    for name, row, answer in zip(("ragged", "ragged", "textonly", "textonly", "caption", "caption"), (0, 1) * 3, batch):
        assert answer.token_ids == without_padding(recorded, f"{name}.greedy.ids", row)
        assert answer.token_ids == recorded.pipeline.chat(*asked(recorded, name, row), **options).token_ids
    assert batch[-1].finish_reason == "error" and "1 place(s) for pictures" in str(batch[-1].error)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends(tiny, backend):
    pipeline, (text, images) = tiny.fresh(backend=backend), asked(tiny, "fewshot")
    answer = pipeline.chat(text, images, max_new_tokens=14, min_new_tokens=5)
    assert answer.token_ids == without_padding(tiny, "fewshot.greedy.ids")
    words = tiny.requests["t2i"]["prompt"][0].removeprefix("<s>").split("<|")[0]
    picture = pipeline.draw([words], num_inference_steps=4)[0]
    expected = tiny.answers["t2i.steps4.picture"][0].permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(picture, dtype=float) - expected).max() < 0.6


def test_a_conversation_runs_only_what_is_new(tiny, run_positions):
    conversation, items = tiny.fresh().conversation(), [tiny.pictures[0], "A small dog"]
    first = conversation.chat(items, max_new_tokens=8)
    known = len(conversation.sequence.ids)
    run_positions.clear()
    second = conversation.chat(["and then", tiny.pictures[1], "it"], max_new_tokens=8)
    new = second.prompt_tokens - known
    # The last token of the first answer was not run.
    assert run_positions == [new + 1] and second.cached_tokens == known - 1
    scratch = tiny.fresh(kv_cache_bytes=0).conversation()
    scratch.sequence, other = conversation.sequence, copy.copy(conversation)
    run_positions.clear()
    assert scratch.chat("So", max_new_tokens=8).token_ids == conversation.chat("So", max_new_tokens=8).token_ids
    assert len(other.sequence.ids) < len(conversation.sequence.ids)
    assert run_positions[0] > 10 * run_positions[1] and first.text
    conversation.reset()
    assert conversation.sequence.ids == ()


def test_room_for_further_pictures_changes_nothing(tiny, run_positions):
    """On a GPU a sequence has room for more pictures than it has. Texts and what is known of them stay the same."""
    plain, roomy = tiny.fresh(), tiny.fresh()
    roomy.answers.pictures_at_once = 4
    found = []
    for pipeline in (plain, roomy):
        run_positions.clear()
        conversation = pipeline.conversation()
        texts = [
            conversation.chat(items, max_new_tokens=6).token_ids
            for items in ([tiny.pictures[0], "A dog"], ["and", tiny.pictures[1], "it"], "So")
        ]
        found.append((texts, conversation.draw(num_inference_steps=2)[0].tobytes(), list(run_positions)))
    assert found[0] == found[1]


def test_a_stream_that_is_not_read_leaves_the_conversation_as_it_was(tiny):
    conversation = tiny.pipeline.conversation()
    stream = conversation.chat([tiny.pictures[0], "A small dog"], stream=True, max_new_tokens=40, min_new_tokens=39)
    next(stream)
    stream.close()
    assert conversation.sequence.ids == ()


@contextlib.contextmanager
def changed(tensor):
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(0.3)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def test_changed_weights_are_noticed(tiny):
    """After a change of weights, a pipeline that has packed, read and drawn before gives what a new one gives."""
    pipeline, model, items = tiny.fresh(), tiny.pipeline.model, [tiny.pictures[0], "A small dog"]

    def scores(pipeline):
        return np.array(pipeline.score(items, ["runs", "sits"]))

    def picture(pipeline):
        return np.asarray(pipeline.draw(items, num_inference_steps=2)[0], dtype=float) / 255

    def off_by(one, other):
        return np.abs(one - other).max()

    for tensor, result in (
        (model.mm_decoder.layers[0].llama_cross_attn.attn.output_proj.bias, scores),
        (model.visual_tokenizer.proj.bias, scores),
        (model.picture_mark.soi_token, scores),
        (model.text_decoder.head_new.bias, scores),
        (model.image_decoder.decoder.mmfs_module.mmfs_down_blocks[0].conv.bias, picture),
    ):
        before = result(pipeline)
        with changed(tensor):
            now = result(pipeline)
            assert off_by(now, before) > 0.01 and off_by(now, result(tiny.fresh())) < 5e-3
        assert off_by(result(pipeline), before) < 5e-3


def test_hooks_are_called(tiny):
    """Where a hook does more than weights say, the model's own modules run; afterwards the packed form runs again."""
    pipeline, layer = tiny.fresh(), tiny.pipeline.model.mm_decoder.layers[0].llama_cross_attn.norm1
    items, called = [tiny.pictures[0], "A small dog"], []
    texts = [pipeline.chat(items, max_new_tokens=4).token_ids]
    packed = type(pipeline.decoder.model)
    hook = layer.register_forward_hook(lambda *given: called.append(given))
    try:
        texts.append(pipeline.chat(items, max_new_tokens=4).token_ids)
    finally:
        hook.remove()
    count = len(called)
    texts.append(pipeline.chat(items, max_new_tokens=4).token_ids)
    assert texts[0] == texts[1] == texts[2] and len(called) == count > 0 and type(pipeline.decoder.model) is packed


def test_scores_are_the_originals(recorded):
    pipeline, rows = recorded.pipeline, recorded.answers
    conversation = pipeline.conversation()
    config = pipeline.model.config
    options = [ids[mask.bool()].tolist() for ids, mask in zip(rows["scores.options_ids"], rows["scores.options_mask"])]
    texts = [pipeline.processor.decode(ids) for ids in options]
    # The recorded options are the ids of texts, so the texts of these ids give them again.
    assert [pipeline.answers.read(text, first=False) for text in texts] == options
    conversation.sequence = conversation.sequence.extended(
        rows["scores.text_ids"][0].tolist(),
        [pipeline.vision.see(recorded.pictures[i]) for i in recorded.requests["scores"]["images"][0]],
    )
    scores = torch.tensor(conversation.score([], texts))
    assert torch.allclose(scores, rows["scores.scores"], rtol=5e-5, atol=0)
    assert conversation.sequence.ids[-1] != config.eos_token_id


def test_pictures_go_through_the_packed_tower(tiny):
    pipeline, pixels = tiny.fresh(), tiny.pipeline.processor.image_processor(tiny.pictures[0])
    seen, plain = pipeline.vision.see(tiny.pictures[0]), tiny.fresh(backend="reference")
    assert isinstance(pipeline.vision.encoder, FeatureEncoder) and "vision tower packed" in pipeline.first_use
    with torch.no_grad():
        own = pipeline.model.get_image_features(**pixels, backend="reference")
    assert relative_error(seen.maps, own.last_hidden_state[0]) <= 2e-6
    assert torch.equal(plain.vision.see(tiny.pictures[0]).tokens, own.pooler_output[0]) and not plain.vision.encoder


def test_values_are_kept_with_the_conversation(tiny, monkeypatch):
    """Without any room in the cache, pictures are projected once for each conversation that holds them."""
    pipeline, projected = tiny.fresh(image_cache_bytes=0, kv_cache_bytes=0), []
    project = PackedLlamaModel.project_pictures
    monkeypatch.setattr(
        PackedLlamaModel, "project_pictures", lambda self, maps: projected.append(len(maps)) or project(self, maps)
    )
    conversation = pipeline.conversation()
    for _ in range(2):
        conversation.chat([*tiny.pictures[:2], "Then"], max_new_tokens=2)
    assert len(projected) == 2
    pipeline.chat([tiny.pictures[0], "Then"], max_new_tokens=2)
    assert len(projected) == 3
    conversation.reset()
    gc.collect()
    assert not pipeline.answers._values


def test_limits_of_caches_count_maps(tiny):
    seen = tiny.fresh().vision.see(tiny.pictures[0])
    both = seen.tokens.nbytes + seen.maps.nbytes
    stage = tiny.fresh(image_cache_bytes=both).vision
    stage.see(tiny.pictures[0])
    assert stage.cache.held_bytes == both
    stage.see(tiny.pictures[1])
    assert stage.cache.held_bytes == both
    small = tiny.fresh(image_cache_bytes=both - 1).vision
    assert torch.equal(small.see(tiny.pictures[0]).maps, seen.maps) and small.cache.held_bytes < both


# ---- items and settings


def test_items_in_any_order(tmp_path, tiny):
    picture = tiny.pictures[0]
    file = tmp_path / "a.png"
    picture.save(file)
    assert read_items([picture, "one", "two", file]) == ("<image>one two<image>", [picture, file])
    assert read_items("see <image> and", [picture]).text == "see <image> and"
    assert read_items("see", picture).text == "<image> see" and read_items(picture).pictures == [picture]
    whole = tiny.pipeline.chat([picture, "one two"], max_new_tokens=3)
    assert tiny.pipeline.chat("one two", [file], max_new_tokens=3) == whole


@pytest.mark.parametrize(
    "items, images, message",
    [
        (["one", 3], None, "item 2 of 2: expected a text .*, or a picture .*, got 3"),
        (["one", None], None, "item 2 of 2: expected a text .*, got None"),
        ({"text": "one"}, None, "expected a list of texts and pictures, got"),
        (["one", " "], None, "item 2 of 2: expected words"),
        (["see <image>"], None, "put the picture itself between two texts"),
        ("see <image>", None, "1 place.s. for pictures .*, but 0 picture.s. came"),
        ("see <image>", ["a", "b"], "1 place.s. for pictures .*, but 2 picture.s. came"),
        (["see"], ["a"], "images are for one text"),
        ([], None, "expected at least one text or picture"),
        ("spells <|image|>", None, "spells out the special token"),
    ],
)
def test_items_that_cannot_be_used(tiny, items, images, message):
    with pytest.raises(PromptError, match=message):
        tiny.pipeline.chat(items, images)


def test_too_many_pictures_and_no_file(tiny):
    with pytest.raises(PromptError, match="more than 49|of which 50|50 or more are visible|50 pictures are visible"):
        tiny.pipeline.chat([tiny.pictures[0]] * 50)
    with pytest.raises(PictureError, match="nowhere.png"):
        tiny.pipeline.chat([Path("nowhere.png")])


def test_a_text_that_names_a_file_gives_a_warning(tmp_path, tiny, caplog):
    tiny.pictures[0].save(tmp_path / "a.png")
    for item, expected in ((str(tmp_path / "a.png"), True), (str(tmp_path / "b.png"), False)):
        caplog.clear()
        assert read_items([item, "words"]).pictures == []
        assert ("is read as a text, and there is a file of this name" in caplog.text) == expected


def test_a_row_without_the_picture_of_its_task_is_an_error(tiny):
    rows = ["words", [tiny.pictures[0], "a photo of"]]
    wrong, right = tiny.pipeline.chat_batch(rows, task="question", progress=False)
    assert "task question is about a picture" in str(wrong.error) and right.error is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, items: p.chat("words", task="caption"), "task caption is about a picture"),
        (lambda p, items: p.chat(items, task="rhyme"), "task: expected one of"),
        (lambda p, items: p.chat(items, allow_long=True), "allow_long is not an option here"),
        (lambda p, items: p.chat(items, image_tokens=1), "image_tokens is not an option here"),
        (lambda p, items: p.draw([]), "expected at least one text or picture that a picture can follow"),
        (lambda p, items: p.score(items, ["one"]), "two or more texts"),
        (lambda p, items: p.chat(items, draw=True), "draw is not an option here, but one of Mini-Gemini"),
        (lambda p, items: p.draw(items, seed="one"), "seed: expected a whole number .*, got 'one'"),
        (lambda p, items: p.score(items, ["one", "<image>"]), r"options\[1\] holds <image>"),
        (lambda p, items: p.score(["words"], ["one", "two"]), "at least one picture before the options"),
    ],
)
def test_calls_that_cannot_run_are_refused(tiny, call, message):
    with pytest.raises(PromptError, match=message):
        call(tiny.pipeline, [tiny.pictures[0], "words"])


@pytest.mark.parametrize("options, message", [({"steps": 3}, "steps is no option"), ({"seed": "x"}, "seed: expected")])
def test_options_of_drawings_are_checked(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.pipeline.draw(["words"], **options)


def test_settings_of_tasks_and_callers():
    story = sampling_for("story")
    assert (story.temperature, story.top_p, story.max_new_tokens) == (1.0, 0.9, 90)
    assert story.generate_options == {"min_new_tokens": 7, "top_k": 50, "repetition_penalty": 1.3}
    greedy = sampling_for("story", temperature=0, max_new_tokens=4)
    assert greedy.of_generate() == {
        **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        **{"min_new_tokens": 4, "repetition_penalty": 1.3},
    }
    assert "num_beams" not in sampling_for("caption", temperature=0.7).generate_options
    assert sampling_for(None).of_generate()["do_sample"] is False
