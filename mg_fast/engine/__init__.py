"""The stages, conversations and batches that lead from pictures and questions to answers."""
