"""The options of answers and of caches. They are checked when they are made, and documented here only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import PromptError, quoted
from ..quantization import check_cache
from ..runtime.arguments import byte_limit, check_stop_strings, plain_numbers, real_number, whole_number
from .image_cache import DEFAULT_BYTES

# Most tokens of an answer if the caller does not say, as in the original's command line.
DEFAULT_NEW_TOKENS = 512

# Options of `generate` that would contradict how a question is asked here, and what to use instead.
_REFUSED = {
    "do_sample": "temperature decides whether tokens are sampled",
    "num_return_sequences": "a question has one answer; use model.generate for several",
    "streamer": "chat(..., stream=True) yields the text",
    "return_dict_in_generate": "use model.generate",
    "stream": "only chat can stream an answer",
    "draw": "only the chat of a Mini-Gemini conversation takes it",
    "ocr": "only the chat of a Mini-Gemini conversation takes it",
}
_MADE_HERE = "it is made of the text and its images; use model.generate to set it"


@dataclass(frozen=True)
class CacheOptions:
    """How much is kept from call to call.

    Attributes:
        image_cache_bytes: most bytes of image tokens kept, by the contents of the pictures, on the model's device; 0
            keeps none.
        kv_cache_bytes: most bytes of keys and values of prompts and answers kept, on the model's devices; 0 keeps none.
            None keeps 1 GiB, or more if the longest conversation that fits the model needs more. The memory in which
            the last answer was decoded is not counted. Its length is rounded up to 2048 positions, and it stays for the
            next answer until `Pipeline.clear_kv_cache`.

    Raises:
        ValueError: a limit is below 0.
    """

    image_cache_bytes: int = DEFAULT_BYTES
    kv_cache_bytes: int | None = None

    def __post_init__(self):
        for name in ("image_cache_bytes", "kv_cache_bytes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, byte_limit(name, value))


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and how many there may be.

    Numbers of NumPy and torch are accepted and become Python's own.

    Attributes:
        max_new_tokens: most tokens of the answer, 512 by default. If the context has room for fewer, the answer ends
            where the context ends.
        temperature: 0 decodes greedily; above 0 samples.
        top_p: the nucleus of the sampling; needs a temperature above 0.
        seed: makes sampling repeatable; the global random state stays as it is. Where transformers' own loop decodes,
            it is repeatable only as long as nothing else in the process draws from torch's global generator meanwhile.
            In a batch it is repeatable for the same questions in the same order and batches.
        allow_long: accept a prompt longer than the model was trained on; None takes the model's `allow_long`.
        generate_options: any other option that `generate` takes for one answer.

    Raises:
        PromptError: an option that would be ignored, contradicts another, or is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    allow_long: bool | None = None
    generate_options: Mapping = field(default_factory=dict, hash=False)

    def __post_init__(self):
        temperature = real_number(self.temperature)
        if temperature is None or not math.isfinite(temperature) or temperature < 0:
            raise PromptError(f"temperature: expected a number of 0 or more, got {quoted(self.temperature)}")
        top_p = real_number(self.top_p)
        if self.top_p is not None and (top_p is None or not 0 <= top_p <= 1):
            raise PromptError(f"top_p: expected a share from 0 to 1, got {quoted(self.top_p)}")
        if self.top_p is not None and temperature == 0:
            raise PromptError(f"top_p={top_p} is for sampling: give a temperature above 0 with it")
        most = whole_number(self.max_new_tokens)
        if self.max_new_tokens is not None and (most is None or most < 1):
            raise PromptError(
                f"max_new_tokens: expected a whole number of 1 or more, got {quoted(self.max_new_tokens)}"
            )
        options = {name: plain_numbers(value) for name, value in self.generate_options.items()}
        check_cache(options)
        if callable(options.get("stopping_criteria")):
            raise PromptError("stopping_criteria: expected a list of criteria, got one criterion")
        _refuse(options, _REFUSED)
        check_stop_strings(options.get("stop_strings"))
        seed = whole_number(self.seed)
        if self.seed is not None and (seed is None or not -(2**63) <= seed < 2**64):
            raise PromptError(f"seed: expected a whole number of at most 64 bits, got {quoted(self.seed)}")
        checked = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": most,
            "seed": seed,
            "generate_options": options,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_for(self, prompt_inputs: Sequence[str]) -> None:
        """Raises PromptError if an option is one of the model's inputs, which are made of the text and its images."""
        _refuse(self.generate_options, dict.fromkeys(("input_ids", "attention_mask", *prompt_inputs), _MADE_HERE))

    def of_generate(self) -> dict:
        """The options of `generate`, except the number of new tokens, which also depends on the prompt."""
        if self.temperature > 0:
            top_p = 1.0 if self.top_p is None else self.top_p
            return {**self.generate_options, "do_sample": True, "temperature": self.temperature, "top_p": top_p}
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **self.generate_options}

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A generator that draws what torch's own would draw after `manual_seed`; None if there is no seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def _refuse(options: Mapping, refused: Mapping[str, str]) -> None:
    for name, instead in refused.items():
        if name in options:
            raise PromptError(f"{name} is not an option here: {instead}")
