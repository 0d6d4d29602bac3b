"""The dtype in which a checkpoint is loaded on a CPU follows the CPU's features and the memory; both are faked here."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import TorchAoConfig

import mg_fast
from mg_fast import cli
from mg_fast.models import builtin
from mg_fast.models.mini_gemini import loading_dtype
from mg_fast.models.mini_gemini.checkpoint import open_checkpoint
from mg_fast.runtime import cpu_dtype
from mg_fast.runtime.dtypes import wanted_dtype
from mg_fast.testing import random_checkpoints as random_checkpoint
from tests.paths import ROOT

OLD, BF16, AMX, FP16, ARM = (
    {"avx2", "f16c"},
    {"avx2", "avx512_bf16"},
    {"amx_bf16"},
    {"avx512_fp16"},
    {"asimdhp", "bf16"},
)
PLENTY, PARAMETERS = 10**12, 10**9
SINGLE, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def machine(monkeypatch):
    def pretend(found, available=PLENTY):
        monkeypatch.setattr(cpu_dtype, "features", lambda: frozenset(found))
        monkeypatch.setattr(cpu_dtype, "available_bytes", lambda: available)

    return pretend


@pytest.fixture(scope="module")
def checkpoints(built, tmp_path_factory):
    half = random_checkpoint.build(tmp_path_factory.mktemp("half") / "float16", size="tiny", dtype=torch.float16)
    return {BFLOAT: built["bfloat16"], HALF: half, SINGLE: built["llama"]}


def lines(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name in (cpu_dtype.__name__, loading_dtype.__name__)
    ]


@pytest.mark.parametrize(
    "found, stored, taken",
    [
        (OLD, BFLOAT, SINGLE),
        (OLD, HALF, SINGLE),
        (BF16, BFLOAT, BFLOAT),
        (AMX, BFLOAT, BFLOAT),
        (BF16, HALF, BFLOAT),
        (FP16, HALF, HALF),
        # float16 lacks the range for bfloat16's numbers.
        (FP16, BFLOAT, SINGLE),
        (ARM, BFLOAT, BFLOAT),
        (ARM, HALF, HALF),
        (set(), BFLOAT, SINGLE),
        # No weight is rounded that was not rounded before.
        (BF16, SINGLE, SINGLE),
        (OLD, SINGLE, SINGLE),
    ],
)
def test_auto_takes_what_the_cpu_computes_in(machine, caplog, found, stored, taken):
    machine(found)
    assert cpu_dtype.choose(stored, PARAMETERS) == taken
    said = lines(caplog)
    assert len(said) == (taken != stored)
    if said:
        name, others = (str(dtype).removeprefix("torch.") for dtype in (taken, stored))
        assert said[0].startswith(
            f"weights are loaded in {name}, not in the checkpoint's {others}: this CPU has no {others} arithmetic"
        )


def test_float32_only_where_it_fits(machine, caplog):
    needed = int(4 * PARAMETERS * 1.25)
    machine(OLD, needed)
    assert cpu_dtype.choose(BFLOAT, PARAMETERS) == SINGLE
    caplog.clear()
    machine(OLD, needed - 1)
    assert cpu_dtype.choose(BFLOAT, PARAMETERS) == BFLOAT
    [said] = lines(caplog)
    assert said.startswith("weights stay in bfloat16: ") and said.endswith(
        "float32 needs 5.0 GB of memory and 5.0 GB are available"
    )
    # A fast 16-bit dtype takes no more memory than the stored one, so it is taken even with little memory.
    machine(BF16, 1)
    assert cpu_dtype.choose(HALF, PARAMETERS) == BFLOAT


@pytest.mark.parametrize("stored", [BFLOAT, HALF])
def test_load(machine, checkpoints, photo, caplog, stored):
    machine(OLD)
    pipeline = mg_fast.load(checkpoints[stored], device="cpu", template="vicuna_v1")
    assert {p.dtype for p in pipeline.model.parameters()} == {SINGLE}
    assert len(lines(caplog)) == 1
    # transformers' own `auto` keeps its meaning.
    plain = mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(checkpoints[stored], dtype="auto")
    assert plain.dtype == stored and len(lines(caplog)) == 1
    assert pipeline.chat("What?", [photo], max_new_tokens=2).text is not None


def test_load_counts_the_checkpoints_numbers(machine, checkpoints, monkeypatch):
    counted = []
    choose = cpu_dtype.choose
    monkeypatch.setattr(
        cpu_dtype, "choose", lambda stored, parameters: counted.append(parameters) or choose(stored, parameters)
    )
    machine(OLD, 10)
    pipeline = mg_fast.load(checkpoints[BFLOAT], device="cpu", template="vicuna_v1")
    assert pipeline.model.dtype == BFLOAT
    assert counted == [sum(math.prod(info.shape) for info in open_checkpoint(checkpoints[BFLOAT]).tensors.values())]
    assert counted[0] == sum(p.numel() for p in pipeline.model.parameters())


@pytest.mark.parametrize("asked", ["bfloat16", BFLOAT, "float16"])
def test_a_dtype_that_was_asked_for_is_obeyed_with_a_warning(machine, checkpoints, caplog, asked):
    machine(OLD)
    pipeline = mg_fast.load(checkpoints[SINGLE], dtype=asked, device="cpu")
    name = str(asked).removeprefix("torch.")
    assert str(pipeline.model.dtype) == f"torch.{name}"
    [said] = lines(caplog)
    fewest, most = cpu_dtype.SLOWER[getattr(torch, name)]
    assert said.startswith(f"weights in {name}, as asked for: this CPU has no {name} arithmetic")
    assert f"take {fewest} to {most} times as long as in float32" in said and said.endswith(
        "(dtype='auto' or 'float32' is faster)"
    )


@pytest.mark.parametrize("found, asked", [(OLD, "float32"), (BF16, "bfloat16"), (ARM, HALF)])
def test_a_fast_one_is_not_talked_about(machine, caplog, found, asked):
    machine(found)
    assert loading_dtype.resolve(asked, "unread") == asked
    assert lines(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", ["bf16", "torch.bfloat16", "bfloat16", BFLOAT, "half", "fp16", "torch.float16", "fp32", "float", SINGLE]
)
def test_every_name_of_a_dtype(checkpoints, asked):
    wanted = {"b": BFLOAT, "h": HALF}.get(str(asked).removeprefix("torch.")[0], HALF if "16" in str(asked) else SINGLE)
    assert wanted_dtype(asked) == wanted
    assert mg_fast.load(checkpoints[SINGLE], dtype=asked, device="cpu").model.dtype == wanted
    assert mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(checkpoints[SINGLE], dtype=asked).dtype == wanted


def test_a_dict_of_dtypes(machine, caplog):
    machine(OLD)
    for others in (SINGLE, BFLOAT):
        dtypes = {"text_config": "bfloat16", "": str(others).removeprefix("torch.")}
        model = mg_fast.load("nano", device="cpu", dtype=dtypes).model
        alone = mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(builtin.resolve("nano"), dtype=dtypes)
        assert [p.dtype for p in model.parameters()] == [p.dtype for p in alone.parameters()]
        assert model.model.vision_tower.dtype == others
    assert lines(caplog) == []


def test_none_is_auto(machine, checkpoints, caplog):
    machine(OLD)
    assert mg_fast.load(checkpoints[BFLOAT], device="cpu", dtype=None).model.dtype == SINGLE
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(
    "asked",
    [
        "load",
        "int8",
        "bf-16",
        "torch.auto",
        "",
        np.float32,
        np.dtype("float16"),
        torch.int8,
        torch.complex64,
        16,
        float,
    ],
)
def test_dtypes_that_are_none(checkpoints, asked, capsys):
    for call in (mg_fast.load, mg_fast.MiniGeminiForConditionalGeneration.from_pretrained):
        with pytest.raises(mg_fast.MgFastError, match="dtype: expected auto, float32, bfloat16, float16 .*, got "):
            call(checkpoints[SINGLE], dtype=asked)
    if isinstance(asked, str):
        with pytest.raises(SystemExit):
            cli.main(["run", "--model", "nano", "--prompt", "What?", "--dtype", asked])
        assert "argument --dtype: expected auto, float32, bfloat16, float16" in capsys.readouterr().err


def test_quantized_weights_want_bfloat16(machine, checkpoints, caplog):
    for found in (OLD, BF16, FP16):
        machine(found)
        assert loading_dtype.resolve("auto", checkpoints[BFLOAT], quantize="int8") == "auto"
        assert lines(caplog) == []
        assert loading_dtype.resolve("auto", checkpoints[HALF], quantize="int4") == BFLOAT
        [said] = lines(caplog)
        assert (
            said
            == "weights are loaded in bfloat16, not in the checkpoint's float16: kernels for int4 weights take bfloat16"
        )
        caplog.clear()
        # What this costs is said by the code that quantizes, so there is no other line.
        assert loading_dtype.resolve("float16", checkpoints[HALF], quantize="int8") == "float16"
        assert loading_dtype.resolve("auto", checkpoints[SINGLE], quantize="int8") == "auto"
        assert loading_dtype.resolve("auto", checkpoints[HALF], quantize=TorchAoConfig) == "auto"
        assert lines(caplog) == []


def test_a_saved_quantized_model_keeps_its_dtype(machine, checkpoints, tmp_path):
    machine(OLD)
    for file in checkpoints[BFLOAT].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loading_dtype.resolve("auto", tmp_path) == "auto"


def test_the_command_line(machine, checkpoints, capsys, caplog):
    machine(OLD)
    words = [
        "--model",
        str(checkpoints[BFLOAT]),
        "--template",
        "vicuna_v1",
        "--prompt",
        "What?",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    assert cli.main(["run", *words]) == 0
    assert len(lines(caplog)) == 1 and "loaded in float32" in lines(caplog)[0]
    caplog.clear()
    assert cli.main(["run", *words, "--dtype", "bf16"]) == 0
    assert len(lines(caplog)) == 1 and "as asked for" in lines(caplog)[0]


@pytest.mark.parametrize(
    "found, says",
    [
        (
            OLD,
            "arithmetic in float32 (measured with AVX2: bfloat16 {0} to {1} times as long, float16 {2} to {3} times as "
            "long); dtype=auto takes float32 for bfloat16 and float32 for float16, where float32 fits in 12.3 GB of "
            "available memory",
        ),
        (
            BF16,
            "arithmetic in float32 and bfloat16 (measured with AVX2: float16 {2} to {3} times as long); "
            "dtype=auto takes bfloat16 for float16",
        ),
        (ARM, "arithmetic in float32 and bfloat16 and float16; dtype=auto keeps 16-bit checkpoints as they are"),
    ],
)
def test_doctor(machine, capsys, found, says):
    machine(found, 12_300_000_000)
    assert cli.main(["doctor"]) == 0
    expected = says.format(*cpu_dtype.SLOWER[BFLOAT], *cpu_dtype.SLOWER[HALF])
    assert f"  CPU: {expected}" in capsys.readouterr().out.splitlines()


def test_features_of_this_machine():
    found = cpu_dtype.features()
    assert found >= {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    assert 0 < cpu_dtype.available_bytes() < 2**60


def test_features_are_read_as_linux_lists_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": False, "num_sockets": 1})
    for text, expected in (
        (
            "processor\t: 0\nmodel name\t: Some EPYC\nflags\t\t: fpu avx512_bf16\n\nflags\t\t: other\n",
            {"fpu", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\n", {"fp", "asimd", "asimdhp", "bf16"}),
    ):
        monkeypatch.setattr(cpu_dtype.Path, "read_text", lambda self, text=text, **_: text)
        assert cpu_dtype.features() == expected

    def missing(self, **_):
        raise FileNotFoundError

    monkeypatch.setattr(cpu_dtype.Path, "read_text", missing)
    assert cpu_dtype.features() == set()


def test_a_container_has_less(monkeypatch):
    files = {"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1000"}
    files["/sys/fs/cgroup/memory.stat"] = "anon 400\ninactive_file 250\nactive_file 350\n"

    def read(self, **_):
        if str(self) not in files:
            raise FileNotFoundError
        return files[str(self)]

    monkeypatch.setattr(cpu_dtype.Path, "read_text", read)
    assert cpu_dtype.available_bytes() == 2250
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert cpu_dtype.available_bytes() > 2250


def test_the_factors_are_those_measured():
    document = json.loads((ROOT / "bench" / "results" / "cpu-dtypes.json").read_text())
    assert "avx512_bf16" not in document["cpu"] and "amx_bf16" not in document["cpu"]
    for dtype, named in cpu_dtype.SLOWER.items():
        many_rows = [row for row in document["products"] if row["shape"] and row["shape"][0] > 1]
        ratios = [row[str(dtype).removeprefix("torch.")]["times_float32"] for row in many_rows]
        assert named == (round(min(ratios)), round(max(ratios)))
