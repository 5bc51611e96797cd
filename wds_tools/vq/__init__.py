"""Image tokenizers: uint8 pixels to codes and back. This is the public list, nothing else."""

from wds_tools.vq.base import ImageTokenizer, LayoutTokenizer
from wds_tools.vq.quantize import nearest
from wds_tools.vq.registry import load_tokenizer

__all__ = ["ImageTokenizer", "LayoutTokenizer", "load_tokenizer", "nearest"]
