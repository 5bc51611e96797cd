"""Trains from datasets: stream shards into PyTorch, or read a small jsonl.

docs/flow.md says how the modules fit together.
"""

from loaders.config import LoaderConfig, Source
from loaders.epochs import EpochLoader
from loaders.jsonl import JsonlDataset
from loaders.loader import Loader, build_loader
from loaders.shards import ShardDataset
from loaders.tars import TarDataset
from loaders.tokens.lanes import merge_states
from loaders.tokens.rows import flatten, model_inputs
from loaders.world import World
from wds_tools.sequences.config import SequenceConfig

__all__ = [
    "EpochLoader",
    "JsonlDataset",
    "Loader",
    "LoaderConfig",
    "SequenceConfig",
    "ShardDataset",
    "Source",
    "TarDataset",
    "World",
    "build_loader",
    "flatten",
    "merge_states",
    "model_inputs",
]
