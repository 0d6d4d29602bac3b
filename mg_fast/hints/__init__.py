"""What is added to a question before it is asked."""
