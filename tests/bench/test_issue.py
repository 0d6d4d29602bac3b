"""The model that predicts times from machine code: what it reads, follows and counts, on code whose count is known."""

import pytest
import torch
import triton
import triton.language as tl

from bench.errors import BadRecord
from bench.issue import launches, multiprocessor
from bench.issue.command import calibration, predicted_us, table
from bench.issue.occupancy import blocks_per_multiprocessor
from bench.issue.predict import DEVICES, TimePrediction, predict
from bench.issue.published import CasePrediction, read, save
from bench.issue.sass import NO_BARRIER, Instruction, parse, pipe_of
from bench.issue.trace import UnknownLoop, trace
from bench.issue.whole_models import Generations, Row, WholePrediction

pytestmark = pytest.mark.slow
H200 = DEVICES["h200"]


def code(*lines: str) -> list[Instruction]:
    """Instructions written by hand, 16 bytes each: `@P0 NAME operand, operand`."""
    found = []
    for place, line in enumerate(lines):
        guard, _, line = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, _, operands = line.partition(" ")
        operands = tuple(operand.strip() for operand in operands.split(",") if operand.strip())
        found.append(Instruction(16 * place, guard.removeprefix("@"), name, operands))
    return found


def test_the_disassemblers_text_is_read_with_its_control_words():
    text = (
        "        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10] ;   /* 0x0000100602047981 */\n"
        "                                                                    /* 0x010ea8000c1e1d00 */\n"
    )
    [found] = parse(text)
    assert (found.address, found.guard, found.name) == (16, "!P0", "LDG.E.128")
    assert found.operands == ("R4", "desc[UR6][R2.64+0x10]")
    control = 0x010EA8000C1E1D00 >> 41
    assert (found.stall, found.sets, found.sets_when_read) == (control & 15, control >> 5 & 7, control >> 8 & 7)
    assert found.waits == tuple(b for b in range(6) if control >> 11 + b & 1)
    assert pipe_of(found) == "load" and pipe_of(code("UIADD3 UR4, UR4, 0x1, URZ")[0]) == "uniform"


def test_loops_are_followed_as_often_as_they_run():
    loop = code(
        "LDC R5, c[0x0][0x210]",
        "MOV R4, RZ",
        "IADD3 R4, R4, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R4, R5, PT",
        "@!P0 BRA 0x20",
        "@!P0 NOP",
        "EXIT",
    )
    assert trace(loop, {0x210: 1}) == [0, 1, 2, 3, ~4, ~5, 6]
    assert len(trace(loop, {0x210: 7})) == 2 + 3 * 7 + 2
    with pytest.raises(UnknownLoop, match="the loop that ends at 0x40 has an unknown number of rounds"):
        trace(loop, {})


