"""The ways to read the same samples, one file each; `measure.py` says what a file has to have, and takes the times."""
