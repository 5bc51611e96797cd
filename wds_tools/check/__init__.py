"""Looks at data sets: verification."""
