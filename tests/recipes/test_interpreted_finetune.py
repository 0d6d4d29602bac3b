"""Ten steps of training with each backend from the same start: the losses stay together."""

import pytest

from recipes.finetune.run import fine_tune
from tests.families import family
from tests.recipes.finetuning import CAPTIONS, losses, make_config

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The losses of ten steps of stage 1 by backend.

    The towers are frozen, so what they compute of the two pictures is kept from one step to the next.
    """
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for backend in ("reference", "torch", "triton"):
        config = make_config(
            folder / backend,
            family("standard").folder,
            CAPTIONS[:2],
            1,
            max_steps=STEPS,
            learning_rate=1e-3,
            schedule="constant",
            warmup=0.0,
            backend=backend,
            feature_cache=str(folder / backend / "features"),
        )
        fine_tune(config)
        found[backend] = losses(config)
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_losses_stay_together(trained, backend):
    assert len(trained[backend]) == STEPS and trained[backend][-1] < trained[backend][0]
    assert trained[backend] == pytest.approx(trained["reference"], rel=1e-4)
