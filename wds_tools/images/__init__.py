"""From image files as they come to the pixels that are tokenized. Needs Pillow: pip install 'wds-tools[convert]'."""

from wds_tools.images.crop import Crop, check_ratio
from wds_tools.images.decode import FORMATS, REASONS, ImageInfo, ImageLimits, decode_rgb, probe
from wds_tools.images.mode import Mode, mode_of_column, parse_mode
from wds_tools.images.prepare import PREPROCESSING_VERSION, crop_for, prepare
from wds_tools.images.ratio import shapes

__all__ = [
    "FORMATS",
    "PREPROCESSING_VERSION",
    "REASONS",
    "Crop",
    "ImageInfo",
    "ImageLimits",
    "Mode",
    "check_ratio",
    "crop_for",
    "decode_rgb",
    "mode_of_column",
    "parse_mode",
    "prepare",
    "probe",
    "shapes",
]
