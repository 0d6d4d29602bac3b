"""Helpers that several layers need and no layer owns; they import nothing from above."""
