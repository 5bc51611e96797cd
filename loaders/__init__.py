"""Trains from data sets: stream shards into PyTorch, or read a small jsonl.

docs/flow.md says how the modules fit together.
"""

from loaders.jsonl import JsonlDataset
from loaders.shards import ShardDataset

__all__ = ["JsonlDataset", "ShardDataset"]
