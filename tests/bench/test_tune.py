"""Tuning without a GPU: the tiles that are tried, replaced and rejected; and what is printed can be pasted."""

import dataclasses

import pytest
import torch

from bench import gpu_timing, measure, tune
from bench.__main__ import main
from bench.cases.operations import MOST_REGISTERS
from bench.registry import Case
from mg_fast.kernels import configs

ENTRIES = tune.entries([])


def test_every_kernel_and_bucket_that_a_published_model_runs_in():
    found = {kernel: {key for name, key in ENTRIES if name == kernel} for kernel in tune.TUNABLE}
    assert found["patch_mining"] == {(2, 64, True), (2, 64, True, "reduced"), (4, 64, True), (4, 64, True, "reduced")}
    assert found["dwconv_norm"] == {(768, "bands"), (3072, "bands")}
    assert found["pointwise"] == {
        (2, "few"),
        (2, "some"),
        (2, "many"),
        (2, "many", "gelu"),
        (4, "few"),
        (4, "some"),
        (4, "many"),
        (4, "many", "gelu"),
    }
    assert found["dual_resize"] == {"columns", "rows"}
    passes = ("forward", "backward")
    assert found["deformable_attention"] == {(stage, size, True) for stage in passes for size in (2, 4)}
    assert found["feature_sync"] == {(size, count, True) for size in (2, 4) for count in ("few", "some", "many")}
    # Where time runs out, no kernel was left out.
    assert [kernel for kernel, _ in ENTRIES[: len(tune.TUNABLE)]] == list(tune.TUNABLE)


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize(("kernel", "key"), ENTRIES, ids=str)
def test_candidates(kernel, key, architecture):
    today, *others = tune.candidates(kernel, architecture, key)
    assert today == tune.tile_of(kernel, architecture, key)
    assert len(others) >= 20 and len({today, *others}) == len(others) + 1
    assert all(type(tile) is type(today) for tile in others)
    assert all(tune.TUNABLE[kernel].fits(key, tile, configs.SHARED_MEMORY_LIMITS[architecture]) for tile in others)
    # The nearest come first: one number is doubled, halved or a step further.
    assert sum(before != now for before, now in zip(today, others[0])) == 1


def test_what_does_not_fit_shared_memory_is_no_candidate():
    wide = configs.ProductTile(256, 128, 64, 8, 8, 4)
    assert wide.rows * wide.columns == 32 * 8 * MOST_REGISTERS
    for architecture, fits in ((90, True), (89, False)):
        assert tune.TUNABLE["pointwise"].fits((2, "many"), wide, configs.SHARED_MEMORY_LIMITS[architecture]) is fits


def test_launches_take_a_replaced_tile():
    before = configs.pointwise_tile(90, 2, 576, 1536, [6144], gelu=False)
    tile = configs.ProductTile(32, 32, 32, 4, 4, 2)
    with configs.replaced_tile(configs.POINTWISE, 90, (2, "few"), tile):
        assert configs.pointwise_tile(90, 2, 576, 1536, [6144], gelu=False) == tile
        assert configs.pointwise_tile(80, 2, 576, 1536, [6144], gelu=False) != tile
        assert configs.pointwise_tile(90, 2, 9216, 1536, [6144], gelu=False) != tile
    assert configs.pointwise_tile(90, 2, 576, 1536, [6144], gelu=False) == before
    reduced = configs.Tile(16, 2, 1)
    with configs.replaced_tile(configs.PATCH_MINING, 90, (2, 64, True, "reduced"), reduced):
        assert configs.patch_mining_tile(90, 2, 8, [192, 384], reduced=True) == reduced
        assert configs.patch_mining_tile(90, 2, 8, [192, 384], reduced=False) != reduced
    # An architecture without a table of its own has none afterwards.
    assert 90 not in configs.PATCH_MINING


def fake_case(name, kernel):
    """A case of one shape, which the library computes by doubling."""
    providers = {"torch": lambda x: lambda: 2 * x, "triton": lambda x: lambda: kernel(x)}
    return Case(name, lambda device: torch.arange(1.0, 5.0), providers, lambda x: 2 * x.double(), baseline="torch")


def rows_of_tile(call, graph):
    """Milliseconds: half of them for twice the rows, a tenth of them in a graph."""
    return (8.0 if graph else 80.0) / configs.dual_resize_tile(None, "columns").rows


