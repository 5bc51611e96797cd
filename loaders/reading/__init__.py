"""Bytes ahead of need: what to load, what is held, what is in flight."""
