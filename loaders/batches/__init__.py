"""Bytes to columns, and what becomes of bad samples."""
