"""What several layers need and none owns; it looks at nothing above it."""
