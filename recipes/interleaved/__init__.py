"""MM-Interleaved's published tasks, one short program each."""
