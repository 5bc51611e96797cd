"""Runs tasks and shows how far they are. Knows callables only, nothing of data."""
