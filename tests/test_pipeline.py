"""load, see and chat: conversations, streaming, sampling, and requests that are refused before any work."""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

import mg_fast
from mg_fast import PictureError, Pipeline, PromptError
from mg_fast.engine.streaming import PieceStream, decode_answer
from mg_fast.models.templates import render

QUESTION = "What is written in the picture?"


def test_load_and_chat(standard, photo):
    pipeline = mg_fast.load(standard, device="cpu", template="vicuna_v1")
    answer = pipeline.chat(QUESTION, images=[photo], max_new_tokens=12)
    assert answer.text and str(answer) == answer.text
    assert answer.image_tokens == 25 and answer.prompt_tokens > 25
    assert len(answer.token_ids) == 12 and answer.finish_reason == "length"
    assert pipeline.load_seconds > 0 and pipeline.template == "vicuna_v1"


def test_chat_is_generate(pipeline, model, processor, photo):
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=12)
    inputs = processor(text=render("vicuna_v1", [(f"<image>\n{QUESTION}", None)]), images=photo, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_second_turn_equals_the_history_sent_fresh(pipeline, model, processor, photo, drawing):
    first = pipeline.chat(QUESTION, [photo], max_new_tokens=8)
    second = pipeline.chat("And what colour?", max_new_tokens=8)
    third = pipeline.chat("Compare with this one.", [drawing], max_new_tokens=8)
    history = [
        (f"<image>\n{QUESTION}", first.text),
        ("And what colour?", second.text),
        ("<image>\nCompare with this one.", None),
    ]
    for turns, images, answer in (
        (history[:1] + [("And what colour?", None)], [photo], second),
        (history, [photo, drawing], third),
    ):
        inputs = processor(text=render("vicuna_v1", turns), images=images, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_picture_is_seen_once(pipeline, model, photo):
    runs = []
    hook = model.model.vision_tower_aux.register_forward_hook(lambda *_: runs.append(1))
    try:
        pipeline.chat(QUESTION, [photo], max_new_tokens=2)
        pipeline.chat("And?", max_new_tokens=2)
    finally:
        hook.remove()
    assert len(runs) == 1


def test_reset_and_separate_conversations(pipeline, photo, drawing):
    alone = pipeline.chat(QUESTION, [photo], max_new_tokens=8)
    other = pipeline.conversation()
    assert other.chat(QUESTION, [photo], max_new_tokens=8) == alone
    pipeline.reset()
    assert pipeline.chat(QUESTION, [photo], max_new_tokens=8) == alone
    other.close()
    assert other.turns == [] and other.pictures == []


def test_a_private_conversation_is_remembered_for_itself_and_until_it_is_closed(pipeline, model, photo):
    store, cache = pipeline.decoder.prefixes, pipeline.vision.cache
    pipeline.reset()
    pipeline.clear_kv_cache()
    pipeline.clear_image_cache()
    runs = []
    hook = model.model.vision_tower_aux.register_forward_hook(lambda *_: runs.append(1))
    try:
        open_one = pipeline.conversation()
        answer = open_one.chat(QUESTION, [photo], max_new_tokens=4)
        shared = store.held_bytes, cache.held_bytes
        one, two = (pipeline.conversation(private=True) for _ in range(2))
        for private in (one, two):
            # Neither the open conversation's past nor the other private one's is found.
            said = private.chat(QUESTION, [photo], max_new_tokens=4)
            assert said == answer and said.cached_tokens == 0
        again = copy.copy(one).chat("And?", [photo], max_new_tokens=4)
        assert again.cached_tokens > 100
        stream = two.chat("And?", max_new_tokens=4, stream=True)
        next(stream)
        two.reset()
        list(stream)
        one.close()
        assert (store.held_bytes, cache.held_bytes) == shared
    finally:
        hook.remove()
    # The second picture of `again` was found, and everybody else's was seen anew.
    assert len(runs) == 3


@pytest.mark.parametrize("prefix", ["", "hd_"], ids=["standard", "hd"])
def test_stream_joins_to_the_text(request, photo, prefix):
    pipeline = Pipeline(request.getfixturevalue(f"{prefix}model"), request.getfixturevalue(f"{prefix}processor"))
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=24)
    pipeline.reset()
    pieces = list(pipeline.chat(QUESTION, [photo], max_new_tokens=24, stream=True))
    assert "".join(pieces) == answer.text and len(pieces) > 1
    assert pipeline._own.turns == [(f"<image>\n{QUESTION}", answer.text)]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_join_for_any_ids(processor, seed):
    """Pieces join to the text for random ids: byte pieces in every order, special tokens, white space."""
    tokenizer = processor.tokenizer
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300 if seed % 2 else 400, (60,), generator=generator)
    pieces = []
    stream = PieceStream(tokenizer, pieces.append)
    stream.put(torch.zeros(1, 5, dtype=torch.long))
    for token in ids:
        stream.put(token[None])
    stream.end()
    assert "".join(pieces) == decode_answer(tokenizer, ids.tolist())


