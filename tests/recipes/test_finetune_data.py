"""Samples of a training: read by place, left out where broken, and put into batches."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from recipes.finetune.config import ConfigError, SourceConfig, parse_config
from recipes.finetune.data import FineTuneData, SkippedSamples, dataset_rows, open_sources, to_batch
from recipes.finetune.labels import EncodedSample, encode_turns
from recipes.finetune.order import EMPTY, SampleOrder, grouped_order
from recipes.finetune.samples import BadSample, read_sample
from tests.families import family
from tests.recipes.finetuning import PICTURES, SAMPLES, sample, write_samples

PLACES = 25


@pytest.fixture
def one_folder(tmp_path, one_thread):
    """A folder with the pictures of SAMPLES, one that is cut off, and one that is no picture."""
    for picture in PICTURES:
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    whole = io.BytesIO()
    Image.open(PICTURES[0]).convert("RGB").save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


def data_of(folder, samples, *, longest=400, plain=False, **source) -> FineTuneData:
    file = write_samples(folder, samples)
    deep = f'{{"a]\\"": {"[" * 200_000}"[{{"{"]" * 200_000}, "conversations": []}}'
    file.write_text(file.read_text().replace("{}", deep))
    [config] = parse_config(
        {"stage": 2, "model": "m", "output": "o", "data": [{"file": str(file), "pictures": str(folder), **source}]}
    ).data
    processor = family("standard").processor
    template = "plain" if plain else "vicuna_v1"

    def encode(turns) -> EncodedSample:
        return encode_turns(processor, template, turns, longest=longest)

    sources = open_sources([config], plain=plain)
    return FineTuneData(
        sources, encode, processor.image_processor, SkippedSamples(folder / "skipped.jsonl"), plain=plain
    )


def told(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


class Deep(dict):
    """Stands for a sample with lists within lists; json cannot write so many."""


# What is wrong with a sample, and what is told of it. The first kind is seen by the form of the sample, the second only
# when it is read as a whole.
BY_FORM = {
    "no object": (3, "expected an object with conversations, got int"),
    "no turns": ({"conversations": []}, "expected a list of turns under conversations, got []"),
    "no text": ({"conversations": [{"from": "human"}]}, "turn 1: expected from and value"),
    "turn order": (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        "turn 1 is from 'gpt', expected 'human'",
    ),
    "same speaker twice": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "turn 2 is from 'human', expected 'gpt'",
    ),
    "no answer": (sample("a", "b", "c"), "turn 3 is a question without an answer"),
    "empty answer": (sample("a", " \n"), "turn 2 is an empty answer"),
    "empty question": (sample("", "b"), "turn 1 is an empty question"),
    "tag without picture": (sample("<image>\na", "b"), "1 <image> tag(s) for 0 picture(s)"),
    "picture without tag": (sample("a", "b", image="photo.png"), "0 <image> tag(s) for 1 picture(s)"),
    "two tags": (sample("<image><image>a", "b", image="photo.png"), "2 <image> tag(s) for 1 picture(s)"),
    "tag in answer": (sample("a", "<image>", image="photo.png"), "turn 2 is an answer and holds <image>"),
    "no such picture": (sample("<image>\na", "b", image="gone.png"), "gone.png: no such file"),
    "picture is a number": (sample("<image>\na", "b", image=7), "image: expected a path, or a list of paths, got 7"),
    "half a surrogate": (sample("a", "\ud83d"), "turn 2 cannot be encoded as UTF-8"),
    "half a surrogate in a path": (sample("<image>\na", "b", image="\ud800.jpg"), r"\ud800.jpg: no such file"),
    "a long path": (sample("<image>\na", "b", image="x" * 5000), "x: no such file"),
    "nested too deeply": (Deep(), "lists or objects are nested too deeply"),
}
WHEN_READ = {
    "corrupt JPEG": (sample("<image>\na", "b", image="cut.jpg"), "cut.jpg: broken or truncated"),
    "no JPEG": (sample("<image>\na", "b", image="text.jpg"), "text.jpg: not a picture that Pillow can read"),
    "too long": (sample("a", "long " * 400), "tokens, those of pictures included, but max_length is 400"),
}


@pytest.mark.parametrize("kind", [*BY_FORM, *WHEN_READ])
def test_a_broken_sample_is_named_and_left_out(one_folder, kind):
    broken, reason = (BY_FORM | WHEN_READ)[kind]
    data = data_of(one_folder, [SAMPLES[0], broken, SAMPLES[2]])
    assert data.report_broken() == (kind in BY_FORM)
    items = [data[i] for i in range(len(data))]
    assert [item is None for item in items] == ([False, False] if kind in BY_FORM else [False, True, False])
    [row] = told(one_folder)
    assert row["file"] == str(one_folder / "samples.json") and row["index"] == 1 and reason in row["reason"]
    assert len(row["reason"]) < 500


def test_a_file_that_is_changed_during_the_run(one_folder):
    data = data_of(one_folder, SAMPLES)
    file = one_folder / "samples.json"
    file.write_bytes(file.read_bytes()[:150] + b"\xff" * 50)
    assert data[0] is not None and data[1] is None and data[2] is None
    assert [row["index"] for row in told(one_folder)] == [1, 2]
    assert all(
        "the file was changed during the run: no sample is left at byte" in r["reason"] for r in told(one_folder)
    )


def test_numbers_of_many_digits_are_numbers(one_folder):
    data = data_of(one_folder, [{**SAMPLES[2], "id": 1}, SAMPLES[0]])
    file = one_folder / "samples.json"
    file.write_text(file.read_text().replace('"id": 1', f'"id": {"9" * 5000}'))
    [source] = open_sources([SourceConfig(file=file, pictures=one_folder)], plain=False)
    assert source.read(0)["id"] == float("inf") and not source.index.faults and len(data) == 2


def test_a_report_has_one_line_for_each_sample(one_folder):
    """Also where several processes write it, or a run continues."""
    first, second = (SkippedSamples(one_folder / "skipped.jsonl") for _ in range(2))
    for report, index in ((first, 1), (second, 1), (second, 2), (first, 2), (first, 1)):
        report.add("a.json", index, f"reason {index}")
    assert [row["index"] for row in told(one_folder)] == [1, 2] and first.count() == second.count() == 2
    assert SkippedSamples(one_folder / "none.jsonl").count() == 0


def test_samples_of_captions(one_folder):
    """In stage 1 a sample is one picture with one caption, and what is asked is left out."""
    turns = read_sample(sample("Tell me.\n<image>", "A cat.", image="photo.png"), plain=True)
    assert turns.turns == (("<image>", "A cat."),)
    for wrong in (SAMPLES[1], SAMPLES[2], SAMPLES[5]):
        with pytest.raises(BadSample, match="the plain template takes one picture and one caption, got"):
            read_sample(wrong, plain=True)


def test_tags_stand_before_the_question():
    """As in the original, also where the picture alone is shown; a question without a tag is not touched."""
    for asked, expected in (
        ("  What is it? <image>\n", "<image>\nWhat is it?"),
        ("<image>", "<image>"),
        ("a<image>b<image>", "<image>\n<image>\nab"),
    ):
        image = ["photo.png"] * asked.count("<image>")
        [[question, _], [second, _]] = read_sample(sample(asked, "x", " y ", "z", image=image)).turns
        assert (question, second) == (expected, " y ")


def test_nothing_usable_is_an_error(one_folder):
    with pytest.raises(
        ConfigError, match=r"none of its 2 samples can be used \(0: turn 2 is an empty answer; 1: turn 1"
    ):
        data_of(one_folder, [sample("a", ""), sample("", "b")])


def test_a_broken_line_of_jsonl_is_one_sample(one_folder):
    file = one_folder / "a.jsonl"
    file.write_text(f"{json.dumps(SAMPLES[0])}\n\n{{broken\n{json.dumps(SAMPLES[2])}\n")
    [source] = open_sources([SourceConfig(file=file, pictures=one_folder)], plain=False)
    assert list(source.index.faults) == [1] and "the line is no JSON" in source.index.faults[1]
    assert [source.read(0), source.read(2)] == [SAMPLES[0], SAMPLES[2]]


def test_samples_are_read_by_their_place(one_folder, monkeypatch):
    """In pieces that cut characters and numbers, with blanks between and a mark of byte order before."""
    from recipes.finetune import index

    monkeypatch.setattr(index, "_PIECE", 7)
    samples = [sample(f"was ist ü✓{i}?", "Ä 😀", number=12.5) for i in range(4)]
    file = one_folder / "a.json"
    for text in (json.dumps(samples), "\ufeff " + json.dumps(samples, ensure_ascii=False, indent=2)):
        file.write_text(text, encoding="utf-8")
        [source] = open_sources([SourceConfig(file=file)], plain=False)
        assert [source.read(i) for i in range(4)] == samples and source.index.words.tolist() == [-5] * 4


def test_paths_are_renamed(one_folder):
    asked = sample("<image>\na", "b", image="VG_100K_2/photo.png")
    (one_folder / "images").mkdir()
    (one_folder / "images" / "photo.png").write_bytes(PICTURES[0].read_bytes())
    data = data_of(one_folder, [asked], rename={"VG_100K_2": "images", "VG_100K": "images"})
    assert data.report_broken() == 0 and data[0]["pictures"][0]["squared"].shape[-1] == 3


class PictureColumn(SimpleNamespace):
    """A column of pictures, as the package datasets calls it."""


class ListColumn:
    """A column of lists."""

    def __init__(self, feature):
        self.feature = feature


class Rows(list):
    """What the package datasets gives, as far as a source asks it: rows whose pictures are bytes once it is told so."""

    column_names, features = ["conversations", "image"], {"image": PictureColumn(decode=True)}

    def cast_column(self, name, feature):
        assert (name, feature.decode) == ("image", False)
        return self

    def remove_columns(self, name):
        return [{key: value for key, value in row.items() if key != name} for row in self]


@pytest.mark.parametrize("lists", [False, True])
def test_rows_of_a_dataset(one_folder, monkeypatch, lists):
    """The package itself is not needed for this: a stand-in has its names. Pictures are read at their turn."""
    content = PICTURES[0].read_bytes()
    rows = Rows(
        [
            sample("<image>\na", "b", image={"bytes": content, "path": None}),
            sample("a", ""),
            sample("a", "b", image=None),
            sample("<image>\na", "b", image={"bytes": content[:200], "path": None}),
            sample("a", "b", image={"bytes": content, "path": None}),
        ]
    )
    if lists:
        monkeypatch.setattr(Rows, "features", {"image": ListColumn(PictureColumn(decode=True))})
        monkeypatch.setattr(Rows, "cast_column", lambda self, name, of: self if not of.feature.decode else None)
        for row in rows:
            row["image"] = [row["image"]] if row.get("image") else []
    rows.append(sample("<image>\na", "b", image={"bytes": None, "path": None}))
    if lists:
        rows[-1]["image"] = [rows[-1]["image"]]
    stand_in = SimpleNamespace(load_dataset=lambda name, subset, split: rows, Image=PictureColumn)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    sources = open_sources([SourceConfig(dataset="owner/name", split="train")], plain=False)
    processor = family("standard").processor
    skipped = SkippedSamples(one_folder / "skipped.jsonl")

    def encode(turns) -> EncodedSample:
        return encode_turns(processor, "vicuna_v1", turns, longest=400)

    data = FineTuneData(sources, encode, processor.image_processor, skipped, plain=False)
    assert data.report_broken() == 1 and data.lengths.tolist() == [3, -2, 3, -2, 3]
    assert torch.equal(data[0]["pictures"][0]["squared"], processor.image_processor.squared([PICTURES[0]])[0])
    assert data[1]["pictures"] == [] and [data[i] for i in (2, 3, 4)] == [None] * 3
    found = told(one_folder)
    assert {row["file"] for row in found} == {"owner/name (train)"} and [row["index"] for row in found] == [1, 3, 4, 5]
    assert [row["reason"][:20] for row in found] == [
        "turn 2 is an empty a",
        "picture: picture of ",
        "0 <image> tag(s) for",
        "picture: expected by",
    ]


def test_where_a_dataset_comes_from(one_folder, monkeypatch):
    """A subset of a named one, or a folder that save_to_disk wrote, alone or with its splits."""
    stand_in = SimpleNamespace(
        load_dataset=lambda name, subset, split: (name, subset, split),
        load_from_disk=lambda folder: {"train": folder} if folder.endswith("both") else (folder,),
    )
    for name, mark in (("both", "dataset_dict.json"), ("alone", "state.json")):
        (one_folder / name).mkdir()
        (one_folder / name / mark).write_text("{}")
    both, alone = str(one_folder / "both"), str(one_folder / "alone")
    found = [
        dataset_rows(stand_in, SourceConfig(dataset=name, subset=subset))
        for name, subset in (("owner/name", None), ("owner/name", "large"), (both, None), (alone, None))
    ]
    assert found == [("owner/name", None, "train"), ("owner/name", "large", "train"), both, (alone,)]


# ---- batches


def test_a_batch(one_folder):
    """Rows are filled up on the right; pictures come in the order of their places."""
    data = data_of(one_folder, SAMPLES)
    batch = to_batch([data[2], None, data[5]], pad_id=0)
    [short, long] = data[2]["row"], data[5]["row"]
    gap = len(long.ids) - len(short.ids)
    assert batch["input_ids"].tolist() == [short.ids + [0] * gap, long.ids]
    assert batch["labels"].tolist() == [short.labels + [-100] * gap, long.labels]
    assert batch["attention_mask"].sum(1).tolist() == [len(short.ids), len(long.ids)]
    assert batch["mm_token_type_ids"].sum(1).tolist() == [0, 2 * PLACES]
    first, second = (picture["squared"] for picture in batch["pictures"])
    processor = family("standard").processor.image_processor
    assert torch.equal(torch.stack([first, second]), processor.squared(list(PICTURES)))


def test_a_batch_of_broken_samples_has_nothing_to_learn():
    batch = to_batch([None, None], pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 3]] and batch["labels"].tolist() == [[-100, -100]]
    assert batch["pictures"] == []


# ---- the order

LENGTHS = [10 * i for i in range(1, 24)] + [-7 * i for i in range(1, 14)]


@pytest.mark.parametrize("grouped", [True, False])
def test_an_order_has_every_sample_once_and_depends_on_the_epoch(grouped):
    orders = {}
    for epoch in (0, 1, 0):
        order = SampleOrder(LENGTHS, 2, 2, seed=1, grouped=grouped)
        order.set_epoch(epoch)
        found = list(order)
        assert sorted(found) == list(range(len(LENGTHS))) and len(order) == len(LENGTHS)
        assert orders.setdefault(epoch, found) == found
    assert orders[0] != orders[1] != list(SampleOrder(LENGTHS, 2, 2, seed=2, grouped=grouped))


def test_samples_of_a_step_are_alike():
    """All with pictures or all without; passes are as long as each other, within the longest sample of the step."""
    order = grouped_order(LENGTHS, 2, 2, torch.Generator().manual_seed(0))
    whole = [order[at : at + 4] for at in range(0, 4 * (23 // 4 + 13 // 4), 4)]
    for step in whole:
        kinds = {LENGTHS[i] > 0 for i in step}
        hands = [sum(abs(LENGTHS[i]) for i in step[at : at + 2]) for at in (0, 2)]
        assert len(kinds) == 1 and abs(hands[0] - hands[1]) <= max(abs(LENGTHS[i]) for i in step)
    assert {LENGTHS[step[0]] > 0 for step in whole} == {True, False}


@pytest.mark.parametrize("grouped", [True, False])
def test_all_processes_have_a_batch_and_no_sample_comes_twice(grouped):
    """Five samples for two processes with batches of two: three places stay empty, and are no samples."""
    order = SampleOrder([3, 4, -5, 6, 7], 2, 2, seed=1, grouped=grouped, processes=2)
    found = list(order)
    assert len(found) == len(order) == 8 and sorted(found) == [EMPTY] * 3 + [0, 1, 2, 3, 4] and EMPTY not in found[:5]
    assert len(SampleOrder([3, 4, -5, 6, 7], 2, 2, seed=1, grouped=grouped)) == 5


def test_processes_and_passes_share_the_samples_of_a_step():
    """One process with a batch of four trains each step on the same samples as two processes with two."""
    alone, shared = (
        grouped_order(LENGTHS, size, passes, torch.Generator().manual_seed(5)) for size, passes in ((4, 1), (2, 2))
    )
    for at in range(0, len(LENGTHS), 4):
        assert set(alone[at : at + 4]) == set(shared[at : at + 4])
