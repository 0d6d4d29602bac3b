"""Fixtures: checkpoints for the tests, and the folder with the original's own answers."""

import gc
import os
from pathlib import Path

# No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast.testing import random_checkpoints as random_checkpoint
from mg_fast.testing.tolerances import ieee_float32
from tests.families import ORIGINAL, OWN, family
from tests.interpreting import kernel_conditions, pytest_pycollect_makemodule  # noqa: F401  (pytest finds them here)
from tests.paths import OWN_GOLDEN, original_golden

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def pytest_collection_finish(session):
    """Leaves all that is imported by now out of garbage collection, which takes a tenth of the time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = original_golden()
    if folder is None:
        pytest.skip("the original's outputs are not here: set MG_FAST_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def standard() -> Path:
    """A tiny standard checkpoint in the published layout, with a picture beside it."""
    return OWN_GOLDEN / "standard"


@pytest.fixture(scope="session")
def hd() -> Path:
    """A tiny HD checkpoint in the published layout."""
    return OWN_GOLDEN / "hd"


@pytest.fixture(scope="session")
def built(standard, hd, tmp_path_factory):
    """Tiny checkpoints by the name of their family."""
    folder = tmp_path_factory.mktemp("built")
    made = {kind: random_checkpoint.build(folder / kind, size=f"tiny-{kind}") for kind in ("gemma", "mixtral")}
    bfloat16 = random_checkpoint.build(folder / "bfloat16", size="tiny", dtype=torch.bfloat16)
    return {"llama": standard, "hd": hd, "bfloat16": bfloat16, **made}


@pytest.fixture(scope="session")
def photo() -> Path:
    return OWN_GOLDEN / "photo.png"


@pytest.fixture(scope="session")
def drawing() -> Path:
    return OWN_GOLDEN / "drawing.png"


@pytest.fixture(scope="session")
def model(standard):
    return mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(standard)


@pytest.fixture(scope="session")
def processor(standard):
    return mg_fast.MiniGeminiProcessor.from_pretrained(standard)


@pytest.fixture(scope="session")
def hd_model(hd):
    return mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(hd)


@pytest.fixture(scope="session")
def hd_processor(hd):
    return mg_fast.MiniGeminiProcessor.from_pretrained(hd)


@pytest.fixture
def pipeline(model, processor):
    """A fresh pipeline over the shared model, without a conversation."""
    return mg_fast.Pipeline(model, processor)


@pytest.fixture(autouse=True)
def two_threads():
    """Sets two threads, or one where two processes share the tests."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Keeps TF32 off: on a GPU, the plain forms' float32 error is the standard for ours, so it must not be TF32's."""
    ieee_float32()


@pytest.fixture
def one_thread(two_threads):
    """Sets one thread, for models so small that they are slower on two."""
    torch.set_num_threads(1)


@pytest.fixture
def own():
    """This project's own tiny checkpoint, loaded once."""
    return family("standard")


@pytest.fixture(params=[*OWN, *ORIGINAL])
def each(request):
    """Every tiny checkpoint, including those of the original that are on this machine."""
    return family(request.param)