def test_characters_of_several_bytes_come_whole(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("Grüße 🙂 日本", add_special_tokens=False).input_ids
    pieces = []
    stream = PieceStream(tokenizer, pieces.append)
    stream.put(torch.zeros(1, 1))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == "Grüße 🙂 日本"
    assert not any("\ufffd" in piece for piece in pieces)


def test_abandoned_stream_stops_and_leaves_no_trace(pipeline, model, photo):
    steps = []
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        stream = pipeline.chat(QUESTION, [photo], max_new_tokens=500, stream=True)
        next(stream)
        stream.close()
    finally:
        hook.remove()
    assert len(steps) < 400
    assert pipeline._own.turns == []


def test_errors_in_a_stream_come_before_it_begins(pipeline, photo):
    with pytest.raises(PromptError, match="trained on at most 2048"):
        pipeline.chat("word " * 700, [photo], stream=True)
    with pytest.raises(PictureError, match="no such file"):
        pipeline.chat(QUESTION, ["/no/such/file.png"], stream=True)


def test_errors_while_streaming_reach_the_reader(pipeline, photo, monkeypatch):
    monkeypatch.setattr(pipeline.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pipeline.chat(QUESTION, [photo], stream=True))


def test_stream_keeps_the_callers_backend(pipeline, model, photo):
    layers = []
    hook = model.model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda *_: layers.append(mg_fast.ops.backend.requested())
    )
    try:
        with mg_fast.use_backend("reference"):
            list(pipeline.chat(QUESTION, [photo], max_new_tokens=2, stream=True))
    finally:
        hook.remove()
    assert layers == ["reference"]


def test_stream_keeps_the_callers_autocast(pipeline, model, photo):
    dtypes = []
    hook = model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda *a: dtypes.append(a[-1].dtype)
    )
    try:
        with torch.autocast("cpu", torch.bfloat16):
            list(pipeline.chat(QUESTION, [photo], max_new_tokens=2, stream=True))
    finally:
        hook.remove()
    assert set(dtypes) == {torch.bfloat16}


