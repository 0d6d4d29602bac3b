"""What tests, benchmark and recipes share: the accuracy rule, and random checkpoints in the published layout."""
