"""`chat_batch` answers each question as if it were asked alone, in order; an error stands in its question's place."""

import copy
import gc
import logging

import pytest
import torch
from PIL import Image

from mg_fast import Pipeline, PromptError
from mg_fast.decoding.kv_cache import KVCache
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from tests.families import ORIGINAL, OWN, family

TEXTS = (
    "What is it?",
    "Hello.",
    "Compare these two, please, and be brief about it.",
    "Who made it, and when, and why?",
)


pytestmark = pytest.mark.usefixtures("one_thread")


def mixed(own, count=9):
    """Questions of different lengths, with no, one and two pictures, in every accepted form."""
    first, second = own.pictures
    questions = []
    for i in range(count):
        text = TEXTS[i % 4] + " Well?" * (i % 3)
        pictures = [[], [first], [first, second], [second]][i % 4]
        questions.append(
            [(text, pictures), {"text": text, "images": pictures}, {"text": text, "images": tuple(pictures)}][i % 3]
        )
    return [*questions, "And a text alone."]


def parts(question):
    if isinstance(question, str):
        return question, []
    return tuple(question.values()) if isinstance(question, dict) else question


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OWN, *ORIGINAL])
def test_each_as_if_alone(name):
    own = family(name)
    questions = mixed(own, 5)
    answers = own.pipeline().chat_batch(questions, max_new_tokens=8, progress=False, batch_size=4)
    for question, answer in zip(questions, answers, strict=True):
        text, pictures = parts(question)
        assert answer.token_ids == own.plain([("<image>\n" * len(pictures) + text, None)], list(pictures), 8)
        assert answer.image_tokens == len(pictures) * own.model.config.tokens_per_picture and answer.error is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0, "repetition_penalty": 1.4}, {"eos_token_id": [*range(3, 120)]}], ids=str
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_of_any_size(own, batch_size, options):
    questions = mixed(own)
    answers = own.pipeline().chat_batch(questions, max_new_tokens=8, progress=False, batch_size=batch_size, **options)
    alone = own.pipeline()
    for question, answer in zip(questions, answers, strict=True):
        text, pictures = parts(question)
        assert answer == alone.conversation().chat(text, list(pictures), max_new_tokens=8, **options)


def test_it_leaves_the_conversation(own):
    pipeline = own.pipeline()
    pipeline.chat("Hello.", max_new_tokens=2)
    turns = list(pipeline._own.turns)
    pipeline.chat_batch(mixed(own), max_new_tokens=2, progress=False)
    assert pipeline._own.turns == turns and pipeline._own.pictures == []


@pytest.mark.parametrize("questions", [list, tuple, iter], ids=str)
def test_kinds_of_lists(own, questions):
    for texts in ([], ["Hello.", "Hi."]):
        answers = own.pipeline().chat_batch(questions(texts), max_new_tokens=2, progress=False)
        assert [len(answer.token_ids) for answer in answers] == [2] * len(texts)


@pytest.mark.parametrize("image_cache_bytes", [2**28, 0])
def test_a_picture_is_encoded_once(own, monkeypatch, tmp_path, image_cache_bytes):
    runs = []
    encode = PictureEncoder.encode
    monkeypatch.setattr(PictureEncoder, "encode", lambda self, *a, **k: runs.append(1) or encode(self, *a, **k))
    copied = tmp_path / "the same.bmp"
    with Image.open(own.pictures[0]) as picture:
        picture.convert("RGB").save(copied)
    questions = [
        ("What?", [own.pictures[0]]),
        ("Who?", [copied]),
        ("Both?", [own.pictures[0], copied]),
        ("Hm?", [own.pictures[1]]),
    ]
    own.pipeline(image_cache_bytes=image_cache_bytes).chat_batch(questions, max_new_tokens=2, progress=False)
    assert len(runs) == 2


def bad_items(own, tmp_path):
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 2000)).save(thin)
    broken = tmp_path / "broken.png"
    broken.write_bytes(own.pictures[0].read_bytes()[:500])
    return [
        (("What?", ["/no/such/file.png"]), "no such file"),
        (("What?", [own.pictures[0], thin]), "too thin"),
        (("What?", [broken]), "broken.png"),
        ("word " * 700, "trained on at most 2048"),
        ("word " * 3000, "the model has 4096 positions"),
        ("", "expected a user text"),
        (None, "expected a text, "),
        (17, "expected a text, "),
        (("a", [], "b"), "expected a text, "),
        ({"text": "a", "pictures": []}, "expected a text, "),
        ({"images": []}, "expected a text, "),
        ((5, None), "expected a user text"),
        (("<image>\nWhat?", []), r"1 <image> tag\(s\), but 0 picture"),
        (("What?", [17]), "17|int"),
        (("What?", 17), "17|int"),
        (("What?", [None]), "None"),
        (("What?", ["http://127.0.0.1/a.png"]), "allow_urls"),
    ]


