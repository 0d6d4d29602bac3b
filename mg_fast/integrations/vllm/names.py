"""The names under which vLLM knows Mini-Gemini."""

# The `architectures` of published checkpoints, and those of the uploads of March 2024.
ARCHITECTURES = tuple(
    f"{brand}{family}ForCausalLM"
    for brand in ("MGM", "MiniGemini")
    for family in ("Llama", "Gemma", "Mixtral", "Mistral")
)
# vLLM looks the tokenizer and the renderer of prompts up by one name, its `tokenizer_mode`.
MODE = "mg_fast"
