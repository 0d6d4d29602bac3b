"""Ranks texts by how likely the model is to write each of them after a sequence."""

from collections.abc import Sequence

import torch

from ...errors import PromptError, quoted
from ...models.templates import IMAGE_TAG
from ...ops.backend import use_backend
from ...runtime.arguments import check_text
from ...runtime.layer_dtypes import call
from .answers import InterleavedAnswers
from .sequence import InterleavedSequence


@torch.inference_mode()
def score(answers: InterleavedAnswers, sequence: InterleavedSequence, options: Sequence[str]) -> list[float]:
    """The logarithm of the probability of each option after a sequence, not divided by its length.

    The sequence is run once, and then every option by itself, so that an option's score does not depend on the others.

    Args:
        answers: the stage that runs the language model.
        sequence: what comes before the options; it has at least one picture.
        options: at least two texts.

    Raises:
        PromptError: there are fewer than two options, one is no text or holds a picture's place, or the sequence has no
            picture or no room.
    """
    if isinstance(options, str) or not isinstance(options, Sequence) or len(options) < 2:
        raise PromptError(f"options: expected a list of two or more texts, got {quoted(options)}")
    for number, option in enumerate(options):
        check_text(option, f"options[{number}]")
        if IMAGE_TAG in option:
            raise PromptError(f"options[{number}] holds {IMAGE_TAG}: only texts can be ranked")
        if not option.strip():
            raise PromptError(f"options[{number}]: expected words, got {quoted(option)}")
    if not sequence.pictures:
        raise PromptError("expected at least one picture before the options, got a text alone")
    model = answers.model
    sequence.check(model.config)
    before, scores = len(sequence.ids), []
    rows = [answers.read(option, first=False) for option in options]
    model.check_length(before, max(map(len, rows)))
    with use_backend(answers.backend):
        # The sequence is run by itself, so that the options' order makes no difference.
        answers.states(sequence)
        for ids in rows:
            states = answers.states(sequence.extended(ids))
            # The state before a token gives its probability.
            logits = call(model.head, states[0, before - 1 : before + len(ids) - 1])
            chances = logits.float().log_softmax(dim=-1)
            scores.append(chances.gather(1, torch.tensor(ids, device=chances.device)[:, None]).sum())
    return torch.stack(scores).tolist()