def tune_fake(kernel, tiles, seconds=1e9, clock=lambda: 0.0, time_call=rows_of_tile, **options):
    """Tiles of dual_resize's columns at two shapes."""
    options = {"cases": [fake_case(name, kernel) for name in ("first", "second")]} | options
    return tune.tune_entry(
        "dual_resize", "columns", tiles, None, seconds, device="cpu", clock=clock, time_call=time_call, **options
    )


TODAY, FASTER, SLOWER = configs.ResizeTile(4, 128, 4), configs.ResizeTile(8, 128, 4), configs.ResizeTile(2, 128, 4)


def test_gains_are_over_todays_tile():
    result = tune_fake(lambda x: 2 * x, [TODAY, FASTER, SLOWER])
    assert result.tiles == pytest.approx({TODAY: 1.0, FASTER: 2.0, SLOWER: 0.5})
    assert result.times[FASTER] == {"first": 1.0, "second": 1.0} and not result.rejected and result.left == 0
    # What cannot be captured is timed with its launches.
    today = configs.dual_resize_tile(None, "columns").rows
    assert result.library_ms == {"first": 80.0 / today, "second": 80.0 / today}


def test_wrong_and_broken_tiles_are_rejected_before_they_are_timed():
    def kernel(x):
        rows = configs.dual_resize_tile(None, "columns").rows
        if rows == 2:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 2 * x + (0.01 if rows == 8 else 0.0)

    result = tune_fake(kernel, [TODAY, FASTER, SLOWER])
    assert list(result.tiles) == [TODAY] and list(result.times) == [TODAY]
    assert "bound" in result.rejected[FASTER] and result.rejected[SLOWER].startswith("RuntimeError: out of resource")


def test_time_is_kept_but_todays_tile_is_timed():
    ticks = iter(range(100))
    result = tune_fake(lambda x: 2 * x, [TODAY, FASTER, SLOWER], seconds=1.5, clock=lambda: float(next(ticks)))
    assert list(result.tiles) == [TODAY, FASTER] and result.left == 1


def test_a_lost_gpu_ends_an_entry_with_what_was_found():
    def time_call(call, graph):
        if configs.dual_resize_tile(None, "columns") == FASTER:
            raise gpu_timing.GpuLost("capture failed")
        return 1.0

    result = tune_fake(lambda x: 2 * x, [TODAY, FASTER, SLOWER], time_call=time_call)
    assert result.lost and list(result.tiles) == [TODAY] and result.left == 1 and result.library_ms == {}
    assert result.rejected[FASTER] == "GpuLost: capture failed"


