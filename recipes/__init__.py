"""Short programs to start from and change."""
