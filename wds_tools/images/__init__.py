"""From image files as they come to the pixels that are tokenized. Needs Pillow: pip install 'wds-tools[convert]'."""

from wds_tools.images.crop import Crop, cc512, check_ratio
from wds_tools.images.decode import FORMATS, REASONS, ImageInfo, ImageLimits, decode_rgb, probe
from wds_tools.images.prepare import PAIR_TYPES, PREPROCESSING_VERSION, Mode, crop_for, prepare
from wds_tools.images.ratio import TARGETS, multi768

__all__ = [
    "FORMATS",
    "PAIR_TYPES",
    "PREPROCESSING_VERSION",
    "REASONS",
    "TARGETS",
    "Crop",
    "ImageInfo",
    "ImageLimits",
    "Mode",
    "cc512",
    "check_ratio",
    "crop_for",
    "decode_rgb",
    "multi768",
    "prepare",
    "probe",
]
