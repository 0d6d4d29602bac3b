"""Predicts how long a kernel takes on a GPU that is not here, from the machine code that it is compiled to."""
