"""Measurements: latency and memory, with the conditions they were taken under."""
