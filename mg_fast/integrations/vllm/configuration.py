"""Completes what vLLM knows of a checkpoint before it makes tokenizer and model, and refuses what it cannot serve."""

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ...errors import CheckpointError, quoted
from ...models.mini_gemini.headers import complete_from_headers
from .names import MODE


def hub_arguments(model_config: ModelConfig) -> dict[str, str | bool | None]:
    """The arguments by which files of a hub id are found: its revision, and the token for closed repositories."""
    return {"revision": model_config.revision, "token": model_config.hf_token}


class MiniGeminiServingConfig(VerifyAndUpdateConfig):
    """Completes vLLM's configuration of a model. vLLM calls it once, in the process that it was started in."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Completes `model_config.hf_config` and chooses our renderer.

        Raises:
            CheckpointError: the checkpoint cannot be served, or an option does not fit it.
        """
        config = model_config.hf_config
        if model_config.tokenizer_mode not in ("auto", MODE):
            raise CheckpointError(
                f"tokenizer_mode: Mini-Gemini's prompts need {MODE!r}, which 'auto' chooses, "
                f"got {quoted(model_config.tokenizer_mode)}"
            )
        model_config.tokenizer_mode = MODE
        if model_config.multimodal_config is not None and model_config.multimodal_config.enable_mm_embeds:
            raise CheckpointError("enable_mm_embeds: image tokens made elsewhere are not supported, only pictures are")
        complete_from_headers(config, model_config.model, **hub_arguments(model_config))
        text = config.text_config
        if text.model_type == "gemma":
            # vLLM takes a published `hidden_act: gelu` for the tanh approximation, unless `hidden_activation` is set.
            text.hidden_activation = text.hidden_act
