"""Looks at datasets: verification."""
