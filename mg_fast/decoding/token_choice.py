"""Chooses the next token of every sequence on the device, and tells the host of it."""

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class TokenChoice:
    """Chooses tokens as GenerationMixin does, on the device."""

    def __init__(
        self,
        ids: torch.Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generator: torch.Generator | None,
    ):
        self.ids, self.processors, self.criteria = ids, processors, criteria
        self.sampled = config.do_sample
        if self.sampled and generator is None and ids.is_cuda:
            generator = torch.Generator(ids.device).manual_seed(int(torch.empty((), dtype=torch.long).random_()))
        self.generator = generator
        self.finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        # Rows that have ended are filled up while the others go on.
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.filling = config._pad_token_tensor.to(ids.device) if ends else None

    def __call__(self, logits: torch.Tensor, length: int) -> "TokenRecord":
        """Chooses the token at position `length` of every row, and writes it into the ids."""
        logits = logits.to(self.ids.device, torch.float32)
        finite = logits.amax(dim=-1).isfinite()
        scores = self.processors(self.ids[:, :length], logits)
        if self.sampled:
            # A row without finite probabilities draws from equal ones instead. Its token is refused later; a
            # multinomial over NaN would make the CUDA context of the whole process unusable.
            probabilities = scores.softmax(dim=-1)
            usable = probabilities.amax(dim=-1).isfinite()
            chosen = torch.multinomial(
                torch.where(usable[:, None], probabilities, 1.0), num_samples=1, generator=self.generator
            )[:, 0]
        else:
            chosen, usable = scores.argmax(dim=-1), finite
        if self.filling is not None:
            chosen = torch.where(self.finished, self.filling, chosen)
        self.ids[:, length] = chosen
        self.lengths += ~self.finished
        self.finished = self.finished | self.criteria(self.ids[:, : length + 1], None)
        return TokenRecord(chosen, self.finished.all(), finite.all(), usable.all())


class TokenRecord:
    """What the host must know of a new token, copied to the host while the device goes on."""

    def __init__(self, chosen: torch.Tensor, *flags: torch.Tensor):
        # From a GPU, such a copy goes into pinned memory and the host does not wait for it.
        self._flags = len(flags)
        self._host = torch.cat([chosen, torch.stack(flags)]).to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(chosen.device).record_event() if chosen.is_cuda else None

    def read(self) -> tuple[torch.Tensor, list[bool]]:
        """The tokens [B]; whether all rows have ended, their logits were finite, and their tokens could be drawn."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens, flags = self._host.split([len(self._host) - self._flags, self._flags])
        return tokens, [bool(flag) for flag in flags.tolist()]
