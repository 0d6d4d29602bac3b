"""The original's settings of text generation for its tasks, and the penalty that sees only new tokens."""

from dataclasses import dataclass

import torch
from transformers import RepetitionPenaltyLogitsProcessor

# What transformers 4.31 adds to sampling where a caller says nothing.
TOP_K = 50


@dataclass(frozen=True)
class TextSettings:
    """Settings of text generation as the original has them; the defaults are those of its code.

    Attributes:
        max_length: most new tokens.
        min_length: the end is not allowed before this length, in which the token that begins the text counts: with 8,
            the first seven new tokens are not the end.
        num_beams: beams of beam search; 1 is greedy or sampled decoding.
        use_nucleus_sampling: draw tokens from the most likely `TOP_K` and the most likely ones of mass `top_p`.
        top_p, temperature: of sampling.
        repetition_penalty: divides the chance of tokens that are in the new text already.
        length_penalty: power of the length by which beam search divides a text's log-likelihood.
        num_captions: texts for each prompt.
    """

    max_length: int = 30
    min_length: int = 8
    num_beams: int = 5
    use_nucleus_sampling: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_captions: int = 1

    def generate_arguments(self) -> dict[str, object]:
        """The arguments of `MMInterleavedForConditionalGeneration.generate` that do the same."""
        sampling = dict(temperature=self.temperature, top_p=self.top_p, top_k=TOP_K)
        return {
            "max_new_tokens": self.max_length,
            "min_new_tokens": new_tokens_of(self.min_length),
            "num_beams": self.num_beams,
            "do_sample": self.use_nucleus_sampling,
            "repetition_penalty": self.repetition_penalty,
            "num_return_sequences": self.num_captions,
            **(sampling if self.use_nucleus_sampling else {}),
            **({"length_penalty": self.length_penalty} if self.num_beams > 1 else {}),
        }


# The settings of the original's configurations and collators.
CODE_DEFAULTS = TextSettings()
INTERLEAVED = TextSettings(max_length=90, num_beams=1, use_nucleus_sampling=True, repetition_penalty=1.3)
CAPTION = TextSettings(max_length=20)
QUESTION = TextSettings(max_length=10, min_length=0, num_beams=3, top_p=1.0, length_penalty=0.0)
PARAGRAPH = TextSettings(max_length=90, min_length=90, repetition_penalty=1.2)


def new_tokens_of(min_length: int) -> int:
    """The fewest new tokens for the original's `min_length`, in which the token that begins the text counts."""
    return max(0, min_length - 1)


class NewTokensRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """The repetition penalty over BOS and the new tokens alone.

    The original's prompt is embeddings, so its penalty does not see the prompt's tokens. It sees the BOS with which the
    original begins the new text. The penalty of transformers also sees the prompt.

    Args:
        penalty: above 1, tokens that came before become less likely.
        prompt: number of positions of the prompt.
        bos_token_id: the token that begins a text; None for none.
    """

    def __init__(self, penalty: float, prompt: int, bos_token_id: int | None):
        super().__init__(penalty)
        self.prompt, self.bos_token_id = prompt, bos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = input_ids[:, self.prompt :]
        if self.bos_token_id is not None:
            seen = torch.nn.functional.pad(seen, (1, 0), value=self.bos_token_id)
        return super().__call__(seen, scores) if seen.shape[1] else scores
