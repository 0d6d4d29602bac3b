"""The models, and how checkpoints, prompts and pictures become their inputs."""
