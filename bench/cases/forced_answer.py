"""The answer that every provider is made to give, and the host's clock for it."""

import time
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

# The number of tokens of an answer if more than the first is timed, and how many of them have their logits compared.
ANSWER, COMPARED = 33, 4


class ForcedAnswer(LogitsProcessor):
    """Makes `generate` give the tokens that are set, and keeps the first logits and two times.

    Attributes:
        logits: [vocabulary] each, of the last sequence's first tokens, in the model's dtype, which they were computed
            in.
        times: in seconds, when the first and the last token's logits were there.
    """

    def __init__(self, answer: Sequence[int], dtype: torch.dtype):
        self.answer, self.dtype = answer, dtype
        self.steps = 0
        self.logits: list[torch.Tensor] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.steps in (0, len(self.answer) - 1):
            self.times.append(now(scores.device.type))
        if self.steps < COMPARED:
            self.logits.append(scores[-1].to(self.dtype))
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.answer[min(self.steps, len(self.answer) - 1)]] = 0.0
        self.steps += 1
        return forced


def now(device: str) -> float:
    """The host's clock in seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
