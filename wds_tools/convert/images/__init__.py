"""The images that records name: where they are, and how they are read."""
