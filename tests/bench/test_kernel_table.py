"""The table of a call's kernels; on a CPU it has torch's operators."""

import pytest
import torch

from bench import kernel_table as tables
from bench.gpu_timing import same_bits
from bench.kernel_table import kernel_table, spans


def test_a_call_by_its_operators():
    x = torch.randn(200, 200)
    table = kernel_table(lambda: torch.relu(x @ x) @ x, "cpu")
    rows = {row["name"]: row for row in table["kernels"]}
    assert rows["aten::mm"]["launches"] == 2 and rows["aten::relu"]["launches"] == 1
    assert table["launches"] == sum(row["launches"] for row in rows.values())
    assert table["busy_us"] == pytest.approx(sum(row["us"] for row in rows.values()), abs=0.1) and table["wall_us"] > 0
    assert [row["us"] for row in table["kernels"]] == sorted((row["us"] for row in table["kernels"]), reverse=True)


def test_kernels_beyond_the_most_are_added_up(monkeypatch):
    monkeypatch.setattr(tables, "MOST_KERNELS", 1)
    x = torch.randn(200, 200)
    first, others = kernel_table(lambda: (x @ x).sin().cos().exp(), "cpu")["kernels"]
    assert others["name"].endswith(" others") and others["launches"] >= 3 and first["us"] > 0


def test_a_call_lasts_from_its_first_kernel_to_its_last():
    """Kernels of one call may overlap, and there may be gaps between them; the profiler lists them in any order."""
    assert spans([(0.0, 4.0), (3.0, 9.0), (20.0, 21.0), (25.0, 30.0)], 2) == [9.0, 10.0]
    assert spans([(25.0, 30.0), (0.0, 12.0), (20.0, 21.0), (3.0, 9.0)], 2) == [12.0, 10.0]
    # One kernel was not seen.
    assert spans([(0.0, 4.0), (20.0, 21.0), (25.0, 30.0)], 2) == spans([], 2) == []


def test_bits_that_repeat_and_bits_that_do_not():
    x = torch.tensor([1.0, float("nan"), -0.0])
    assert same_bits(lambda: x.clone(), [x]) and same_bits(lambda: [x, x], [x, x])
    # The numbers are equal, but not the bits.
    assert not same_bits(lambda: x.abs(), [x])
    answers = iter([x, x, x + 1])
    assert not same_bits(lambda: next(answers), [x])
