"""Predictions of the published models' memory, against those that are recorded and against known figures."""

import functools
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import memory
from bench.__main__ import main
from bench.cases import all_cases
from bench.counting import Count
from bench.errors import BadRecord
from bench.fake_models import empty_model
from bench.memory import Prediction
from mg_fast import use_backend
from mg_fast.modules import convnext_channels_last as convnext
from mg_fast.modules.clip import PackedClip

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="takes a torch that is built for CUDA: no GPU"),
]

# All cases but the larger whole models, which take as long again: `python -m bench memory --check` has them too.
CHEAP = ("dual_resize", "clip", "tower", "patch_mining", "projector", "picture", "end-to-end/7b-b1-bfloat16")
GB = 10**9


@pytest.fixture(scope="module")
def predictions():
    return memory.predict(CHEAP)


def test_as_recorded(predictions):
    """The figures are deterministic; a difference is told with its size, and with how to accept it."""
    try:
        recorded = memory.recorded()
    except BadRecord as error:
        pytest.skip(str(error))
    found = list(memory.differences(recorded, predictions))
    assert not found, "\n".join(found)
    # All other cases are recorded too.
    assert list(recorded) == list(memory.cases())


def test_mining_in_hd(predictions):
    """The original's steps take at least 3 GB, the kernel at most 0.3 GB above the stage maps."""
    peaks = {provider: p.peak for provider, p in predictions["patch_mining/1536-hd-b1-bfloat16"].items()}
    print("mining, HD, transient peak in GB:", {provider: round(peak / GB, 3) for provider, peak in peaks.items()})
    assert peaks["reference"] >= 3 * GB
    assert peaks["triton"] <= 0.3 * GB


def test_what_is_held(predictions):
    """Calls leave stage maps, image tokens and the cache in bfloat16, and the first token's logits in float32."""
    maps = 2 * sum((192 >> s) ** 2 * (192 << s) for s in range(4))
    assert {p.held for p in predictions["tower/768-b1-bfloat16"].values()} == {maps}
    assert {p.held for p in predictions["tower/1536-hd-b1-bfloat16"].values()} == {4 * maps}
    assert {p.held for p in predictions["picture/768-b1-bfloat16"].values()} == {2 * 576 * 4096}
    whole = predictions["end-to-end/7b-b1-bfloat16"]
    cache = 2 * 32 * 2 * 640 * 4096
    assert whole["triton"].held == whole["auto"].held == cache + 4 * 32000
    assert whole["original"].held == cache + 4 * 32000 * 640


def test_known_figures(predictions):
    """Weights are as published; FLOP as counted elsewhere, for 23 layers of CLIP and for 24."""
    whole = predictions["end-to-end/7b-b1-bfloat16"]
    weights = 6_738_415_616 + 304e6 + 196e6 + 7e6 + 21e6
    assert whole["original"].weights == pytest.approx(2 * weights, rel=1e-3)
    # The packed copies are q, k and v of 23 layers, the contractions of ConvNeXt's blocks, and all convolutions.
    blocks = sum(depth * (4 * c * c + 49 * c) for depth, c in zip((3, 3, 27, 3), (192, 384, 768, 1536)))
    merges = 48 * 192 + sum(4 * c * 2 * c for c in (192, 384, 768))
    packed = whole["triton"].weights - whole["original"].weights
    assert packed == pytest.approx(2 * (23 * 3 * 1024**2 + blocks + merges), rel=3e-3)
    clip = predictions["clip/768-b1-bfloat16"]
    assert clip["triton"].flop == pytest.approx(366e9, rel=1e-3) and clip["reference"].flop == pytest.approx(
        382e9, rel=1e-3
    )
    # The original computes the logits of every position. The sum below is the picture and the language model.
    assert whole["original"].flop - whole["triton"].flop > 2 * 639 * 4096 * 32000
    assert whole["triton"].flop == pytest.approx(1.21e12 + 8.4e12, rel=0.02)


