"""Where a run stands, what it consumed, and whether that is every sample once."""