def test_sampling_is_seeded_and_leaves_the_global_state(pipeline, photo):
    def ask(seed):
        pipeline.reset()
        return pipeline.chat(QUESTION, [photo], max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed).token_ids

    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert ask(1) == ask(1) != ask(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_picture_kinds(model, processor, photo):
    # There is no cache, because it would answer for all of these pictures.
    pipeline = Pipeline(model, processor, image_cache_bytes=0)
    with Image.open(photo) as image:
        rgb = image.convert("RGB")
    array = np.asarray(rgb)
    expected = pipeline.see(photo)
    assert expected.shape == (25, 64)
    for kind in (
        str(photo),
        photo.read_bytes(),
        io.BytesIO(photo.read_bytes()),
        rgb,
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ):
        assert torch.equal(pipeline.see(kind), expected)
        pipeline.reset()
        pipeline.chat(QUESTION, kind if not isinstance(kind, io.BytesIO) else [photo], max_new_tokens=1)


def test_where_the_pictures_stand(pipeline, photo, drawing):
    before = pipeline.chat("Compare them.", [photo, drawing], max_new_tokens=8)
    pipeline.reset()
    assert pipeline.chat("<image>\n<image>\nCompare them.", [photo, drawing], max_new_tokens=8) == before
    pipeline.reset()
    with pytest.raises(PromptError, match=r"the text has 1 <image> tag\(s\), but 2 picture\(s\) came"):
        pipeline.chat("<image>\nCompare them.", [photo, drawing])
    with pytest.raises(PromptError, match=r"the text has 1 <image> tag\(s\), but 0 picture\(s\) came"):
        pipeline.chat("<image>\nCompare them.")


def test_a_tag_the_model_writes_is_not_a_picture(pipeline, photo, monkeypatch):
    monkeypatch.setattr("mg_fast.engine.answers.decode_answer", lambda tokenizer, ids: "see <image> there")
    pipeline.chat(QUESTION, [photo], max_new_tokens=2)
    assert pipeline.chat("And?", max_new_tokens=2).image_tokens == 25


@pytest.mark.parametrize(
    "call,message",
    [
        (dict(text=""), "expected a user text"),
        (dict(text="   "), "expected a user text"),
        (dict(text="hi", temperature=-1), "temperature: expected a number of 0 or more, got -1"),
        (dict(text="hi", max_new_tokens=0), "max_new_tokens: expected a whole number of 1 or more, got 0"),
        (dict(text="word " * 2000, allow_long=True), "tokens, the model has 4096 positions"),
        (dict(text="word " * 700), "tokens, the model was trained on at most 2048"),
    ],
)
def test_bad_requests(pipeline, call, message):
    with pytest.raises(PromptError, match=message):
        pipeline.chat(call.pop("text"), **call)
    assert pipeline._own.turns == []


def test_long_prompts_where_allowed(pipeline):
    answer = pipeline.chat("word " * 700, max_new_tokens=2, allow_long=True)
    assert 2048 < answer.prompt_tokens < 4096


def test_beams(pipeline, photo):
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=8, num_beams=2)
    assert len(answer.token_ids) <= 8
    with pytest.raises(PromptError, match="beams cannot be streamed"):
        pipeline.chat(QUESTION, max_new_tokens=8, num_beams=2, stream=True)


def test_unknown_options_are_not_swallowed(pipeline):
    with pytest.raises(ValueError, match="max_tokens"):
        pipeline.chat("hi", max_tokens=3)


def test_profile(pipeline, photo):
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=4, profile=True)
    names = [stage.name for stage in answer.stages]
    assert names == [
        "preprocess",
        "LR tower",
        "HR tower",
        "patch info mining",
        "projector",
        "prefill to first token",
        "decode",
    ]
    assert all(stage.seconds > 0 for stage in answer.stages)
    table = mg_fast.runtime.meter.format_stages(answer.stages)
    assert all(name in table for name in names)


def test_finish_reason_stop(pipeline, model, photo, monkeypatch):
    free = pipeline.chat(QUESTION, [photo], max_new_tokens=6)
    pipeline.reset()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [free.token_ids[2]])
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=6)
    assert (
        answer.finish_reason == "stop"
        and answer.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]
    )


def test_an_empty_question_with_a_picture(pipeline, photo):
    with pytest.raises(PromptError, match="expected a user text, got '  '"):
        pipeline.chat("  ", [photo])


def test_interleaved_streams_keep_the_one_that_ends_first(pipeline, photo, caplog):
    first = pipeline.chat(QUESTION, [photo], max_new_tokens=3, stream=True)
    second = pipeline.chat("And this?", max_new_tokens=3, stream=True)
    list(first)
    with caplog.at_level("WARNING"):
        list(second)
    assert "not kept" in caplog.text
    assert len(pipeline._own.turns) == len(pipeline._own.pictures) == 1
    assert pipeline.chat("And?", max_new_tokens=2).image_tokens == 25


def test_reset_while_a_stream_is_read(pipeline, photo):
    stream = pipeline.chat(QUESTION, [photo], max_new_tokens=20, stream=True)
    next(stream)
    pipeline.reset()
    list(stream)
    assert pipeline._own.turns == [] and pipeline._own.pictures == []
    assert pipeline.chat("Hello?", max_new_tokens=2).image_tokens == 0


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(top_p=0.5), "top_p=0.5 is for sampling"),
        (dict(temperature=float("nan")), "temperature: expected a number of 0 or more"),
        (dict(temperature=float("inf")), "temperature: expected a number of 0 or more"),
        (dict(temperature="0.7"), "temperature: expected a number of 0 or more, got '0.7'"),
        (dict(temperature=0.7, top_p=2), "top_p: expected a share from 0 to 1, got 2"),
        (dict(temperature=0.7, seed="a"), "seed: expected a whole number of at most 64 bits, got 'a'"),
        (dict(temperature=0.7, seed=2**70), "seed: expected a whole number of at most 64 bits"),
        (dict(stopping_criteria=lambda ids, scores: True), "stopping_criteria: expected a list of criteria, got one"),
        (dict(max_new_tokens=2.5), "max_new_tokens: expected a whole number"),
        (dict(num_return_sequences=3), "num_return_sequences is not an option here"),
        (dict(do_sample=True), "do_sample is not an option here: temperature decides"),
        (dict(attention_mask=1), "attention_mask is not an option here: it is made of the text and its images"),
        (dict(prefill_chunk_size=8), "prefill_chunk_size cuts a prompt"),
    ],
)
def test_options_that_would_be_ignored(pipeline, photo, options, message):
    with pytest.raises(PromptError, match=message):
        pipeline.chat(QUESTION, [photo], **options)


