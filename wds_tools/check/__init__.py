"""Looks at datasets: are they whole, what do they hold, what do two encodings differ in."""