def test_bad_items_in_their_place(own, tmp_path):
    bad = bad_items(own, tmp_path)
    questions, good = [], []
    for i, (item, _) in enumerate(bad):
        questions += [item, (f"Number {i}?", [own.pictures[i % 2]])]
        good.append(2 * i + 1)
    answers = own.pipeline().chat_batch(questions, max_new_tokens=3, progress=False)
    alone = own.pipeline()
    for i, (item, message) in enumerate(bad):
        given = answers[2 * i]
        assert given.finish_reason == "error" and given.text == "" and given.token_ids == [], item
        with pytest.raises(type(given.error), match=message):
            raise given.error
    for i in good:
        assert answers[i] == alone.conversation().chat(*questions[i], max_new_tokens=3)


def test_unexpected_errors_are_told_of_once_each(own, monkeypatch, caplog):
    def see(images, before, *, allow_urls):
        raise images[0]

    pipeline = own.pipeline()
    monkeypatch.setattr(pipeline.vision, "see_all", see)
    errors = [
        KeyError("a"),
        KeyError("b"),
        ZeroDivisionError("c"),
        OSError("d"),
        PromptError("e"),
        FloatingPointError("f"),
    ]
    answers = pipeline.chat_batch([("What?", [error]) for error in errors], progress=False)
    assert [answer.error for answer in answers] == errors
    records = [record for record in caplog.records if record.name == "mg_fast.engine.batch"]
    assert sorted(record.getMessage().split()[-1] for record in records) == ["KeyError", "ZeroDivisionError"]
    assert caplog.text.count(", in see\n") == 2


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no class for a broken device")
def test_a_broken_device_ends_the_batch(own, monkeypatch):
    def see(images, before, *, allow_urls):
        calls.append(images)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    pipeline, calls = own.pipeline(), []
    monkeypatch.setattr(pipeline.vision, "see_all", see)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        pipeline.chat_batch([("What?", ["a"]), ("And?", ["b"])], progress=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "call,message",
    [
        (dict(questions="Hello."), "expected a list of questions, got str"),
        (dict(questions=None), "expected a list of questions, got NoneType"),
        (dict(questions={"text": "Hello."}), "expected a list of questions, got dict"),
        (dict(questions=["a"], batch_size=0), "batch_size: expected a whole number"),
        (dict(questions=["a"], batch_size=2.0), "batch_size: expected a whole number"),
        (dict(questions=["a"], top_p=0.5), "top_p=0.5 is for sampling"),
        (dict(questions=["a"], max_new_tokens=0), "max_new_tokens: expected"),
        (dict(questions=["a"], num_return_sequences=2), "num_return_sequences is not an option here"),
        (dict(questions=["a"], streamer=object()), "streamer is not an option here"),
    ],
)
def test_bad_calls(own, call, message):
    with pytest.raises(PromptError, match=message):
        own.pipeline().chat_batch(**call)


def test_the_progress_bar(own, capsys):
    pipeline = own.pipeline()
    pipeline.chat_batch(["a", "", "b"], max_new_tokens=1, progress=False)
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    pipeline.chat_batch(["a", "", "b"], max_new_tokens=1)
    shown = capsys.readouterr()
    assert shown.out == "" and "questions: 100%" in shown.err and "3/3" in shown.err


def test_room_near_the_end_of_the_context(own):
    """The answer to a long prompt ends early; short prompts of the same list have all the room that they ask for."""
    model = copy.deepcopy(own.model)
    model.config.text_config.max_position_embeddings = 220
    pipeline, free = Pipeline(model, own.processor), own.pipeline()
    questions = ["word " * 16, "Hello.", "word " * 12, "Hi.", "word " * 15]
    answers = pipeline.chat_batch(questions, max_new_tokens=60, progress=False, eos_token_id=None)
    lengths = set()
    for text, answer in zip(questions, answers):
        expected = free.conversation().chat(text, max_new_tokens=60, eos_token_id=None)
        room = min(60, 220 - answer.prompt_tokens)
        assert (
            answer.token_ids == expected.token_ids[:room]
            and len(answer.token_ids) == room
            and answer.finish_reason == "length"
        )
        lengths.add(room)
    assert len(lengths) > 2


