"""Multimodal training data in plain WebDataset tars: convert, encode, verify, export.

The command line is `wds-tools`; docs/flow.md says which module does what.
"""

from wds_tools.errors import WdsToolsError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample

__all__ = ["Manifest", "Sample", "WdsToolsError", "__version__"]

__version__ = "0.1.0"
