"""The stages of a model that reads and gives texts and pictures in any order."""
