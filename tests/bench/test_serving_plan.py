"""The plan for serving: what is recorded is what is computed, and its figures fit to those of other predictions."""

import dataclasses
import json

import pytest

from bench import memory, records, serving_plan
from bench.__main__ import main
from bench.costs.answer import ModelledAnswer, parameters
from bench.serving_plan import DIVISIONS, MODELS, ServedModel, encoding_ms

RECORDED = serving_plan.recorded()
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.slow
def test_the_record_is_what_is_computed(one_thread):
    assert serving_plan.predict() == RECORDED


def test_the_record_names_its_versions():
    assert json.loads(serving_plan.RECORDED.read_text())["versions"].keys() == memory.versions().keys()


@each_model
def test_weights_are_those_of_the_model(name):
    model, answer = RECORDED[name], ModelledAnswer(name)
    predicted = json.loads(memory.PREDICTED.read_text())["cases"]
    whole = predicted["picture/1536-hd-b1-bfloat16" if answer.hd else "picture/768-b1-bfloat16"]
    projector = answer.config.text_config.hidden_size
    if projector == 4096:
        # The picture side with the packed towers, as it was counted at torch's dispatcher in blocks of the allocator.
        assert model.picture_side == pytest.approx(whole["auto"]["weights"], rel=0.01)
    # The packed copies are no part of the model.
    assert answer.weight_bytes < model.language + model.picture_side < 1.03 * answer.weight_bytes + 0.5e9
    assert 2 * parameters(name.removesuffix("-hd")) == answer.weight_bytes


@each_model
def test_encoding_takes_longer_than_its_floor(name):
    """Both are predictions, and made by different means."""
    assert 1.3 * RECORDED[name].encode_ms < encoding_ms(name) < 3 * RECORDED[name].encode_ms


MADE = ServedModel(
    language=40 * 10**9,
    picture_side=2 * 10**9,
    pictures=7,
    encoding=3 * 10**9,
    budget=4096,
    step={"1": 5 * 10**9, "2": 3 * 10**9, "4": 2 * 10**9, "8": 10**9},
    cache={"1": 10**9, "2": 5 * 10**8, "4": 2 * 10**8, "8": 10**8},
    encode_ms=1.0,
    prefill_ms=8.0,
    decode_ms=16.0,
    batch=4,
    exchanged=450_000_000,
)


def test_memory_by_hand():
    # The larger one of the two peaks counts: a step on one GPU, and on four GPUs encoding.
    assert [MADE.taken(gpus) / 1e9 for gpus in DIVISIONS] == [47, 25, 15, 10]
    assert MADE.requests(1, 80) == int(0.92 * 80 - 47) and MADE.requests(2, 80) == int((0.92 * 80 - 25) / 0.5)
    assert MADE.requests(1, 40) < 1 and MADE.requests(8, 141) == 1024
    assert [MADE.division(card) for card in (16, 40, 80, 141)] == [8, 4, 2, 1]
    assert dataclasses.replace(MADE, picture_side=20 * 10**9).division(16) is None


def test_times_by_hand():
    assert MADE.language_ms(1) == 24 and MADE.summing_ms(1) == 0
    # Around a ring of eight, each GPU sends twice seven eighths of what is summed up.
    assert MADE.summing_ms(8) == pytest.approx(1.75) and MADE.language_ms(8) == pytest.approx(3 + 1.75)


def test_tables(monkeypatch):
    monkeypatch.setattr(serving_plan, "encoding_ms", lambda name: 2.0)
    row = serving_plan.memory_table({"7b": MADE}).splitlines()[2]
    assert row == (
        "| 7b | 40.0 GB | 2.0 GB | 47.0 / 25.0 / 15.0 / 10.0 GB | 26 / 97 / 293 / 636 | 82 / 209 / 573 / 1,024 | "
        "4 engines of 2 GPUs | 8 engines of 1 GPU |"
    )
    cells = [cell.strip() for cell in serving_plan.limits_table({"7b": MADE}).splitlines()[2].split("|")[1:-1]]
    assert cells == [
        *("7b", "2.0 ms", "8.0 ms", "16.0 ms", "answer / encoding"),
        *(f"{share:.0%}" for share in (2 / 26, 2 / 10, 2 / 6.75, 0.25 / 5)),
        *("0.7", "38 / 308 / 2,462"),
    ]


def test_recorded_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving_plan, "RECORDED", tmp_path / "serving.json")
    monkeypatch.setattr(serving_plan, "predict", lambda: {"7b": MADE})
    assert main(["serving"]) == 0 and not serving_plan.RECORDED.exists()
    printed = capsys.readouterr().out
    with pytest.raises(serving_plan.BadRecord, match="python -m bench serving --save"):
        serving_plan.recorded()
    assert main(["serving", "--save"]) == 0 and capsys.readouterr().out == printed
    assert serving_plan.recorded() == {"7b": MADE}
    assert serving_plan.memory_of_serving({}) + "\n\n" + serving_plan.limits_of_serving({}) + "\n" == printed
    assert records.RESULTS / "serving.json" != serving_plan.RECORDED