def test_a_stream_is_measured_too(pipeline, photo):
    whole = pipeline.chat(QUESTION, [photo], max_new_tokens=4, profile=True)
    pipeline.reset()
    pipeline.clear_image_cache()
    stream = pipeline.chat(QUESTION, [photo], max_new_tokens=4, profile=True, stream=True)
    assert "".join(stream) == whole.text and stream.answer.token_ids == whole.token_ids
    assert [stage.name for stage in stream.answer.stages] == [stage.name for stage in whole.stages]
    assert {"preprocess", "decode"} < {stage.name for stage in whole.stages}


def test_other_criteria_end_an_answer_too(pipeline, photo):
    free = pipeline.chat(QUESTION, [photo], max_new_tokens=8)
    pipeline.reset()
    answer = pipeline.chat(QUESTION, [photo], max_new_tokens=8, eos_token_id=free.token_ids[3])
    assert (
        answer.finish_reason == "stop"
        and answer.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]
    )
    pipeline.reset()
    answer = pipeline.chat(
        QUESTION, [photo], max_new_tokens=8, stopping_criteria=[lambda ids, scores, **_: torch.tensor([True])]
    )
    assert answer.finish_reason == "stop" and len(answer.token_ids) == 1


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(backend="triton"), r"backend 'triton' cannot run \w+: triton runs on CUDA tensors"),
        (dict(device="warp"), "unknown device 'warp'"),
        (dict(device="cuda"), "torch finds no CUDA device here"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is_read(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(mg_fast.BackendError, match=message):
        mg_fast.load(tmp_path / "not read", **options)


def test_urls_where_asked_for(pipeline, photo):
    import base64

    url = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    assert torch.equal(pipeline.see(url, allow_urls=True), pipeline.see(photo))
    with pytest.raises(PictureError, match="allow_urls=True"):
        pipeline.chat(QUESTION, [url])
    assert pipeline.chat(QUESTION, [url], allow_urls=True, max_new_tokens=2).image_tokens == 25


def test_thin_pictures_are_named(pipeline, photo, tmp_path):
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 2000)).save(thin)
    with pytest.raises(PictureError, match=rf"^{thin}: 1x2000 pixels: too thin"):
        pipeline.chat(QUESTION, [photo, thin])


def test_attention_is_the_one_asked_for(standard, photo):
    answers = []
    for attention in ("sdpa", "eager"):
        pipeline = mg_fast.load(standard, device="cpu", template="vicuna_v1", attn_implementation=attention)
        assert pipeline.model.config.text_config._attn_implementation == attention
        answers.append((pipeline.chat(QUESTION, [photo], max_new_tokens=8), pipeline.chat("And?", max_new_tokens=8)))
    assert answers[0] == answers[1]


def test_warm_up_leaves_conversations_alone(pipeline, photo):
    pipeline.chat(QUESTION, [photo], max_new_tokens=4)
    turns = list(pipeline._own.turns)
    seconds = pipeline.warm_up()
    # The towers were packed for the question before.
    assert seconds["all"] > 0 and seconds["towers packed"] > 0
    assert pipeline._own.turns == turns
    assert pipeline.chat("And?", max_new_tokens=4).image_tokens == 25


def test_image_tokens_are_the_callers_own(pipeline, photo):
    tokens = pipeline.see(photo)
    expected = tokens.clone()
    tokens.mul_(2).requires_grad_()
    assert torch.equal(pipeline.see(photo), expected)
