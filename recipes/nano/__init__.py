"""A Mini-Gemini small enough to train on a laptop's processor, and the pictures it is trained on."""
