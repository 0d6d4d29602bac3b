"""Mini-Gemini: its configuration, checkpoints and model, and the pictures and prompts that go into it."""
