"""Builds dialogues that teach a language model to write prompts for pictures: `python -m recipes.data --help`."""
