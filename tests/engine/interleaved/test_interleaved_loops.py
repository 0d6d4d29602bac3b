"""The loop of texts and pictures gives what the original's loop gave, and runs only what is new."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mg_fast.engine.interleaved.drawing import DrawingStage
from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved.image_processing import drawn_pictures

pytestmark = pytest.mark.usefixtures("one_thread")
LOOPS = ["interleaved", "interleaved_free", "scripted"]
QUICK = {"num_inference_steps": 2, "temperature": 0, "max_new_tokens": 5}


def items_of(recorded, name):
    """The items of a recorded loop, and how our loop is asked for it."""
    asked = recorded.requests[name]
    item, config = asked["item"], asked["config"]
    items = list(item["sentences"])
    begins = item.get("generate_mode") == "generate_images"
    if not begins:
        for picture, sentence, first in zip(item["images"], item["sentence_ixs"], item["image_first"]):
            place = items.index(item["sentences"][sentence]) + (not first)
            items.insert(place, recorded.pictures[picture])
    settings = config["generation_kwargs"]
    options = {
        "rounds": item["num_iter"],
        "force_pictures": config["force_gen_image_next"],
        "start_with_picture": begins,
        "texts": item.get("multiround_context") if config["force_replace_gen_text"] else None,
        "temperature": 0,
        "max_new_tokens": settings["max_length"],
        "min_new_tokens": settings["min_length"] - 1,
        "repetition_penalty": settings["repetition_penalty"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
    }
    return items, options


def texts_of(recorded, name):
    """The texts of a recorded loop; a scripted one stands in the place of what the model wrote."""
    asked = recorded.requests[name]
    scripted = asked["item"].get("multiround_context") or []
    return [
        (scripted[i] if i < len(scripted) else "") or step["text"]
        for i, step in enumerate(asked["rounds"])
        if "text" in step
    ]


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_the_originals(recorded, name, monkeypatch, run_positions):
    """Texts are identical, with the recorded pictures fed back; each picture is drawn from the recorded sequence."""
    items, options = items_of(recorded, name)
    rounds = [i for i, step in enumerate(recorded.requests[name]["rounds"]) if "text" not in step]
    expected = [drawn_pictures(recorded.answers[f"{name}.round{i}.picture"])[0] for i in rounds]
    drawn, draw = [], DrawingStage.draw

    def recorded_picture(self, sequence, drawing):
        drawn.append((sequence, draw(self, sequence, drawing)[0]))
        return [expected[len(drawn) - 1]]

    monkeypatch.setattr(DrawingStage, "draw", recorded_picture)
    pipeline = recorded.fresh()
    parts = pipeline.interleave(items, **options)
    assert [part for part in parts if isinstance(part, str)] == texts_of(recorded, name)
    assert [part for part in parts if not isinstance(part, str)] == expected and len(drawn) == len(rounds)
    config = pipeline.model.config
    block = [config.soi_token_id, *[config.image_token_id] * config.num_img_token]
    for number, (sequence, picture), target in zip(rounds, drawn, expected):
        assert [*sequence.ids, *block] == recorded.answers[f"{name}.round{number}.text_ids"][0].tolist()
        # A value between two levels of 8 bits may fall on either side.
        assert off_by(picture, target) <= 1
    # Every position is run once. For its logits, the last known one before a text is run again.
    assert sum(run_positions) <= len(drawn[-1][0].ids) + config.num_img_token + len(parts) + options["max_new_tokens"]


def off_by(one: Image.Image, two: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 8 bits."""
    return np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max()


def test_drawn_from_the_recorded_noise(recorded):
    """The pictures of a loop, before they are rounded, are the original's."""
    pipeline = recorded.pipeline
    items, options = items_of(recorded, "scripted")
    drawn = []
    draw = pipeline.model.draw_targets

    def kept(*args, **given):
        drawn.append(draw(*args, **{**given, "output_type": "pt"}))
        return drawn_pictures(drawn[-1])

    pipeline.model.draw_targets = kept
    try:
        recorded.fresh().interleave(items, **{**options, "rounds": 1})
    finally:
        del pipeline.model.draw_targets
    assert (drawn[0] - recorded.answers["scripted.round0.picture"]).abs().max() < 1e-4


def test_continued_equals_from_scratch(tiny):
    """A loop that remembers gives what one gives that runs everything again, and the same bits a second time."""
    items, options = items_of(tiny, "interleaved")
    options |= {"num_inference_steps": 2, "temperature": 0.9, "top_p": 0.9, "seed": 5, "rounds": 3}
    remembering, forgetful = tiny.fresh(), tiny.fresh(kv_cache_bytes=0, image_cache_bytes=0)
    first, again, scratch = (p.interleave(items, **options) for p in (remembering, remembering, forgetful))
    assert same(first, again) and [type(part) for part in first] == [type(part) for part in scratch]
    for one, other in zip(first, scratch):
        # Sums over other numbers of positions are rounded otherwise.
        assert one == other if isinstance(one, str) else off_by(one, other) <= 1
    assert not same(first, remembering.interleave(items, **{**options, "seed": 6}))


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        a == b if isinstance(a, str) else a.tobytes() == b.tobytes() for a, b in zip(one, two)
    )


def test_a_stream_gives_the_same_parts(tiny):
    items, options = items_of(tiny, "interleaved_free")
    options |= {"num_inference_steps": 2}
    parts = tiny.pipeline.interleave(items, **options)
    joined = [""]
    for piece in tiny.pipeline.interleave(items, stream=True, **options):
        if isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined += [piece, ""]
            joined = joined if isinstance(piece, Image.Image) else joined[:-1]
    # The last three parts are texts that follow each other.
    assert same(joined, [parts[0], parts[1], " ".join(parts[2:])])


