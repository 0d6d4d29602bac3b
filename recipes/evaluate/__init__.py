"""Runs the benchmarks that Mini-Gemini was published with, through lmms-eval: `python -m recipes.evaluate --help`."""
