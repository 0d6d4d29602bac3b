"""Everything that a GPU which is borrowed for a quarter of an hour should tell: `python -m bench gpu`."""
