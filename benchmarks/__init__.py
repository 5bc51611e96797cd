"""Throughput, size and memory against the plain way of doing the same: `make bench`."""
