"""Bytes <-> values: tars, samples, shards, indices, manifests. No paths, no network, no torch."""