def test_half_a_picture_is_not_made_twice(predictions):
    """The whole takes no less than its largest part, and the launches of its parts and of the steps between them."""
    for setting in ("768", "1536-hd"):
        parts = [predictions[f"{part}/{setting}-b1-bfloat16"]["triton"] for part in ("clip", "tower", "patch_mining")]
        parts.append(predictions[f"projector/{setting}-b1-bfloat16"]["reference"])
        parts.append(predictions[f"dual_resize/{setting}-float32"]["triton"])
        whole = predictions[f"picture/{setting}-b1-bfloat16"]["triton"]
        # Between the parts views and features are put together, both pixels become bfloat16, and tokens are added and
        # put in order.
        assert whole.launches == sum(part.launches for part in parts) + 6
        assert max(part.peak for part in parts) <= whole.peak <= sum(part.peak for part in parts)
        assert whole.flop == sum(part.flop for part in parts)


def test_few_launches(predictions):
    """High-resolution tower, mining and projector together launch fewer kernels than timm's tower alone.

    In 16 bits two launches convolve and normalise a map, which by the issue model takes half of the time of one.
    """
    for setting in ("768", "1536-hd"):
        by = {
            part: predictions[f"{part}/{setting}-b1-bfloat16"]
            for part in ("clip", "tower", "patch_mining", "projector")
        }
        few = (
            by["tower"]["triton"].launches
            + by["patch_mining"]["triton"].launches
            + by["projector"]["reference"].launches
            + 2
        )
        assert few <= 166 < by["tower"]["reference"].launches * 2 // 3
        assert few + by["clip"]["triton"].launches <= 386


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's allocator: no GPU")
@pytest.mark.parametrize(
    "name, provider",
    [("patch_mining", "reference"), ("patch_mining", "torch"), ("patch_mining", "triton"), ("tower", "auto")],
)
def test_predicted_is_what_a_gpu_allocates(predictions, name, provider):
    """HD at its real size; the tolerance covers what the allocator gives beyond its blocks, and cuDNN's workspaces."""
    case = all_cases()[f"{name}/1536-hd-b1-bfloat16"]
    with torch.inference_mode():
        call = case.providers[provider](case.make("cuda"))
        # The first call makes the tables and the workspaces of the libraries.
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    assert predictions[case.name][provider].peak == pytest.approx(peak, rel=0.05, abs=8 * 2**20)


@pytest.fixture(scope="module")
def towers():
    """Both towers of the published models on a GPU that is not here."""
    with FakeTensorMode():
        inner = empty_model("7b", hd=False).model
        yield inner.vision_tower, inner.vision_tower_aux


def launches(call):
    with torch.inference_mode(), Count("cuda") as count:
        call()
    return count.launches


def test_launches_of_a_packed_clip(towers):
    """A layer launches two norms, four products, attention, SiLU and two residuals.

    Before the layers come patches, class token, positions and norm.
    """
    packed, views = PackedClip.from_tower(towers[0]), torch.empty(1, 3, 336, 336, dtype=torch.bfloat16, device="cuda")
    found = launches(functools.partial(packed, views))
    assert found.total() == 23 * 10 + 4 and found["aten.addmm.default"] == 23 * 4


