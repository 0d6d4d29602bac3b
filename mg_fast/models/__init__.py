"""The models, and how checkpoints, prompts and pictures become what they take."""
