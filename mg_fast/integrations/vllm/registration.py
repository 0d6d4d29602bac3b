"""Tells vLLM about Mini-Gemini's classes, by their names: nothing of vLLM is imported before it is in use.

vLLM calls `register` in each of its processes, since pyproject.toml names it under `vllm.general_plugins`.
"""

from .names import ARCHITECTURES, MODE


def register() -> None:
    """Registers model, configuration, tokenizer and renderer with vLLM. It may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from ...models.mini_gemini import configuration  # noqa: F401  (AutoConfig learns the model types)
    from .configuration import MiniGeminiServingConfig

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{__package__}.model:ServedMiniGemini")
        MODELS_CONFIG_MAP[architecture] = MiniGeminiServingConfig
    if MODE not in RENDERER_REGISTRY.renderers:
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(MODE, f"{__package__}.renderer", "MiniGeminiRenderer")
