"""The `torch` backend: the operations' forms in PyTorch, on any device."""
