"""Given answers have the original's log-likelihoods, in batches and in any number of passes too."""

import pytest
import torch

from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved import scoring
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(name: str) -> tuple[dict, torch.Tensor]:
    answers = recorded.answers(name)
    options = dict(option_ids=answers["scores.options_ids"], option_mask=answers["scores.options_mask"])
    return {**inputs(name, "scores", answers), **options}, answers["scores.scores"]


@pytest.mark.parametrize("passes", [1, 3], ids=["one pass", "three passes"])
@pytest.mark.parametrize("name", recorded.NAMES)
def test_scores_are_the_recorded_ones(name, passes, monkeypatch):
    given, expected = asked(name)
    if passes > 1:
        monkeypatch.setattr(scoring.score_options, "__defaults__", (2,))
    assert relative_error(load(name).score(**given), expected) <= 2e-5


def test_padded_prompts_with_different_pictures_score_as_alone():
    """The second prompt has no picture, and is padded on the left."""
    name, model = "mmi-tiny", load("mmi-tiny")
    given, expected = asked(name)
    ids, plain = given["input_ids"], torch.tensor([[1, 282, 337, 346]])
    prompts = torch.full((2, ids.shape[1]), model.config.pad_token_id)
    prompts[0], prompts[1, -4:] = ids[0], plain[0]
    batch = dict(
        input_ids=prompts,
        attention_mask=(prompts != model.config.pad_token_id).long(),
        option_ids=given["option_ids"].expand(2, -1, -1),
        option_mask=given["option_mask"].expand(2, -1, -1),
        num_image_per_seq=torch.tensor([1, 0]),
        **{part: given[part] for part in ("image_tokens", "image_maps")},
    )
    scores = model.score(**batch)
    alone = model.score(plain, given["option_ids"], given["option_mask"])
    assert relative_error(scores[0], expected) <= 2e-5 and relative_error(scores[1], alone) <= 1e-5


def test_one_token_options_need_no_further_pass():
    model = load("mmi-tiny")
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        expected = model(ids).logits[0, -1].log_softmax(dim=-1)
    assert torch.allclose(model.score(ids, torch.tensor([[7], [8]])), expected[[7, 8]], atol=1e-6)


@pytest.mark.parametrize(
    "options, mask, message",
    [
        (torch.ones(1, 3, dtype=torch.long), None, "at least two options to choose from, got 1"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "got an empty one"),
        (torch.ones(3, 2, 2, dtype=torch.long), None, r"option_ids must be \[1, options, tokens\], got \[3, 2, 2\]"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 2), r"option_mask must be \[1, 2, 3\], got \[1, 2, 2\]"),
    ],
)
def test_options_that_do_not_fit(options, mask, message):
    with pytest.raises(PromptError, match=message):
        load("mmi-tiny").score(torch.tensor([[1, 5]]), options, mask)
