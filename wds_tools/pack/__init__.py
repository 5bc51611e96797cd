"""Data sets -> shards of token rows, ahead of training."""
