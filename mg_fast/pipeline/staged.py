"""What the pipelines of all families share: they pass questions about the model on to their stages."""

import torch

from ..engine.answers import AnswerStage
from ..quantization import WeightBytes, weight_bytes


class StagedPipeline:
    """A facade over the stages of one model; a subclass sets them.

    Attributes:
        answers: the stage that writes texts, which also holds the model and the processor.
        load_seconds: how long loading took; None if `mg_fast.load` did not make this pipeline.
    """

    answers: AnswerStage
    load_seconds: float | None = None

    def __reduce_ex__(self, protocol):
        """Refuses copying and pickling, which the locks and the memory of a decoder do not allow."""
        name = type(self).__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise TypeError(
            f"{article} {name} cannot be copied or pickled: pipeline.conversation() opens another conversation over "
            f"the same model, mg_fast.{name}(model, processor) makes another pipeline over it, and another process "
            "calls mg_fast.load itself"
        )

    @property
    def model(self):
        """The model that everything runs on."""
        return self.answers.model

    @property
    def processor(self):
        """The model's processor."""
        return self.answers.processor

    @property
    def backend(self) -> str | None:
        """The backend of every call; None leaves the choice to what is in force at the call."""
        return self.answers.backend

    @property
    def device(self) -> torch.device:
        """The device of the language model's input; for offloaded weights, the device that they are brought to."""
        return self.answers.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.model.dtype

    @property
    def decoder(self):
        """The answer stage's decoder, which all backends but `reference` decode with."""
        return self.answers.decoder

    @property
    def weights(self) -> WeightBytes:
        """The bytes of the language model and of everything else, as they are stored now."""
        return weight_bytes(self.model)

    def clear_kv_cache(self) -> None:
        """Drops what is remembered of prompts and answers: keys and values, and the states where they are kept.

        Conversations go on, and compute their history once more. This is needed after a write to the language model's
        weights through `.data`. Other changes of weights, hooks and adapters are noticed without it.
        """
        self.answers.forget()
