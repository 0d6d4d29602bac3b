"""The operations' PyTorch forms, on any device: the `torch` backend."""
