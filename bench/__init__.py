"""Measurements: latency and memory of mg_fast against the original's own steps."""
