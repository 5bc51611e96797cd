"""Datasets -> shards of token rows, ahead of training."""
