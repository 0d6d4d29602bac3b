"""Fine-tunes Mini-Gemini as the original was trained: two stages on transformers' Trainer, with frozen towers."""
