"""Image tokenizers: uint8 pixels to a grid of codebook indices and back. This is the public list, nothing else."""

from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.quantize import nearest
from wds_tools.vq.registry import load_tokenizer

__all__ = ["ImageTokenizer", "load_tokenizer", "nearest"]
