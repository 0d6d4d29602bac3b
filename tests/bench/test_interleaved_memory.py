"""MM-Interleaved at its published size, counted without a GPU: what a token, a step and the whole model cost."""

import pytest
import torch

from bench import memory
from bench.errors import BadRecord
from bench.fake_interleaved import GROUP, PICTURES

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

DECODE, STEP = f"{GROUP}decode-n4-b1-bfloat16", f"{GROUP}step-b1-bfloat16"
# What is counted anew here; `python -m bench memory --check` counts everything.
COUNTED = ("plain", "auto")


@pytest.fixture(scope="module")
def recorded():
    try:
        return memory.recorded()
    except BadRecord as error:
        pytest.skip(str(error))


@pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="takes a torch that is built for CUDA: no GPU")
def test_as_recorded(recorded):
    pytest.importorskip("triton")
    found = list(memory.differences(recorded, memory.predict([DECODE, STEP], COUNTED)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pictures", PICTURES)
def test_a_token_costs_hardly_more_than_in_the_plain_language_model(recorded, pictures):
    case = recorded[f"{GROUP}decode-n{pictures}-b1-bfloat16"]
    flop, launches = ({name: p[figure] for name, p in case.items()} for figure in ("flop", "launches"))
    assert flop["plain"] < flop["auto"] <= 1.05 * flop["plain"]
    assert launches["plain"] < launches["auto"] <= 1.2 * launches["plain"]
    # The original projects every picture again in ten layers: 1,344 pixels from 1,024 to 1,024 channels.
    assert flop["original"] - flop["plain"] > 10 * pictures * 2 * 1344 * 1024**2
    if pictures == 4:
        assert flop["original"] / flop["plain"] == pytest.approx(5.4, abs=0.1)


def test_a_prompt_costs_hardly_more_than_in_the_plain_language_model(recorded):
    for pictures in PICTURES:
        case = recorded[f"{GROUP}prefill-n{pictures}-b1-bfloat16"]
        assert case["plain"]["flop"] < case["auto"]["flop"] <= 1.05 * case["plain"]["flop"]
        assert case["auto"]["flop"] < case["original"]["flop"]


def test_a_step_launches_few_kernels(recorded):
    case = recorded[STEP]
    assert case["plain"]["launches"] < case["auto"]["launches"] <= 1.2 * case["plain"]["launches"]
    assert case["auto"]["flop"] <= 1.05 * case["plain"]["flop"]
    # Both halves of the original's guided batch project the picture before, in 13 blocks with 5,440 pixels.
    assert case["original"]["flop"] - case["auto"]["flop"] > 2 * 13 * 2 * 5440 * 1024**2


def test_the_whole_model_fits_a_card_of_40_gb(recorded):
    """Weights, packed copies, and everything that is held at once, with four pictures."""
    needed = {name: p["weights"] + p["peak"] for name, p in recorded[f"{GROUP}whole-n4-b1-bfloat16"].items()}
    assert needed["auto"] <= 36e9 < 60e9 < needed["original"]