def test_a_stream_that_is_closed_while_drawing_leaves_the_conversation_usable(tiny, monkeypatch):
    conversation, drawing, draw = tiny.pipeline.conversation(), threading.Event(), DrawingStage.draw

    def told(self, sequence, options):
        def step(number, latents):
            drawing.set()
            options.on_step(number, latents)

        return draw(self, sequence, replace(options, on_step=step))

    monkeypatch.setattr(DrawingStage, "draw", told)
    items, options = items_of(tiny, "interleaved")
    stream = conversation.interleave(items, stream=True, **{**options, "num_inference_steps": 900})
    next(stream)
    assert drawing.wait(60)
    stream.close()
    monkeypatch.undo()
    kept, config = conversation.sequence, tiny.pipeline.model.config
    # The text is kept, and nothing of the picture.
    assert tiny.answers["interleaved.round1.text_ids"][0].tolist()[: len(kept.ids)] == list(kept.ids)
    assert kept.ids[-1] not in (config.soi_token_id, config.image_token_id) and len(kept.pictures) == 1
    other = tiny.fresh(kv_cache_bytes=0).conversation()
    other.sequence = kept
    one, two = (c.draw(num_inference_steps=2) for c in (conversation, other))
    assert off_by(one[0], two[0]) <= 1
    one, two = (c.chat("And then", max_new_tokens=6).token_ids for c in (conversation, other))
    assert one == two


def test_an_error_in_a_drawing_leaves_the_conversation_as_it_was(tiny):
    conversation = tiny.pipeline.conversation()
    conversation.chat([tiny.pictures[0], "This is"], max_new_tokens=4)
    before = conversation.sequence

    def fails(step, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.draw(["and this"], on_step=fails, num_inference_steps=3)
    assert conversation.sequence is before
    assert conversation.draw(["and this"], num_inference_steps=2)


def test_limits_of_a_loop(tiny):
    start = [tiny.pictures[0], "A red cat"]
    run = tiny.pipeline.interleave
    kinds = [type(part).__name__ for part in run(start, max_pictures=2, force_pictures=True, **QUICK)]
    assert kinds == ["str", "Image", "str", "Image"]
    assert run(start, max_pictures=0, force_pictures=True, **QUICK) == run(start, rounds=1, **QUICK)
    # The model ends this text by itself.
    items, options = items_of(tiny, "interleaved_free")
    ended = tiny.pipeline.interleave(items, **{**options, "num_inference_steps": 4, "auto_end": True})
    assert [part for part in ended if isinstance(part, str)] == texts_of(tiny, "interleaved_free")[:3]


def test_a_full_context_ends_a_loop(tiny, monkeypatch, caplog):
    config = tiny.pipeline.model.config
    monkeypatch.setattr(config, "seq_len", 30)
    start = [tiny.pictures[0], "A red cat"]
    parts = tiny.pipeline.interleave(start, rounds=4, force_pictures=True, **QUICK)
    assert [type(part).__name__ for part in parts] == ["str"] and "the story ends after 1 of 4 rounds" in caplog.text
    with pytest.raises(PromptError, match="no picture can be drawn here"):
        tiny.pipeline.draw([tiny.pictures[0], "A red cat sits on the table and looks"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"items": ["no picture"]}, "expected at least one picture before the first text"),
        ({"items": []}, "expected at least one picture before the first text"),
        ({"items": [], "start_with_picture": True}, "expected at least one text or picture to go on from"),
        ({"rounds": 0}, "rounds: expected a whole number of 1 or more"),
        ({"texts": "one"}, "texts: expected a list"),
        ({"texts": ["", "a <image>"]}, r"texts\[1\] holds <image>: a text of a loop has no pictures"),
        ({"texts": ["<|image|>"]}, r"texts\[0\] holds <\|image\|>"),
        ({"task": "poem"}, "task: expected one of caption, "),
        ({"num_beams": 2, "stream": True}, "beams cannot be streamed"),
    ],
)
def test_loops_that_cannot_run_are_refused_at_once(tiny, options, message):
    items = options.get("items", [tiny.pictures[0]])
    with pytest.raises(PromptError, match=message):
        tiny.pipeline.interleave(items, **{name: value for name, value in options.items() if name != "items"})


@pytest.mark.parametrize(
    "option, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive whole number"),
        ({"num_inference_steps": 2000}, "num_inference_steps must be at most 1000"),
        ({"scheduler": "ddim"}, "scheduler must be one of diffusers'"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must be \[1, 4, 8, 8\]"),
    ],
)
def test_options_of_drawings_are_refused_at_once(tiny, run_positions, option, message):
    for call in (tiny.pipeline.interleave, tiny.pipeline.draw):
        with pytest.raises(ValueError, match=message):
            call([tiny.pictures[0]], **option)
    assert not run_positions


def test_seeds_of_several_pictures(tiny):
    """The pictures of one call have the seeds that follow each other."""
    draw = tiny.pipeline.draw
    both = draw(["two boats"], num_images=2, seed=7, num_inference_steps=2)
    alone = [draw(["two boats"], seed=seed, num_inference_steps=2)[0] for seed in (7, 8)]
    assert same(both, alone) and not same(both[:1], both[1:])
    generator = torch.Generator().manual_seed(7)
    assert same(draw(["two boats"], generator=generator, num_inference_steps=2), both[:1])
