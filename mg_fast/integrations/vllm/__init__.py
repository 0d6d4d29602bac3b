"""Mini-Gemini in vLLM: a plugin that vLLM finds by its entry point and loads in each of its processes.

vLLM brings the language models, the scheduler and the server. This package adds the picture side, the prompts and the
configuration. `registration` has what vLLM calls; importing it imports neither vLLM nor torch.
"""
