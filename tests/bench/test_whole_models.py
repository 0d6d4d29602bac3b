"""Predictions of whole models: the library's formula against hand-made launches, and what is recorded."""

import json

import pytest
import torch

from bench.counting import CountedCall
from bench.issue import library, whole_models
from bench.issue.choices import OPERATIONS, Choice, predict_choices, read_choices
from bench.issue.library import GAP_US, SHORTEST_US, LaunchTime, launch_time, product_us
from bench.issue.predict import DEVICES
from bench.issue.published import FIRST_GENERATION, RECORD, read
from bench.issue.whole_models import Row, WholePrediction, predict, predict_all, read_whole
from bench.memory import PREDICTED
from bench.registry import Cost, group_of
from mg_fast.ops import operation
from mg_fast.testing.environment import environment

H200 = DEVICES["h200"]
# FLOP of one multiprocessor in a microsecond.
FLOP = H200.tensor_tflops * 1e6 / H200.multiprocessors


def call(name: str, *inputs: tuple[int, ...], flop: int = 0, moved: int = 0, outputs=()) -> CountedCall:
    return CountedCall(name, 1, Cost(flop, moved), inputs, outputs)


def test_a_product_takes_whole_rounds_of_programs():
    tile = 2 * 128 * 256 / FLOP
    # 132 programs are one round. One row more takes a round of the smallest tile, a fourth of it.
    assert product_us(128 * 12, 512, 256 * 11, H200) == pytest.approx(512 * tile)
    assert product_us(128 * 132 + 1, 512, 256, H200) == pytest.approx(1.25 * product_us(128 * 132, 512, 256, H200))
    # As many FLOP as the rate allows are the least time.
    for rows, terms, columns in ((577, 1024, 4096), (36864, 192, 768), (1, 4096, 11008), (576, 6144, 1536)):
        floor = 2 * rows * terms * columns / H200.tensor_tflops / 1e6
        assert floor <= product_us(rows, terms, columns, H200)
    # Of the smallest tile 33 programs make this result, so that four of them share its terms.
    assert product_us(64, 4096, 128 * 33, H200) == pytest.approx(1024 * 2 * 64 * 128 / FLOP)


def test_what_binds_a_launch():
    times = {
        "products": call("aten::addmm", (3072,), (2304, 768), (768, 3072), flop=1, moved=1000),
        "memory": call("aten::gelu_", (2304, 3072), moved=43_000_000),
        "attention": call(library.ATTENTION, (1, 16, 577, 64), flop=int(library.ATTENTION_TFLOPS * 7e6), moved=10),
        "convolution": call(library.CONVOLUTION, (1, 96, 9, 9), (96, 1, 7, 7), moved=43_000_000),
        "short kernels": call("aten::add", (1, 4096), moved=8192),
    }
    found = {binds: launch_time(one, H200) for binds, one in times.items()}
    assert {binds: time.binds for binds, time in found.items()} == {binds: binds for binds in times}
    assert found["memory"].us == pytest.approx(10.0) and found["convolution"].us == pytest.approx(50.0)
    assert found["attention"].us == pytest.approx(7.0) and found["short kernels"] == LaunchTime(1.0, "short kernels")
    # A convolution of pixels that do not overlap is a product of all patches.
    patches = call(library.CONVOLUTION, (1, 192, 96, 96), (384, 192, 2, 2), outputs=((1, 384, 48, 48),))
    assert launch_time(patches, H200).us == product_us(2304, 768, 384, H200)


def test_a_compiler_makes_one_launch_of_what_lies_between_products():
    product, norm, add = call("aten::mm", (1, 8), (8, 8)), call("aten::mean", moved=9), call("aten::add", moved=7)
    calls = [add, norm, product, product, add, add, norm, product]
    assert library.compiled(calls) == [norm, product, product, norm, product]


def test_a_whole_model_is_the_sum_of_its_launches():
    kernels = read(RECORD)["dwconv_norm/768-stage2-b1-bfloat16"]
    calls = [call("mg_fast::dwconv_norm", (1, 48, 48, 768)), call("aten::add", moved=10)]
    found = predict(calls, H200, lambda one: kernels)
    # The kernel is two launches.
    assert found.launches == 3 and found.us == pytest.approx(kernels.us + SHORTEST_US + 2 * GAP_US, abs=0.1)
    assert sum(found.parts.values()) == pytest.approx(found.us, abs=0.2)
    assert next(iter(found.parts)) == "our kernels" and found.binds.startswith("our kernels ")


def test_the_recorded_models():
    """They have as many launches as was counted elsewhere, and today's are nowhere slower."""
    found, counted = read_whole(), json.loads(PREDICTED.read_text())["cases"]
    assert len(found) == 10
    for name in ("tower/768-b1-bfloat16", "tower/1536-hd-b1-bfloat16"):
        assert found[Row(name, "auto")].today.launches == counted[name]["auto"]["launches"]
    for row, both in found.items():
        assert both.today.us <= both.first.us, row
        for one in both:
            assert sum(one.parts.values()) == pytest.approx(one.us, rel=1e-3)
    decoding = [Row("end-to-end/8b-decode-b1-bfloat16", provider) for provider in ("auto", whole_models.COMPILED)]
    # Keys and values are not repeated: two launches a layer fewer, and one more puts the groups in place.
    assert found[decoding[0]].first.launches - found[decoding[0]].today.launches == 32 * 2
    assert found[decoding[1]].today.us < found[decoding[0]].today.us


@pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="takes a torch that is built for CUDA: no GPU")
def test_the_record_is_what_the_model_says():
    recorded = json.loads(RECORD.read_text())
    if any(recorded[package] != environment()[package] for package in ("torch", "transformers")):
        pytest.skip("it was recorded with other releases, whose modules launch other operators")
    assert predict_all(read(FIRST_GENERATION), read(), H200) == read_whole()
    assert predict_choices(read(), H200) == read_choices()


def test_auto_takes_what_the_model_says():
    """At no published shape the model says something else than `auto` takes first, on a GPU and in 16 bits."""
    found = read_choices()
    assert {group_of(name) for name in found} == set(OPERATIONS) and len(found) == 8 * len(OPERATIONS)
    for name, choice in found.items():
        assert operation.OPERATIONS[group_of(name)].auto[0] == choice.takes, name


@pytest.mark.parametrize("kernel_us, takes", [(79.0, "triton"), (81.0, "torch"), (120.0, "torch")])
def test_a_kernel_is_taken_where_it_wins_by_more_than_the_error(kernel_us, takes):
    assert Choice(kernel_us, WholePrediction(100.0, 2, {"memory": 100.0})).takes == takes
