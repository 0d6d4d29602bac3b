"""Mini-Gemini: configuration, checkpoints, pictures and prompts in, the model."""
