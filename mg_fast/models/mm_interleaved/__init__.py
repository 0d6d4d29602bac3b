"""MM-Interleaved: reads pictures and text in any order, and writes and draws in any order."""