def test_launches_of_the_high_resolution_tower(towers, monkeypatch):
    """Four convolutions and norms, and four launches of three operators in each of 36 blocks.

    The library's products have their GELU apart; the second one adds to the map.
    """
    tower, pixels = towers[1], torch.empty(1, 3, 768, 768, dtype=torch.bfloat16, device="cuda")
    packed = tower.pack()
    with use_backend("triton"):
        for_kernels = tower.pack()
    around = {"aten.convolution.default": 4, "aten.native_layer_norm.default": 4}
    products = {"aten.addmm.default": 36, "aten.gelu_.default": 36, "aten.addmm.out": 36}
    # The convolution and the norm of 16-bit maps are two launches.
    kernels = {"mg_fast.dwconv_norm.default": 72}
    kernels |= {f"mg_fast.{name}.default": 36 for name in ("linear_gelu", "linear_residual_")}
    assert launches(functools.partial(for_kernels, pixels, backend="triton")) == around | kernels
    assert launches(functools.partial(packed, pixels, backend="auto")) == around | products | {
        "mg_fast.dwconv_norm.default": 72
    }
    convolved = {"aten.convolution.default": 4 + 36, "aten.native_layer_norm.default": 4 + 36}
    assert launches(functools.partial(packed, pixels, backend="torch")) == convolved | products
    # There are 40 convolutions, 40 norms, and in each of 36 blocks two products, GELU, gamma and the residual.
    assert launches(functools.partial(tower, pixels, backend="reference")).total() == 40 + 40 + 36 * 5
    # Packing lays out the taps of every block and the weight of every convolution, and folds layer scale into a weight
    # and a bias. For the library it widens three tensors, and sets two more numbers or columns.
    for_library = {"aten.new_zeros.default": 36 * 3, "aten.copy_.default": 36 * 5, "aten.div.Tensor": 36}
    packing = {"aten.clone.default": 36 + 4, "aten.mul.Tensor": 36 * 2}
    assert launches(tower.pack) == packing | for_library
    with use_backend("triton"):
        assert launches(tower.pack) == packing
    # With half of a stage's rows at a time there are two more products in each of its three blocks.
    monkeypatch.setattr(convnext, "GPU_EXPANSION", 192 * 192 * 4 * 192 * 2 // 2)
    assert launches(functools.partial(packed, pixels, backend="triton")).total() == 152 + 3 * 2


def prediction(**figures):
    return Prediction(**(dict(weights=100, held=10, peak=1000, moved=500, launches=7, flop=0) | figures))


def test_differences():
    recorded = memory.record({"patch_mining/a": {"triton": prediction()}})["cases"]
    assert not list(memory.differences(recorded, {"patch_mining/a": {"triton": prediction()}}))
    [worse] = memory.differences(recorded, {"patch_mining/a": {"triton": prediction(peak=1100)}})
    assert (
        worse.startswith("patch_mining/a, triton: peak 1,000 -> 1,100 (+10.00%) got worse")
        and "python -m bench memory --save" in worse
    )
    [better] = memory.differences(recorded, {"patch_mining/a": {"triton": prediction(launches=6)}})
    assert "launches 7 -> 6 (-14.29%) got better: record it" in better
    [new] = memory.differences(recorded, {"patch_mining/a": {"auto": prediction()}})
    assert "patch_mining/a, auto: not recorded" in new
    for figure in ("peak", "moved", "launches", "flop", "weights", "held"):
        assert len(list(memory.differences(recorded, {"patch_mining/a": {"triton": prediction(**{figure: 1})}}))) == 1


@pytest.fixture
def predicted(monkeypatch, tmp_path):
    """A few invented predictions, and a file of its own to record them in."""
    monkeypatch.setattr(memory, "PREDICTED", tmp_path / "predicted.json")
    found = {
        "patch_mining/1536-hd-b1-bfloat16": {"triton": prediction(peak=3 * 2**20)},
        "end-to-end/7b-b1-bfloat16": {"auto": prediction(weights=30 * GB, peak=11 * GB)},
    }
    monkeypatch.setattr(memory, "predict", lambda patterns: {name: found[name] for name in found if name in patterns})
    return found


def test_table(predicted, capsys):
    assert main(["memory"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["patch_mining/1536-hd-b1-bfloat16", "triton", "0.00", "0.0", "3.0", "0.00", "7", "0.0"] in lines
    # 41 GB are too much for a card of 40.
    assert ["end-to-end/7b-b1-bfloat16", "auto", "41.0", "no", "no", "no", "yes", "yes", "yes"] in lines
    assert main(["memory", "*-hd-*"]) == 0
    out = capsys.readouterr().out
    assert "patch_mining/1536-hd" in out and "7b-b1" not in out and "would it fit" not in out


def test_recorded_and_checked(predicted, capsys):
    assert main(["memory", "--save"]) == 0
    assert main(["memory", "--check"]) == 0
    assert "as recorded" in capsys.readouterr().out
    predicted["patch_mining/1536-hd-b1-bfloat16"]["triton"] = prediction(peak=4 * 2**20)
    assert main(["memory", "--check", "patch_mining"]) == 1
    assert "(+33.33%) got worse" in capsys.readouterr().out
    document = json.loads(memory.PREDICTED.read_text())
    memory.PREDICTED.write_text(json.dumps(document | {"versions": document["versions"] | {"torch": "1.0"}}))
    assert main(["memory", "--check"]) == 2
    assert "was recorded with torch 1.0" in capsys.readouterr().err


def test_what_a_user_got_wrong(predicted, capsys):
    assert main(["memory", "nonsense"]) == 2
    assert "no case is called 'nonsense'" in capsys.readouterr().err
    assert main(["memory", "--save", "patch_mining"]) == 2
    assert "records the predictions of all cases" in capsys.readouterr().err
    assert main(["memory", "--check"]) == 2
    assert "python -m bench memory --save" in capsys.readouterr().err
