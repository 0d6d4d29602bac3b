"""What lmms-eval's requests become for `chat_batch`, and what is refused. lmms-eval is not needed for these tests."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
from PIL import Image

from mg_fast.errors import BackendError, CheckpointError, PromptError
from mg_fast.integrations import lmms_eval
from mg_fast.integrations.lmms_eval import BATCHES_TOGETHER, NEW_TOKENS, ChatBatchModel, answer_options, question

PICTURE = Image.new("RGB", (8, 8), "red")


class Recorder:
    """A pipeline that answers every question with a text of its own, and keeps what it is asked."""

    def __init__(self, faults=()):
        self.calls, self.faults = [], set(faults)

    def chat_batch(self, questions, *, batch_size, progress, **options):
        assert not progress
        self.calls.append(([one["text"] for one in questions], batch_size, options))
        return [
            SimpleNamespace(text="", error=PromptError(f"{one['text']} is too long"))
            if one["text"] in self.faults
            else SimpleNamespace(text=f"{one['text']}, answered. Q: and more\n\nand more", error=None)
            for one in questions
        ]


def requests(texts, options=None, pictures=lambda doc: []):
    """Requests of one task as lmms-eval makes them; `options` may be a list with those of each."""
    each = options if isinstance(options, list) else [options or {}] * len(texts)
    return [
        SimpleNamespace(args=(text, dict(own), pictures, number, "task", "test"))
        for number, (text, own) in enumerate(zip(texts, each))
    ]


def model_of(pipeline, documents=100, **options):
    model = ChatBatchModel(pipeline, **options)
    # lmms-eval's evaluator sets it.
    model.task_dict = {"task": {"test": [{"number": number} for number in range(documents)]}}
    return model


# ---- options of answers


@pytest.mark.parametrize(
    "given, options, stops",
    [
        ({}, {"temperature": 0.0}, []),
        # Where a task names no stop string, lmms-eval fills in an empty line.
        ({"until": ["\n\n"], "do_sample": False}, {"temperature": 0.0}, []),
        ({"until": ["ASSISTANT:", "\n\n"]}, {"temperature": 0.0}, ["ASSISTANT:", "\n\n"]),
        ({"until": "Q:"}, {"temperature": 0.0}, ["Q:"]),
        # The options of MME.
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
            {"max_new_tokens": 16, "temperature": 0.0},
            [],
        ),
        # lmms-eval's MM-Vet names a temperature and turns sampling off.
        ({"temperature": 0.2, "do_sample": False, "top_p": 1.0}, {"temperature": 0.0}, []),
        ({"temperature": 0.2, "top_p": 0.9, "seed": 3}, {"temperature": 0.2, "top_p": 0.9, "seed": 3}, []),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1.0, "top_k": 5}, []),
        # The original's MMMU.
        (
            {"do_sample": True, "temperature": 1, "num_beams": 5, "top_p": None, "max_new_tokens": 128},
            {"temperature": 1.0, "num_beams": 5, "max_new_tokens": 128},
            [],
        ),
        (None, {"temperature": 0.0}, []),
    ],
)
def test_options(given, options, stops):
    before = dict(given or {})
    assert answer_options(given) == ({"max_new_tokens": NEW_TOKENS, **options}, stops, [])
    assert dict(given or {}) == before


def test_options_without_use_are_named_once(caplog):
    assert answer_options({"image_aspect_ratio": "original"})[2] == ["image_aspect_ratio"]
    asked = requests(["a", "b", "c"], [{"image_aspect_ratio": "pad", "max_new_tokens": n} for n in (1, 2, 3)])
    with caplog.at_level(logging.WARNING):
        model_of(Recorder()).generate_until(asked)
    assert [record.getMessage() for record in caplog.records] == [
        "options of the task that mg_fast has no use for: image_aspect_ratio"
    ]


# ---- questions


def test_tags_stay_where_there_is_one_for_each_picture():
    assert question("Is <image> like <image>?", [PICTURE] * 2, "t")["text"] == "Is <image> like <image>?"
    assert question("Is <image> red?", [PICTURE] * 2, "t")["text"] == "Is < image> red?"
    assert question("What is <image>?", [], "t") == {"text": "What is < image>?", "images": []}
    assert question("Is <image 1> red?", [PICTURE], "t") == {"text": "Is <image 1> red?", "images": [PICTURE]}


def test_a_video_is_refused():
    with pytest.raises(BackendError, match="task t: expected pictures.*'film.mp4'"):
        question("What?", ["film.mp4"], "t")


def test_pictures_are_those_of_the_document():
    seen = []

    def pictures(document):
        seen.append(document["number"])
        return [PICTURE]

    pipeline = Recorder()
    model_of(pipeline).generate_until(requests(["a", "b"], pictures=pictures))
    assert seen == [0, 1] and pipeline.calls[0][0] == ["a", "b"]
    # A task without pictures may return None.
    assert model_of(pipeline).generate_until(requests(["c"], pictures=lambda _: None)) == [
        "c, answered. Q: and more\n\nand more"
    ]


# ---- batches


def test_requests_with_equal_options_are_asked_together_and_answers_keep_their_order():
    pipeline = Recorder()
    options = [{"max_new_tokens": 5 + number % 2, "until": ["Q:"]} for number in range(6)]
    answers = model_of(pipeline, batch_size="4").generate_until(requests("abcdef", options))
    assert answers == [f"{letter}, answered." for letter in "abcdef"]
    assert [(texts, size, given["max_new_tokens"]) for texts, size, given in pipeline.calls] == [
        (["a", "c", "e"], 4, 5),
        (["b", "d", "f"], 4, 6),
    ]


def test_few_pictures_are_in_memory_at_a_time():
    pipeline, most = Recorder(), BATCHES_TOGETHER * 2
    model_of(pipeline, batch_size=2).generate_until(requests([f"q{n}" for n in range(40)]))
    assert [len(texts) for texts, _, _ in pipeline.calls] == [most, most, 40 - 2 * most]


@pytest.mark.parametrize("size, found", [(None, 16), ("auto", 16), ("auto:4", 16), ("3", 3), (7, 7)])
def test_batch_sizes(size, found):
    assert ChatBatchModel(Recorder(), batch_size=size).batch_size == found


@pytest.mark.parametrize("size", [0, "0", -1, "many", 2.5])
def test_wrong_batch_sizes(size):
    with pytest.raises(BackendError, match="batch_size: expected a whole number"):
        ChatBatchModel(Recorder(), batch_size=size)


# ---- faults


def test_a_question_that_cannot_be_answered_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        answers = model_of(Recorder(faults="bd")).generate_until(requests("abc"))
    assert answers[1] == "" and answers[2].startswith("c")
    assert "1 of 3 questions could not be answered" in caplog.text and "b is too long" in caplog.text
    with pytest.raises(PromptError, match="b is too long"):
        model_of(Recorder(faults="bd"), strict=True).generate_until(requests("abc"))


def test_tasks_of_other_types_are_refused():
    with pytest.raises(NotImplementedError, match="generate_until.*likelihood"):
        ChatBatchModel(Recorder()).loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until.*rounds"):
        ChatBatchModel(Recorder()).generate_until_multi_round([])


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(BackendError, match="pretrained=DIR"):
        ChatBatchModel()
    with pytest.raises(BackendError, match="unknown dtipe; expected pretrained, device, strict, dtype, backend"):
        ChatBatchModel("nano", dtipe="float32")
    with pytest.raises(CheckpointError):
        ChatBatchModel("no_such_checkpoint")
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(BackendError, match="is MM-Interleaved"):
        ChatBatchModel(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_it_is_imported_without_lmms_eval():
    with pytest.raises(BackendError, match=r"lmms-eval is not installed here: pip install 'mg_fast\[eval\]'"):
        lmms_eval.LmmsEvalModel  # noqa: B018


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        lmms_eval.Other  # noqa: B018
