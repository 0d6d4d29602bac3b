"""From pictures and questions to answers: the stages, conversations and batches."""
