"""A loader under trainers."""
