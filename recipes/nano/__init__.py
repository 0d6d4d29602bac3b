"""A Mini-Gemini that is small enough to train on a laptop's CPU, and the pictures that it is trained on."""