def test_an_error_that_comes_back_is_a_lost_gpu(monkeypatch):
    """An illegal access is reported by the call that made it, and by every later call."""

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not tune._lost(ValueError("a tile that does not run"), "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert tune._lost(ValueError("a tile that does not run"), "cuda") and not tune._lost(ValueError("on a CPU"), "cpu")


def test_inputs_that_do_not_fit_are_told():
    def make(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    case = dataclasses.replace(fake_case("large", None), make=make)
    result = tune_fake(None, [TODAY, FASTER], cases=[case])
    assert result.error.startswith("OutOfMemoryError: CUDA out of memory") and result.left == 2 and not result.lost
    assert "# 'columns': OutOfMemoryError" in tune.report([result], 90, best=1)


def test_a_library_that_breaks_loses_no_tile():
    def time_call(call, graph):
        if not graph:
            raise RuntimeError("the library's own")
        return rows_of_tile(call, graph)

    result = tune_fake(lambda x: 2 * x, [TODAY, FASTER], time_call=time_call)
    assert result.tiles == {TODAY: 1.0, FASTER: 2.0}
    assert result.error == "the library's form: RuntimeError: the library's own"
    text = tune.report([result], 90, best=1)
    assert "ResizeTile(8, 128, 4),  # 2.00 times today's\n" in text and "times the library" not in text


def test_tiles_are_told_apart_by_a_graphs_replay(monkeypatch):
    """The host takes longer to launch them than the GPU takes to run them."""
    monkeypatch.setattr(gpu_timing, "time_graph", lambda call, seconds: 0.01)
    monkeypatch.setattr(gpu_timing, "time_on_gpu", lambda call, seconds: measure.Timing([0.1, 0.2, 0.3]))
    assert tune._milliseconds(lambda: None, True) == 0.01 and tune._milliseconds(lambda: None, False) == 0.2


def test_printed_entries_are_those_of_a_table():
    """What is printed can be evaluated: it is a part of a table of configs.py with the fastest tiles in it."""
    product = configs.ProductTile(64, 128, 64, 8, 4, 4)
    faster = product._replace(stages=3)
    tiles, times = {product: 1.0, faster: 1.25}, {product: {"a": 1.0}, faster: {"a": 0.8}}
    results = [
        tune_fake(lambda x: 2 * x, [TODAY, FASTER, SLOWER]),
        tune.Result("pointwise", (2, "few"), tiles, times, {"a": 1.6}),
        tune.Result("pointwise", (4, "few"), rejected={product: "ValueError: nothing"}, left=3),
    ]
    text = tune.report(results, 90, best=2)
    found: dict = {}
    exec(text, vars(configs) | {}, found)
    assert found == {"DUAL_RESIZE": {90: {"columns": FASTER}}, "POINTWISE": {90: {(2, "few"): faster}}}
    assert "1.25 times today's, 2.00 times the library" in text
    assert "# or ProductTile(64, 128, 64, 8, 4, 4, 255): 1.00 times" in text
    assert "ResizeTile(2, 128, 4)" not in text, "no more tiles are printed than were asked for"
    assert "1 rejected, the first for ValueError: nothing, 3 left for want of time" in text


@pytest.mark.slow
def test_compiled_without_a_gpu(tmp_path, monkeypatch):
    """Candidates are in Triton's cache afterwards; one that does not compile is left out."""
    pytest.importorskip("triton")
    # A block of 3 is no power of two.
    wrong = configs.ResizeTile(3, 128, 4)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "candidates", lambda *_: [TODAY, wrong, FASTER])
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    entry = ("dual_resize", "columns")
    assert tune.compile_candidates([entry], 90, seconds=300) == {entry: [TODAY, FASTER]}
    assert len(list(tmp_path.rglob("resize_columns_fwd_kernel.cubin"))) == 2


def test_no_time_to_compile():
    entry = ("dual_resize", "columns")
    assert tune.compile_candidates([entry], 90, seconds=0) == {entry: []}


@pytest.fixture
def pretended(monkeypatch):
    """A pretended GPU, on which an entry is given this result or ends with this error."""

    def give(*answers):
        left = iter(answers)

        def tune_entry(*_, **__):
            if isinstance(answer := next(left), BaseException):
                raise answer
            return answer

        monkeypatch.setattr(tune, "tune_entry", tune_entry)

    monkeypatch.setattr(tune, "check_device", lambda device: device)
    monkeypatch.setattr(tune, "compile_candidates", lambda chosen, *_: {entry: [] for entry in chosen})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "ieee_float32", lambda: None)
    return give


def test_an_interrupt_prints_what_was_found(pretended):
    """The second entry is interrupted."""
    pretended(tune_fake(lambda x: 2 * x, [TODAY, FASTER]), KeyboardInterrupt())
    found: dict = {}
    exec(tune.tune(["dual_resize"], 1.0), vars(configs) | {}, found)
    assert found == {"DUAL_RESIZE": {90: {"columns": FASTER}}}


def test_an_entry_is_printed_when_it_is_done(pretended, capsys):
    """A process that is killed in the second has said what it found in the first, and on what."""
    pretended(tune_fake(lambda x: 2 * x, [TODAY, FASTER]), SystemExit())
    with pytest.raises(SystemExit):
        tune.tune(["dual_resize"], 1.0)
    out = capsys.readouterr().out
    assert "(sm_90)" in out and "# DUAL_RESIZE[90]\n" in out
    assert "#     'columns': ResizeTile(8, 128, 4),  # 2.00 times today's" in out
    assert all(line.startswith("#") for line in out.splitlines()), "the tables that follow can be pasted"


def test_after_a_lost_gpu_nothing_is_tried(pretended):
    first, never = tune_fake(lambda x: 2 * x, [TODAY, FASTER]), AssertionError("tried")
    first.lost = True
    pretended(first, never)
    text = tune.tune(["dual_resize"], 1.0)
    assert "'columns': ResizeTile(8, 128, 4)" in text
    assert "ended at dual_resize 'columns', which lost the GPU: 1 entries not tried" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_is_one_line(capsys):
    for words, said in ((["tune"], "a GPU was asked for"), (["tune", "nonsense"], "no kernel is called 'nonsense'")):
        assert main(words) == 2
        out = capsys.readouterr()
        assert said in out.err and out.err.count("\n") == 1 and not out.out