def test_too_little_memory_halves_a_batch(own, monkeypatch, caplog):
    pipeline = own.pipeline()
    whole, rows = pipeline.model.generate, []

    def generate(**inputs):
        rows.append(len(inputs["input_ids"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(**inputs)

    monkeypatch.setattr(pipeline.model, "generate", generate)
    questions = mixed(own)
    answers = pipeline.chat_batch(questions, max_new_tokens=4, progress=False, batch_size=8)
    monkeypatch.undo()
    alone = own.pipeline()
    assert answers == [alone.conversation().chat(*parts(question), max_new_tokens=4) for question in questions]
    assert max(rows) == 8 and min(rows) <= 2 and "two halves" in caplog.text


def test_too_little_memory_for_one(own, monkeypatch):
    pipeline = own.pipeline()
    whole = pipeline.model.generate

    def generate(**inputs):
        if "image_tokens" in inputs:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(**inputs)

    monkeypatch.setattr(pipeline.model, "generate", generate)
    answers = pipeline.chat_batch(["Hello.", ("What?", [own.pictures[0]]), "Hi."], max_new_tokens=2, progress=False)
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert isinstance(answers[1].error, torch.OutOfMemoryError)


def test_too_little_memory_for_a_picture(own, monkeypatch):
    encode = PictureEncoder.encode
    calls = []

    def short(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, *arguments, **options)

    monkeypatch.setattr(PictureEncoder, "encode", short)
    questions = [("What is it, please?", [own.pictures[0]]), ("Who?", [own.pictures[1]])]
    answers = own.pipeline().chat_batch(questions, max_new_tokens=2, progress=False)
    assert [answer.finish_reason for answer in answers] == ["error", "length"]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 3}], ids=["greedy", "sampled"])
def test_a_row_that_is_not_finite_fails_alone(own, sampling, caplog):
    # Other tests of this process may hold pipelines with caches of their own.
    before = [x for x in gc.get_objects() if type(x) is KVCache]
    pipeline = own.pipeline()
    embedding = pipeline.model.get_input_embeddings()
    rare = own.processor.tokenizer("%", add_special_tokens=False).input_ids[-1]

    def spoil(module, arguments, output):
        return torch.where((arguments[0] == rare)[..., None], torch.nan, output)

    questions = ["Hello.", "What is it?", "What is % of it?", ("Look.", [own.pictures[0]]), "Well?"]
    hook = embedding.register_forward_hook(spoil)
    try:
        answers = pipeline.chat_batch(questions, max_new_tokens=1, progress=False, **sampling)
    finally:
        hook.remove()
    assert [answer.finish_reason for answer in answers] == ["length", "length", "error", "length", "length"]
    assert isinstance(answers[2].error, FloatingPointError)
    # The kept error does not keep the memory of the failed attempt.
    gc.collect()
    caches = [x for x in gc.get_objects() if type(x) is KVCache and not any(x is other for other in before)]
    idle = pipeline.decoder._idle
    assert [cache for cache in caches if idle is None or cache is not idle.cache] == []
    if not sampling:
        alone = own.pipeline()
        assert [a for i, a in enumerate(answers) if i != 2] == [
            alone.conversation().chat(*parts(q), max_new_tokens=1) for i, q in enumerate(questions) if i != 2
        ]


def test_sampling_is_repeatable_and_not_alike_everywhere(own):
    pipeline = own.pipeline()
    questions = ["Tell me a story."] * 6
    options = dict(max_new_tokens=10, temperature=1.5, progress=False)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for batch_size in (1, 2, 6):
        first, again, other = (
            [answer.token_ids for answer in pipeline.chat_batch(questions, batch_size=batch_size, seed=seed, **options)]
            for seed in (5, 5, 6)
        )
        assert first == again != other
        # The same question draws different numbers each time, in one batch or in several.
        assert len({tuple(ids) for ids in first}) == 6
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_ends_of_rows(own):
    """If a criterion or a string ended a row, its answer has no filling."""
    pipeline = own.pipeline()
    questions = ["Tell me a story.", "Hello.", ("What?", [own.pictures[0]])]
    free = [pipeline.conversation().chat(*parts(question), max_new_tokens=10) for question in questions]
    end = free[0].token_ids[4]

    def ends(ids, scores):
        return ids[:, -1] == end

    answers = pipeline.chat_batch(questions, max_new_tokens=10, progress=False, stopping_criteria=[ends])
    for question, answer in zip(questions, answers):
        alone = pipeline.conversation().chat(*parts(question), max_new_tokens=10, stopping_criteria=[ends])
        assert answer == alone
    assert len(answers[0].token_ids) <= 5
    strings = ["tio"]
    answers = pipeline.chat_batch(questions, max_new_tokens=10, progress=False, stop_strings=strings)
    alone = [pipeline.conversation().chat(*parts(q), max_new_tokens=10, stop_strings=strings) for q in questions]
    assert answers == alone and len({len(answer.token_ids) for answer in answers}) > 1


def test_the_reference_answers_batches_too(own):
    pipeline = Pipeline(own.model, own.processor, backend="reference")
    questions = mixed(own, 4)
    answers = pipeline.chat_batch(questions, max_new_tokens=4, progress=False)
    alone = own.pipeline()
    assert [a.token_ids for a in answers] == [
        alone.conversation().chat(*parts(q), max_new_tokens=4).token_ids for q in questions
    ]


def test_beams_in_batches(own, caplog):
    with caplog.at_level(logging.WARNING):
        answers = own.pipeline().chat_batch(mixed(own, 4), max_new_tokens=4, num_beams=2, progress=False)
    for question, answer in zip(mixed(own, 4), answers):
        text, pictures = parts(question)
        assert answer.token_ids == own.plain(
            [("<image>\n" * len(pictures) + text, None)], list(pictures), 4, num_beams=2
        )