@pytest.mark.parametrize("number", [0, 3, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 7])
def test_a_64_bit_counter_is_compared_in_both_halves(number):
    """The loop adds 2^32 - 1 until the counter reaches the number."""
    step = 2**32 - 1
    loop = code(
        "CS2R R2, SRZ",
        f"IADD3 R2, P1, R2, {step:#x}, RZ",
        "IADD3.X R3, RZ, R3, RZ, P1, !PT",
        f"ISETP.GE.U32.AND P0, PT, R2, {number % 2**32:#x}, PT",
        f"ISETP.GE.U32.AND.EX P0, PT, R3, {number >> 32:#x}, PT, P0",
        "@!P0 BRA 0x10",
        "EXIT",
    )
    assert len(trace(loop, {})) == 1 + 5 * max(1, -(-number // step)) + 1


def test_a_forward_branch_is_taken_only_where_its_predicate_is_known():
    branch = code("S2R R0, SR_CTAID.X", "ISETP.NE.AND P0, PT, R0, 0x4, PT", "@P0 BRA 0x40", "NOP", "EXIT")
    assert len(trace(branch, {}, program=(4, 0, 0))) == 5
    assert len(trace(branch, {}, program=(3, 0, 0))) == 4
    unknown = code("LDG.E R0, desc[UR4][R2.64]", *("NOP",) * 0, "ISETP.NE.AND P0, PT, R0, 0x4, PT", "@P0 BRA 0x40")
    assert len(trace([*unknown, *code("NOP", "NOP", "NOP", "NOP", "EXIT")[3:]], {})) == 5


@pytest.mark.parametrize("divisor", [1, 3, 7, 12])
@pytest.mark.parametrize("number", [0, 1, 11, 12, 100])
def test_a_division_of_whole_numbers_is_followed(number, divisor):
    """The steps that compilers write for a division, with its correction; the loop then runs as often as it says."""
    steps = code(
        f"MOV R0, {number:#x}",
        f"MOV R1, {divisor:#x}",
        "I2F.U32.RP R2, R1",
        "MUFU.RCP R2, R2",
        "IADD3 R2, R2, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "IADD3 R4, RZ, -R3, RZ",
        "IMAD R4, R4, R1, RZ",
        "MOV R2, RZ",
        "IMAD.HI.U32 R3, R3, R4, R2",
        "IMAD.HI.U32 R5, R3, R0, RZ",
        "IADD3 R6, -R5, RZ, RZ",
        "IMAD R6, R6, R1, R0",
        "ISETP.GE.U32.AND P0, PT, R6, R1, PT",
        "@P0 IADD3 R6, R6, -R1, RZ",
        "@P0 IADD3 R5, R5, 0x1, RZ",
        "ISETP.GE.U32.AND P0, PT, R6, R1, PT",
        "@P0 IADD3 R5, R5, 0x1, RZ",
        "MOV R7, RZ",
        "ISETP.GE.AND P0, PT, R7, R5, PT",
        "@P0 EXIT",
        "IADD3 R7, R7, 0x1, RZ",
        "BRA 0x130",
    )
    assert len(trace(steps, {})) == 19 + 4 * (number // divisor) + 2


def test_dependent_and_independent_instructions_take_the_cycles_of_their_pipes():
    def cycles(instructions: list[Instruction], warps: int) -> int:
        return multiprocessor.issue(instructions, range(len(instructions)), warps, 1, 0.0).cycles

    waiting = [Instruction(16 * i, "", "FFMA", ("R0", "R0", "R1", "R2"), stall=4) for i in range(50)]
    # One warp waits for each result; four warps on one scheduler fill the gaps of each other.
    assert cycles(waiting, 1) == 4 * 49 + 1
    assert cycles(waiting, 16) == pytest.approx(200, abs=4)
    assert cycles(waiting, 32) == pytest.approx(400, abs=8)
    whole = [Instruction(16 * i, "", "IMAD", ("R0", "R1", "R2", "R3")) for i in range(50)]
    assert cycles(whole, 4) == 2 * 49 + 1
    load = Instruction(0, "", "LDG.E", ("R0", "desc[UR4][R2.64]"), sets=0)
    use = Instruction(16, "", "FADD", ("R1", "R0", "R0"), waits=(0,))
    assert cycles([load, use], 1) == pytest.approx(multiprocessor.LOAD_LATENCY_L1 + 2, abs=2)
    assert load.sets_when_read == NO_BARRIER


def test_what_resides_on_a_multiprocessor():
    assert blocks_per_multiprocessor(90, 210, 0, 4) == (2, "registers")
    assert blocks_per_multiprocessor(90, 32, 131072, 8) == (1, "shared memory")
    assert blocks_per_multiprocessor(90, 32, 98304, 8) == (2, "shared memory")
    assert blocks_per_multiprocessor(90, 32, 0, 8) == (8, "registers")
    assert blocks_per_multiprocessor(90, 16, 0, 8) == (8, "warps")
    assert blocks_per_multiprocessor(90, 16, 0, 1) == (32, "blocks")
    assert blocks_per_multiprocessor(103, 32, 98304, 8) == (2, "shared memory")
    assert blocks_per_multiprocessor(110, 16, 0, 8) == (6, "warps")


@triton.jit
def running_sum_kernel(x_ptr, out_ptr, rounds, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(rounds):
        b_sum += tl.load(x_ptr + i * BLOCK + o)
    tl.store(out_ptr + o, b_sum)


@pytest.mark.parametrize("rounds", [5, 13])
def test_a_compiled_kernel_loads_as_often_as_it_says(rounds):
    with launches.recorded(90) as recorded:
        x = torch.empty(132 * 128 * 14, device="cuda")
        out = torch.empty(132 * 128, device="cuda")
        running_sum_kernel[(132,)](x, out, rounds, BLOCK=128, num_warps=4)
    [launch] = recorded
    assert (launch.programs, launch.warps, launch.bytes) == (132, 4, 15 * 132 * 128 * 4)
    found = predict(launch, H200)
    # The compiler unrolls the loop, and turns a load off where a round is missing.
    assert found.by_pipe["load"] == rounds and found.by_pipe["store"] == 1 and found.by_pipe["turned off"] > 0
    assert found.instructions == sum(found.by_pipe.values())
    assert found.waves == pytest.approx(1 / found.resident, abs=1e-3)
    assert found.memory_us == pytest.approx(launch.bytes / H200.memory_gbps / 1e3, abs=0.01)
    assert found.us == max(found.issue_us, found.l2_us, found.memory_us) and found.binds in found.times


def prediction(us: float) -> CasePrediction:
    launch = TimePrediction(
        "a_kernel", 264, 4, 64, 0, 8, "registers", 0.25, 1000, {"FMA": 1000}, 0.5, us, us / 2, us / 4
    )
    return CasePrediction(1000, [launch, launch])


def test_predictions_are_kept_and_read(tmp_path):
    found = {"dwconv_norm/a": prediction(3.0), "dwconv_norm/b": prediction(8.0)}
    save(found, H200, {}, tmp_path / "issue.json")
    assert read(tmp_path / "issue.json") == found and found["dwconv_norm/a"].us == 6.0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(BadRecord, match="holds no predictions of `python -m bench issue --save`"):
        read(tmp_path / "other.json")
    [*_, first, second] = [line for line in table(found, H200) if line.startswith("  a_kernel")]
    assert first == second and first.endswith("8.0  issue")


def test_a_measured_run_calibrates_the_model():
    def row(name: str, **figures) -> dict:
        return {"name": name, "provider": "triton", "ok": True, "median_ms": 1.0, "graphed_ms": None} | figures

    kernels = {name: prediction(us / 2) for name, us in (("a", 10.0), ("b", 20.0), ("c", 30.0), ("d", 5.0))}
    one = WholePrediction(40.0, 7, {"products": 34.0, "gaps": 6.0})
    predicted = predicted_us(kernels, {Row("a", "auto"): Generations(one, one)})
    rows = [
        row("a", graphed_ms=0.011),
        row("b", warm_ms=0.030),
        row("c", median_ms=0.033),
        row("d", ok=False),
        row("d", provider="torch"),
        row("a", provider="auto", graphed_ms=0.044),
    ]
    told = calibration(predicted, {"device": "cuda", "gpu": "NVIDIA H200", "cases": rows})
    assert "the median ratio is 1.10, from 1.10 to 1.50" in told and "off by up to 36%" in told
    assert "1 of 5 predictions were not measured" in told
    assert [line.split() for line in told.splitlines() if line.startswith("a,")] == [
        ["a,", "triton", "10.0", "11.0", "1.10"],
        ["a,", "auto", "40.0", "44.0", "1.10"],
    ]
    assert not any(line.startswith("d ") for line in told.splitlines())
    with pytest.raises(BadRecord, match="none of the predicted cases is there"):
        calibration(predicted, {"device": "cuda", "gpu": "NVIDIA H200", "cases": rows[3:5]})
    with pytest.raises(BadRecord, match="expected documents of a GPU"):
        calibration(predicted, {"device": "cpu", "gpu": None, "cases": rows})
