"""Multimodal training data in plain WebDataset tars: convert, encode, verify, export.

The command line is `wds-tools`; docs/flow.md says which module does what.
"""

TYPE_CHECKING = False  # as a type checker takes it; typing itself would have to be loaded
if TYPE_CHECKING:
    from wds_tools.errors import WdsToolsError
    from wds_tools.format.manifest import Manifest
    from wds_tools.format.schema import Sample
    from wds_tools.select.dataset import Dataset, DatasetWriter, open_dataset

__all__ = ["Dataset", "DatasetWriter", "Manifest", "Sample", "WdsToolsError", "__version__", "open_dataset"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The public names, loaded when they are asked for: the command line has to listen to signals before it loads anything."""
    homes = {"Manifest": "format.manifest", "Sample": "format.schema", "WdsToolsError": "errors"}
    homes |= dict.fromkeys(("Dataset", "DatasetWriter", "open_dataset"), "select.dataset")
    if name not in homes:
        raise AttributeError(f"module 'wds_tools' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"wds_tools.{homes[name]}"), name)
